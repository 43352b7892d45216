"""How views share out axes: axes of new dimensions from those they are made of.

A view merges neighbouring dimensions and takes others apart; sizes tell which belong together.
Dimensions merged with a concatenation that is not the slowest of them stay together as one bundle.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from freqopt.passes.axes.dimensions import (
    Atom,
    Axis,
    Segment,
    Shape,
    axis_size,
    expanded,
    hint,
    normalise,
    product,
    same,
    segment_size,
)
from freqopt.passes.axes.parts import gathered, holds_ranks, over_ranks
from freqopt.passes.site import Extent


def regroup(before: Sequence[Extent], after: Sequence[Extent]) -> list[tuple[range, range]] | None:
    """Smallest groups of consecutive dimensions with equal products, for a view or reshape."""
    groups: list[tuple[range, range]] = []
    i = j = 0
    while i < len(before) and j < len(after):
        found = _smallest_group(before, after, i, j)
        if found is None:
            return None
        groups.append((range(i, found[0]), range(j, found[1])))
        i, j = found
    if i < len(before) or j < len(after):
        if not all(same(s, 1) for s in (*before[i:], *after[j:])) or not groups:
            return None if groups or (before and after) else []
        left, right = groups.pop()
        groups.append((range(left.start, len(before)), range(right.start, len(after))))
    return groups


def _smallest_group(
    before: Sequence[Extent], after: Sequence[Extent], i: int, j: int
) -> tuple[int, int] | None:
    left, right = len(before) - i, len(after) - j
    for total in range(2, left + right + 1):
        for a in range(max(1, total - right), min(left, total - 1) + 1):
            stop_i, stop_j = i + a, j + total - a
            if same(product(before[i:stop_i]), product(after[j:stop_j])):
                return stop_i, stop_j
    return None


def distribute(
    axes: Sequence[Axis], sizes: Sequence[Extent], node: fx.Node, first_dim: int
) -> list[Axis] | None:
    """Axes of the dimensions `sizes` that a view makes out of `axes`, None if they cannot be told.

    first_dim: the first of the new dimensions in the output of `node`.
    """
    wide_in = [axis for axis in axes if axis and not same(axis_size(axis), 1)]
    wide_out = [k for k, size in enumerate(sizes) if not same(size, 1)]
    if len(wide_in) == 1 and len(wide_out) == 1 and (len(wide_in[0]) > 1 or len(sizes) == 1):
        if len(wide_in[0]) > 1:
            return [wide_in[0] if k == wide_out[0] else () for k in range(len(sizes))]
    if len(wide_in) == 1 and (bundle := bundle_of(wide_in[0])) is not None:
        return _unbundled(bundle, sizes, node, first_dim)
    if len(sizes) == 1 and (ranked := _over_ranks(wide_in)) is not None:
        return [ranked]
    if any(len(axis) > 1 for axis in axes):
        found = _distribute_segments(wide_in, sizes, node, first_dim)
        return [bundled(wide_in, sizes[0])] if found is None and len(sizes) == 1 else found
    queue = list(normalise([atom for axis in axes if axis for atom in axis[0]]))
    result: list[Axis] = []
    k = 0
    while k < len(sizes):
        taken = _take_atoms(queue, sizes[k])
        if taken is not None:
            result.append(expanded(gathered(normalise(taken))) if taken else ())
            k += 1
            continue
        split = _split_atom(queue, sizes, k, node, first_dim)
        if split is None:
            return None
        result.extend(((atom,),) for atom in split)
        k += len(split)
    if queue:
        if not all(same(atom.size, 1) for atom in queue) or not result:
            return None
        last = result[-1][0] if result[-1] else ()
        result[-1] = (normalise([*last, *queue]),)
    return result


def _over_ranks(axes: Sequence[Axis]) -> Axis | None:
    """The parts of all ranks merged with the concatenation that each of them is of."""
    if len(axes) != 2 or len(axes[1]) < 2 or len(axes[0]) != 1:
        return None
    first = axes[0][0]
    if len(first) != 1 or not holds_ranks(first):
        return None
    count = hint(first[0].size)
    return None if count is None else over_ranks(count, axes[1])


def bundled(axes: Sequence[Axis], size: Extent) -> Axis:
    """One axis of several of which one is a concatenation: rows of a batch of text and video."""
    first = next(atom for axis in axes for segment in axis for atom in segment)
    return ((Atom(size, "made", first.root, bundle=tuple(axes)),),)


def bundle_of(axis: Axis) -> Shape | None:
    """The axes that an axis was bundled of, None for all others."""
    return axis[0][0].bundle if len(axis) == 1 and len(axis[0]) == 1 else None


def _unbundled(
    bundle: Shape, sizes: Sequence[Extent], node: fx.Node, first_dim: int
) -> list[Axis] | None:
    """Axes of dimensions that a bundle is taken apart into."""
    before = [axis_size(axis) for axis in bundle]
    if len(sizes) == 1:
        return [bundled(bundle, sizes[0])]
    result: list[Axis] = []
    for left, right in regroup(before, sizes) or ():
        part = sizes[right.start : right.stop]
        found = distribute(bundle[left.start : left.stop], part, node, first_dim + right.start)
        if found is None:
            return None
        result += found
    return result or None


def _distribute_segments(
    axes: Sequence[Axis], sizes: Sequence[Extent], node: fx.Node, first_dim: int
) -> list[Axis] | None:
    """`distribute` where the slowest axis is a concatenation: frames of two videos, say.

    Merged with faster axes, every segment is merged with them; a merged one is taken apart where
    all its segments end in the same atoms.
    """
    if len(sizes) == 1 and all(len(axis) == 1 for axis in axes[1:]):
        rest = [atom for axis in axes[1:] for atom in axis[0]]
        return [tuple(normalise([*segment, *rest]) for segment in axes[0])]
    if len(axes) != 1:
        return None
    heads: list[Segment] = []
    tails: list[Segment] = []
    for segment in axes[0]:
        for at in reversed(range(len(segment))):
            if same(segment_size(segment[at:]), product(sizes[1:])):
                heads.append(segment[:at])
                tails.append(segment[at:])
                break
    if len(tails) < len(axes[0]) or any(tail != tails[0] for tail in tails):
        return None
    rest_axes = distribute([(tails[0],)], sizes[1:], node, first_dim + 1)
    return None if rest_axes is None else [tuple(heads), *rest_axes]


def _take_atoms(queue: list[Atom], size: Extent) -> list[Atom] | None:
    """Remove the fewest leading atoms whose product is `size` from the queue."""
    if same(size, 1) and not (queue and same(queue[0].size, 1)):
        return []
    total: Extent = 1
    for count, atom in enumerate(queue, 1):
        total = product((total, atom.size))
        if same(total, size):
            taken = queue[:count]
            del queue[:count]
            return taken
    return None


def _split_atom(
    queue: list[Atom], sizes: Sequence[Extent], k: int, node: fx.Node, first_dim: int
) -> list[Atom] | None:
    """Split the leading atom over as many of the dimensions from `k` on as multiply to it."""
    if not queue:
        return None
    whole = queue[0]
    for stop in range(k + 2, len(sizes) + 1):
        if same(product(sizes[k:stop]), whole.size):
            del queue[0]
            return [
                Atom(
                    sizes[k + i],
                    whole.origin,
                    whole.root,
                    node,
                    first_dim + k + i,
                    whole,
                    i,
                    stop - k,
                )
                for i in range(stop - k)
            ]
    return None
