"""Int inputs of a part's graph for what the call of its model tells, and their numbers.

One graph then serves landscape and portrait, and any number of resolutions, whichever part of the
model it is.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from torch import fx, nn

from freqopt.capture.call_grids import int_inputs
from freqopt.capture.call_layouts import (
    BySizes,
    Teller,
    arguments_of,
    numbers_of_layout,
    tellers,
)
from freqopt.decisions import check_length
from freqopt.grid import Grid
from freqopt.passes.axes.told import Told
from freqopt.passes.site import Source, Value

if TYPE_CHECKING:
    from freqopt.plan.plan import Plan

logger = logging.getLogger(__name__)

NUMBERS = ("before", "t", "h", "w", "after")


_met: weakref.WeakKeyDictionary[nn.Module, set[Grid]] = weakref.WeakKeyDictionary()
"""Grids of calls so far, by model."""


class Telling:
    """What the call of a model that is under way tells.

    on_grid: is called with each grid that was not met before.
    """

    def __init__(self, model: nn.Module, teller: Teller, on_grid: Callable[[Grid], None]) -> None:
        self.model, self.teller, self.on_grid = weakref.ref(model), teller, on_grid
        self._said = False

    def __call__(self) -> tuple[int, int, int, int, int]:
        """As `numbers_of_layout`; zeros, and a warning once, where the call tells nothing.

        Raises:
            PlanError: a length too far from those of the plan.
        """
        model = self.model()
        arguments = None if model is None else arguments_of(model)
        layout = None if arguments is None else self.teller(arguments)
        if model is not None and layout is not None:
            met = _met.setdefault(model, set())
            if layout.grid not in met:
                self.on_grid(layout.grid)
                met.add(layout.grid)
        if layout is None and not self._said:
            self._said = True
            logger.warning(
                "%s tells no grid of tokens in this call, unlike the one it was compiled for: "
                "attention is dense in such calls",
                self.teller.name,
            )
        return numbers_of_layout(layout)


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
    gm: fx.GraphModule, model: nn.Module | None, plan: Plan | None
) -> tuple[list[Told], list[Number]]:
    """What the call under way of a model tells a part of its graph, and the part's new inputs."""
    arguments = None if model is None else arguments_of(model)
    places = gm.graph.find_nodes(op="placeholder")
    if model is None or plan is None or arguments is None or not places:
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
        telling = Telling(model, teller, _checks(plan, own))
        numbers += [Number(telling, i, node) for i, node in enumerate(made)]
        before, t, h, w, after = (Value(node) for node in made)
        rows = layout.before + math.prod(layout.grid) + layout.after
        found.append(Told(places[0], teller.name, rows, *layout, (before, t, h, w), after, own))
    return found, numbers


def _checks(plan: Plan, sources: tuple[Source, ...]) -> Callable[[Grid], None]:
    """Checks the lengths of calls against those that a plan was verified at."""
    sites = {
        name: known
        for name, site in plan.sites.items()
        if site.decision == "split"
        for known in plan.known(name)
        if known.sources == sources
    }

    def check(grid: Grid) -> None:
        for name, known in list(sites.items())[:1]:
            check_length(plan, name, math.prod(grid) + known.before + known.after)

    return check
