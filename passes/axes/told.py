"""Grids that the data of an input tells at every call: positions of tokens packed into one axis.

A pass cannot read data. Who compiles a model reads an input's data at compile time, to know that
there is a grid, and again at every call; the numbers of a call come into the graph as ints.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import fx

from freqopt.grid import Grid
from freqopt.passes.axes.dimensions import Axis, Segment, has, hint, segment_size
from freqopt.passes.axes.lattices import is_lattice
from freqopt.passes.axes.layout import Layout, around
from freqopt.passes.site import Argument, Extent, Rest, Source


@dataclass(frozen=True, eq=False)
class Told:
    """What an input's data tell about `rows` tokens: a grid, and tokens around it in their axis.

    source: the input. name: what it is called in the model. before, grid, after: of the call that
    the graph was captured for. arguments: how the graph gets before, t, h and w at every call.
    after_argument: the same of after, where the model that the graph is a part of tells all this:
    its tokens are those that are as many in the call captured. sources: as those of `Known`.
    """

    source: fx.Node
    name: str
    rows: Extent
    before: int
    grid: Grid
    after: int
    arguments: tuple[Argument, Argument, Argument, Argument]
    after_argument: Argument | None = None
    sources: tuple[Source, ...] = ()

    @property
    def by_model(self) -> bool:
        """Whether it is told by what the model around was called with, not by a graph's input."""
        return self.after_argument is not None

    def has_rows(self, size: Extent) -> bool:
        """Whether tokens are these. A guard keeps it so, where an input of the graph tells."""
        return hint(size) == hint(self.rows) if self.by_model else has(size, self.rows)

    def alike(self, other: Told) -> bool:
        """Whether two inputs tell the same in this call."""
        mine, others = (self.before, self.grid, self.after), (other.before, other.grid, other.after)
        return mine == others


OrderOf = Callable[[tuple[fx.Node, ...]], Argument | None]
"""Given the indices by which pieces were put in their places: 1 at calls where these lie one after
the other, and 0 at others; None if that cannot be read, or is not so in the call captured."""


def unread(indices: tuple[fx.Node, ...]) -> Argument | None:
    """Nothing is known of any order."""
    del indices
    return None


def told_of(axis: Axis, told: Sequence[Told], given: Grid | None = None) -> tuple[int, Told] | None:
    """The segment of a token axis that an input tells the grid of, and what it tells.

    given: the grid that it has to be. None where more than one segment, or grid, could be meant.
    """
    found = [
        (index, each)
        for index, segment in enumerate(axis)
        for each in told
        if _may_be(segment) and each.has_rows(segment_size(segment))
        if given is None or each.grid == given
    ]
    if not found or any(index != found[0][0] for index, _ in found):
        return None
    return found[0] if all(each.alike(found[0][1]) for _, each in found) else None


def told_layout(axis: Axis, index: int, told: Told, graph: fx.Graph) -> Layout:
    """The layout where an input tells at every call what lies in one segment of an axis."""
    before, *extents = told.arguments
    layout = around(axis, index, index + 1, told.grid, graph, counted=True)
    layout.shown = layout.text_before, segment_size(axis[index])
    layout.text_before = layout.text_before + told.before
    layout.text_after = layout.text_after + told.after
    layout.text_before_arguments = (*layout.text_before_arguments, before)
    layout.text_after_arguments = (Rest(),)
    layout.grid_arguments = tuple(extents)
    layout.remark = f"; it is read from {told.name} at every call"
    return layout


def _may_be(segment: Segment) -> bool:
    """Whether tokens came in one axis, or from where nobody knows."""
    return not is_lattice(segment)
