"""What a part's graph is given at every call: budgets by the module that runs it, and numbers.

One graph serves several layers, and the layers of several models of one class: which of them is
running is on Python's stack. Nothing here keeps a model alive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

from torch import Tensor, fx, nn

from freqopt.capture.budgets import attribute_of
from freqopt.capture.model_tells import Number, Telling
from freqopt.capture.modules import (
    base_name,
    match_names,
    module_of_site,
    modules_of,
    names_of,
)
from freqopt.capture.under_way import Arguments, calls_under_way, told_once
from freqopt.passes.naming import name_around, plain_path, site_name

if TYPE_CHECKING:
    from freqopt.plan.plan import Plan


class Callers(Protocol):
    """Tells which of the modules that are running is the model that a plan is for.

    is_noted: whether such models note their calls.
    """

    is_noted: bool

    def among(self, modules: Iterable[nn.Module]) -> nn.Module | None:
        """The model, None if it is not being called."""


class Budget:
    """A budget that a graph takes: whose, and what it is for modules that have none (exact).

    relative: name of the attention's module in the one that runs the graph. nth: which of its
    attentions.
    """

    def __init__(self, relative: str, nth: int, zeros: Tensor, node: fx.Node) -> None:
        self.relative, self.nth, self.zeros, self.node = relative, nth, zeros, node
        self.example = node.meta["example_value"]


class Running(NamedTuple):
    """The modules that run a graph: the innermost, and the model, with how it was called."""

    runner: nn.Module | None
    caller: nn.Module | None
    arguments: Callable[[], Arguments] | None


class NamedParts:
    """The modules of a model, and which of a plan's sites each is."""

    def __init__(self, root: nn.Module, plan: Plan | None) -> None:
        self.plan = plan
        self.names = names_of(root)
        self._paths = list(modules_of(root))

    def planned(self, name: str) -> str | None:
        """The plan's name of a site."""
        assert self.plan is not None
        if base_name(name) in self.plan.sites:
            return base_name(name)
        path, nth = module_of_site(name)
        found = site_name(self.matched.get(path, ""), 0, nth)
        if found in self.plan.sites or name in self.plan.evidence.dense_sites:
            return found if found in self.plan.sites else None
        outer = name_around(path, self.matched)
        found = site_name(self.matched.get(outer or "", ""), 0, nth)
        return found if found in self.plan.sites else None

    def site_of(self, module: nn.Module, nth: int) -> str | None:
        """The plan's name of an attention of a module; None if it is no module of the model."""
        name = self.names.get(id(module))
        return None if name is None else self.planned(site_name(name, 0, nth))

    @cached_property
    def matched(self) -> dict[str, str]:
        """The plan's names of modules, by those of the model."""
        assert self.plan is not None
        return match_names(self._paths, [module_of_site(name)[0] for name in self.plan.sites])


class Feeding:
    """Gives a graph its budgets and numbers at every call.

    plan: among the options, if it is. parts: of the model that the graph was compiled for.
    """

    def __init__(
        self,
        callers: Callers,
        plan: Plan | None,
        root: nn.Module | None,
        parts: NamedParts | None,
        inputs: Sequence[Budget | Number],
    ) -> None:
        self.callers, self.plan, self.inputs = callers, plan, list(inputs)
        self._parts: WeakKeyDictionary[nn.Module, NamedParts] = WeakKeyDictionary()
        if root is not None and parts is not None:
            self._parts[root] = parts
        self._planned: WeakKeyDictionary[nn.Module, dict[int, tuple[Tensor, str | None]]]
        self._planned = WeakKeyDictionary()
        self._inner: WeakKeyDictionary[nn.Module, dict[str, tuple[str, ...]]]
        self._inner = WeakKeyDictionary()

    def feed(self) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
        """Adds the inputs to the arguments of a call of the graph."""
        if self.callers.is_noted and all(isinstance(each, Number) for each in self.inputs):
            return told_once(self._ask)
        return lambda arguments: (*arguments, *self._inputs_of(self._running()))

    def site_of(self, budget: Tensor) -> str | None:
        """The plan's name of the site that a budget was given to the graph for."""
        for known in self._planned.values():
            for given, site in known.values():
                if given is budget:
                    return site
        return None

    def _ask(self) -> tuple[nn.Module | None, tuple[int, ...]]:
        running = self._running()
        return running.caller, tuple(self._inputs_of(running))

    def _running(self) -> Running:
        calls: dict[nn.Module, Callable[[], Arguments]] = {}
        for module, given in calls_under_way():
            calls.setdefault(module, given)  # of a model inside its own call, the inner one
        caller = self.callers.among(calls)
        arguments = None if caller is None else calls[caller]
        return Running(next(iter(calls), None), caller, arguments)

    def _inputs_of(self, running: Running) -> Iterator[Any]:
        told: dict[Telling, Sequence[int]] = {}
        arguments = None if running.arguments is None else running.arguments()
        for each in self.inputs:
            if isinstance(each, Budget):
                yield self._budget(running, each)
                continue
            if each.telling not in told:
                told[each.telling] = each.telling(running.caller, arguments, running.runner)
            yield told[each.telling][each.place]

    def _budget(self, running: Running, wanted: Budget) -> Tensor:
        """The budget (2, H) of an attention in the module that is running."""
        module = self._module(running.runner, wanted.relative)
        if module is None:
            return wanted.zeros
        attribute = attribute_of(wanted.nth)
        own = module.__dict__.get(attribute)
        if isinstance(own, Tensor) and own.shape == wanted.zeros.shape:
            if own.device != wanted.zeros.device:
                own = module.__dict__[attribute] = own.to(wanted.zeros.device)
            return own
        known = self._planned.setdefault(module, {})
        if wanted.nth not in known:
            site = self._site(running.caller, module, wanted.nth)
            found = wanted.zeros
            if site is not None and self.plan is not None:
                budget = self.plan.module_budgets(site).amin(0)
                found = budget if budget.shape == found.shape else found
            known[wanted.nth] = found.to(wanted.zeros.device, copy=True), site
        return known[wanted.nth][0]

    def _module(self, runner: nn.Module | None, relative: str) -> nn.Module | None:
        if runner is None or not relative:
            return runner
        known = self._inner.setdefault(runner, {})
        found = _at(runner, known[relative]) if relative in known else None
        if found is None:
            ways = [name for name, _ in runner.named_modules() if plain_path(name) == relative]
            if not ways:
                return None
            known[relative] = tuple(ways[-1].split("."))  # of a wrapper, what it wraps
            found = _at(runner, known[relative])
        return found

    def _site(self, caller: nn.Module | None, module: nn.Module, nth: int) -> str | None:
        """The plan's name of an attention, in the model that is called or in one met before."""
        if self.plan is None:
            return None
        if caller is not None and caller not in self._parts:
            self._parts[caller] = NamedParts(caller, self.plan)
        own = [] if caller is None else [self._parts[caller]]
        for parts in own or self._parts.values():
            site = parts.site_of(module, nth)
            if site is not None:
                return site
        return None if caller is None else self._anew(caller, module, nth)

    def _anew(self, caller: nn.Module, module: nn.Module, nth: int) -> str | None:
        """As `_site`, of a model in which a module may have been replaced since it was met."""
        parts = NamedParts(caller, self.plan)
        if id(module) not in parts.names:
            return None
        self._parts[caller] = parts
        return parts.site_of(module, nth)


def _at(module: nn.Module | None, way: Iterable[str]) -> nn.Module | None:
    """The module that is there now: it may have been replaced since the last call."""
    for name in way:
        module = None if module is None else module._modules.get(name)
    return module
