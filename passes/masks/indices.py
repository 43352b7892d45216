"""What is known of integers that masks are made from: running indices, and what none is below.

In integers of 32 bits and more, and in floats as far as these count by ones. Narrow integers turn
round, and in bfloat16 4,098 is 4,096.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import guard_or_false

from freqopt.passes.axes.dimensions import product, same
from freqopt.passes.masks.memory import is_written
from freqopt.passes.nodes import argument, is_plain_index, operation, shape, tensor, value
from freqopt.passes.site import Extent

WIDE = (torch.int32, torch.int64)

COUNTS = {
    torch.float64: 1 << 53,
    torch.float32: 1 << 24,
    torch.float16: 1 << 11,
    torch.bfloat16: 256,
}
"""Up to where floats have every integer."""


def has_integers(dtype: torch.dtype, most: Extent) -> bool:
    """Whether a dtype has all integers from 0 to a number, and none above turns into a lower one.

    Of a size that is a symbol the graph is guarded to be for sizes of which that is so.
    """
    return dtype in WIDE or (dtype in COUNTS and bool(guard_or_false(most <= COUNTS[dtype])))


def is_index(item: Any, length: Extent) -> bool:
    """Whether a tensor is 0, 1, 2, ... along its last axis, which has `length` entries."""
    if not isinstance(item, fx.Node) or is_written(item):
        return False
    name = operation(item)
    if name in ("unsqueeze", "view", "reshape", "to", "expand", "getitem"):
        if name == "getitem" and not is_plain_index(item.args[1]):
            return False
        sizes = shape(item)
        source = item.args[0]
        if value(item).dtype not in WIDE:
            return False
        kept = bool(sizes) and same(sizes[-1], length) and same(product(shape(source)), length)
        return kept and is_index(source, length)
    if name != "arange" or value(item).dtype not in WIDE:
        return False
    first, second = argument(item, 0, "start", default=0), argument(item, 1, "end")
    start, step = (
        (0 if second is None and "end" not in item.kwargs else first),
        argument(item, 2, "step"),
    )
    return value(start) == 0 and step in (None, 1) and same(shape(item)[0], length)


def lower_bound(item: Any) -> Extent | None:
    """A number that no entry of an integer tensor is below.

    A sum over an input is taken to be a count, so not negative: it is how lengths are made from
    the padding masks that pipelines pass, which hold zeros and ones in any dtype.
    """
    found = value(item)
    if isinstance(found, (int, torch.SymInt)) and not isinstance(found, bool):
        return found
    if not isinstance(item, fx.Node) or is_written(item):
        return None
    bound = _bound_of(item)
    known = tensor(item)
    if bound is None or known is None or not has_integers(known.dtype, bound):
        return None
    return bound


FORMS = {"unsqueeze", "view", "reshape", "to", "int", "long", "expand", "squeeze", "getitem"}
"""Operations that leave integers what they are, where the dtype has them."""


def _bound_of(item: fx.Node) -> Extent | None:
    """The same, had the tensor's dtype all numbers."""
    name = operation(item)
    if name in FORMS:
        source = tensor(item.args[0])
        as_bits = name == "view" and source is not None and source.dtype != value(item).dtype
        return None if as_bits else lower_bound(item.args[0])
    if name == "sum":
        return 0 if _is_input(argument(item, 0, "input")) else None
    if name == "add" and argument(item, 2, "alpha", default=1) == 1:
        parts = [lower_bound(argument(item, 0, "input")), lower_bound(argument(item, 1, "other"))]
        known = [part for part in parts if part is not None]
        return operator.add(*known) if len(known) == 2 else None
    return _start_of(item) if name == "arange" else None


def _start_of(node: fx.Node) -> Extent | None:
    """The first number of an integer arange that counts upwards."""
    first, second = argument(node, 0, "start", default=0), argument(node, 1, "end")
    start = value(0 if second is None and "end" not in node.kwargs else first)
    step = argument(node, 2, "step", default=1)
    known = isinstance(start, (int, torch.SymInt)) and isinstance(step, int) and step > 0
    return start if known and value(node).dtype in WIDE else None


def _is_input(item: Any) -> bool:
    """Whether a tensor is an input of the graph as it came, or converted."""
    while isinstance(item, fx.Node) and not is_written(item):
        if operation(item) not in ("to", "bool", "int", "long"):
            return item.op == "placeholder"
        item = item.args[0]
    return False
