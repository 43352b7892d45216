"""How operations that compute carry the axes of tensors on: products, joins, convolutions.

See `rules` for what a rule is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from freqopt.passes.axes.dimensions import Atom, Axis, Shape, axis_size, hint, join, rank, same
from freqopt.passes.axes.graph_axes import Dimensions
from freqopt.passes.axes.rules import dim_of, known_axes, rule, several
from freqopt.passes.nodes import argument, known_int, operation, shape, tensor, value

REDUCTIONS = {
    "sum",
    "mean",
    "amax",
    "amin",
    "prod",
    "any",
    "all",
    "var",
    "std",
    "norm",
    "logsumexp",
}


@rule("pad_sequence")
def _pad_sequence(dimensions: Dimensions, node: fx.Node) -> list[Axis | None] | None:
    """Sequences stacked into a batch: those of one length keep their tokens, if they are alike."""
    tensors = argument(node, 0, "sequences")
    shapes = [dimensions.of(t) for t in tensors]
    known = [s for s in shapes if s]
    if not known or len(known) != len(shapes):
        return None
    length, *rest = _best(known)
    if any(not same(axis_size(s[0]), axis_size(known[0][0])) for s in known):
        length = None
    first = argument(node, 1, "batch_first", default=False) is True
    return [None, length, *rest] if first else [length, None, *rest]


@rule("cat", "stack")
def _cat(dimensions: Dimensions, node: fx.Node) -> list[Axis | None] | None:
    tensors = argument(node, 0, "tensors")
    dim = known_int(argument(node, 1, "dim", "axis", default=0))
    shapes = [dimensions.of(t) for t in tensors]
    if dim is None or not shapes or any(s is None for s in shapes):
        return None
    known = [s for s in shapes if s]
    if len(known) != len(shapes):
        return None
    # Beside tensors of any form, `cat` takes empty ones of one dimension, such as a new cache.
    known = [s for s in known if len(s) > 1 or not same(axis_size(s[0]), 0)] or known
    if operation(node) == "stack":
        axes: list[Axis | None] = _agreed(known)
        at = dim_of(dim, len(axes) + 1)
        axes.insert(at, slices_axis(dimensions, tensors) or dimensions.new_axis(node, at))
        return _taken_apart(known, axes, at, node)
    at = dim_of(dim, len(known[0]))
    # Of inputs that tell as much, the largest is the video, and others are frames put to it.
    known_sizes = [hint(axis_size(s[at])) or 0 for s in known]
    largest = max(range(len(known)), key=lambda i: known_sizes[i])
    axes = _best([known[largest], *known[:largest], *known[largest + 1 :]])
    axes[at] = join(s[at] for s in known)
    return axes


def _taken_apart(
    shapes: Sequence[Shape], axes: list[Axis | None], at: int, node: fx.Node
) -> list[Axis | None]:
    """Axes of stacked pieces: where these are all of one extent of channels, its two parts."""
    for dim in range(len(shapes[0])):
        atoms = [s[dim][0][0] for s in shapes if len(s[dim]) == 1 and len(s[dim][0]) == 1]
        cuts = [atom.cut for atom in atoms if atom.cut is not None and atom.origin == "made"]
        if len(cuts) < len(shapes) or len(cuts) < 2:
            continue
        (whole, _, length), count = cuts[0], len(cuts)
        bounds = [(whole, i * length, (i + 1) * length) for i in range(count)]
        if len(whole) != 1 or not same(whole[0].size, count * length):
            continue
        if all(c[0] == b[0] and same(c[1], b[1]) for c, b in zip(cuts, bounds, strict=True)):
            inner = dim + (dim >= at)
            for part, (place, size) in enumerate(((at, count), (inner, length))):
                root = whole[0].root
                atom = Atom(size, "made", root, node, place, whole[0], part, 2)
                axes[place] = ((atom,),)
    return axes


def slices_axis(dimensions: Dimensions, tensors: Sequence[fx.Node]) -> Axis | None:
    """The axis that tensors are all slices along, in order: frames that were taken one by one."""
    origins = [_slice_of(node) for node in tensors]
    source, dim, _ = origins[0] or (None, 0, 0)
    axes = dimensions.of(source)
    wanted = [(source, dim, index) for index in range(len(tensors))]
    if axes is None or origins != wanted or not same(shape(source)[dim], len(tensors)):
        return None
    return axes[dim]


def _slice_of(node: Any) -> tuple[fx.Node, int, int] | None:
    """The tensor that `node` was computed from a slice of, its dimension and the slice's index."""
    for _ in range(MOST_STEPS):
        source = node.args[0] if isinstance(node, fx.Node) and node.args else None
        if not isinstance(source, fx.Node):
            return None
        name = operation(node)
        if name == "getitem" and operation(source) == "unbind":
            dim, index = argument(source, 1, "dim", default=0), node.args[1]
            whole = source.args[0]
            if isinstance(whole, fx.Node) and isinstance(dim, int) and isinstance(index, int):
                return whole, dim_of(dim, len(shape(whole))), index
            return None
        if name in ("getitem", "select") and tensor(source) is not None:
            place = _place_of(node, len(shape(source)))
            if place is not None:
                return source, *place
        node = source
    return None


def _place_of(node: fx.Node, dims: int) -> tuple[int, int] | None:
    """Dimension and index of a slice, of x[:, :, i] or x.select(dim, i)."""
    if operation(node) == "select":
        dim, index = argument(node, 1, "dim"), argument(node, 2, "index")
        return (
            (dim_of(dim, dims), index) if isinstance(dim, int) and isinstance(index, int) else None
        )
    items = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    if Ellipsis in items or None in items:
        return None
    places = [(d, item) for d, item in enumerate(items) if isinstance(item, int)]
    return places[0] if len(places) == 1 else None


MOST_STEPS = 40
"""Operations between a frame taken out and the frames put together again."""


def _best(shapes: Sequence[Shape]) -> list[Axis | None]:
    return [max(axes, key=rank) for axes in zip(*shapes, strict=True)]


def _agreed(shapes: Sequence[Shape]) -> list[Axis | None]:
    """Of stacked tensors; of different pieces of a whole nothing is known."""
    return [
        None if any(_is_other_piece(axes[0], axis) for axis in axes[1:]) else max(axes, key=rank)
        for axes in zip(*shapes, strict=True)
    ]


def _is_other_piece(first: Axis, second: Axis) -> bool:
    """Whether two axes are pieces, cut out at different places."""
    atoms = [axis[0][0] for axis in (first, second) if len(axis) == 1 and len(axis[0]) == 1]
    cuts = [atom.cut for atom in atoms]
    if len(cuts) < 2 or cuts[0] is None or cuts[1] is None:
        return False
    return not (same(cuts[0][1], cuts[1][1]) and same(cuts[0][2], cuts[1][2]))


@rule("embedding")
def _embedding(dimensions: Dimensions, node: fx.Node) -> list[Axis | None] | None:
    """Indices and weight come in one order from nn.functional and in the other from aten."""
    for source in node.all_input_nodes:
        axes = dimensions.of(source)
        if axes is not None and len(axes) == len(shape(node)) - 1:
            if all(same(a, b) for a, b in zip(shape(source), shape(node), strict=False)):
                return [*axes, None]
    return None


@rule("linear")
def _linear(dimensions: Dimensions, node: fx.Node) -> list[Axis | None] | None:
    known = known_axes(dimensions, node)
    return None if known is None else [*known[1][:-1], None]


@rule("matmul", "bmm", "mm", "addmm", "baddbmm")
def _matmul(dimensions: Dimensions, node: fx.Node) -> list[Axis | None] | None:
    start = 1 if operation(node) in ("addmm", "baddbmm") else 0
    left = argument(node, start, "input", "self", "batch1", "mat1")
    right = argument(node, start + 1, "other", "mat2", "batch2")
    a, b = dimensions.of(left), dimensions.of(right)
    if a is None or b is None or len(a) < 2 or len(b) < 2:
        return None
    result: list[Axis | None] = [None] * len(shape(node))
    for axes, sizes in ((a, shape(left)), (b, shape(right))):
        for back in range(3, len(axes) + 1):
            if same(sizes[-back], shape(node)[-back]):
                known = result[-back]
                if known is None or rank(axes[-back]) > rank(known):
                    result[-back] = axes[-back]
    result[-2], result[-1] = a[-2], b[-1]
    return result


@rule("scaled_dot_product_attention")
def _attention(dimensions: Dimensions, node: fx.Node) -> list[Axis | None] | None:
    query = dimensions.of(argument(node, 0, "query"))
    values = dimensions.of(argument(node, 2, "value"))
    return None if query is None or values is None else [*query[:-1], values[-1]]


@several("multi_head_attention_forward")
def _packed_attention(dimensions: Dimensions, node: fx.Node) -> list[Shape | None]:
    """Rule of nn.MultiheadAttention's single node: its tokens are those of the query."""
    query = dimensions.of(argument(node, 0, "query"))
    return [None if query is None else (*query[:-1], ((),)), None]


@several("flex_attention", "flex_attention_hop")
def _flex_attention(dimensions: Dimensions, node: fx.Node) -> list[Shape | None]:
    query, values = dimensions.of(node.args[0]), dimensions.of(node.args[2])
    if query is None or values is None:
        return [None] * len(value(node))
    others: list[Shape | None] = [query[:-1]] * (len(value(node)) - 1)
    return [(*query[:-1], values[-1]), *others]


@rule("einsum")
def _einsum(dimensions: Dimensions, node: fx.Node) -> list[Axis | None] | None:
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    left, arrow, right = str(equation).replace(" ", "").partition("->")
    if not arrow or "." in left or len(left.split(",")) != len(operands):
        return None
    found: dict[str, Axis] = {}
    for labels, operand in zip(left.split(","), operands, strict=True):
        for label, axis in zip(labels, dimensions.of(operand) or (), strict=False):
            if label not in found or rank(axis) > rank(found[label]):
                found[label] = axis
    return [found.get(label) for label in right]


@rule(*sorted(REDUCTIONS))
def _reduce(dimensions: Dimensions, node: fx.Node) -> list[Axis | None] | None:
    known = known_axes(dimensions, node)
    given = argument(node, 1, "dim", "axis")
    if known is None or given is None:
        return None
    axes: list[Axis | None] = list(known[1])
    listed = given if isinstance(given, (tuple, list)) else [given]
    dims = {dim_of(d, len(axes)) for d in listed if isinstance(d, int)}
    if len(shape(node)) == len(axes):
        return [() if d in dims else axis for d, axis in enumerate(axes)]
    return [axis for d, axis in enumerate(axes) if d not in dims]


@several("meshgrid")
def _meshgrid(dimensions: Dimensions, node: fx.Node) -> list[Shape | None]:
    """Rule of meshgrid: every output has the axes of all inputs."""
    given = node.args[0] if len(node.args) == 1 else node.args
    tensors = list(given) if isinstance(given, (tuple, list)) else [given]
    axes: list[Axis] = []
    for item in tensors:
        known = dimensions.of(item)
        if known is None or len(known) > 1:
            return [None] * len(value(node))
        axes.append(known[0] if known else ())
    if node.kwargs.get("indexing") == "xy" and len(axes) > 1:
        axes[:2] = axes[1::-1]
    return [tuple(axes)] * len(tensors)
