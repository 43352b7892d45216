"""Where the dimensions of tensors come from: atoms, segments and axes.

Every dimension of a graph's inputs is an atom. An axis (one dimension of some tensor) is a list of
segments that were concatenated, each an ordered product of atoms that were merged, slowest first.
Reading the token axis of a query thus tells its grid, its memory order and where text lies.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from freqopt.passes.axes.divisions import equal_by_divisions
from freqopt.passes.site import Extent

Origin = Literal["data", "parameter", "made"]


@dataclass(frozen=True, eq=False)
class Atom:
    """One extent of the model's data, by identity.

    size: its extent. origin: whether it is a dimension of an input that holds data, of a parameter
    or buffer, or was made inside the graph. root: the graph input it comes from, and which of its
    dimensions. node, dim: a tensor of which it is a whole dimension, so that its size can be read
    at run time (None if there is none). parent, part: the atom it was split off, and its place
    among the `parts` of it, slowest first. cut: the segment it is a piece of, with start and stop.
    bundle: axes that were merged into it although one of them is a concatenation. order: of tokens
    that were put in their places by index, the indices of all pieces, in the order of writing.
    """

    size: Extent
    origin: Origin
    root: tuple[str, int]
    node: fx.Node | None = None
    dim: int = 0
    parent: Atom | None = None
    part: int = 0
    parts: int = 1
    cut: tuple[Segment, Extent, Extent] | None = None
    bundle: Shape | None = None
    order: tuple[fx.Node, ...] = ()

    def __repr__(self) -> str:
        return f"{self.root[0]}[{self.root[1]}]:{self.size}"


Segment = tuple[Atom, ...]
Axis = tuple[Segment, ...]
Shape = tuple[Axis, ...]


def same(a: Extent | bool, b: Extent | bool) -> bool:
    """Whether two sizes are provably equal; never specialises a symbol and never guards."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    if a is b:
        return True
    expressions = [x.node.expr if isinstance(x, torch.SymInt) else x for x in (a, b)]
    if expressions[0] == expressions[1]:
        return True
    first, second = hint(a), hint(b)
    if first is not None and second is not None and first != second:
        return False
    return bool(statically_known_true(a == b)) or equal_by_divisions(a, b)


def has(size: Extent, tokens: Extent) -> bool:
    """Whether there are as many tokens in this call; a guard keeps it so where numbers vary."""
    if same(size, tokens):
        return True
    first, second = hint(size), hint(tokens)
    return first is not None and first == second and bool(size == tokens)


def hint(size: Extent | bool) -> int | None:
    """The value of a size in the traced example, None for data-dependent sizes."""
    if isinstance(size, torch.SymInt):
        return int(size.node.hint) if size.node.has_hint() else None
    return int(size)


def product(sizes: Iterable[Extent]) -> Extent:
    """Product of sizes; 1 for none."""
    total: Extent = 1
    for size in sizes:
        total = size if isinstance(total, int) and total == 1 else total * size
    return total


def segment_size(segment: Segment) -> Extent:
    """Number of tokens of a segment."""
    return product(atom.size for atom in segment)


def axis_size(axis: Axis) -> Extent:
    """Number of tokens of an axis; an axis without segments has one."""
    if not axis:
        return 1
    total: Extent = 0
    for segment in axis:
        size = segment_size(segment)
        total = size if isinstance(total, int) and total == 0 else total + size
    return total


def normalise(atoms: Sequence[Atom]) -> Segment:
    """Join neighbouring parts of one atom back into it."""
    result = list(atoms)
    start = 0
    while start < len(result):
        parent, parts = result[start].parent, result[start].parts
        run = result[start : start + parts]
        if parent is not None and len(run) == parts and parts > 1:
            if all(a.parent is parent and a.part == i for i, a in enumerate(run)):
                result[start : start + parts] = [parent]
                start = 0
                continue
        start += 1
    return tuple(result)


def bundle_segment(axis: Axis) -> Segment:
    """A segment of one atom that stands for a whole concatenation, see `expanded`."""
    first = next(atom for segment in axis for atom in segment)
    return (Atom(axis_size(axis), "data", first.root, bundle=(axis,)),)


def expanded(segment: Segment) -> Axis:
    """The concatenation that a segment stands for; any other is an axis of its own."""
    bundle = segment[0].bundle if len(segment) == 1 else None
    return bundle[0] if bundle is not None and len(bundle) == 1 else (segment,)


def join(axes: Iterable[Axis]) -> Axis:
    """Axis of a concatenation; pieces that were cut out of one segment are put together again.

    Pieces without tokens, such as padding that happens to be none, leave no trace.
    """
    result: list[Segment] = []
    empty: list[Segment] = []
    for axis in axes:
        for segment in axis or ((),):
            if same(segment_size(segment), 0):
                empty.append(segment)
                continue
            result.append(segment)
            _mend(result)
    return tuple(part for segment in result or empty[:1] for part in expanded(segment))


def _mend(segments: list[Segment]) -> None:
    """Merge the last two segments if they are neighbouring pieces of the same one."""
    while len(segments) >= 2 and all(len(s) == 1 and s[0].cut for s in segments[-2:]):
        first, second = segments[-2][0], segments[-1][0]
        assert first.cut is not None and second.cut is not None
        (whole, start, middle), (other, again, stop) = first.cut, second.cut
        if whole != other or not same(middle, again):
            return
        segments.pop()
        if same(start, 0) and same(stop, segment_size(whole)):
            segments[-1] = whole
        else:
            segments[-1] = (piece(whole, start, stop),)


def piece(
    segment: Segment, start: Extent, stop: Extent, node: fx.Node | None = None, dim: int = 0
) -> Atom:
    """The atom of tokens start..stop of a segment."""
    first = segment[0] if segment else None
    origin: Origin = first.origin if first else "made"
    root = first.root if first else ("", 0)
    order = first.order if first else ()
    return Atom(stop - start, origin, root, node, dim, cut=(segment, start, stop), order=order)


def take(axis: Axis, start: Extent, stop: Extent, node: fx.Node, dim: int) -> Axis | None:
    """Axis of the slice start..stop of an axis (both within it), or None if it cannot be told."""
    bounds: list[Extent] = [0]
    for segment in axis:
        bounds.append(bounds[-1] + segment_size(segment))
    first = next((i for i, bound in enumerate(bounds) if same(bound, start)), None)
    last = next((i for i, bound in enumerate(bounds) if same(bound, stop)), None)
    if first is not None and last is not None:
        return axis[first:last] if first <= last else None
    for i, segment in enumerate(axis):
        low, high = bounds[i], bounds[i + 1]
        if at_most(low, start) and at_most(stop, high):
            whole, offset = segment, start - low
            if len(segment) == 1 and segment[0].cut:
                whole, begun, _ = segment[0].cut
                offset = begun + offset
            return ((piece(whole, offset, offset + (stop - start), node, dim),),)
    return _take_across(axis, bounds, start, stop)


def _take_across(axis: Axis, bounds: list[Extent], start: Extent, stop: Extent) -> Axis | None:
    """A slice over several segments that cuts the first or the last of them."""
    result: list[Segment] = []
    for i, segment in enumerate(axis):
        low, high = bounds[i], bounds[i + 1]
        if at_most(high, start) or at_most(stop, low):
            continue
        inside_left, inside_right = at_most(start, low), at_most(high, stop)
        if inside_left and inside_right:
            result.append(segment)
        elif inside_left and at_most(stop, high):
            result.append((piece(segment, 0, stop - low),))
        elif inside_right and at_most(low, start):
            result.append((piece(segment, start - low, high - low),))
        else:
            return None
    return tuple(result)


def at_most(a: Extent, b: Extent) -> bool:
    """Whether a <= b provably; never specialises a symbol and never guards."""
    if isinstance(a, int) and isinstance(b, int):
        return a <= b
    return bool(statically_known_true(a <= b))


def atoms_of(axis: Axis) -> list[Atom]:
    """All atoms of an axis, pieces replaced by the atoms they were cut from."""
    result: list[Atom] = []
    for segment in axis:
        for atom in segment:
            result.extend(atom.cut[0] if atom.cut and atom.cut[0] else (atom,))
    return result


def rank(axis: Axis) -> tuple[int, int, int]:
    """How much an axis tells: which of several broadcast operands to believe.

    Extents of 1 do not count, as they are no more than a way to write the others; but a piece cut
    out of something tells less than a whole, be it of size 1.
    """
    atoms = [a for segment in axis for a in segment]
    wide = [a for a in atoms if not same(a.size, 1)]
    data = sum(a.origin == "data" for a in wide)
    return data, len(wide), -sum(a.cut is not None for a in atoms)
