"""Carries atoms forward through a graph: the axes of every tensor (see `dimensions`).

One rule per kind of operation. A rule may be wrong about an unusual call; every axis is therefore
checked against the tensor's real sizes, and one that does not provably fit becomes a fresh atom.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from freqopt.passes.dimensions import (
    Atom,
    Axis,
    Origin,
    Segment,
    Shape,
    axis_size,
    distribute,
    join,
    rank,
    regroup,
    same,
    take,
)
from freqopt.passes.nodes import argument, is_pointwise, known_int, numbers, operation, shape, value
from freqopt.passes.provenance import Provenance
from freqopt.passes.site import Extent

SAME_AXES = {
    "to", "float", "half", "bfloat16", "double", "int", "long", "bool", "type", "type_as", "clone",
    "contiguous", "detach", "dropout", "native_dropout", "layer_norm", "rms_norm", "group_norm",
    "batch_norm", "instance_norm", "normalize", "softmax", "log_softmax", "_to_copy", "alias",
    "cuda", "cpu", "pin_memory", "empty_like", "zeros_like", "ones_like", "full_like", "rand_like",
    "randn_like", "feature_dropout", "cumsum", "nan_to_num", "copy_", "masked_fill_", "fill_",
    "zero_", "index_put_", "index_fill", "scatter", "alpha_dropout", "roll", "requires_grad",
}  # fmt: skip
"""Operations whose output has the axes of their first argument."""

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

Rule = Callable[["Dimensions", fx.Node], Sequence[Axis | None] | None]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule of some operations."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


class Dimensions:
    """Axes of every tensor of a graph.

    inputs: axes of the placeholders, for the body of a higher-order operator.
    """

    def __init__(self, graph: fx.Graph, inputs: Sequence[Shape | None] | None = None) -> None:
        self.axes: dict[fx.Node, Shape] = {}
        self.several: dict[fx.Node, list[Shape | None]] = {}
        self.bodies: dict[fx.Node, tuple[fx.GraphModule, Dimensions]] = {}
        self.positions: dict[Atom, list[Segment]] = {}
        self.graph = graph
        self._provenance: Provenance | None = None
        self.arrival = {node.name: i for i, node in enumerate(graph.find_nodes(op="placeholder"))}
        given = iter(inputs or ())
        for node in graph.nodes:
            if node.op == "placeholder":
                known = next(given, None)
                self.axes[node] = known if known is not None else self._fresh(node, origin_of(node))
            elif node.op == "get_attr":
                self.axes[node] = self._fresh(node, "parameter")
            elif node.op != "output":
                self._visit(node)

    def of(self, node: Any) -> Shape | None:
        """Axes of the tensor that a node makes."""
        return self.axes.get(node) if isinstance(node, fx.Node) else None

    def provenance(self) -> Provenance:
        """What tensors were computed from; made when it is first asked for."""
        if self._provenance is None:
            self._provenance = Provenance(self.graph)
        return self._provenance

    def _visit(self, node: fx.Node) -> None:
        if enter_body(self, node):
            return
        if not isinstance(value(node), torch.Tensor):
            if isinstance(value(node), (tuple, list)):
                self.several[node] = SEVERAL.get(operation(node), _unknown)(self, node)
            return
        name = operation(node)
        found = None
        if name in RULES:
            found = RULES[name](self, node)
        elif name in SAME_AXES:
            found = self.of(node.args[0] if node.args else next(iter(node.kwargs.values()), None))
        elif is_pointwise(name):
            found = self.broadcast(node)
        self.axes[node] = self.checked(node, found)

    def checked(self, node: fx.Node, axes: Sequence[Axis | None] | None) -> Shape:
        """The axes, with a fresh atom for each dimension that they do not provably fit."""
        sizes = shape(node)
        if axes is None or len(axes) != len(sizes):
            return self._fresh(node, "made")
        return tuple(
            axis if axis is not None and same(axis_size(axis), size) else self.new_axis(node, dim)
            for dim, (axis, size) in enumerate(zip(axes, sizes, strict=True))
        )

    def _fresh(self, node: fx.Node, origin: Origin) -> Shape:
        return tuple(self.new_axis(node, dim, origin) for dim in range(len(shape(node))))

    def new_axis(self, node: fx.Node, dim: int, origin: Origin = "made") -> Axis:
        """An axis of one new atom."""
        return ((Atom(shape(node)[dim], origin, (node.name, dim), node, dim),),)

    def broadcast(self, node: fx.Node) -> list[Axis | None]:
        """Axes of an elementwise operation: per dimension, the operand that tells most."""
        rank_out = len(shape(node))
        result: list[Axis | None] = [None] * rank_out
        for operand in node.all_input_nodes:
            axes, sizes = self.of(operand), shape(operand)
            if axes is None:
                continue
            for back in range(1, min(rank_out, len(axes)) + 1):
                axis, known, out = axes[-back], result[-back], shape(node)[-back]
                if same(sizes[-back], 1) and not same(out, 1):
                    continue
                if known is None:
                    result[-back] = axis
                elif axis is not known:
                    self._note_positions(axis, known)
                    if self._precedes(axis, known):
                        result[-back] = axis
        return result

    def _note_positions(self, first: Axis, second: Axis) -> None:
        """Remember the lattice of a table of positions that packed tokens meet element by element.

        Rotary tables made in the graph from three ranges tell how tokens lie that came in one axis.
        """
        if len(first) != len(second):
            return
        for a, b in zip(first, second, strict=True):
            for tokens, table in ((a, b), (b, a)):
                if len(tokens) == 1 and tokens[0].origin == "data" and is_table(table):
                    if same(tokens[0].size, axis_size((table,))):
                        self.positions.setdefault(tokens[0], []).append(table)

    def _precedes(self, axis: Axis, known: Axis) -> bool:
        """Whether an axis tells more than another that is aligned with it.

        Of equals, that of the input which came first: tokens are projected before the tables of
        positions that are multiplied with them come in.
        """
        first, second = rank(axis), rank(known)
        return first > second or (first == second and self._arrival(axis) < self._arrival(known))

    def _arrival(self, axis: Axis) -> int:
        names = [atom.root[0] for segment in axis for atom in segment if atom.origin == "data"]
        return min((self.arrival.get(name, 0) for name in names), default=0)


def is_table(segment: Segment) -> bool:
    """Whether a segment is a lattice of three axes, none of which came with the data."""
    return len(segment) == 3 and all(a.origin != "data" and a.parent is None for a in segment)


def origin_of(node: fx.Node) -> Origin:
    """Whether a graph input is a parameter or buffer, or data of this call."""
    found = value(node)
    if isinstance(found, torch.nn.Parameter):
        return "parameter"
    argument_of_graph = node.meta.get("grapharg")
    source = getattr(argument_of_graph, "source", None)
    while source is not None:
        if "ParamBuffer" in type(source).__name__:
            return "parameter"
        source = getattr(source, "base", None)
    name = str(node.target)
    if "_parameters_" in name or "_buffers_" in name or name.startswith(("p_", "b_", "c_")):
        return "parameter"
    return "data"


def enter_body(dimensions: Dimensions, node: fx.Node) -> bool:
    """Follow the axes into the body of a higher-order operator (activation checkpointing)."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    owner = node.graph.owning_module
    first = node.args[0]
    if first.op != "get_attr" or owner is None:
        return False
    body = getattr(owner, str(first.target), None)
    if not isinstance(body, fx.GraphModule):
        return False
    inner = Dimensions(body.graph, [dimensions.of(argument) for argument in node.args[1:]])
    dimensions.bodies[node] = (body, inner)
    returned = next(n for n in reversed(body.graph.nodes) if n.op == "output").args[0]
    if isinstance(returned, fx.Node):
        dimensions.axes[node] = dimensions.checked(node, inner.of(returned))
    else:
        assert isinstance(returned, (tuple, list))
        dimensions.several[node] = [inner.of(item) for item in returned]
    return True


def _unknown(dimensions: Dimensions, node: fx.Node) -> list[Shape | None]:
    return [None] * len(value(node))


def _dim(index: int, rank_: int) -> int:
    return index + rank_ if index < 0 else index


def _known(dimensions: Dimensions, node: fx.Node) -> tuple[fx.Node, Shape] | None:
    source = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))
    axes = dimensions.of(source)
    return (source, axes) if isinstance(source, fx.Node) and axes is not None else None


@rule("view", "reshape", "flatten", "unflatten", "view_as", "reshape_as")
def _reshape(dimensions: Dimensions, node: fx.Node) -> list[Axis | None] | None:
    known = _known(dimensions, node)
    if known is None or isinstance(argument(node, 1, "dtype"), torch.dtype):
        return None
    source, axes = known
    before, after = shape(source), shape(node)
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
    start, stop = _dim(start, rank_in), _dim(stop, rank_in)
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
    known = _known(dimensions, node)
    dim = known_int(argument(node, 1, "dim"))
    if known is None or dim is None:
        return None
    axes: list[Axis | None] = list(known[1])
    if operation(node) == "unsqueeze":
        axes.insert(_dim(dim, len(axes) + 1), ())
    elif len(shape(node)) < len(axes):
        del axes[_dim(dim, len(axes))]
    return axes


@rule("expand", "expand_as", "broadcast_to", "repeat", "tile")
def _expand(dimensions: Dimensions, node: fx.Node) -> list[Axis | None] | None:
    known = _known(dimensions, node)
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
    known = _known(dimensions, node)
    dim = known_int(argument(node, 2, "dim"))
    if known is None or dim is None:
        return None
    dim = _dim(dim, len(known[1]))
    kept = same(shape(known[0])[dim], shape(node)[dim])
    return [axis if d != dim or kept else None for d, axis in enumerate(known[1])]


@rule("view_as_complex", "view_as_real")
def _complex(dimensions: Dimensions, node: fx.Node) -> list[Axis | None] | None:
    known = _known(dimensions, node)
    if known is None:
        return None
    return list(known[1][:-1]) if operation(node) == "view_as_complex" else [*known[1], None]


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


@rule("transpose", "permute", "movedim", "t", "T", "mT", "adjoint")
def _permute(dimensions: Dimensions, node: fx.Node) -> list[Axis | None] | None:
    known = _known(dimensions, node)
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
        a, b = (_dim(d, count) for d in pair if d is not None)
        order = list(range(count))
        if name == "movedim":
            order.insert(b, order.pop(a))
        else:
            order[a], order[b] = b, a
    if any(d is None for d in order) or len(order) != count:
        return None
    return [axes[d] for d in order if d is not None]


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
    if operation(node) == "stack":
        axes: list[Axis | None] = _best(known)
        axes.insert(_dim(dim, len(axes) + 1), dimensions.new_axis(node, _dim(dim, len(axes) + 1)))
        return axes
    axes = _best(known)
    at = _dim(dim, len(axes))
    axes[at] = join(s[at] for s in known)
    return axes


def _best(shapes: Sequence[Shape]) -> list[Axis | None]:
    return [max(axes, key=rank) for axes in zip(*shapes, strict=True)]


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
    known = _known(dimensions, node)
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


@rule("conv1d", "conv2d", "conv3d")
def _conv(dimensions: Dimensions, node: fx.Node) -> list[Axis | None] | None:
    known = _known(dimensions, node)
    if known is None or len(known[1]) != len(shape(node)):
        return None
    axes: list[Axis | None] = [known[1][0], None]
    for dim in range(2, len(known[1])):
        axes.append(resized(known[1][dim], shape(node)[dim], node, dim))
    return axes


def resized(axis: Axis, size: Extent, node: fx.Node, dim: int) -> Axis | None:
    """The same axis of an input with another extent: convolved, padded or interpolated."""
    if len(axis) != 1 or len(axis[0]) != 1:
        return None
    atom = axis[0][0]
    if atom.cut is not None and len(atom.cut[0]) != 1:
        return None
    return ((Atom(size, atom.origin, atom.root, node, dim),),)


@rule("pad", "constant_pad_nd", "interpolate", "upsample")
def _resize(dimensions: Dimensions, node: fx.Node) -> list[Axis | None] | None:
    """Dimensions that change stay axes of the same input, with another extent."""
    known = _known(dimensions, node)
    if known is None or len(known[1]) != len(shape(node)):
        return None
    result: list[Axis | None] = []
    for dim, axis in enumerate(known[1]):
        size = shape(node)[dim]
        if same(shape(known[0])[dim], size):
            result.append(axis)
        else:
            result.append(resized(axis, size, node, dim))
    return result


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
    known = _known(dimensions, node)
    given = argument(node, 1, "dim", "axis")
    if known is None or given is None:
        return None
    axes: list[Axis | None] = list(known[1])
    listed = given if isinstance(given, (tuple, list)) else [given]
    dims = {_dim(d, len(axes)) for d in listed if isinstance(d, int)}
    if len(shape(node)) == len(axes):
        return [() if d in dims else axis for d, axis in enumerate(axes)]
    return [axis for d, axis in enumerate(axes) if d not in dims]


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


def slice_axis(node: fx.Node, axis: Axis, size: Extent, item: slice, dim: int) -> Axis | None:
    """Axis of a slice; its length is read off dimension `dim` of the output, `node`."""
    length = shape(node)[dim]
    start, step = value(item.start), value(item.step)
    if step not in (None, 1) or not isinstance(start, (int, torch.SymInt, type(None))):
        return None
    if same(length, size):
        return axis
    if start is None:
        start = 0
    elif isinstance(start, int) and start < 0:
        start = size + start
    elif isinstance(start, torch.SymInt) and (start.node.has_hint() and start.node.hint < 0):
        start = size + start
    return take(axis, start, start + length, node, dim)


@rule("slice", "narrow")
def _slice(dimensions: Dimensions, node: fx.Node) -> list[Axis | None] | None:
    known = _known(dimensions, node)
    dim = known_int(argument(node, 1, "dim", default=0))
    if known is None or dim is None:
        return None
    start = argument(node, 2, "start")
    step = argument(node, 4, "step", default=1) if operation(node) == "slice" else 1
    axes: list[Axis | None] = list(known[1])
    dim = _dim(dim, len(axes))
    axes[dim] = slice_axis(node, known[1][dim], shape(known[0])[dim], slice(start, None, step), dim)
    return axes


@rule("select")
def _select(dimensions: Dimensions, node: fx.Node) -> list[Axis | None] | None:
    known = _known(dimensions, node)
    dim = known_int(argument(node, 1, "dim"))
    if known is None or dim is None:
        return None
    dim = _dim(dim, len(known[1]))
    return [axis for d, axis in enumerate(known[1]) if d != dim]


def _split(dimensions: Dimensions, node: fx.Node) -> list[Shape | None]:
    """Rule of split, chunk and unbind: one shape per output."""
    outputs = value(node)
    known = _known(dimensions, node)
    unbind = operation(node) == "unbind"
    dim = known_int(argument(node, 1 if unbind else 2, "dim", "axis", default=0))
    if known is None or dim is None:
        return [None] * len(outputs)
    source, axes = known
    at = _dim(dim, len(axes))
    if unbind:
        return [(*axes[:at], *axes[at + 1 :])] * len(outputs)
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


def _meshgrid(dimensions: Dimensions, node: fx.Node) -> list[Shape | None]:
    """Rule of meshgrid: every output has the axes of all inputs."""
    given = node.args[0] if len(node.args) == 1 else node.args
    tensors = list(given) if isinstance(given, (tuple, list)) else [given]
    axes: list[Axis] = []
    for item in tensors:
        known = dimensions.of(item)
        if known is None or len(known) > 1:
            return _unknown(dimensions, node)
        axes.append(known[0] if known else ())
    if node.kwargs.get("indexing") == "xy" and len(axes) > 1:
        axes[:2] = axes[1::-1]
    return [tuple(axes)] * len(tensors)


SEVERAL: dict[str, Callable[[Dimensions, fx.Node], list[Shape | None]]] = {
    "split": _split,
    "chunk": _split,
    "unbind": _split,
    "meshgrid": _meshgrid,
    "split_with_sizes": _split,
    "tensor_split": _split,
}
