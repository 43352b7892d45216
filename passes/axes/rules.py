"""How views carry the axes of tensors on: reshapes, permutations, slices and splits.

A rule takes a node and returns the axes of its output, None for those it cannot tell. It may be
wrong about an unusual call: `propagate` checks its answer against the real sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from freqopt.passes.axes.dimensions import Atom, Axis, Shape, axis_size, hint, same, take
from freqopt.passes.axes.distribute import distribute, regroup
from freqopt.passes.axes.divisions import learn_divisions, learn_length
from freqopt.passes.axes.graph_axes import Dimensions
from freqopt.passes.axes.parts import of_one_rank, parts_along, shares
from freqopt.passes.nodes import argument, known_int, numbers, operation, shape, value
from freqopt.passes.site import Extent

Rule = Callable[[Dimensions, fx.Node], Sequence[Axis | None] | None]
RULES: dict[str, Rule] = {}
"""Rules of operations that make one tensor."""

SeveralRule = Callable[[Dimensions, fx.Node], list[Shape | None]]
SEVERAL: dict[str, SeveralRule] = {}
"""Rules of operations that make several tensors."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule of some operations."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def several(*names: str) -> Callable[[SeveralRule], SeveralRule]:
    """Register a function as the rule of operations that make several tensors."""

    def register(function: SeveralRule) -> SeveralRule:
        SEVERAL.update(dict.fromkeys(names, function))
        return function

    return register


def dim_of(index: int, rank_: int) -> int:
    """A dimension counted from the front."""
    return index + rank_ if index < 0 else index


def known_axes(dimensions: Dimensions, node: fx.Node) -> tuple[fx.Node, Shape] | None:
    """The first argument of a node and its axes, if they are known."""
    source = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))
    axes = dimensions.of(source)
    return (source, axes) if isinstance(source, fx.Node) and axes is not None else None


@rule("view", "reshape", "flatten", "unflatten", "view_as", "reshape_as")
def _reshape(dimensions: Dimensions, node: fx.Node) -> list[Axis | None] | None:
    known = known_axes(dimensions, node)
    if known is None or isinstance(argument(node, 1, "dtype"), torch.dtype):
        return None
    source, axes = known
    before, after = shape(source), shape(node)
    learn_divisions(before, after, _asked(node, after))
    pairs = _pinned(node, before, after)
    result: list[Axis | None] = [None] * len(after)
    for left, right in pairs:
        groups = regroup(before[left.start : left.stop], after[right.start : right.stop])
        for a, b in groups or ():
            old = axes[left.start + a.start : left.start + a.stop]
            start, stop = right.start + b.start, right.start + b.stop
            new = distribute(old, after[start:stop], node, start)
            if new is not None:
                result[start:stop] = new
    return result


def _asked(node: fx.Node, after: Sequence[Extent]) -> Sequence[Extent]:
    """Sizes as the call names them, where it does."""
    if operation(node) not in ("view", "reshape"):
        return after
    given = [value(size) for size in numbers(node, 1)]
    if len(given) != len(after):
        return after
    known = (int, torch.SymInt)
    return [
        a if isinstance(a, known) and not (isinstance(a, int) and a < 0) else b
        for a, b in zip(given, after, strict=True)
    ]


def _pinned(
    node: fx.Node, before: Sequence[Extent], after: Sequence[Extent]
) -> list[tuple[range, range]]:
    """Pairs of dimension ranges that the call itself says belong together."""
    name, rank_in, rank_out = operation(node), len(before), len(after)
    start = stop = None
    if name == "flatten":
        start = known_int(argument(node, 1, "start_dim", default=0))
        stop = known_int(argument(node, 2, "end_dim", default=-1))
    elif name == "unflatten":
        start = stop = known_int(argument(node, 1, "dim"))
    elif name in ("view", "reshape"):
        sizes = numbers(node, 1)
        if -1 in sizes:
            # The dimensions on either side of -1 are matched from the outside inwards.
            at = sizes.index(-1)
            after_it = len(sizes) - at - 1
            lead = 0
            while lead < min(at, rank_in) and same(before[lead], after[lead]):
                lead += 1
            trail = 0
            while trail < min(after_it, rank_in - lead) and same(
                before[-trail - 1], after[-trail - 1]
            ):
                trail += 1
            if lead == at and trail == after_it:
                start, stop = lead, rank_in - trail - 1
    if start is None or stop is None or rank_in == 0:
        return [(range(rank_in), range(rank_out))]
    start, stop = dim_of(start, rank_in), dim_of(stop, rank_in)
    if stop < start:
        return [(range(rank_in), range(rank_out))]
    tail = rank_in - stop - 1
    middle = range(start, rank_out - tail)
    same_dims = [(range(d, d + 1), range(d, d + 1)) for d in range(start)]
    rest = [
        (range(rank_in - d, rank_in - d + 1), range(rank_out - d, rank_out - d + 1))
        for d in range(tail, 0, -1)
    ]
    return [*same_dims, (range(start, stop + 1), middle), *rest]


@rule("squeeze", "unsqueeze")
def _squeeze(dimensions: Dimensions, node: fx.Node) -> list[Axis | None] | None:
    known = known_axes(dimensions, node)
    dim = known_int(argument(node, 1, "dim"))
    if known is None or dim is None:
        return None
    axes: list[Axis | None] = list(known[1])
    if operation(node) == "unsqueeze":
        axes.insert(dim_of(dim, len(axes) + 1), ())
    elif len(shape(node)) < len(axes):
        del axes[dim_of(dim, len(axes))]
    return axes


@rule("expand", "expand_as", "broadcast_to", "repeat", "tile")
def _expand(dimensions: Dimensions, node: fx.Node) -> list[Axis | None] | None:
    known = known_axes(dimensions, node)
    if known is None:
        return None
    source, axes = known
    after = shape(node)
    result: list[Axis | None] = [None] * len(after)
    for back in range(1, len(axes) + 1):
        if same(shape(source)[-back], after[-back]):
            result[-back] = axes[-back]
    return result


@rule("repeat_interleave")
def _repeat_interleave(dimensions: Dimensions, node: fx.Node) -> list[Axis | None] | None:
    known = known_axes(dimensions, node)
    dim = known_int(argument(node, 2, "dim"))
    if known is None or dim is None:
        return None
    dim = dim_of(dim, len(known[1]))
    kept = same(shape(known[0])[dim], shape(node)[dim])
    return [axis if d != dim or kept else None for d, axis in enumerate(known[1])]


@rule("view_as_complex", "view_as_real")
def _complex(dimensions: Dimensions, node: fx.Node) -> list[Axis | None] | None:
    known = known_axes(dimensions, node)
    if known is None:
        return None
    return list(known[1][:-1]) if operation(node) == "view_as_complex" else [*known[1], None]


@rule("transpose", "permute", "movedim", "t", "T", "mT", "adjoint")
def _permute(dimensions: Dimensions, node: fx.Node) -> list[Axis | None] | None:
    known = known_axes(dimensions, node)
    if known is None:
        return None
    axes = list(known[1])
    count, name = len(axes), operation(node)
    if name == "permute":
        given: Any = node.kwargs.get("dims")
        order = [known_int(d) for d in (numbers(node, 1) if given is None else given)]
    else:
        pair: tuple[int | None, int | None]
        pair = (0, 1) if name in ("t", "T") else (-2, -1)
        if name in ("transpose", "movedim"):
            first = argument(node, 1, "dim0", "source", "axis0")
            pair = (known_int(first), known_int(argument(node, 2, "dim1", "destination", "axis1")))
        if None in pair or (name in ("t", "T") and count != 2):
            return None
        a, b = (dim_of(d, count) for d in pair if d is not None)
        order = list(range(count))
        if name == "movedim":
            order.insert(b, order.pop(a))
        else:
            order[a], order[b] = b, a
    if any(d is None for d in order) or len(order) != count:
        return None
    return [axes[d] for d in order if d is not None]


@rule("getitem")
def _getitem(dimensions: Dimensions, node: fx.Node) -> Sequence[Axis | None] | None:
    source, index = node.args
    if isinstance(source, fx.Node) and source in dimensions.several:
        at = known_int(index)
        items = dimensions.several[source]
        return items[at] if at is not None and -len(items) <= at < len(items) else None
    axes = dimensions.of(source)
    return None if axes is None else index_axes(node, source, axes, index)


def index_axes(node: fx.Node, source: Any, axes: Shape, index: Any) -> list[Axis | None] | None:
    """Axes of `source[index]` for integers, slices, None and Ellipsis."""
    items = list(index) if isinstance(index, tuple) else [index]
    used = sum(item is not None and item is not Ellipsis for item in items)
    if Ellipsis not in items:
        items.append(Ellipsis)
    at = items.index(Ellipsis)
    items[at : at + 1] = [slice(None)] * (len(axes) - used)
    for dim, place in enumerate([i for i, item in enumerate(items) if item is not None]):
        axes = at_index(axes, dim, items[place])
        one = of_one_rank(axes, dim, shape(source)[dim], items[place])
        if one is not None:
            axes, items[place] = one, slice(None)
    result: list[Axis | None] = []
    dim = 0
    for item in items:
        if item is None:
            result.append(())
            continue
        if isinstance(item, slice):
            if len(result) >= len(shape(node)):
                return None
            result.append(slice_axis(node, axes[dim], shape(source)[dim], item, len(result)))
        elif not isinstance(value(item), (int, torch.SymInt)) or isinstance(value(item), bool):
            return None
        dim += 1
    return result


def at_index(axes: Shape, dim: int, index: Any) -> Shape:
    """Axes of a tensor whose part at an index is taken: of ranks, that of one of them."""
    place, count = known_int(index), None
    if place is not None and axes[dim]:
        count = hint(axis_size(axes[dim]))
    if place is None or count is None or not -count <= place < count:
        return axes
    parts = parts_along(axes, dim, count)
    return axes if parts is None else parts[place]


def slice_axis(node: fx.Node, axis: Axis, size: Extent, item: slice, dim: int) -> Axis | None:
    """Axis of a slice; its length is read off dimension `dim` of the output, `node`."""
    length = shape(node)[dim]
    start, step = value(item.start), value(item.step)
    if isinstance(step, int) and step > 1:
        return every_other(axis, length, node, dim)
    if step not in (None, 1) or not isinstance(start, (int, torch.SymInt, type(None))):
        return None
    if same(length, size):
        return axis
    unbacked = unbacked_slice(node, axis, size, item, dim)
    if unbacked is not None:
        return unbacked
    if start is None:
        start = 0
    elif isinstance(start, int) and start < 0:
        start = size + start
    elif isinstance(start, torch.SymInt) and (start.node.has_hint() and start.node.hint < 0):
        start = size + start
    return take(axis, start, start + length, node, dim)


def every_other(axis: Axis, length: Extent, node: fx.Node, dim: int) -> Axis | None:
    """Axis of x[::n]: every n-th row of an image, as where four patches are merged into one."""
    if len(axis) != 1 or len(axis[0]) != 1 or axis[0][0].cut or axis[0][0].origin != "data":
        return None
    return ((Atom(length, "data", axis[0][0].root, node, dim),),)


def unbacked_slice(node: fx.Node, axis: Axis, size: Extent, item: slice, dim: int) -> Axis | None:
    """Axis of x[:-n] or x[-n:] where n, the text's length say, depends on data.

    PyTorch gives such a slice a length of its own, as it could be of none: x[-0:] is all of x. That
    n is not 0 is taken for granted, and the length is then that of what is left.
    """
    length, start, stop = shape(node)[dim], value(item.start), value(item.stop)
    if not isinstance(length, torch.SymInt) or length.node.has_hint():
        return None
    bounds: list[Extent] = [0, size]
    for i, bound in enumerate((start, stop)):
        if bound is None:
            continue
        if not isinstance(bound, torch.SymInt) or not bound.node.expr.could_extract_minus_sign():
            return None
        bounds[i] = size + bound
    found = take(axis, bounds[0], bounds[1], node, dim)
    if found is not None:
        learn_length(length, bounds[1] - bounds[0])
    return found


@rule("slice", "narrow")
def _slice(dimensions: Dimensions, node: fx.Node) -> list[Axis | None] | None:
    known = known_axes(dimensions, node)
    dim = known_int(argument(node, 1, "dim", default=0))
    if known is None or dim is None:
        return None
    start = argument(node, 2, "start")
    step = argument(node, 4, "step", default=1) if operation(node) == "slice" else 1
    axes: list[Axis | None] = list(known[1])
    dim = dim_of(dim, len(axes))
    length = shape(node)[dim]
    stop = length if start is None else value(start) + length
    one = of_one_rank(known[1], dim, shape(known[0])[dim], slice(start, stop))
    if one is not None:
        return list(one)
    axes[dim] = slice_axis(node, known[1][dim], shape(known[0])[dim], slice(start, None, step), dim)
    return axes


@rule("select")
def _select(dimensions: Dimensions, node: fx.Node) -> list[Axis | None] | None:
    known = known_axes(dimensions, node)
    dim = known_int(argument(node, 1, "dim"))
    if known is None or dim is None:
        return None
    dim = dim_of(dim, len(known[1]))
    axes = at_index(known[1], dim, argument(node, 2, "index"))
    return [axis for d, axis in enumerate(axes) if d != dim]


@several("split", "chunk", "unbind", "split_with_sizes", "tensor_split")
def _split(dimensions: Dimensions, node: fx.Node) -> list[Shape | None]:
    """Rule of split, chunk and unbind: one shape per output."""
    outputs = value(node)
    known = known_axes(dimensions, node)
    unbind = operation(node) == "unbind"
    dim = known_int(argument(node, 1 if unbind else 2, "dim", "axis", default=0))
    if known is None or dim is None:
        return [None] * len(outputs)
    source, axes = known
    at = dim_of(dim, len(axes))
    parts = parts_along(axes, at, len(outputs))
    if parts is not None:
        return [(*p[:at], *p[at + 1 :]) if unbind else p for p in parts]
    if unbind:
        return [(*axes[:at], *axes[at + 1 :])] * len(outputs)
    even = all(same(output.shape[at], outputs[0].shape[at]) for output in outputs)
    cut = shares(axes[at], len(outputs)) if even else None
    if cut is not None:
        return [(*axes[:at], share, *axes[at + 1 :]) for share in cut]
    result: list[Shape | None] = []
    start: Extent = 0
    for output in outputs:
        stop = start + output.shape[at]
        axis = axes[at] if same(output.shape[at], shape(source)[at]) else None
        if axis is None:
            axis = take(axes[at], start, stop, node, at)
        if axis is not None:
            axis = tuple(tuple(unreadable(atom, node) for atom in segment) for segment in axis)
        result.append(None if axis is None else (*axes[:at], axis, *axes[at + 1 :]))
        start = stop
    return result


def unreadable(atom: Atom, node: fx.Node) -> Atom:
    """An atom whose size cannot be read from `node`, because that makes several tensors."""
    if atom.node is not node:
        return atom
    return Atom(atom.size, atom.origin, atom.root, None, 0, cut=atom.cut)
