"""Watches models that a plan is attached to, whose blocks are compiled one by one.

A block's graph does not know which layer it serves; the budget that the layer brings does. After a
call of the whole model it is said how many of the planned layers were served, and why not the rest.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from freqopt.capture.budgets import known_by
from freqopt.capture.looking import is_looking
from freqopt.capture.modules import base_name
from freqopt.capture.signatures import forward_signature, named_arguments
from freqopt.options import Options
from freqopt.passes.reasons import Why
from freqopt.plan.identity import class_name_of, shown_name
from freqopt.telling import running
from freqopt.telling.copies import is_copy
from freqopt.telling.gone import Presence, line_about
from freqopt.telling.limits import Limit
from freqopt.telling.outermost import outermost_call
from freqopt.telling.outside import tell_outside
from freqopt.telling.running import Calls, Graph, Measured, Named, measured_in
from freqopt.telling.traced import expect, expect_no_more
from freqopt.telling.verdict import (
    INSPECT,
    Compiled,
    Lines,
    Verdict,
    alike,
    by_another_backend,
    judge,
    say,
)
from freqopt.telling.watching import TimestepRange, next_look

if TYPE_CHECKING:
    from freqopt.plan.plan import Plan

NOTHING_RAN = (
    "no compiled block ran with these budgets: compile the blocks with backend='freqopt', after "
    "freqopt.attach (torch.compiler.reset() forgets what was compiled before); where a hook keeps "
    "the compiler out, freqopt.optimize(model, plan=plan) serves attention without it"
)

TELLS = -20_260_002
"""Key of the hook, the same in all models, as the compiler guards on it."""

_watches: weakref.WeakKeyDictionary[nn.Module, Watch] = weakref.WeakKeyDictionary()
_parts: weakref.WeakKeyDictionary[nn.Module, Compiled] = weakref.WeakKeyDictionary()

Places = Mapping[str, tuple[nn.Module, str]]
"""Where the budgets of a plan's sites are: a module, and the attribute of it."""


def watch(model: nn.Module, plan: Plan, places: Places) -> None:
    """Look at the calls of a model that a plan is attached to, until `unwatch`."""
    _watches[model] = Watch(model, plan, places)
    running.owners.append(weakref.WeakMethod(_watches[model].owner_of))
    expect(model, _unnoticed, (module for module, _ in places.values()))
    model._forward_hooks[TELLS] = _after_call
    model._forward_hooks_with_kwargs[TELLS] = True


def watch_strictly(model: nn.Module) -> None:
    """Raise, too, where no part of a watched model comes to our backend."""
    _watches[model].strict = True


def is_watched(model: nn.Module) -> bool:
    """Whether the calls of a model are looked at."""
    return model in _watches


def unwatch(model: nn.Module) -> None:
    """Look no more."""
    model._forward_hooks.pop(TELLS, None)
    model._forward_hooks_with_kwargs.pop(TELLS, None)
    expect_no_more(model)
    found = _watches.pop(model, None)
    if found is not None:
        for graph in running.graphs:  # whose calls are named while it is known whose they are
            graph.settle()
        running.owners.remove(weakref.WeakMethod(found.owner_of))
        for part in [part for part in _parts if part in found.parts]:
            del _parts[part]


def _unnoticed(model: nn.Module) -> None:
    """Another backend compiled a watched model, or a part of it that has planned attention."""
    found = _watches.get(model)
    if found is not None:
        found.unnoticed()


def begin_call(model: nn.Module) -> None:
    """A call of a watched model begins."""
    found = _watches.get(model)
    if found is not None:
        found.limit.begin()


def _after_call(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    """Forward hook: a function and no method, so that models are copied and pickled with it."""
    if torch.compiler.is_compiling() or is_looking():
        return
    found = _watches.get(model)  # copies that have not been called have none
    if found is not None:
        found.after(model, args, kwargs)


class Watch:
    """What is known of one model that a plan is attached to."""

    def __init__(self, model: nn.Module, plan: Plan, places: Places) -> None:
        self.plan = plan
        self._places = {  # weakly, as one may be the model, which would never be freed
            name: (weakref.ref(module), attribute) for name, (module, attribute) in places.items()
        }
        self.name = shown_name(class_name_of(model), plan)
        self.verified = verified_errors(plan)
        self.range = TimestepRange(plan, model)
        self.limit = Limit(self.name, plan)
        self.calls, self.look = 0, 1
        self.said, self.unnoticed_line, self.strict = Lines(), "", False
        self.parts = weakref.WeakSet(model.modules())
        self._there = Presence(model, {name: module for name, (module, _) in places.items()})
        self._gone: set[str] = set()
        self._is_compiled = False

    @property
    def places(self) -> dict[str, tuple[nn.Module, str]]:
        """Where the budgets are; see `Places`."""
        found = ((name, ref(), attribute) for name, (ref, attribute) in self._places.items())
        return {name: (m, attribute) for name, m, attribute in found if m is not None}

    def unnoticed(self) -> None:
        """A call is over in which another backend compiled the model, or a part with attention.

        Raises:
            SiteError: the model is served under `strict`.
        """
        verdict = by_another_backend(self.name, self.plan)
        again, self.unnoticed_line = verdict.line == self.unnoticed_line, verdict.line
        say(verdict, again=again, strict=self._is_strict())

    def _is_strict(self) -> bool:
        return self.strict or any(part.settings.strict for part in self._compiled())

    def owner_of(self, budget: Tensor) -> Named | None:
        """What a budget belongs to, None if it is not of this model."""
        for name, (module, attribute) in self.places.items():
            own = module.__dict__.get(attribute)
            if own is not None and known_by(own) is budget:
                verified = self.verified.get(name)
                return Named(self.name, name, verified, judged_from(self.plan))
        return None

    def after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A call of the model is over.

        Raises:
            SiteError: its parts were compiled under `strict`, and a planned site was not split.
        """
        if self.range.name is not None and not self.range.told:
            times = named_arguments(forward_signature(model), args, kwargs).get(self.range.name)
            if isinstance(times, (Tensor, int, float)):
                self.range.note(times)
        if outermost_call() is not None or is_copy(model):  # told when that is over; told already
            return
        missed = self._missed()
        if not self.said.whole or missed:
            self._say(self.served(), missed)
        self._look_for_modules()
        self.limit.end(strict=self._is_strict(), told=bool(missed))
        self.calls += 1
        if self.calls >= self.look:
            self.look = next_look(self.calls)
            grids = [grid for part in self._compiled() for grid in part.grids]
            tell_outside(model, self.plan, grids)

    def _look_for_modules(self) -> None:
        """Tell of planned modules that are not in the model any more, where parts are compiled.

        Raises:
            SiteError: under `strict`.
        """
        self._is_compiled = self._is_compiled or any(part.graphs for part in self._compiled())
        gone = self._there.gone() if self._is_compiled else []
        new, self._gone = set(gone) - self._gone, set(gone)
        if gone:
            verdict = Verdict(line_about(self.name, gone), False)
            say(verdict, again=not new, strict=self._is_strict())

    def served(self) -> set[str]:
        """Sites whose budgets a split attention was called with; with further calls of modules."""
        ours = {
            id(known_by(module.__dict__[attribute])): name
            for name, (module, attribute) in self.places.items()
            if attribute in module.__dict__
        }
        found = {
            ours[id(budget)]
            for graph in running.graphs
            for calls in graph.calls.values()
            for index, (_, split, _) in enumerate(graph.decisions)
            if split and (place := graph.budgets[index]) >= 0 and calls.split(index)
            # One that is gone is none of ours, whatever has its place in memory now.
            if (budget := calls.budgets[graph.inputs.index(place)]()) is not None
            if id(budget) in ours
        }
        return found | {name for name in self.plan.sites if base_name(name) in found}

    def name_of(self, graph: Graph, calls: Calls, index: int) -> str | None:
        """The site of a decision in calls of a graph, None where it is of another model."""
        place = graph.budgets[index] if graph.budgets else -1
        if place < 0:
            return None
        budget = calls.budgets[graph.inputs.index(place)]()
        owner = None if budget is None else self.owner_of(budget)
        return None if owner is None else owner.site

    def _compiled(self) -> list[Compiled]:
        """What is known of the parts that were compiled, or are served."""
        return [found for part, found in _parts.items() if part in self.parts]

    def _missed(self) -> dict[str, Why]:
        """Sites that were dense in this call, though others of theirs may have been split."""
        found: dict[str, Why] = {}
        for compiled in self._compiled():
            while compiled.missed:
                found.update([compiled.missed.popitem()])
        return found

    def _say(self, served: set[str], missed: Mapping[str, Why]) -> None:
        """Say how many sites are split so far; once that is all, of calls where some are not."""
        served = {name for name in served if base_name(name) not in missed}
        found = Compiled(Options())
        parts = [part for part in _parts if part in self.parts]
        for part in parts:
            compiled = _parts[part]
            found.settings = compiled.settings
            found.breaks.update(compiled.breaks)
            for name, outcome in compiled.outcomes.items():
                if not outcome.split:
                    found.outcomes.update(dict.fromkeys(self._alike(part, name), outcome))
        verdict = judge(self.name, found, self.plan, served)
        if not verdict.good and not parts:
            verdict = Verdict(verdict.line.replace(INSPECT, NOTHING_RAN), False)
        self.said.say(verdict, missed, strict=self._is_strict())

    def _alike(self, part: nn.Module, name: str) -> set[str]:
        """Sites of the plan that a site of a block may be, in any layer."""
        if name == "model":
            return {site for site, (m, _) in self.places.items() if type(m) is type(part)}
        return alike(name, self.places)


def verified_errors(plan: Plan) -> dict[str, float]:
    """Relative L2 error of each split site as the plan measured it, root mean square over heads."""
    return {
        name: math.sqrt(math.fsum(x * x for x in site.error) / len(site.error))
        for name, site in plan.sites.items()
        if site.decision == "split" and site.error
    }


MANY_CALLS = 32
"""Calls that see a good part of a denoising schedule, in whole steps or twice for guidance."""


def judged_from(plan: Plan) -> int:
    """Calls whose mean error is comparable with the plan's, which is one over all its timesteps.

    A plan with budgets by timestep may leave noisy steps several times that error.
    """
    return MANY_CALLS if plan.timestep_edges else 1


def attached_to(model: object) -> Plan | None:
    """The plan that is attached to a model, or to a module in it; None if there is none."""
    if not isinstance(model, nn.Module) or not _watches:
        return None
    own = _watches.get(model)
    if own is None:
        found = (_watches.get(module) for module in model.modules())
        own = next((each for each in found if each is not None), None)
    return None if own is None else own.plan


def note_part(part: nn.Module, found: Compiled) -> None:
    """Have a watched model, or a part of it, tell what became of sites there."""
    _parts[part] = found


def measured_at(model: nn.Module) -> dict[str, Measured]:
    """What was split so far in calls of a model that a plan is attached to, by site."""
    found = _watches.get(model)
    return {} if found is None else measured_in(running.graphs, found.name_of)


def inside_attached(part: nn.Module, compiled: Compiled) -> bool:
    """Whether a module is a part of an attached model, which then tells about it."""
    found = any(
        part in each.parts and part is not model and attached_to(part) is None
        for model, each in _watches.items()
    )
    if found:
        _parts[part] = compiled
    return found
