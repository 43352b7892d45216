"""Int inputs of a part's graph for what the call of its model tells, and their numbers.

One graph then serves landscape and portrait, and any number of resolutions, whichever part of the
model it is.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

from torch import fx, nn

from freqopt.capture.call_grids import int_inputs
from freqopt.capture.call_layouts import (
    BySizes,
    Teller,
    numbers_of_layout,
    tellers,
)
from freqopt.capture.repeated import Pending, in_backward
from freqopt.capture.under_way import Arguments, arguments_of, is_training
from freqopt.decisions import check_length
from freqopt.errors import InputError
from freqopt.grid import Grid
from freqopt.passes.axes.told import Told
from freqopt.passes.site import Source, Value

if TYPE_CHECKING:
    from freqopt.plan.plan import Plan

logger = logging.getLogger(__name__)

NUMBERS = ("before", "t", "h", "w", "after")

Sources = tuple[Source, ...]
Numbers = tuple[int, int, int, int, int]


class Telling:
    """What the call of a model that is under way tells.

    plan_of: the plan of a model, to whose lengths calls are held. sources: as in its layouts.
    """

    def __init__(
        self, teller: Teller, plan_of: Callable[[nn.Module], Plan | None], sources: Sources
    ) -> None:
        self.teller, self.plan_of, self.sources = teller, plan_of, sources
        self._met: WeakKeyDictionary[nn.Module, set[tuple[int, Grid]]] = WeakKeyDictionary()
        self._said = False
        self._pending: Pending[Numbers] = Pending()

    def __call__(self, model: nn.Module | None, arguments: Arguments | None) -> Numbers:
        """As `numbers_of_layout`; zeros, and a warning once, where the call tells nothing.

        model, arguments: None where the model is not being called.

        Raises:
            PlanError: a length too far from those of the plan.
            InputError: see `_one_of`.
        """
        if arguments is None and in_backward() and (trained := self._pending.again()):
            return _one_of(trained)
        layout = None if arguments is None else self.teller(arguments)
        if layout is not None and model is not None:
            self._check(model, layout.grid)
        if layout is None and not self._said:
            self._said = True
            logger.warning(
                "%s tells no grid of tokens in this call, unlike the one it was compiled for: "
                "attention is dense in such calls",
                self.teller.name,
            )
        numbers = numbers_of_layout(layout)
        if is_training():
            self._pending.note(numbers)
        return numbers

    def _check(self, model: nn.Module, grid: Grid) -> None:
        """Check a length that is new against those that the model's plan was verified at."""
        plan = self.plan_of(model)
        if plan is None or (id(plan), grid) in (met := self._met.setdefault(model, set())):
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
        met.add((id(plan), grid))


def _one_of(trained: Sequence[Numbers]) -> Numbers:
    """What the call told that activation checkpointing runs once more, in the backward pass.

    Raises:
        InputError: several calls may be meant, and told different grids.
    """
    told = dict.fromkeys(trained)
    if len(told) > 1:
        grids = ", ".join("x".join(map(str, numbers[1:4])) for numbers in told)
        raise InputError(
            "activation checkpointing runs a compiled block once more, outside of any call of "
            f"its model, and the model was called on several grids since ({grids}): call "
            "backward() after each, or compile the whole model"
        )
    return next(iter(told))


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
    gm: fx.GraphModule, model: nn.Module | None, plan_of: Callable[[nn.Module], Plan | None]
) -> tuple[list[Told], list[Number]]:
    """What the call under way of a model tells a part of its graph, and the part's new inputs."""
    arguments = None if model is None else arguments_of(model)
    plan = None if model is None else plan_of(model)
    places = gm.graph.find_nodes(op="placeholder")
    if plan is None or arguments is None or not places:
        return [], []
    sources = [k.sources for name in plan.sites for k in plan.known(name)]
    found, numbers = [], []
    for teller, layout in tellers(arguments, sources):
        own = teller.sources if isinstance(teller, BySizes) else ()
        values = numbers_of_layout(layout)
        named = dict(zip(NUMBERS, values, strict=True))
        made = int_inputs(gm, places, f"{teller.name}_of_model", named)
        if not made:
            return [], []
        telling = Telling(teller, plan_of, own)
        numbers += [Number(telling, i, node) for i, node in enumerate(made)]
        before, t, h, w, after = (Value(node) for node in made)
        rows = layout.before + math.prod(layout.grid) + layout.after
        found.append(Told(places[0], teller.name, rows, *layout, (before, t, h, w), after, own))
    return found, numbers
