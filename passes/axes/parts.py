"""Axes of tokens that lie on several GPUs: parts of ranks, and what they are side by side.

Where this rank's part is a piece of something, such as `x.chunk(P)[rank]`, the parts of all ranks
are the whole; of a part that came as an input, the whole is known by its size alone.
"""

from __future__ import annotations

import itertools
from typing import Any

from freqopt.passes.axes.dimensions import (
    Atom,
    Axis,
    Segment,
    Shape,
    axis_size,
    bundle_segment,
    expanded,
    hint,
    join,
    piece,
    same,
    segment_size,
)
from freqopt.passes.axes.divisions import learn_share
from freqopt.passes.nodes import value
from freqopt.passes.site import Extent

PARTS = "<ranks>"
"""In the place of an input's name: an atom along which there is one part for every rank."""


def ranks_axis(count: int) -> Axis:
    """An axis of the parts of `count` ranks."""
    return ((Atom(count, "data", (PARTS, 0)),),)


def holds_ranks(segment: Segment) -> bool:
    """Whether parts of several ranks lie side by side in a segment, of which nothing is known."""
    return any(atom.root[0] == PARTS for atom in segment)


def over_ranks(count: int, axis: Axis) -> Axis:
    """The parts of all ranks side by side, of which `axis` is this one's."""
    if len(axis) == 1:
        (part,) = ranks_axis(count)[0]
        return expanded(gathered((part, *axis[0])))
    (ranks,) = ranks_axis(count)[0]
    return join(at_rank(axis, rank, ranks) for rank in range(count))


def gathered(segment: Segment) -> Segment:
    """A segment in which ranks and their pieces of one whole are put together to that."""
    atoms = [atom for atom in segment if not same(atom.size, 1)]
    for i in range(len(atoms) - 1):
        ranks, part = atoms[i], atoms[i + 1]
        if ranks.root[0] != PARTS or part.cut is None:
            continue
        whole, start, stop = part.cut
        if _is_share(whole, start, stop, ranks.size):
            return (*atoms[:i], *whole, *atoms[i + 2 :])
    return segment


def shares(axis: Axis, count: int) -> list[Axis] | None:
    """Equal pieces of a concatenation that are cut across its segments, None for all else."""
    size = hint(axis_size(axis))
    if len(axis) < 2 or size is None or size % count:
        return None
    bounds = itertools.accumulate(hint(segment_size(segment)) or 0 for segment in axis)
    length, inside = size // count, set(range(0, size + 1, size // count))
    if inside <= {0, *bounds}:
        return None
    whole = bundle_segment(axis)
    return [((piece(whole, i * length, (i + 1) * length),),) for i in range(count)]


def _is_share(whole: Segment, start: Extent, stop: Extent, count: Extent) -> bool:
    """Whether a piece is one of `count` equal ones; a guard keeps it so where sizes vary."""
    size, length = segment_size(whole), stop - start
    known = hint(size), hint(length), hint(count), hint(start)
    if not all(isinstance(n, int) for n in known):
        return False
    total, part, ranks, first = (n or 0 for n in known)
    if part * ranks != total or part == 0 or first % part:
        return False
    if not same(size, length * count):
        if not bool(size == length * count):
            return False
        learn_share(size, length, ranks)
    return True


def at_rank(axis: Axis, rank: int, ranks: Atom) -> Axis:
    """The axis of what a rank has, of which `axis` is what this one has. ranks: all of them."""
    return tuple(_segment_at(segment, rank, ranks) for segment in axis)


def _segment_at(segment: Segment, rank: int, ranks: Atom) -> Segment:
    tokens = [atom for atom in segment if atom.origin == "data" and not same(atom.size, 1)]
    if not tokens or any(atom.root[0] == PARTS for atom in tokens):
        return segment
    if len(segment) == 1 and segment[0].cut is not None:
        whole, start, stop = segment[0].cut
        if _is_share(whole, start, stop, ranks.size):
            length = stop - start
            return (piece(whole, rank * length, (rank + 1) * length),)
    if all(atom.root[1] == 0 for atom in tokens):
        return segment  # a batch, which all ranks have
    length = segment_size(segment)
    whole = (ranks, *segment)
    return (piece(whole, rank * length, (rank + 1) * length),)


def count_of_ranks(axis: Axis) -> int | None:
    """Of how many ranks parts lie one after the other along an axis, None for all others."""
    atoms = [a for a in axis[0] if not same(a.size, 1)] if len(axis) == 1 else []
    return hint(atoms[0].size) if atoms and atoms[0].root[0] == PARTS else None


def parts_along(axes: Shape, dim: int, count: int) -> list[Shape] | None:
    """Axes of the parts of `count` ranks, cut apart along a dimension; None if it has none."""
    if count_of_ranks(axes[dim]) != count:
        return None
    atoms = [a for a in axes[dim][0] if not same(a.size, 1)]
    rest: Axis = (tuple(atoms[1:]),) if atoms[1:] else ()
    return [
        tuple(at_rank(rest if d == dim else each, rank, atoms[0]) for d, each in enumerate(axes))
        for rank in range(count)
    ]


def of_one_rank(axes: Shape, dim: int, size: Extent, item: Any) -> Shape | None:
    """Axes of a slice that is what one of several ranks had, None for all others."""
    if not isinstance(item, slice) or value(item.step) not in (None, 1):
        return None
    start, stop, count = value(item.start), value(item.stop), count_of_ranks(axes[dim])
    if count is None or stop is None:
        return None
    start = 0 if start is None else start
    if not same((stop - start) * count, size):
        return None
    place = next((i for i in range(count) if same(start, i * (stop - start))), None)
    parts = None if place is None else parts_along(axes, dim, count)
    return None if parts is None or place is None else parts[place]


def together(axis: Axis) -> tuple[Axis, tuple[tuple[int, int], ...]] | None:
    """An axis in which tokens lie in pieces with others between, and with these brought together.

    With start and length of its pieces in the order that brings them together; None where none are
    apart, or a length is not known. As where text and video were sharded one by one.
    """
    sizes = [segment_size(segment) for segment in axis]
    if in_pieces(axis) < 2 or not all(isinstance(size, int) for size in sizes):
        return None
    starts = [0, *itertools.accumulate(size for size in sizes if isinstance(size, int))]
    wholes: list[Segment | None] = []
    groups: list[list[int]] = []
    for index, segment in enumerate(axis):
        cut = segment[0].cut if len(segment) == 1 else None
        whole = None if cut is None else cut[0]
        at = wholes.index(whole) if whole is not None and whole in wholes else len(wholes)
        if at == len(wholes):
            wholes.append(whole)
            groups.append([])
        groups[at].append(index)
    order = [index for group in groups for index in group]
    if order == sorted(order):
        return None
    joined = join((axis[index],) for index in order)
    if in_pieces(joined):
        return None
    return joined, tuple((starts[i], starts[i + 1] - starts[i]) for i in order)


def in_pieces(axis: Axis) -> int:
    """In how many pieces of one lattice or input tokens lie, if others are between them; else 0."""
    cuts = [segment[0].cut for segment in axis if len(segment) == 1 and segment[0].cut]
    wholes = [cut[0] for cut in cuts]
    return max((wholes.count(whole) for whole in wholes if wholes.count(whole) > 1), default=0)
