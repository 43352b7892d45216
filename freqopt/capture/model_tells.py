"""Int inputs of a part's graph for what the call of its model tells, and their numbers.

One graph then serves landscape and portrait, and any number of resolutions, whichever part of the
model it is.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

from torch import fx, nn

from freqopt.capture.call_grids import int_inputs, say_untold
from freqopt.capture.call_layouts import (
    BySizes,
    Teller,
    numbers_of_layout,
    tellers,
)
from freqopt.capture.repeated import Pending, in_backward, several
from freqopt.capture.under_way import Arguments, arguments_of, is_training
from freqopt.decisions import check_length
from freqopt.errors import InputError
from freqopt.grid import Grid
from freqopt.passes.axes.told import Told
from freqopt.passes.site import Source, Value
from freqopt.positions import Layout
from freqopt.telling.outside import tell_outside

if TYPE_CHECKING:
    from freqopt.plan.plan import Plan

NUMBERS = ("before", "t", "h", "w", "after")

Sources = tuple[Source, ...]
Numbers = tuple[int, int, int, int, int]


class Telling:
    """What the call of a model that is under way tells.

    plan_of: the plan of a model, to whose lengths calls are held. sources: as in its layouts.
    strict: a call that tells nothing is an error.
    """

    def __init__(
        self, teller: Teller, plan_of: Callable[[nn.Module], Plan | None], *, strict: bool
    ) -> None:
        self.teller, self.plan_of, self.strict = teller, plan_of, strict
        self.sources: Sources = teller.sources if isinstance(teller, BySizes) else ()
        self._said = False

    def __call__(
        self, model: nn.Module | None, arguments: Arguments | None, part: nn.Module | None
    ) -> Numbers:
        """As `numbers_of_layout`; zeros, and a warning once, where the call tells nothing.

        model, arguments: None where the model is not being called. part: the module that runs.

        Raises:
            PlanError: a length too far from those of the plan.
            InputError: see `_told_in`.
            SiteError: the call tells nothing, under `strict`.
        """
        if arguments is None and part is not None and in_backward():
            trained = _told_in(_calls_before(part).get(self.teller))
            if trained is not None:
                return trained
        layout = None if arguments is None else self.teller(arguments)
        if layout is not None and model is not None:
            self._check(model, layout.grid)
        if layout is None and (self.strict or not self._said):
            self._said = True
            say_untold(f"{self.teller.name} tells no grid of tokens", strict=self.strict)
        numbers = numbers_of_layout(layout)
        if model is not None and is_training():
            calls = _trained.setdefault(model, {})
            calls.setdefault(self.teller, Pending()).note(numbers)
        return numbers

    def _check(self, model: nn.Module, grid: Grid) -> None:
        """Check a grid that is new, and its length, against those of the model's plan."""
        plan = self.plan_of(model)
        if plan is None:
            return
        held, met = _met.get(model, (None, set()))
        if held is None or held() is not plan:
            held, met = _met[model] = weakref.ref(plan), set()
        if (self.sources, grid) in met:
            return
        sites = (
            (name, known)
            for name, site in plan.sites.items()
            if site.decision == "split"
            for known in plan.known(name)
            if known.sources == self.sources
        )
        for name, known in itertools.islice(sites, 1):
            check_length(plan, name, math.prod(grid) + known.before + known.after)
        tell_outside(model, plan, [grid])
        met.add((self.sources, grid))


_met: WeakKeyDictionary[nn.Module, tuple[weakref.ref[Plan], set[tuple[Sources, Grid]]]]
_met = WeakKeyDictionary()
"""What was checked of a model with a plan, whichever of its graphs asked."""

_trained: WeakKeyDictionary[nn.Module, dict[Teller, Pending[Numbers]]] = WeakKeyDictionary()
"""What calls told that gradients were asked of, by the model that was called and what tells it:
the graph that a backward pass runs may be another than that of the call."""


def _told_in(calls: Pending[Numbers] | None) -> Numbers | None:
    """What the call told of which activation checkpointing runs a part once more.

    None where gradients were asked of no call.

    Raises:
        InputError: several calls may be meant, and told different grids.
    """
    told = dict.fromkeys(() if calls is None else calls.again())
    if len(told) > 1:
        grids = ", ".join("x".join(map(str, numbers[1:4])) for numbers in told)
        raise InputError(several("a model", f"on several grids ({grids})"))
    return next(iter(told), None)


class Number(NamedTuple):
    """An int input of a graph: which of the numbers that are told."""

    telling: Telling
    place: int
    node: fx.Node

    @property
    def example(self) -> object:
        """What it is in the call that the graph is compiled for."""
        return self.node.meta["example_value"]


def told_by_model(
    gm: fx.GraphModule,
    model: nn.Module | None,
    part: nn.Module | None,
    plan_of: Callable[[nn.Module], Plan | None],
    *,
    strict: bool = False,
) -> tuple[list[Told], list[Number]]:
    """What the call under way of a model tells a part of its graph, and the part's new inputs.

    In a backward pass it is the call from before of which a checkpoint runs the part once more.

    model: None where it is not being called. part: the module that runs the graph. strict: a later
    call that tells nothing is an error.
    """
    plan = None if model is None else plan_of(model)
    arguments = None if model is None else arguments_of(model)
    if arguments is None and part is not None and in_backward():
        return _added(gm, _told_before(part, plan_of, strict=strict))
    if plan is None or arguments is None:
        return [], []
    sources = [k.sources for name in plan.sites for k in plan.known(name)]
    told = tellers(arguments, sources)
    return _added(
        gm, [(Telling(teller, plan_of, strict=strict), layout) for teller, layout in told]
    )


def model_before(part: nn.Module) -> nn.Module | None:
    """The model in whose calls, that gradients were asked of, a part of it ran."""
    return next((m for m in _trained if any(each is part for each in m.modules())), None)


def _calls_before(part: nn.Module) -> dict[Teller, Pending[Numbers]]:
    """What calls of the model of a part told that gradients were asked of."""
    model = model_before(part)
    return {} if model is None else _trained[model]


def _told_before(
    part: nn.Module, plan_of: Callable[[nn.Module], Plan | None], *, strict: bool
) -> list[tuple[Telling, Layout]]:
    """What was told in the call that a part of a model runs once more of."""
    found = []
    for teller, calls in _calls_before(part).items():
        told = _told_in(calls)
        if told is not None and all(told[1:4]):
            layout = Layout(told[0], (told[1], told[2], told[3]), told[4])
            found.append((Telling(teller, plan_of, strict=strict), layout))
    return found


def _added(
    gm: fx.GraphModule, given: Sequence[tuple[Telling, Layout]]
) -> tuple[list[Told], list[Number]]:
    """Add int inputs to a graph for what calls tell; none if it cannot have all."""
    places = gm.graph.find_nodes(op="placeholder")
    found, numbers = [], []
    for telling, layout in given if places else ():
        name = telling.teller.name
        values = numbers_of_layout(layout)
        named = dict(zip(NUMBERS, values, strict=True))
        made = int_inputs(gm, places, f"{name}_of_model", named)
        if not made:
            return [], []
        numbers += [Number(telling, i, node) for i, node in enumerate(made)]
        before, t, h, w, after = (Value(node) for node in made)
        rows = layout.before + math.prod(layout.grid) + layout.after
        numbers_there = (before, t, h, w)
        found.append(Told(places[0], name, rows, *layout, numbers_there, after, telling.sources))
    return found, numbers
