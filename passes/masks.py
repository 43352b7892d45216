"""What an attention mask allows: which masks a split site can honour, and why not the others.

Text keys are always exact, so a key mask over text costs nothing. That the video keys are always
attended has to be proven from how the graph builds the mask, never assumed from its values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from freqopt.passes.graph_values import argument, example, op_name, same, shape_of

TRANSPARENT = frozenset(["unsqueeze", "to", "bool", "view", "reshape", "expand", "contiguous", "clone",
                         "type", "detach", "squeeze", "getitem"])  # fmt: skip


def honours(mask: fx.Node, first: Any, count: Any) -> str | None:
    """Why a mask keeps its site dense, or None if it is a key mask that spares the video keys.

    Args:
        mask: the attention's mask.
        first, count: where the video keys begin and how many there are.
    """
    shape, value = shape_of(mask), example(mask)
    if shape is None or not isinstance(value, Tensor):
        return "its mask is not a tensor of the graph"
    if always_true(mask):
        return None
    if value.dtype != torch.bool:
        return "its mask is an additive bias (supported: a boolean key mask over the text)"
    if len(shape) != 4 or not (same(shape[1], 1) and same(shape[2], 1)):
        return (
            f"its mask has shape {tuple(shape)}, one row for each query or head "
            "(supported: a key mask, (batch, 1, 1, tokens))"
        )
    if not _spares(mask, first, count):
        return "its mask might hide video keys (the graph does not prove that it never does)"
    return None


def always_true(mask: fx.Node) -> bool:
    """Whether a boolean mask is all True by construction."""
    node = mask
    while op_name(node) in TRANSPARENT and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    value = example(node)
    return op_name(node) in ("ones", "ones_like", "new_ones") and isinstance(value, Tensor)


def _spares(node: fx.Node, first: Any, count: Any) -> bool:
    """Whether columns [first, first + count) of a boolean mask are True whatever the data."""
    name = op_name(node)
    if always_true(node):
        return True
    if name in TRANSPARENT and isinstance(node.args[0], fx.Node):
        before, after = shape_of(node.args[0]), shape_of(node)
        if before is None or after is None or not same(before[-1], after[-1]):
            return False
        return _spares(node.args[0], first, count)
    if name == "cat":
        return _cat_spares(node, first, count)
    if name == "masked_fill":
        base, hidden, fill = node.args[0], argument(node, "mask"), argument(node, "value")
        return fill is False and _spares(base, first, count) and _beyond(hidden, first, count)
    if name == "bitwise_and" or name == "logical_and":
        return all(isinstance(a, fx.Node) and _spares(a, first, count) for a in node.args[:2])
    if name in ("lt", "le"):
        return _below(node, first, count)
    return False


def _cat_spares(node: fx.Node, first: Any, count: Any) -> bool:
    """A concatenation over the key axis whose part for the video keys is all True."""
    parts, axis = argument(node, "tensors"), argument(node, "dim", 0)
    shape = shape_of(node)
    if shape is None or axis % len(shape) != len(shape) - 1:
        return False
    offset: Any = 0
    for part in parts:
        size = shape_of(part)
        if size is None:
            return False
        if same(offset, first) and same(size[-1], count):
            return always_true(part)
        offset = offset + size[-1]
    return False


def _beyond(hidden: Any, first: Any, count: Any) -> bool:
    """Whether `hidden` is `position >= video end + something not negative`."""
    if not isinstance(hidden, fx.Node):
        return False
    while op_name(hidden) in TRANSPARENT:
        hidden = hidden.args[0]
    if op_name(hidden) not in ("ge", "gt") or not same(first, 0):
        return False
    return _is_position(hidden.args[0]) and _at_least(hidden.args[1], count)


def _below(node: fx.Node, first: Any, count: Any) -> bool:
    """`position < video end + something not negative`."""
    return same(first, 0) and _is_position(node.args[0]) and _at_least(node.args[1], count)


def _is_position(node: Any) -> bool:
    """0, 1, 2, ... along the last axis."""
    while isinstance(node, fx.Node) and op_name(node) in TRANSPARENT:
        if op_name(node) == "getitem" and not _only_adds_axes(node):
            return False
        node = node.args[0]
    if not isinstance(node, fx.Node) or op_name(node) != "arange":
        return False
    numbers = [a for a in node.args if not isinstance(a, torch.dtype)]
    plain = len(numbers) == 1 or (len(numbers) == 2 and same(example(numbers[0]), 0))
    return plain and "start" not in node.kwargs and "step" not in node.kwargs


def _only_adds_axes(node: fx.Node) -> bool:
    index = node.args[1]
    parts = index if isinstance(index, tuple) else (index,)
    return all(p is None or p is Ellipsis or p == slice(None) for p in parts)


def _at_least(node: Any, bound: Any) -> bool:
    """Whether a value is provably at least `bound`: bound plus a count."""
    while isinstance(node, fx.Node) and op_name(node) in TRANSPARENT:
        node = node.args[0]
    if not isinstance(node, fx.Node):
        return same(example(node), bound)
    if op_name(node) != "add":
        return same(example(node), bound)
    for fixed, counted in (node.args[:2], node.args[1::-1]):
        if not _is_tensor(fixed) and same(example(fixed), bound) and _is_count(counted):
            return True
    return False


def _is_tensor(node: Any) -> bool:
    return isinstance(example(node), Tensor)


def _is_count(node: Any) -> bool:
    """A sum of truth values: never negative."""
    while isinstance(node, fx.Node) and op_name(node) in TRANSPARENT:
        node = node.args[0]
    if not isinstance(node, fx.Node) or op_name(node) != "sum":
        return False
    source = node.args[0]
    while isinstance(source, fx.Node) and op_name(source) in ("to", "int", "long", "type"):
        source = source.args[0]
    value = example(source)
    return isinstance(value, Tensor) and value.dtype == torch.bool
