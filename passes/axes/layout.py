"""How a site's tokens lie: the grid of the video, the text around it, and how a graph gets these.

Extents and numbers of tokens are constants where they are known, and read at run time where not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

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
from freqopt.passes.axes.lattices import LatticeExtent
from freqopt.passes.bodies import way_into
from freqopt.passes.nodes import shape
from freqopt.passes.reasons import Reason, Why
from freqopt.passes.site import Argument, Extent, Product, Size, Source, Total

SIZED = "freqopt_sized"
"""Under this name a node notes, by dimension, the `Source` of sizes that ints gave its tensor."""


@dataclass
class Layout:
    """How a site's tokens lie: grid extents (slowest first) and the text around the video.

    segments: start and stop of those of the axis that are the video. problem: why there is no grid.
    remark: what else is to say where there is one. shown: tokens before and in the part of the
    sequence that no mask may hide, where that is more than the grid, as the grid may be another in
    the next call. sources: as those of `Known`. The arguments are what the graph computes the
    extents from; those of the pads as in `Site`. pieces: start and length of pieces of the
    sequence, in the order that it has them.
    """

    grid: tuple[Extent, Extent, Extent] | None = None
    segments: tuple[int, int] = (0, 1)
    text_before: Extent = 0
    text_after: Extent = 0
    problem: Why | None = None
    remark: str = ""
    shown: tuple[Extent, Extent] | None = None
    sources: tuple[Source, ...] = ()
    grid_arguments: tuple[Argument, ...] = ()
    text_before_arguments: tuple[Argument, ...] = ()
    text_after_arguments: tuple[Argument, ...] = ()
    pad_before_arguments: tuple[Argument, ...] = ()
    pad_after_arguments: tuple[Argument, ...] = ()
    pieces: tuple[tuple[int, int], ...] = ()


def around(
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
        arguments = [segment_argument(segment, graph) for segment in part]
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
        arguments = [segment_argument(segment, graph) for segment in part]
        if any(argument is None for argument in arguments):
            layout.problem = Reason.PADS_UNREADABLE()
        setattr(layout, name, tuple(a for a in arguments if a is not None))


def many_keys(others: int | None, video: int | None) -> Why | None:
    """Why keys without queries cost more than a split of the others saves; None if they do not.

    others, video: numbers of tokens, None where they depend on data.
    """
    if others is None or video is None or 2 * others <= video:
        return None
    return Reason.MANY_KEYS(others=others)


def segment_argument(segment: Segment, graph: fx.Graph) -> Argument | None:
    """How the graph can compute the number of tokens of a segment."""
    size = segment_size(segment)
    if isinstance(size, int):
        return size
    parts = [_argument(atom, graph) for atom in segment]
    known = tuple(part for part in parts if part is not None)
    if not known or len(known) < len(parts):
        return None
    return known[0] if len(known) == 1 else Product(known)


def extent_argument(extent: LatticeExtent, graph: fx.Graph) -> Argument | None:
    """How the graph can compute an extent of a lattice, which may be that of several."""
    if not isinstance(extent, tuple):
        return _argument(extent, graph)
    parts = [_argument(part, graph) for part in extent]
    if all(isinstance(part, int) for part in parts):
        return sum(part for part in parts if isinstance(part, int))
    known = tuple(part for part in parts if isinstance(part, (int, Size)))
    return Total(known) if len(known) == len(parts) else None


def sources_of(extents: Sequence[LatticeExtent], graph: fx.Graph) -> tuple[Source, ...]:
    """What of the model's arguments the extents of a lattice come from; () if one does not.

    It is a size of one of the graph's inputs, or the int that a tensor made in the graph is as long
    as, where who wrote the graph has noted that.
    """
    inputs = {node.name: node for node in graph.find_nodes(op="placeholder")}
    found = []
    for extent in extents:
        if isinstance(extent, int):
            found.append(Source("", 0, extent))
            continue
        if isinstance(extent, tuple):
            return ()
        if extent.node is not None and extent.dim in (sized := extent.node.meta.get(SIZED, {})):
            found.append(sized[extent.dim])
            continue
        if extent.root[0] not in inputs or extent.cut:
            return ()
        name, dim = extent.root
        whole, part = hint(shape(inputs[name])[dim]), hint(extent.size)
        if not whole or not part or whole % part:
            return ()
        found.append(Source(readable_input(name), dim, whole // part))
    return tuple(found)


def readable_input(name: str) -> str:
    """Name of a graph input as the user wrote it: l_kwargs_hidden_states_ is hidden_states."""
    for prefix in ("l_kwargs_", "l_args_", "l_", "kwargs_", "args_"):
        if name.startswith(prefix):
            name = name[len(prefix) :]
            break
    return name.strip("_") or name


def _argument(extent: Atom | int, graph: fx.Graph) -> int | Size | None:
    """How the graph can compute an extent."""
    if isinstance(extent, int):
        return extent
    if isinstance(extent.size, int):
        return extent.size
    if extent.node is None or way_into(extent.node.graph, graph) is None:
        return None
    return Size(extent.node, extent.dim)
