"""Complex numbers of an exported program as pairs of real ones, which is all that ONNX has.

Rotary positions of many models are complex tables. Every complex tensor (...) becomes a real tensor
(..., 2), and every operation on it one on pairs; an operation without a form in pairs is named,
with its place in the user's code.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from freqopt.exporters.problems import ExportError

Rule = Callable[["Pairs", fx.Node], Any]

SAME = (
    "alias",
    "clone",
    "contiguous",
    "detach",
    "detach_",
    "lift_fresh",
    "lift_fresh_copy",
    "resolve_conj",
    "resolve_neg",
)
"""Operations that leave values as they are."""


def make_real(gm: fx.GraphModule) -> bool:
    """Rewrite, in place, all complex numbers of an exported graph; whether there were any.

    Raises:
        ExportError: an input or output that is complex, or an operation without a form in pairs.
    """
    _inline_bodies(gm)
    if not any(map(_is_complex, gm.graph.nodes)):
        return False
    pairs = Pairs(gm)
    for node in list(gm.graph.nodes):
        pairs.rewrite(node)
    pairs.clear()
    gm.graph.lint()
    gm.recompile()
    return True


def _is_complex(node: fx.Node) -> bool:
    example = node.meta.get("val")
    every = example if isinstance(example, (list, tuple)) else [example]
    return any(isinstance(one, Tensor) and one.is_complex() for one in every)


def _inline_bodies(gm: fx.GraphModule) -> None:
    """Open blocks of no_grad and of disabled autocast that complex numbers go through."""
    for node in list(gm.graph.nodes):
        kind = getattr(node.target, "__name__", "")
        if kind == "wrap_with_set_grad_enabled":
            body, given = node.args[1], node.args[2:]
        elif kind == "wrap_with_autocast" and not node.args[2]:
            body, given = node.args[4], node.args[5:]
        else:
            continue
        assert isinstance(body, fx.Node)
        inner = gm.get_submodule(str(body.target))
        assert isinstance(inner, fx.GraphModule)
        if not any(_is_complex(n) for n in inner.graph.nodes):
            continue
        known: dict[fx.Node, Any] = dict(
            zip(inner.graph.find_nodes(op="placeholder"), given, strict=True)
        )
        for held in inner.graph.find_nodes(op="get_attr"):
            name = _free_name(gm, str(held.target))
            _hold(gm, name, operator.attrgetter(str(held.target))(inner))
            with gm.graph.inserting_before(node):
                known[held] = gm.graph.get_attr(name)
            known[held].meta = dict(held.meta)
        with gm.graph.inserting_before(node):
            result = gm.graph.graph_copy(inner.graph, known)
        for user in list(node.users):
            user.replace_all_uses_with(result[user.args[1]])  # type: ignore[index]
            gm.graph.erase_node(user)
        gm.graph.erase_node(node)


def _free_name(gm: fx.GraphModule, name: str) -> str:
    free = name.replace(".", "_")
    while hasattr(gm, free):
        free += "_"
    return free


def _hold(gm: fx.GraphModule, name: str, value: Any) -> None:
    if isinstance(value, nn.Module):
        gm.add_module(name, value)
    else:
        gm.register_buffer(name, value, persistent=False)


class Pairs:
    """The real counterparts of a graph's complex nodes; `of` also makes pairs of real numbers."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm, self.graph = gm, gm.graph
        self.known: dict[fx.Node, fx.Node] = {}
        self.done: list[fx.Node] = []

    def rewrite(self, node: fx.Node) -> None:
        """Put operations on pairs in the place of one on complex numbers."""
        concerned = _is_complex(node) or any(n in self.known for n in node.all_input_nodes)
        if not concerned:
            return
        with self.graph.inserting_before(node):
            made = self._rule(node)(self, node)
        if _is_complex(node):
            self.known[node] = made
        elif made is not None:
            node.replace_all_uses_with(made)
        self.done.append(node)

    def clear(self) -> None:
        """Remove the complex nodes, which nothing uses any more."""
        for node in reversed(self.done):
            if not node.users and node.op not in ("placeholder", "output"):
                self.graph.erase_node(node)
        read = {str(node.target) for node in self.graph.nodes if node.op == "get_attr"}
        for name, buffer in list(self.gm.named_buffers()):
            if buffer.is_complex() and name not in read:
                path, _, leaf = name.rpartition(".")
                delattr(self.gm.get_submodule(path), leaf)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A new node."""
        return self.graph.call_function(function, args, kwargs)

    def of(self, value: Any) -> Any:
        """The pair of a complex node or number, or of a real one with 0."""
        if isinstance(value, fx.Node):
            if value in self.known:
                return self.known[value]
            return self.call(torch.stack, [value, self.call(torch.zeros_like, value)], -1)
        return self.number(complex(value))

    def number(self, value: complex) -> fx.Node:
        """A complex number as a constant pair."""
        name = _free_name(self.gm, "freqopt_complex")
        _hold(self.gm, name, torch.tensor([value.real, value.imag], dtype=torch.float32))
        return self.graph.get_attr(name)

    def is_complex(self, value: Any) -> bool:
        """Whether an argument is complex."""
        return value in self.known if isinstance(value, fx.Node) else isinstance(value, complex)

    def parts(self, value: Any) -> tuple[fx.Node, fx.Node]:
        """Real and imaginary part of a pair."""
        pair = self.of(value)
        return self.call(torch.select, pair, -1, 0), self.call(torch.select, pair, -1, 1)

    def join(self, real: fx.Node, imaginary: fx.Node) -> fx.Node:
        """The pair of two parts."""
        return self.call(torch.stack, list(torch_broadcast(self, real, imaginary)), -1)

    def _rule(self, node: fx.Node) -> Rule:
        if node.op == "get_attr":
            return _held
        if node.op == "call_function":
            target: Any = node.target
            name = getattr(target, "overloadpacket", target).__name__
            rule = RULES.get(name)
            if rule is not None:
                return rule
            raise _refusal(node, f"{name} has no form in real numbers")
        if node.op == "placeholder":
            raise _refusal(node, f"the input {node.target} is complex, which ONNX has not")
        raise _refusal(node, f"the {node.op} of the model is complex, which ONNX has not")


def torch_broadcast(pairs: Pairs, a: fx.Node, b: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Two nodes of one shape, which stacking needs."""
    both = pairs.call(torch.broadcast_tensors, a, b)
    return pairs.call(operator.getitem, both, 0), pairs.call(operator.getitem, both, 1)


def _refusal(node: fx.Node, why: str) -> ExportError:
    lines = [line for line in (node.stack_trace or "").splitlines() if "File" in line]
    stack = node.meta.get("nn_module_stack") or {}
    module = next((str(e[0]) for e in reversed(stack.values()) if str(e[0])), "the model itself")
    where = lines[-1].strip() if lines else "its place in the code is not known"
    return ExportError(
        f"complex numbers are the cause: {why} ({module}; {where}). Use pairs of real numbers "
        "there (cosines and sines of the rotary positions), as in torch.view_as_real"
    )


def _rank(value: fx.Node) -> int:
    example = value.meta["val"]
    return int((example[0] if isinstance(example, (list, tuple)) else example).dim())


def _from_start(dim: Any, rank: int) -> Any:
    return dim + rank if isinstance(dim, int) and dim < 0 else dim


def _held(pairs: Pairs, node: fx.Node) -> fx.Node:
    value = operator.attrgetter(str(node.target))(pairs.gm)
    name = _free_name(pairs.gm, f"{node.target}_real")
    _hold(pairs.gm, name, torch.view_as_real(value.detach().resolve_conj()).clone())
    return pairs.graph.get_attr(name)


def _same(pairs: Pairs, node: fx.Node) -> Any:
    return pairs.of(node.args[0])


def _product(pairs: Pairs, node: fx.Node) -> fx.Node:
    a, b = node.args[:2]
    if not pairs.is_complex(a):
        a, b = b, a
    if not pairs.is_complex(b):
        return pairs.call(torch.mul, pairs.of(a), _beside(pairs, b))
    return _times(pairs, pairs.parts(a), pairs.parts(b))


def _times(pairs: Pairs, a: tuple[fx.Node, fx.Node], b: tuple[fx.Node, fx.Node]) -> fx.Node:
    def product(x: fx.Node, y: fx.Node) -> fx.Node:
        return pairs.call(torch.mul, x, y)

    real = pairs.call(torch.sub, product(a[0], b[0]), product(a[1], b[1]))
    imaginary = pairs.call(torch.add, product(a[0], b[1]), product(a[1], b[0]))
    return pairs.call(torch.stack, [real, imaginary], -1)


def _beside(pairs: Pairs, real: Any) -> Any:
    """A real factor of both parts."""
    return pairs.call(torch.unsqueeze, real, -1) if isinstance(real, fx.Node) else real


def _quotient(pairs: Pairs, node: fx.Node) -> fx.Node:
    a, b = node.args[:2]
    if not pairs.is_complex(b):
        return pairs.call(torch.div, pairs.of(a), _beside(pairs, b))
    real, imaginary = pairs.parts(b)
    squares = pairs.call(torch.square, pairs.of(b))
    turned = (real, pairs.call(torch.neg, imaginary))
    over = pairs.call(torch.sum, squares, -1, keepdim=True)
    return pairs.call(torch.div, _times(pairs, pairs.parts(a), turned), over)


def _sum(function: Callable[..., Any]) -> Rule:
    def rule(pairs: Pairs, node: fx.Node) -> fx.Node:
        a, b = (pairs.of(value) for value in node.args[:2])
        return pairs.call(function, a, b, **node.kwargs)

    return rule


def _conjugate(pairs: Pairs, node: fx.Node) -> fx.Node:
    return pairs.call(torch.mul, pairs.of(node.args[0]), pairs.number(1 - 1j))


def _polar(pairs: Pairs, node: fx.Node) -> fx.Node:
    length, angle = node.args[:2]
    waves = [pairs.call(wave, angle) for wave in (torch.cos, torch.sin)]
    parts = [pairs.call(torch.mul, length, wave) for wave in waves]
    return pairs.call(torch.stack, parts, -1)


def _exponential(pairs: Pairs, node: fx.Node) -> fx.Node:
    real, imaginary = pairs.parts(node.args[0])
    length = pairs.call(torch.exp, real)
    waves = [pairs.call(wave, imaginary) for wave in (torch.cos, torch.sin)]
    return pairs.call(torch.stack, [pairs.call(torch.mul, length, wave) for wave in waves], -1)


def _length(pairs: Pairs, node: fx.Node) -> fx.Node:
    squares = pairs.call(torch.square, pairs.of(node.args[0]))
    return pairs.call(torch.sqrt, pairs.call(torch.sum, squares, -1))


def _angle(pairs: Pairs, node: fx.Node) -> fx.Node:
    real, imaginary = pairs.parts(node.args[0])
    return pairs.call(torch.atan2, imaginary, real)


def _converted(pairs: Pairs, node: fx.Node) -> fx.Node:
    """Of `to`: between complex types, to a real one, or from one."""
    value = node.meta["val"]
    device = node.kwargs.get("device")
    device = next((a for a in node.args[1:] if isinstance(a, torch.device)), device)
    pair = pairs.of(node.args[0])
    if not _is_complex(node):
        pair = pairs.call(torch.select, pair, -1, 0)
    dtype = value.real.dtype if value.is_complex() else value.dtype
    options = {"dtype": dtype} if device is None else {"dtype": dtype, "device": device}
    return pairs.graph.call_method("to", (pair,), options)


def _sized(name: str, last: int) -> Rule:
    """Of operations that take a size for every dimension."""

    def rule(pairs: Pairs, node: fx.Node) -> fx.Node:
        sizes = node.args[1]
        assert isinstance(sizes, Sequence)
        return pairs.graph.call_method(name, (pairs.of(node.args[0]), [*sizes, last]))

    return rule


def _along(*places: int, grows: int = 0) -> Rule:
    """Of operations whose arguments at `places` are dimensions, or lists of them, from either end.

    grows: dimensions that the result has more.
    """

    def rule(pairs: Pairs, node: fx.Node) -> fx.Node:
        args: list[Any] = list(node.args)
        target: Any = node.target
        joined = isinstance(args[0], (list, tuple))
        complex_one = next(filter(pairs.is_complex, args[0])) if joined else args[0]
        rank = _rank(complex_one) + grows
        args[0] = [pairs.of(n) for n in args[0]] if joined else pairs.of(args[0])
        left_out = target._schema.arguments[len(args) : max(places) + 1]
        args += [node.kwargs.get(given.name, given.default_value) for given in left_out]
        for place in places:
            if isinstance(args[place], (list, tuple)):
                args[place] = [_from_start(dim, rank) for dim in args[place]]
            else:
                args[place] = _from_start(args[place], rank)
        return pairs.call(target, *args)

    return rule


def _permuted(pairs: Pairs, node: fx.Node) -> fx.Node:
    rank, given = _rank(node), node.args[1]
    assert isinstance(given, Sequence)
    dims = [_from_start(dim, rank) for dim in given]
    return pairs.call(torch.permute, pairs.of(node.args[0]), [*dims, rank])


def _indexed(pairs: Pairs, node: fx.Node) -> fx.Node:
    target: Any = node.target
    return pairs.call(target, pairs.of(node.args[0]), *node.args[1:])


def _chosen(pairs: Pairs, node: fx.Node) -> fx.Node:
    condition = pairs.call(torch.unsqueeze, node.args[0], -1)
    return pairs.call(torch.where, condition, pairs.of(node.args[1]), pairs.of(node.args[2]))


def _padded(pairs: Pairs, node: fx.Node) -> fx.Node:
    if len(node.args) > 2 and node.args[2]:
        raise _refusal(node, "padding with another number than 0 has no form in real numbers")
    around = node.args[1]
    assert isinstance(around, Sequence)
    return pairs.call(torch.nn.functional.pad, pairs.of(node.args[0]), [0, 0, *around])


def _in_sequence(pairs: Pairs, node: fx.Node) -> fx.Node:
    several, *rest = node.args
    target: Any = node.target
    if (len(rest) > 1 and rest[1]) or node.kwargs.get("padding_value"):
        raise _refusal(node, "padding with another number than 0 has no form in real numbers")
    assert isinstance(several, Sequence)
    return pairs.call(target, [pairs.of(each) for each in several], *rest, **node.kwargs)


RULES: dict[str, Rule] = {
    **dict.fromkeys(SAME, _same),
    "view_as_complex": lambda pairs, node: node.args[0],
    "view_as_real": _same,
    "real": lambda pairs, node: pairs.parts(node.args[0])[0],
    "imag": lambda pairs, node: pairs.parts(node.args[0])[1],
    "complex": lambda pairs, node: pairs.join(*node.args[:2]),  # type: ignore[arg-type]
    "polar": _polar,
    "exp": _exponential,
    "abs": _length,
    "angle": _angle,
    "_conj": _conjugate,
    "conj": _conjugate,
    "conj_physical": _conjugate,
    "mul": _product,
    "div": _quotient,
    "add": _sum(torch.add),
    "sub": _sum(torch.sub),
    "neg": lambda pairs, node: pairs.call(torch.neg, pairs.of(node.args[0])),
    "to": _converted,
    "_to_copy": _converted,
    "_assert_tensor_metadata": lambda pairs, node: None,
    "view": _sized("reshape", 2),
    "reshape": _sized("reshape", 2),
    "_unsafe_view": _sized("reshape", 2),
    "expand": _sized("expand", 2),
    "repeat": _sized("repeat", 1),
    "permute": _permuted,
    "transpose": _along(1, 2),
    "unsqueeze": _along(1, grows=1),
    "squeeze": _along(1),
    "flatten": _along(1, 2),
    "unflatten": _along(1),
    "select": _along(1),
    "slice": _along(1),
    "narrow": _along(1),
    "index_select": _along(1),
    "split": _along(2),
    "split_with_sizes": _along(2),
    "chunk": _along(2),
    "unbind": _along(1),
    "cat": _along(1),
    "stack": _along(1, grows=1),
    "flip": _along(1),
    "sum": _along(1),
    "mean": _along(1),
    "sym_size": _along(1),
    "index": _indexed,
    "where": _chosen,
    "constant_pad_nd": _padded,
    "pad": _padded,
    "pad_sequence": _in_sequence,
    "getitem": lambda pairs, node: pairs.call(
        operator.getitem, pairs.of(node.args[0]), node.args[1]
    ),
}
"""What to make of each operation, by its name in aten."""
