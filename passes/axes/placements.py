"""Tokens put in their places by index: text, video and audio written into one sequence of zeros.

Which place is whose stands in data only. Where the pieces written fill the sequence, they may lie
in it one after the other, as they were written: that they do is for whoever has the data to see, at
every call (see `Atom.order`). None of them counts as a lattice, so that nothing is split before the
user, or a plan, says with a grid that one of them is the video.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from freqopt.passes.axes.dimensions import Atom, Axis, Segment, axis_size, has, rank, same
from freqopt.passes.axes.graph_axes import Dimensions
from freqopt.passes.axes.rules import dim_of, rule
from freqopt.passes.nodes import argument, known_int, operation, shape, tensor

EMPTY = {"zeros", "new_zeros", "empty", "new_empty", "zeros_like", "empty_like", "full", "new_full"}


@rule("index_copy", "index_copy_")
def _index_copy(dimensions: Dimensions, node: fx.Node) -> list[Axis | None] | None:
    """`base.index_copy(dim, index, source)`, of which the result may be written to again."""
    base, dim = argument(node, 0, "input", "self"), known_int(argument(node, 1, "dim"))
    index, source = argument(node, 2, "index"), argument(node, 3, "tensor", "source")
    axes = dimensions.of(base)
    if axes is None or dim is None:
        return None
    found = place(dimensions, base, dim_of(dim, len(axes)), index, source)
    if found is None:
        return list(axes)
    dimensions.placed[node] = dimensions.placed[base]
    if operation(node) == "index_copy":
        return found
    dimensions.axes[base] = dimensions.checked(base, found)
    return found


@rule("copy_")
def _copy(dimensions: Dimensions, node: fx.Node) -> list[Axis | None] | None:
    """`base.copy_(source)`: a new tensor has the axes of what fills it, as of a collective."""
    base, source = argument(node, 0, "self"), argument(node, 1, "src", "other")
    axes, written = dimensions.of(base), dimensions.of(source)
    if axes is None or not isinstance(base, fx.Node):
        return None
    sizes = zip(shape(base), shape(source), strict=False)
    whole = len(shape(base)) == len(shape(source)) and all(same(a, b) for a, b in sizes)
    if written is None or not whole or operation(base) not in EMPTY:
        return list(axes)
    dimensions.axes[base] = dimensions.checked(base, written)
    return list(written)


def note_setitem(dimensions: Dimensions, node: fx.Node) -> None:
    """`base[index] = source` or `base[:, index] = source`, which later readers of the base see."""
    base, index, source = node.args
    items = index if isinstance(index, tuple) else (index,)
    dim = len(items) - 1
    if not isinstance(base, fx.Node) or any(item != slice(None) for item in items[:-1]):
        return
    found = place(dimensions, base, dim, items[-1], source)
    if found is not None:
        dimensions.axes[base] = dimensions.checked(base, found)


def place(
    dimensions: Dimensions, base: Any, dim: int, index: Any, source: Any
) -> list[Axis | None] | None:
    """Axes of `base` after one more piece was written into it; None if this is something else."""
    places, written = tensor(index), dimensions.of(source)
    known = dimensions.of(base)
    if places is None or places.dim() != 1 or places.is_floating_point() or known is None:
        return None
    if str(places.dtype) == "torch.bool" or written is None or len(written) != len(known):
        return None
    if base not in dimensions.placed and operation(base) not in EMPTY:
        return None
    pieces = [*dimensions.placed.get(base, ()), (written[dim], source, index)]
    dimensions.placed[base] = tuple(pieces)
    order = tuple(node for _, _, node in pieces)
    axes: list[Axis | None] = [
        max(a, b, key=rank) if same(axis_size(a), axis_size(b)) else a
        for a, b in zip(known, written, strict=True)
    ]
    whole = tuple(_as_one(axis, node, dim, order) for axis, node, _ in pieces)
    axes[dim] = whole if has(axis_size(whole), shape(base)[dim]) else known[dim]
    return axes


def _as_one(axis: Axis, source: fx.Node, dim: int, order: tuple[fx.Node, ...]) -> Segment:
    """A written piece as one atom, whatever lattice it was."""
    first = next((segment[0] for segment in axis if segment), None)
    if first is None:
        return (Atom(axis_size(axis), "made", (source.name, dim), source, dim, order=order),)
    return (Atom(axis_size(axis), first.origin, first.root, source, dim, order=order),)
