"""Checks, at calls of a graph whose sizes are symbols, grids and lengths against those of its plan.

A graph of fixed sizes is checked when it is compiled. One that serves any number of resolutions
says nothing about the next call, so that its sizes are looked at there, and judged where they are
new.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from freqopt.decisions import check_length
from freqopt.grid import Grid
from freqopt.passes.decision import Decision
from freqopt.passes.nodes import shape, value
from freqopt.passes.site import Argument, Extent, Product, Site, Size, Total, Value
from freqopt.telling.outside import tell_outside

if TYPE_CHECKING:
    from freqopt.plan.plan import Plan

Feed = Callable[[tuple[Any, ...]], tuple[Any, ...]]

MOST_MET = 1024
"""Sizes of calls that are remembered."""


class _Planned(NamedTuple):
    """A site by the plan's name, with its grid and length as numbers or expressions."""

    name: str
    grid: tuple[Any, ...]
    length: Any


class CallLengths:
    """What calls of a graph are checked for.

    names: those of sites in the plan. told: inputs of the graph whose numbers are checked where
    they are told. owner: returns the model that was compiled, None where that is not known.
    checked: names of sites that were checked in the call that the graph is compiled for.

    Raises:
        PlanError: a fixed length too far from those of the plan.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        decisions: Iterable[Decision],
        plan: Plan,
        names: Mapping[str, str],
        told: AbstractSet[fx.Node],
        owner: Callable[[], nn.Module | None],
        checked: AbstractSet[str],
    ) -> None:
        self.plan, self.owner = plan, owner
        self._sites: list[_Planned] = []
        constant: list[_Planned] = []
        known: dict[object, tuple[int, int | None]] = _symbols_of(gm)
        for decision in decisions:
            site, name = decision.site, names.get(decision.site.name)
            if not decision.split or name is None or not told.isdisjoint(site.read_at_call):
                continue
            found = _Planned(name, *_numbers_of(site))
            fixed = all(isinstance(number, int) for number in (*found.grid, found.length))
            kept = constant if fixed else self._sites
            if found.grid and all(found[1:] != each[1:] for each in kept):
                if not (fixed and decision.site.name in checked):
                    kept.append(found)
        symbols = {
            symbol
            for site in self._sites
            for number in (*site.grid, site.length)
            for symbol in getattr(number, "free_symbols", ())
        }
        self._places = {symbol: known[symbol] for symbol in symbols if symbol in known}
        if len(self._places) < len(symbols):  # a number that depends on data
            self._sites = []
        self._met: set[tuple[int, ...]] = set()
        self._judged: set[tuple[str, Grid]] = set()
        self._judge(constant, {})

    def feed(self, feed: Feed | None) -> Feed | None:
        """Checks calls, of whose arguments another feed makes those of the graph.

        Raises (when called):
            PlanError: a length too far from those of the plan.
        """
        if not self._sites:
            return feed
        own, met, judge = feed or tuple, self._met, self._judge_call
        places = list(self._places.values())

        def check(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            arguments = own(arguments)
            sizes = tuple(
                int(arguments[place]) if dim is None else int(arguments[place].shape[dim])
                for place, dim in places
            )
            if sizes not in met:
                judge(sizes)
            return arguments

        return check

    def _judge_call(self, sizes: tuple[int, ...]) -> None:
        self._judge(self._sites, dict(zip(self._places, sizes, strict=True)))
        if len(self._met) >= MOST_MET:
            self._met.clear()
        self._met.add(sizes)

    def _judge(self, sites: Sequence[_Planned], here: Mapping[object, int]) -> None:
        told = False
        for site in sites:
            t, h, w = (_in_call(extent, here) for extent in site.grid)
            key = site.name, (t, h, w)
            if not t * h * w or key in self._judged:
                continue
            length = _in_call(site.length, here)
            if told:  # one line tells of all sites; what is too far off is refused
                self.plan.expected_error(site.name, length)
            else:
                told = check_length(self.plan, site.name, length)
            self._judged.add(key)
            model = self.owner()
            if model is not None:
                tell_outside(model, self.plan, [key[1]])


def _in_call(number: Any, sizes: Mapping[object, int]) -> int:
    """A number, or what an expression comes to."""
    return number if isinstance(number, int) else int(number.subs(sizes))


def _symbols_of(gm: fx.GraphModule) -> dict[object, tuple[int, int | None]]:
    """Where a call has the number of a symbol: the place of an int, or of a tensor and its dim."""
    found: dict[object, tuple[int, int | None]] = {}
    for place, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        example = value(node)
        if isinstance(example, torch.SymInt):
            found[example.node.expr] = place, None
        elif isinstance(example, Tensor):
            for dim, size in enumerate(example.shape):
                if isinstance(size, torch.SymInt):
                    found.setdefault(size.node.expr, (place, dim))
    return found


def _numbers_of(site: Site) -> tuple[tuple[Any, ...], Any]:
    """The extents of a site's grid, and its number of keys."""
    grid = tuple(_expression(_extent(argument)) for argument in site.grid_arguments)
    return grid, _expression(site.key_length)


def _expression(extent: Extent) -> Any:
    return extent if isinstance(extent, int) else extent.node.expr


def _extent(argument: Argument) -> Extent:
    """An extent as it is known when a graph is compiled."""
    if isinstance(argument, Size):
        return shape(argument.node)[argument.dim]
    if isinstance(argument, Value):
        found: Extent = value(argument.node)
        return found
    if isinstance(argument, Total):
        return sum((_extent(part) for part in argument.parts), start=0)
    if isinstance(argument, Product):
        return functools.reduce(operator.mul, map(_extent, argument.parts))
    assert isinstance(argument, int), argument
    return argument
