"""Reading fx nodes: names of operations, example values, arguments by name.

One vocabulary for Dynamo's graphs (functions and methods) and exported ones (aten overloads), so that
the rules elsewhere are written once.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true


def example(node: Any) -> Any:
    """The fake value of a node (Dynamo keeps it as example_value, export as val), or None."""
    if not isinstance(node, fx.Node):
        return node
    value = node.meta.get("example_value")
    return node.meta.get("val") if value is None else value


def shape_of(node: fx.Node) -> tuple[Any, ...] | None:
    """Shape of a node's tensor, sizes possibly symbolic, or None if it makes no tensor."""
    value = example(node)
    return tuple(value.shape) if isinstance(value, Tensor) else None


def same(a: Any, b: Any) -> bool:
    """Whether two sizes are known to be equal, without guarding on them."""
    if a is b:
        return True
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return statically_known_true(a == b)


@functools.lru_cache(maxsize=4096)
def _function_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        name: str = target._schema.name.split("::")[-1]
    elif isinstance(target, torch._ops.OpOverloadPacket):
        name = target.__name__
    else:
        name = getattr(target, "__name__", str(target))
    return name


def op_name(node: fx.Node) -> str:
    """Bare name of a call: "add" for operator.add, Tensor.add_, aten.add.Tensor and operator.iadd."""
    if node.op == "call_method":
        name = str(node.target)
    elif node.op == "call_function":
        name = _function_name(node.target)
    else:
        return ""
    if name.startswith("__"):
        name = name.strip("_")
    name = name.strip("_")
    return _ALIASES.get(name, name)


_ALIASES = {
    "iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "div", "truediv": "div",
    "true_divide": "div", "divide": "div", "multiply": "mul", "subtract": "sub", "radd": "add",
    "rmul": "mul", "rsub": "sub", "concat": "cat", "concatenate": "cat", "swapaxes": "transpose",
    "swapdims": "transpose", "unsafe_view": "view", "convolution": "conv", "conv1d": "conv",
    "conv2d": "conv", "conv3d": "conv", "matrix_multiply": "matmul", "softmax_int": "softmax",
    "log_softmax": "log_softmax", "and": "bitwise_and", "or": "bitwise_or", "to_copy": "to",
}  # fmt: skip

_ARGUMENTS = {
    "scaled_dot_product_attention": (
        "query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa",
    ),
    "softmax": ("input", "dim", "dtype"),
    "dropout": ("input", "p", "training", "inplace"),
    "transpose": ("input", "dim0", "dim1"),
    "cat": ("tensors", "dim"),
    "stack": ("tensors", "dim"),
    "baddbmm": ("input", "batch1", "batch2", "beta", "alpha"),
    "masked_fill": ("input", "mask", "value"),
    "flatten": ("input", "start_dim", "end_dim"),
}  # fmt: skip


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """An argument of a call by its documented name, however it was passed."""
    if name in node.kwargs:
        return node.kwargs[name]
    names = _ARGUMENTS[op_name(node)]
    position = names.index(name)
    return node.args[position] if position < len(node.args) else default


def is_getitem(node: fx.Node) -> bool:
    """Whether a node indexes a tuple or a tensor."""
    return node.op == "call_function" and node.target is operator.getitem
