"""Carries dimension provenance through a graph: one rule per kind of operation.

Rules exist for what keeps, moves, merges or cuts axes. An operation without a rule makes dimensions
of which nothing is known, so an unfamiliar operation can hide a grid but never invent one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from freqopt.passes.dims import (
    DATA,
    ONE,
    UNKNOWN,
    WEIGHT,
    Atom,
    Dim,
    Dims,
    fresh,
    rank,
    reshape,
    single,
    size_of,
)
from freqopt.passes.graph_values import example, is_getitem, op_name, same, shape_of

Value = Dims | tuple[Any, ...] | None
"""Dims of a tensor, a tuple of such for several tensors, or None."""

POINTWISE = frozenset(
    """add sub mul div pow neg exp exp2 log sin cos tanh sigmoid silu gelu relu relu6 elu leaky_relu
    mish hardswish softplus sqrt rsqrt reciprocal abs sign square clamp clip minimum maximum min max
    float half bfloat16 double to type type_as bool int long clone contiguous detach alias dropout
    feature_dropout alpha_dropout softmax log_softmax layer_norm rms_norm group_norm batch_norm
    instance_norm native_layer_norm normalize where masked_fill bitwise_and bitwise_or logical_and
    logical_or logical_not eq ne lt le gt ge lerp addcmul addcdiv nan_to_num erf fill zero copy
    zeros_like ones_like empty_like full_like rand_like randn_like new_empty new_zeros floor round
    remainder floordiv requires_grad lift_fresh identity scalar_tensor glu_gate fused_rms_norm
    """.split()
)

RESHAPES = frozenset(["view", "reshape", "flatten", "unflatten", "view_as", "reshape_as", "ravel"])


class Provenance:
    """Dims of every node of a graph; `of` reads them, `inputs` are dims of a subgraph's inputs."""

    def __init__(self, graph: fx.GraphModule, inputs: list[Value] | None = None) -> None:
        self.values: dict[fx.Node, Value] = {}
        self.children: dict[fx.Node, Provenance] = {}
        self._graph = graph
        given = iter(inputs or [])
        for node in graph.graph.nodes:
            known = next(given, None) if node.op == "placeholder" else None
            self.values[node] = known if known is not None else self._evaluate(node)

    def of(self, node: fx.Node) -> Dims | None:
        """Dims of a node's tensor, or None where it makes none."""
        value = self.values.get(node)
        return value if shape_of(node) is not None else None

    def _evaluate(self, node: fx.Node) -> Value:
        if node.op in ("placeholder", "get_attr"):
            return self._input(node)
        if node.op not in ("call_function", "call_method"):
            return None
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return self._subgraph(node)
        name = op_name(node)
        rule = RULES.get(name)
        if rule is None and _is_pointwise(node, name):
            rule = _pointwise
        try:
            found = rule(self, node) if rule is not None else None
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            found = None  # a call of a form the rule does not know is an operation without a rule
        return self._checked(node, found)

    def _checked(self, node: fx.Node, found: Value) -> Value:
        """`found` where its sizes agree with the tensor's; unknown dimensions elsewhere."""
        value = example(node)
        if isinstance(value, (tuple, list)):
            if isinstance(found, tuple) and len(found) == len(value):
                return found
            return tuple(_unknown(node, item, i) for i, item in enumerate(value))
        shape = shape_of(node)
        if shape is None:
            return None
        if found is None or len(found) != len(shape):
            return _unknown(node, value, 0)
        pairs = enumerate(zip(found, shape, strict=True))
        return tuple(
            dim if same(size_of(dim), size) else fresh(node, i, size) for i, (dim, size) in pairs
        )

    def _input(self, node: fx.Node) -> Value:
        shape = shape_of(node)
        if shape is None:
            return None
        origin = WEIGHT if node.op == "get_attr" or is_weight(node) else DATA
        return tuple(
            single(Atom((node.name, i), size, origin, (node.name, i), (node, i)))
            for i, size in enumerate(shape)
        )

    def _subgraph(self, node: fx.Node) -> Value:
        """Recurse into the body of a higher-order op whose operands follow its graph."""
        bodies = [a for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr"]
        modules = [getattr(self._graph, str(b.target), None) for b in bodies]
        if len(modules) != 1 or not isinstance(modules[0], fx.GraphModule):
            return self._checked(node, None)
        operands = [a for a in node.args if a is not bodies[0]]
        inputs = [self.values.get(a) if isinstance(a, fx.Node) else None for a in operands]
        child = self.children[node] = Provenance(modules[0], inputs)
        output = next(n for n in modules[0].graph.nodes if n.op == "output").args[0]
        if isinstance(output, (tuple, list)):
            return tuple(child.values.get(o) if isinstance(o, fx.Node) else None for o in output)
        return child.values.get(output)


def is_weight(node: fx.Node) -> bool:
    """Whether a graph input is a parameter or buffer rather than data."""
    if isinstance(example(node), torch.nn.Parameter):
        return True
    name = str(node.target)
    return "_parameters_" in name or "_buffers_" in name or name.startswith(("p_", "b_", "c_"))


def _unknown(node: fx.Node, value: Any, index: int) -> Value:
    if not isinstance(value, Tensor):
        return None
    return tuple(fresh(node, 100 * index + i, size) for i, size in enumerate(value.shape))


def _is_pointwise(node: fx.Node, name: str) -> bool:
    if name in POINTWISE:
        return True
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags


def _operands(state: Provenance, node: fx.Node) -> list[Dims]:
    """Dims of the tensor operands, in order."""
    found = [state.of(a) for a in node.all_input_nodes]
    return [dims for dims in found if dims is not None]


def _first(state: Provenance, node: fx.Node) -> Dims:
    source = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))
    dims = state.of(source) if isinstance(source, fx.Node) else None
    if dims is None:
        raise KeyError(node.name)
    return dims


def _pointwise(state: Provenance, node: fx.Node) -> Value:
    """Broadcast: each dimension from the operand that knows most of it."""
    shape = shape_of(node)
    operands = _operands(state, node)
    if shape is None or not operands:
        return None
    result: list[Dim] = []
    for i, size in enumerate(shape):
        back = i - len(shape)
        options = [d[back] for d in operands if -back <= len(d)]
        options = [d for d in options if same(size_of(d), size)]
        result.append(max(options, key=rank) if options else fresh(node, i, size))
    return tuple(result)


def _reshape(state: Provenance, node: fx.Node) -> Value:
    shape = shape_of(node)
    return reshape(_first(state, node), shape, node) if shape is not None else None


def _permuted(state: Provenance, node: fx.Node) -> Value:
    dims = _first(state, node)
    order = node.args[1:] or (node.kwargs["dims"],)
    order = order[0] if isinstance(order[0], (tuple, list)) else order
    return tuple(dims[i] for i in order)


def _transposed(state: Provenance, node: fx.Node) -> Value:
    dims = list(_first(state, node))
    if op_name(node) in ("t", "mT", "T", "adjoint", "getattr"):
        first, second = -2, -1
    else:
        first = node.kwargs.get("dim0", node.args[1] if len(node.args) > 1 else None)
        second = node.kwargs.get("dim1", node.args[-1])
    dims[first], dims[second] = dims[second], dims[first]
    return tuple(dims)


def _getattr(state: Provenance, node: fx.Node) -> Value:
    if node.args[1] in ("mT", "T", "H", "mH"):
        return _transposed(state, node)
    return None


def _moved(state: Provenance, node: fx.Node) -> Value:
    dims = list(_first(state, node))
    source, target = node.args[1], node.args[2]
    if not (isinstance(source, int) and isinstance(target, int)):
        return None
    moved = dims.pop(source)
    dims.insert(target % (len(dims) + 1), moved)
    return tuple(dims)


def _squeezed(state: Provenance, node: fx.Node) -> Value:
    dims, shape = list(_first(state, node)), shape_of(node)
    chosen = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if isinstance(chosen, int):
        if shape is not None and len(shape) < len(dims):
            dims.pop(chosen)
        return tuple(dims)
    return tuple(d for d in dims if not same(size_of(d), 1))


def _unsqueezed(state: Provenance, node: fx.Node) -> Value:
    dims = list(_first(state, node))
    at = node.args[1] if len(node.args) > 1 else node.kwargs["dim"]
    dims.insert(at if at >= 0 else at + len(dims) + 1, ONE)
    return tuple(dims)


def _joined(state: Provenance, node: fx.Node) -> Value:
    tensors = node.args[0] if node.args else node.kwargs["tensors"]
    axis = node.kwargs.get(
        "dim", node.kwargs.get("axis", node.args[1] if len(node.args) > 1 else 0)
    )
    parts = [state.of(t) for t in tensors]
    if any(p is None for p in parts):
        return None
    known = [p for p in parts if p is not None]
    axis %= len(known[0])
    result = [max((p[i] for p in known), key=rank) for i in range(len(known[0]))]
    result[axis] = tuple(s for p in known for s in p[axis] if not _empty(s))
    return tuple(result)


def _empty(segment: tuple[Atom, ...]) -> bool:
    return any(same(atom.size, 0) for atom in segment)


def _stacked(state: Provenance, node: fx.Node) -> Value:
    tensors = node.args[0]
    axis = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    dims = list(state.of(tensors[0]) or ())
    axis = axis if axis >= 0 else axis + len(dims) + 1
    dims.insert(axis, fresh(node, axis, len(tensors)))
    return tuple(dims)


def _expanded(state: Provenance, node: fx.Node) -> Value:
    """Dimensions whose size stays; repeated ones are new."""
    dims, shape = _first(state, node), shape_of(node)
    if shape is None:
        return None
    dims = (*[ONE] * (len(shape) - len(dims)), *dims)
    return tuple(
        d if same(size_of(d), s) else fresh(node, i, s)
        for i, (d, s) in enumerate(zip(dims, shape, strict=True))
    )


def _pieces(state: Provenance, node: fx.Node) -> Value:
    """chunk, split, unbind and the like: pieces that coincide with segments keep them."""
    dims, made = _first(state, node), example(node)
    name = op_name(node)
    axis = node.kwargs.get("dim")
    if axis is None:
        at = 1 if name == "unbind" else 2
        axis = node.args[at] if len(node.args) > at else 0
    axis %= len(dims)
    if name == "unbind":
        rest = dims[:axis] + dims[axis + 1 :]
        return tuple(rest for _ in made)
    segments, result = list(dims[axis]), []
    for index, item in enumerate(made):
        size = item.shape[axis]
        piece = _take(segments, size)
        part = piece if piece is not None else fresh(node, 100 * index + axis, size)
        result.append((*dims[:axis], part, *dims[axis + 1 :]))
    return tuple(result)


def _take(segments: list[tuple[Atom, ...]], size: Any) -> Dim | None:
    """Take leading segments that together have `size`; if none fit, forget the rest."""
    total: Any = 0
    for count in range(1, len(segments) + 1):
        total = total + math.prod([atom.size for atom in segments[count - 1]])
        if same(total, size):
            taken = tuple(segments[:count])
            del segments[:count]
            return taken
    segments.clear()
    return None


def _sliced_dim(node: fx.Node, dim: Dim, size: Any, index: int, start: Any, stop: Any) -> Dim:
    """Part of a dimension: whole, a run of its segments, or a new axis cut from one."""
    if same(size_of(dim), size):
        return dim
    for first in range(len(dim)):
        for last in range(first + 1, len(dim) + 1):
            part = dim[first:last]
            offset = size_of(dim[:first])
            begin = 0 if start is None else start
            begins = same(offset, begin) or same(size_of(dim) + begin, offset)
            if same(size_of(part), size) and begins:
                return part
    known = [a for s in dim for a in s]
    if len(known) == 1 and known[0].axis is not None:
        atom = known[0]
        cut = (*atom.key, "cut", str(start), str(stop))
        return single(Atom(cut, size, atom.origin, atom.axis, (node, index)))
    return fresh(node, index, size)


def _indexed(state: Provenance, node: fx.Node) -> Value:
    source, index = node.args[0], node.args[1]
    value = state.values.get(source)
    if isinstance(example(source), (tuple, list)):
        return value[index] if isinstance(value, tuple) and isinstance(index, int) else None
    dims, shape = _first(state, node), shape_of(node)
    if shape is None:
        return None
    parts = list(index) if isinstance(index, (tuple, list)) else [index]
    used = sum(p is not None and p is not Ellipsis for p in parts)
    if Ellipsis not in parts:
        parts.append(Ellipsis)
    result: list[Dim] = []
    position = 0
    for part in parts:
        out = len(result)
        if part is None:
            result.append(ONE)
        elif part is Ellipsis:
            for _ in range(len(dims) - used):
                result.append(dims[position])
                position += 1
        elif isinstance(part, slice):
            if part.step not in (None, 1):
                result.append(fresh(node, out, shape[out]))
            else:
                bounds = (example(part.start), example(part.stop))
                result.append(_sliced_dim(node, dims[position], shape[out], out, *bounds))
            position += 1
        elif isinstance(part, int):
            position += 1
        else:
            return None
    return tuple(result)


def _slice(state: Provenance, node: fx.Node) -> Value:
    """aten.slice and Tensor.narrow."""
    dims, shape = list(_first(state, node)), shape_of(node)
    arguments = [*node.args[1:], None, None, None, None][:4]
    axis, start, stop = arguments[0] or 0, arguments[1], arguments[2]
    if op_name(node) == "narrow":
        stop = None
    elif arguments[3] not in (None, 1):
        return None
    axis %= len(dims)
    if shape is None:
        return None
    bounds = (example(start), example(stop))
    dims[axis] = _sliced_dim(node, dims[axis], shape[axis], axis, *bounds)
    return tuple(dims)


def _select(state: Provenance, node: fx.Node) -> Value:
    dims = list(_first(state, node))
    dims.pop(node.args[1])
    return tuple(dims)


def _linear(state: Provenance, node: fx.Node) -> Value:
    dims, shape = _first(state, node), shape_of(node)
    if shape is None:
        return None
    last = len(shape) - 1
    return (*dims[:-1], fresh(node, last, shape[-1]))


def _matmul(state: Provenance, node: fx.Node) -> Value:
    """a @ b, bmm, addmm, baddbmm: rows of a, columns of b, batch from whichever knows more."""
    names = [a for a in node.args if isinstance(a, fx.Node)]
    if op_name(node) in ("addmm", "baddbmm"):
        names = names[1:]
    a, b = state.of(names[0]), state.of(names[1])
    if a is None or b is None or len(a) < 2 or len(b) < 2:
        return None
    longer, shorter = (a, b) if len(a) >= len(b) else (b, a)
    batch = list(longer[:-2])
    for i in range(1, len(shorter) - 1):
        batch[-i] = max(batch[-i], shorter[-2 - i], key=rank)
    return (*batch, a[-2], b[-1])


def _einsum(state: Provenance, node: fx.Node) -> Value:
    equation = node.args[0]
    operands = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
    left, right = equation.replace(" ", "").split("->")
    found: dict[str, Dim] = {}
    for labels, operand in zip(left.split(","), operands, strict=True):
        dims = state.of(operand)
        if dims is None or "." in labels or len(labels) != len(dims):
            return None
        for label, dim in zip(labels, dims, strict=True):
            found[label] = max(found.get(label, dim), dim, key=rank)
    return tuple(found[label] for label in right)


def _conv(state: Provenance, node: fx.Node) -> Value:
    """Spatial axes shrink but stay axes of the same input; channels are new."""
    dims, shape = _first(state, node), shape_of(node)
    if shape is None:
        return None
    unbatched = len(dims) == len(shape) and len(dims) < 3
    if unbatched:
        return None
    result = [dims[0], fresh(node, 1, shape[1])]
    for i in range(2, len(shape)):
        atoms = [a for s in dims[i] for a in s]
        if len(atoms) != 1:
            result.append(fresh(node, i, shape[i]))
            continue
        atom = atoms[0]
        key = (*atom.key, node.name, i)
        result.append(single(Atom(key, shape[i], atom.origin, atom.axis, (node, i))))
    return tuple(result)


def _pool(state: Provenance, node: fx.Node) -> Value:
    found = _conv(state, node)
    return None if found is None else (found[0], _first(state, node)[1], *found[2:])


def _attention(state: Provenance, node: fx.Node) -> Value:
    from freqopt.passes.graph_values import argument

    query, value = state.of(argument(node, "query")), state.of(argument(node, "value"))
    return None if query is None or value is None else (*query[:-1], value[-1])


def _reduced(state: Provenance, node: fx.Node) -> Value:
    """sum, mean, ...: kept dimensions stay."""
    dims, shape = _first(state, node), shape_of(node)
    axes = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    if axes is None or shape is None:
        return None
    chosen = {a % len(dims) for a in (axes if isinstance(axes, (tuple, list)) else [axes])}
    if len(shape) == len(dims):
        return tuple(ONE if i in chosen else d for i, d in enumerate(dims))
    return tuple(d for i, d in enumerate(dims) if i not in chosen)


def _embedding(state: Provenance, node: fx.Node) -> Value:
    aten = isinstance(node.target, torch._ops.OpOverload)
    indices = state.of(node.args[1 if aten else 0])
    shape = shape_of(node)
    if indices is None or shape is None:
        return None
    return (*indices, fresh(node, len(shape) - 1, shape[-1]))


def _complex_view(state: Provenance, node: fx.Node) -> Value:
    dims = _first(state, node)
    return dims[:-1] if op_name(node) == "view_as_complex" else (*dims, fresh(node, len(dims), 2))


def _padded(state: Provenance, node: fx.Node) -> Value:
    return _expanded(state, node)


RULES: dict[str, Callable[[Provenance, fx.Node], Value]] = {
    **dict.fromkeys(RESHAPES, _reshape),
    **dict.fromkeys(["permute"], _permuted),
    **dict.fromkeys(["transpose", "t", "adjoint"], _transposed),
    **dict.fromkeys(["chunk", "split", "tensor_split", "split_with_sizes", "unbind"], _pieces),
    **dict.fromkeys(["expand", "expand_as", "broadcast_to", "repeat", "tile"], _expanded),
    **dict.fromkeys(["repeat_interleave"], _expanded),
    **dict.fromkeys(["matmul", "bmm", "mm", "addmm", "baddbmm"], _matmul),
    **dict.fromkeys(["avg_pool2d", "avg_pool3d", "max_pool2d", "max_pool3d"], _pool),
    **dict.fromkeys(["sum", "mean", "amax", "amin", "var", "std", "norm"], _reduced),
    **dict.fromkeys(["view_as_complex", "view_as_real"], _complex_view),
    **dict.fromkeys(["slice", "narrow"], _slice),
    "moveaxis": _moved,
    "movedim": _moved,
    "squeeze": _squeezed,
    "unsqueeze": _unsqueezed,
    "cat": _joined,
    "stack": _stacked,
    "getitem": _indexed,
    "getattr": _getattr,
    "select": _select,
    "linear": _linear,
    "einsum": _einsum,
    "conv": _conv,
    "scaled_dot_product_attention": _attention,
    "embedding": _embedding,
    "pad": _padded,
    "outer": lambda state, node: tuple(d for dims in _operands(state, node) for d in dims),
}

__all__ = ["UNKNOWN", "Provenance", "is_getitem", "is_weight"]
