"""Reads fx nodes the same way whoever wrote them: Dynamo, with functions and methods, or export."""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import fx

from freqopt.passes.site import Extent

OPERATORS = {
    "truediv": "div",
    "floordiv": "floor_divide",
    "and_": "bitwise_and",
    "or_": "bitwise_or",
    "xor": "bitwise_xor",
    "__and__": "bitwise_and",
    "__or__": "bitwise_or",
    "__xor__": "bitwise_xor",
    "invert": "bitwise_not",
    "concat": "cat",
    "concatenate": "cat",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "iadd": "add",
    "isub": "sub",
    "imul": "mul",
    "itruediv": "div",
    "_unsafe_view": "view",
    "special_softmax": "softmax",
    "_safe_softmax": "softmax",
}
"""Other names of one operation."""

OVERWRITING = {"copy_", "index_put_", "masked_fill_", "fill_", "zero_", "index_copy_"}
"""Keep the underscore of their names: nothing, or something else, is called like them without."""

VIEWS = {
    "view",
    "reshape",
    "flatten",
    "unflatten",
    "squeeze",
    "unsqueeze",
    "expand",
    "expand_as",
    "transpose",
    "permute",
    "movedim",
    "t",
    "getitem",
    "select",
    "slice",
    "narrow",
    "chunk",
    "split",
    "unbind",
    "split_with_sizes",
    "tensor_split",
    "view_as",
    "alias",
    "detach",
    "contiguous",
    "diagonal",
    "unfold",
    "view_as_real",
    "view_as_complex",
    "to",
    "type_as",
    "float",
}
"""May share memory with their first argument (the last ones when there is nothing to convert)."""


def value(node: Any) -> Any:
    """The example value of a node (a fake tensor, a symbol, ...); anything else is itself."""
    if not isinstance(node, fx.Node):
        return node
    meta = node.meta
    return meta["example_value"] if "example_value" in meta else meta.get("val")


def constant(item: Any) -> Any:
    """The value of an argument that is a number in the model's code, such as a scale or dropout.

    Under dynamic=True a float of a module is an input of the graph. It is then guarded to be the
    number it is now: it hardly ever changes, and what becomes of an attention depends on it. A
    float that the graph computes, of sizes say, is not: its symbol is returned.
    """
    found = value(item)
    if isinstance(found, torch.SymFloat) and found.node.has_hint():
        if found.node.expr.is_Symbol or found.node.expr.is_number:
            return float(found)
    return found


def tensor(node: Any) -> torch.Tensor | None:
    """The example tensor of a node, None for all else."""
    found = value(node)
    return found if isinstance(node, fx.Node) and isinstance(found, torch.Tensor) else None


def is_distributed(node: Any) -> bool:
    """Whether the tensor that a node makes is the part of a larger one that this process has."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value(node), module.DTensor)


def shape(node: Any) -> tuple[Extent, ...]:
    """Sizes of the tensor that a node makes; empty for all else."""
    found = tensor(node)
    return () if found is None else tuple(found.shape)


def operation(node: fx.Node) -> str:
    """Name of what a node does, without trailing underscore, the same for all spellings."""
    name = raw_name(node)
    if name == "getattr" and len(node.args) == 2:
        name = str(node.args[1])
    name = OPERATORS.get(name, name)
    if name.endswith("_") and not name.startswith("_") and name not in OVERWRITING:
        name = name[:-1]
    return OPERATORS.get(name, name)


def raw_name(node: fx.Node) -> str:
    """The name of what a node does as its target has it."""
    target = node.target
    if isinstance(target, str):
        return target if node.op == "call_method" else ""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[-1]
    return str(getattr(target, "__name__", type(target).__name__))


def argument(node: fx.Node, position: int, *names: str, default: Any = None) -> Any:
    """An argument given by position or by any of its names."""
    for name in names:
        if name in node.kwargs:
            return node.kwargs[name]
    return node.args[position] if position < len(node.args) else default


def numbers(node: fx.Node, position: int) -> list[Any]:
    """Integer arguments given one by one or as one sequence: `x.view(2, 3)`, `x.view([2, 3])`."""
    rest = node.args[position:]
    if len(rest) == 1 and isinstance(rest[0], (tuple, list)):
        return list(rest[0])
    return list(rest)


def is_plain_index(index: Any) -> bool:
    """Whether an index has no tensor or list in it, which could put entries in another order."""
    items = index if isinstance(index, tuple) else (index,)
    return all(
        item is None or item is Ellipsis or isinstance(value(item), (int, torch.SymInt, slice))
        for item in items
    )


def known_int(item: Any) -> int | None:
    """A Python integer, None for symbols and all else."""
    found = value(item)
    return found if isinstance(found, int) and not isinstance(found, bool) else None


@functools.lru_cache(maxsize=4096)
def is_pointwise(name: str) -> bool:
    """Whether PyTorch tags an operation of that name as elementwise."""
    packet = getattr(torch.ops.aten, name, None)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return False
    overloads = (getattr(packet, overload) for overload in packet.overloads())
    return any(torch.Tag.pointwise in overload.tags for overload in overloads)
