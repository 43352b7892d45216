"""The grid of a site: which segment of its tokens is video, on which lattice, and what is text.

A wrong grid is worse than none, so a grid is given only if it provably multiplies to the number of
video tokens; a grid set by the user is held to the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from freqopt.grid import Grid
from freqopt.passes.axes.dimensions import (
    Atom,
    Axis,
    Segment,
    axis_size,
    hint,
    product,
    same,
    segment_size,
)
from freqopt.passes.axes.lattices import (
    Lattice,
    LatticeExtent,
    extent_size,
    find_lattices,
    is_lattice,
)
from freqopt.passes.bodies import way_into
from freqopt.passes.reasons import Reason, Why
from freqopt.passes.site import Argument, Extent, Product, Size, Total


@dataclass
class Layout:
    """How a site's tokens lie: grid extents (slowest first) and the text around the video.

    segments: start and stop of those of the axis that are the video. problem: why there is no grid.
    remark: what else is to say where there is one. The arguments are what the graph computes the
    extents from; those of the pads as in `Site`.
    """

    grid: tuple[Extent, Extent, Extent] | None = None
    segments: tuple[int, int] = (0, 1)
    text_before: Extent = 0
    text_after: Extent = 0
    problem: Why | None = None
    remark: str = ""
    grid_arguments: tuple[Argument, ...] = ()
    text_before_arguments: tuple[Argument, ...] = ()
    text_after_arguments: tuple[Argument, ...] = ()
    pad_before_arguments: tuple[Argument, ...] = ()
    pad_after_arguments: tuple[Argument, ...] = ()


def infer_layout(
    axis: Axis,
    given: Grid | None,
    graph: fx.Graph,
    positions: Mapping[Atom, Sequence[Segment]] | None = None,
) -> Layout:
    """Layout of a token axis.

    given: the user's grid, which goes before what the graph says, if it fits. positions: lattices
    of the tables of positions that tokens packed into one axis meet, see `Dimensions`.
    """
    if given is not None:
        return _given_layout(axis, given, graph)
    found = find_lattices(axis, positions or {})
    if not found:
        return Layout(problem=_why_no_lattice(axis))
    chosen = _main(axis, found)
    others = ", ".join(each.shape() for each in found if each is not chosen)
    if chosen is None:
        return Layout(problem=Reason.SEVERAL_GRIDS(grids=others))
    if chosen.problem is not None:
        return Layout(problem=chosen.problem)
    first, second, third = (extent_size(extent) for extent in chosen.extents)
    layout = _around(axis, chosen.start, chosen.stop, (first, second, third), graph)
    arguments = [_extent_argument(extent, graph) for extent in chosen.extents]
    known = tuple(argument for argument in arguments if argument is not None)
    if layout.problem is None and len(known) < 3:
        layout.problem = Reason.EXTENT_UNREADABLE()
    layout.grid_arguments = known
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


def _given_layout(axis: Axis, given: Grid, graph: fx.Graph) -> Layout:
    tokens = product(given)
    fits = [i for i, segment in enumerate(axis) if same(segment_size(segment), tokens)]
    runs = [(each.start, each.stop) for each in find_lattices(axis, {})]
    runs = [run for run in runs if same(axis_size(axis[slice(*run)]), tokens)]
    guarded = not fits and not runs
    if guarded:
        fits = _guarded(axis, tokens)
    lattices = [(i, i + 1) for i in fits if is_lattice(axis[i])]
    chosen = lattices or runs or [(i, i + 1) for i in fits]
    if len(chosen) != 1:
        sizes = " + ".join(str(segment_size(segment)) for segment in axis)
        misfit = Reason.GRID_MISFIT(
            grid=given, shown="x".join(map(str, given)), tokens=tokens, sizes=sizes,
            how_many="more than one has" if chosen else "none has",
        )  # fmt: skip
        return Layout(problem=misfit)
    layout = _around(axis, *chosen[0], given, graph, counted=guarded)
    layout.grid_arguments = given
    if guarded:
        layout.remark = f"; other numbers of video tokens than the {tokens} of grid= compile anew"
    return layout


def _guarded(axis: Axis, tokens: Extent) -> list[int]:
    """The segments of symbolic size that have as many tokens as the user's grid in this call.

    Guards keep it so: where the answer changes, the model is compiled anew. Sizes that depend on
    data take no guard, and do not count.
    """
    sizes = [segment_size(segment) for segment in axis]
    return [i for i, size in enumerate(sizes) if hint(size) is not None and bool(size == tokens)]


def _around(
    axis: Axis,
    start: int,
    stop: int,
    grid: tuple[Extent, Extent, Extent],
    graph: fx.Graph,
    *,
    counted: bool = False,
) -> Layout:
    """The layout where segments start..stop are the video, and those around it text.

    counted: that the grid has as many tokens is known, by a guard.
    """
    before, after = axis[:start], axis[stop:]
    video = axis_size(axis[start:stop])
    layout = Layout(
        grid=grid,
        segments=(start, stop),
        text_before=axis_size(before) if before else 0,
        text_after=axis_size(after) if after else 0,
    )
    if not counted and not same(product(grid), video):
        layout.problem = Reason.GRID_UNPROVEN(grid=grid, video=video)
    for name, part in (("text_before_arguments", before), ("text_after_arguments", after)):
        arguments = [_segment_argument(segment, graph) for segment in part]
        if any(argument is None for argument in arguments):
            layout.problem = Reason.TEXT_UNREADABLE()
        setattr(layout, name, tuple(a for a in arguments if a is not None))
    return layout


def pad_queries(layout: Layout, keys: Axis, start: int, stop: int, graph: fx.Graph) -> None:
    """Note how many keys lie before and after those of the queries, segments start..stop."""
    for name, part in (
        ("pad_before_arguments", keys[:start]),
        ("pad_after_arguments", keys[stop:]),
    ):
        arguments = [_segment_argument(segment, graph) for segment in part]
        if any(argument is None for argument in arguments):
            layout.problem = Reason.PADS_UNREADABLE()
        setattr(layout, name, tuple(a for a in arguments if a is not None))


def _segment_argument(segment: Segment, graph: fx.Graph) -> Argument | None:
    size = segment_size(segment)
    if isinstance(size, int):
        return size
    parts = [_argument(atom, graph) for atom in segment]
    known = tuple(part for part in parts if part is not None)
    if not known or len(known) < len(parts):
        return None
    return known[0] if len(known) == 1 else Product(known)


def _extent_argument(extent: LatticeExtent, graph: fx.Graph) -> Argument | None:
    """How the graph can compute an extent of a lattice, which may be that of several."""
    if not isinstance(extent, tuple):
        return _argument(extent, graph)
    parts = [_argument(part, graph) for part in extent]
    if all(isinstance(part, int) for part in parts):
        return sum(part for part in parts if isinstance(part, int))
    known = tuple(part for part in parts if isinstance(part, (int, Size)))
    return Total(known) if len(known) == len(parts) else None


def _argument(extent: Atom | int, graph: fx.Graph) -> int | Size | None:
    """How the graph can compute an extent."""
    if isinstance(extent, int):
        return extent
    if isinstance(extent.size, int):
        return extent.size
    if extent.node is None or way_into(extent.node.graph, graph) is None:
        return None
    return Size(extent.node, extent.dim)


def _why_no_lattice(axis: Axis) -> Why:
    roots = {a.root[0]: a.origin for segment in axis for a in segment}
    data = [name for name, origin in roots.items() if origin == "data"]
    if not data:
        return Reason.LOST()
    return Reason.NO_GRID(inputs=", ".join(readable_input(name) for name in data))


def readable_input(name: str) -> str:
    """Name of a graph input as the user wrote it: l_kwargs_hidden_states_ is hidden_states."""
    for prefix in ("l_kwargs_", "l_args_", "l_", "kwargs_", "args_"):
        if name.startswith(prefix):
            name = name[len(prefix) :]
            break
    return name.strip("_") or name
