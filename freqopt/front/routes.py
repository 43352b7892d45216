"""The three ways to replace a model's attention, each of which can be taken off again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import nn

from freqopt.backend import freqopt_backend
from freqopt.capture.modules import modules_of
from freqopt.eager import dispatcher
from freqopt.eager.serve import Server
from freqopt.front.parts import Parts
from freqopt.front.range import LOOKS
from freqopt.front.state import Route, blocks_of
from freqopt.front.uncompiled import COMPILED, uncompile
from freqopt.plan.identity import class_name_of
from freqopt.plan.plan import Plan
from freqopt.regional import Attached, attach
from freqopt.telling import running
from freqopt.telling.attached import measured_at, watch_strictly
from freqopt.telling.copies import is_copy, tell_of_copy
from freqopt.telling.limits import Limit
from freqopt.telling.running import Graph, Measured, measured_in
from freqopt.telling.said import tell
from freqopt.telling.traced import expect, expect_no_more, is_traced
from freqopt.telling.verdict import by_another_backend, say


class Way(Protocol):
    """One model on one route. Starting where it has started, or stopping twice, changes nothing."""

    def start(self) -> None:
        """Replace the attention, from the next call on."""

    def stop(self) -> None:
        """Leave the model as it was."""

    def measured(self) -> dict[str, Measured]:
        """What ran so far, by the plan's names of the sites that were split."""

    def densities(self) -> dict[str, float]:
        """Share of pairs attended exactly so far, by site, where it was measured."""


def way_of(
    route: Route, model: nn.Module, plan: Plan, options: Mapping[str, Any], *, strict: bool
) -> Way:
    """The way for a route. options: of the backend, for the routes that compile."""
    if route == "eager":
        return Eager(model, plan, strict=strict)
    if route == "regional":
        return Regional(model, plan, {**options, "strict": strict})
    return Whole(model, plan, {**options, "strict": strict})


class Eager:
    """Calls of attention are answered as they come."""

    def __init__(self, model: nn.Module, plan: Plan, *, strict: bool) -> None:
        self.model, self.plan, self.strict = model, plan, strict
        self.server: Server | None = None
        self._undo = ExitStack()
        self._on = False

    def start(self) -> None:
        """Attach the plan, and serve."""
        if self._on:
            return
        with ExitStack() as undo:
            attached = attach(self.model, self.plan)
            undo.callback(attached.remove)
            if self.server is not None:
                self.server.told.forget()
            self.server = Server(attached, self.plan, strict=self.strict)
            undo.callback(self.server.stop)
            self.server.start()
            undo.callback(dispatcher.restore, dispatcher.choose(self.server.modules))
            compiled, put_back = uncompile(self.model, self.server.modules)
            undo.callback(put_back)
            self._undo, self._on = undo.pop_all(), True
        if compiled:
            more = f" and {len(compiled) - 1} more" if len(compiled) > 1 else ""
            tell(
                f"{class_name_of(self.model)}: {compiled[0] or 'the model itself'}{more}, "
                "compiled before, runs without the compiler while attention in it is served so; "
                "disable() puts that back"
            )

    def stop(self) -> None:
        """Serve no more."""
        self._undo.close()
        self._on = False

    def measured(self) -> dict[str, Measured]:
        """See `Way`."""
        return {} if self.server is None else measured_in(self.server.told.graphs.values())

    def densities(self) -> dict[str, float]:
        """See `Way`."""
        return {} if self.server is None else self.server.told.densities()


class Regional:
    """Blocks are compiled, one for all that are alike."""

    def __init__(self, model: nn.Module, plan: Plan, options: Mapping[str, Any]) -> None:
        self.model, self.plan, self.options = model, plan, dict(options)
        self.attached: Attached | None = None
        self._undo = ExitStack()
        self._on = False
        self._before: dict[str, Measured] = {}

    def start(self) -> None:
        """Attach the plan, and have each block compiled when it is called."""
        if self._on:
            return
        with ExitStack() as undo:
            self.attached = attach(self.model, self.plan)
            undo.callback(self.attached.remove)
            if self.options["strict"]:
                watch_strictly(self.attached.root)
            modules = modules_of(self.model)
            for name in blocks_of(self.model, self.plan) or ("",):
                undo.callback(_compile(modules[name], self.options))
            self._undo, self._on = undo.pop_all(), True

    def stop(self) -> None:
        """Leave the blocks as they were."""
        self._before = self.measured()
        self._undo.close()
        self._on = False

    def measured(self) -> dict[str, Measured]:
        """See `Way`."""
        if self._on and self.attached is not None:
            return measured_at(self.attached.root)
        return self._before

    def densities(self) -> dict[str, float]:
        """See `Way`."""
        return {}


class Whole:
    """The model is compiled in place as one."""

    def __init__(self, model: nn.Module, plan: Plan, options: Mapping[str, Any]) -> None:
        self.model, self.plan, self.options = model, plan, {**options, "plan": plan}
        plan.check_model(model)
        every = modules_of(model)
        planned = {name: every[name] for name in plan.modules(model).values()}
        self.parts = Parts(model, planned, strict=bool(options["strict"]))
        self._undo: Callable[[], None] | None = None
        self._is_told = False

    def start(self) -> None:
        """Have the model compiled when it is called."""
        if self._undo is None:
            for graph in graphs_of(self.model, self.plan):
                graph.forget()  # calls at the same plan from before, whose graphs serve again
            with ExitStack() as undo:
                undo.callback(_compile(self.model, self.options))
                self.model.__dict__[COMPILED] = self._looked_at(self.model.__dict__[COMPILED])
                self.model._forward_pre_hooks[LOOKS] = _is_traced
                undo.callback(self.model._forward_pre_hooks.pop, LOOKS, None)
                expect(self.model, self._unnoticed, self.parts.parts.values())
                undo.callback(expect_no_more, self.model)
                self.parts.start()
                undo.callback(self.parts.stop)
                self._undo = undo.pop_all().close

    def _unnoticed(self, model: nn.Module) -> None:
        """Another backend compiled the model in the meantime, or something around it."""
        verdict = by_another_backend(class_name_of(model), self.plan)
        say(verdict, again=self._is_told, strict=bool(self.options["strict"]))
        self._is_told = True

    def _looked_at(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """The compiled call, told of where the compiler gives up; hooks would be in its graph."""
        limit = Limit(class_name_of(self.model), self.plan)

        def call(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return compiled(*args, **kwargs)
            limit.begin()
            with self.parts.in_call():
                found = compiled(*args, **kwargs)
            limit.end(strict=bool(self.options["strict"]))
            return found

        return call

    def stop(self) -> None:
        """Leave the model as it was."""
        if self._undo is not None:
            self._undo()
            self._undo = None

    def measured(self) -> dict[str, Measured]:
        """See `Way`."""
        return measured_in(graphs_of(self.model, self.plan))

    def densities(self) -> dict[str, float]:
        """See `Way`."""
        return {}


def _is_traced(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Forward pre-hook: in a graph, see whether it comes to our backend; copies have none."""
    if torch.compiler.is_compiling():
        is_traced()
    elif is_copy(module):
        tell_of_copy(module)


def graphs_of(model: nn.Module, plan: Plan) -> list[Graph]:
    """The graphs that were compiled for calls of a model at a plan."""
    found = [g for g in running.graphs if g.owner is not None and g.owner() is model]
    plans = [None if graph.plan is None else graph.plan() for graph in found]
    return [graph for graph, its in zip(found, plans, strict=True) if its is plan or its == plan]


def _compile(module: nn.Module, options: Mapping[str, Any]) -> Callable[[], None]:
    """Compile a module in place; what puts back what was there."""
    had, before = COMPILED in module.__dict__, module.__dict__.get(COMPILED)

    def undo() -> None:
        if had:
            module.__dict__[COMPILED] = before
        else:
            module.__dict__.pop(COMPILED, None)

    module.compile(backend=freqopt_backend, options=dict(options))
    return undo
