"""The grid of a site: which segment of its tokens is video, on which lattice, and what is text.

A wrong grid is worse than none, so a grid is given only if it provably multiplies to the number of
video tokens, or the data of every call tell it; one set by the user is held to the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from freqopt.grid import Grid
from freqopt.passes.axes.dimensions import Atom, Axis, Segment, atoms_of, axis_size, hint
from freqopt.passes.axes.given import Others, given_layout
from freqopt.passes.axes.lattices import Lattice, extent_size, find_lattices
from freqopt.passes.axes.layout import (
    Layout,
    around,
    extent_argument,
    readable_input,
    sources_of,
)
from freqopt.passes.axes.parts import PARTS, in_pieces
from freqopt.passes.axes.told import OrderOf, Told, told_layout, told_of, unread
from freqopt.passes.reasons import Reason, Why
from freqopt.passes.site import Argument, Product, Size, Value


@dataclass(frozen=True)
class Said:
    """What comes from elsewhere than the graph.

    grid: the user's, with the `others` around it. told: what the data of inputs tell. believed:
    whether that is enough, as the user or a plan says that the model's tokens are video. order_of:
    tells whether tokens put in their places by index lie as they were written.
    """

    grid: Grid | None = None
    others: Others = (0, 0)
    told: tuple[Told, ...] = ()
    believed: bool = False
    order_of: OrderOf = unread


def infer_layout(
    axis: Axis,
    said: Said,
    graph: fx.Graph,
    positions: Mapping[Atom, Sequence[Segment]] | None = None,
) -> Layout:
    """Layout of a token axis.

    said: what comes from elsewhere than the graph; the user's grid goes before what the graph says,
    if it fits. positions: lattices of the tables of positions that tokens packed into one axis
    meet, see `Dimensions`.
    """
    layout = _layout(axis, said, graph, positions or {})
    orders = dict.fromkeys(atom.order for atom in atoms_of(axis) if atom.order)
    if layout.problem is None and orders:
        _hold_to_order(layout, [said.order_of(order) for order in orders])
    return layout


def _hold_to_order(layout: Layout, known: Sequence[Argument | None]) -> None:
    """Keep a grid for the calls in which tokens lie as they were written."""
    read = [each for each in known if each is not None]
    first, *rest = layout.grid_arguments
    if len(read) < len(known) or not isinstance(first, (int, Size, Value)):
        layout.problem = Reason.PLACED()
        return
    marks = [each for each in read if isinstance(each, Value)]
    if marks:
        layout.grid_arguments = (Product((first, *marks)), *rest)


def _layout(
    axis: Axis, said: Said, graph: fx.Graph, positions: Mapping[Atom, Sequence[Segment]]
) -> Layout:
    if said.grid is not None:
        layout = given_layout(axis, said.grid, graph, said.others)
        if layout.problem is None or any(said.others):
            return layout
        read = told_of(axis, said.told, said.grid)
        return layout if read is None else told_layout(axis, *read, graph)
    found = find_lattices(axis, positions)
    if not found:
        read = told_of(axis, said.told)
        if read is None:
            return Layout(problem=_why_no_lattice(axis))
        return told_layout(axis, *read, graph) if said.believed else _not_believed(read[1])
    chosen = _main(axis, found)
    others = ", ".join(each.shape() for each in found if each is not chosen)
    if chosen is None:
        return Layout(problem=Reason.SEVERAL_GRIDS(grids=others))
    if chosen.problem is not None:
        return Layout(problem=chosen.problem)
    first, second, third = (extent_size(extent) for extent in chosen.extents)
    layout = around(axis, chosen.start, chosen.stop, (first, second, third), graph)
    arguments = [extent_argument(extent, graph) for extent in chosen.extents]
    known = tuple(argument for argument in arguments if argument is not None)
    if layout.problem is None and len(known) < 3:
        layout.problem = Reason.EXTENT_UNREADABLE()
    layout.grid_arguments, layout.sources = known, sources_of(chosen.extents, graph)
    if others:
        layout.remark = f"; other grids in its sequence ({others}) stay exact, as text does"
    return layout


def _main(axis: Axis, lattices: Sequence[Lattice]) -> Lattice | None:
    """The lattice that has more tokens than all others together, such as a video after its history.

    The others are left exact. None where no lattice is as large, and for unknown sizes.
    """
    if len(lattices) == 1:
        return lattices[0]
    sizes = [hint(axis_size(axis[each.start : each.stop])) for each in lattices]
    known = [size for size in sizes if size is not None]
    if len(known) < len(sizes):
        return None
    largest = max(range(len(known)), key=lambda i: known[i])
    return lattices[largest] if 2 * known[largest] > sum(known) else None


def _not_believed(told: Told) -> Layout:
    """No layout: that tokens with positions are video is for the user to say."""
    return Layout(problem=Reason.IN_POSITIONS(input=told.name, grid=told.grid))


def _why_no_lattice(axis: Axis) -> Why:
    count = in_pieces(axis)
    if count:
        return Reason.IN_PIECES(count=count)
    roots = {a.root[0]: a.origin for segment in axis for a in segment}
    data = [name for name, origin in roots.items() if origin == "data" and name != PARTS]
    if not data:
        return Reason.LOST()
    return Reason.NO_GRID(inputs=", ".join(readable_input(name) for name in data))
