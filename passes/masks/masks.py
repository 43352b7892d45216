"""Masks that a split can honour: none, or one over keys that never hides a video token.

That no video key is hidden has to follow from the graph itself. What models build from ones, index
comparisons and concatenation is followed; any other mask leaves the site dense.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from freqopt.passes.axes.dimensions import at_most, same
from freqopt.passes.masks.covering import is_one, rows_covered
from freqopt.passes.masks.indices import is_index, lower_bound
from freqopt.passes.masks.memory import is_written
from freqopt.passes.masks.ranks import whole_of
from freqopt.passes.nodes import (
    argument,
    known_int,
    operation,
    shape,
    tensor,
    value,
)
from freqopt.passes.reasons import Reason, Why
from freqopt.passes.site import Extent

PASS = {
    "view",
    "reshape",
    "unsqueeze",
    "expand",
    "expand_as",
    "to",
    "contiguous",
    "clone",
    "detach",
    "bool",
    "int",
    "long",
    "float",
    "type_as",
    "flatten",
    "alias",
    "repeat",
}
"""Operations after which an entry is true if it was before, and the last axis is the same."""

SPREADS = {
    "expand",
    "expand_as",
    "bitwise_and",
    "logical_and",
    "mul",
    "bitwise_or",
    "logical_or",
    "masked_fill",
    "where",
}
"""Operations that repeat the entry of a last axis of length 1."""


def mask_problem(mask: fx.Node, before: Extent, video: Extent, batch: Extent) -> Why | None:
    """Why a mask cannot be honoured, or None if it is one over keys that leaves the video alone.

    mask: (B or 1, 1, 1, keys) bool, True = attend. before: text tokens in front; video: number of
    video tokens.
    """
    found = tensor(mask)
    if found is None:
        return Reason.MASK_NO_TENSOR()
    if found.dtype != torch.bool:
        return Reason.MASK_ADDED(dtype=found.dtype)
    sizes = shape(mask)
    if len(sizes) != 4 or not (same(sizes[1], 1) and same(sizes[2], 1)):
        return Reason.MASK_PAIRS(shape=sizes)
    if not (same(sizes[0], 1) or same(sizes[0], batch)):
        return Reason.MASK_BATCH(batch=sizes[0], queries=batch)
    if not Range(before, before + video).true(mask):
        return Reason.MASK_UNPROVEN()
    return None


def hides_nothing(mask: fx.Node) -> bool:
    """Whether a mask of any shape is provably true, or adds provably zero, for all pairs."""
    sizes = shape(mask)
    found = tensor(mask)
    if found is None or not sizes:
        return False
    everything = Range(0, sizes[-1])
    return everything.true(mask) if found.dtype == torch.bool else everything.zero(mask)


class Range:
    """Proves things about entries start..stop of the last axis of tensors."""

    def __init__(self, start: Extent, stop: Extent) -> None:
        self.start, self.stop = start, stop

    def true(self, item: Any) -> bool:
        """Whether all entries in the range are provably True."""
        if item is True:
            return True
        if not isinstance(item, fx.Node):
            return False
        if is_written(item):
            return rows_covered(item, self.start, self.stop)
        if (whole := whole_of(item)) is not None:
            return self.true(whole)
        name = operation(item)
        source = item.args[0] if item.args else item.kwargs.get("input")
        if name in ("ones", "ones_like", "new_ones"):
            return True
        if name in ("full", "new_full", "full_like"):
            return is_one(argument(item, 2 if name == "new_full" else 1, "fill_value"))
        if name in PASS or adds_dimensions(item):
            own = self._of_operand(item, source)
            return own is not None and own.true(source)
        if name == "masked_fill":
            fill = argument(item, 2, "value")
            hidden = argument(item, 1, "mask")
            return self.true(source) and (is_one(fill) or self._false_at(item, hidden))
        if name in ("bitwise_and", "logical_and", "mul"):
            return all(self._true_at(item, operand) for operand in item.args[:2])
        if name in ("bitwise_or", "logical_or"):
            return any(self._true_at(item, operand) for operand in item.args[:2])
        if name in ("bitwise_not", "logical_not"):
            return self.false(source)
        if name == "ne" and len(item.args) == 2 and _is_zero(item.args[1]):
            return self._true_at(item, source)
        if name in ("lt", "le", "gt", "ge"):
            return self._compares(item, True)
        if name == "cat":
            return self._concatenated(item)
        if name in ("pad", "constant_pad_nd"):
            return self._padded(item)
        return False

    def false(self, item: Any) -> bool:
        """Whether all entries in the range are provably False."""
        if item is False:
            return True
        if not isinstance(item, fx.Node) or is_written(item):
            return False
        name = operation(item)
        source = item.args[0] if item.args else item.kwargs.get("input")
        if name in ("zeros", "zeros_like", "new_zeros"):
            return True
        if name in PASS or adds_dimensions(item):
            own = self._of_operand(item, source)
            return own is not None and own.false(source)
        if name in ("bitwise_and", "logical_and"):
            return any(self._false_at(item, operand) for operand in item.args[:2])
        if name in ("bitwise_or", "logical_or"):
            return all(self._false_at(item, operand) for operand in item.args[:2])
        if name == "logical_not" or (name == "bitwise_not" and value(item).dtype == torch.bool):
            return self.true(source)
        if name == "eq" and len(item.args) == 2 and _is_zero(item.args[1]):
            return self._true_at(item, source)
        if name in ("lt", "le", "gt", "ge"):
            return self._compares(item, False)
        if name == "cat":
            return self._concatenated(item, Range.false)
        return False

    def zero(self, item: Any) -> bool:
        """Whether all entries in the range of a tensor of numbers are provably 0."""
        if isinstance(item, (int, float)):
            return item == 0
        if not isinstance(item, fx.Node) or is_written(item):
            return False
        name = operation(item)
        source = item.args[0] if item.args else item.kwargs.get("input")
        if name in ("zeros", "zeros_like", "new_zeros"):
            return True
        if name in ("full", "new_full", "full_like"):
            fill = argument(item, 2 if name == "new_full" else 1, "fill_value")
            return isinstance(fill, (int, float)) and fill == 0
        if name in PASS or adds_dimensions(item):
            found = tensor(source)
            if found is not None and found.dtype == torch.bool:
                return self._keeps_last(item, source) and self.false(source)
            return self._keeps_last(item, source) and self.zero(source)
        if name == "masked_fill":
            return self.zero(source) and self._false_at(item, argument(item, 1, "mask"))
        if name == "where" and len(item.args) == 3:
            chosen, yes, no = item.args
            return (self._true_at(item, chosen) and self._zero_at(item, yes)) or (
                self._false_at(item, chosen) and self._zero_at(item, no)
            )
        if name == "cat":
            return self._concatenated(item, Range.zero)
        if name == "mul":
            pairs = (item.args[:2], item.args[1::-1])
            return any(_is_finite(factor) and self.zero(other) for other, factor in pairs)
        if name == "sub" and len(item.args) == 2 and is_one(item.args[0]):
            return self._true_number(item, item.args[1])
        if name == "rsub" and len(item.args) == 2 and is_one(item.args[1]):
            return self._true_number(item, item.args[0])
        return False

    def _true_number(self, node: fx.Node, operand: Any) -> bool:
        """Whether an operand is a bool mask as numbers, all of them 1 in the range."""
        while isinstance(operand, fx.Node) and operation(operand) in PASS | {"float", "half"}:
            found = tensor(operand)
            if found is not None and found.dtype == torch.bool:
                break
            source = operand.args[0]
            if not (isinstance(source, fx.Node) and self._keeps_last(operand, source)):
                return False
            operand = source
        return self._true_at(node, operand)

    def _zero_at(self, node: fx.Node, operand: Any) -> bool:
        return self._aligned(node, operand) and self.zero(operand)

    def _true_at(self, node: fx.Node, operand: Any) -> bool:
        own = self._of_operand(node, operand)
        return own is not None and own.true(operand)

    def _false_at(self, node: fx.Node, operand: Any) -> bool:
        own = self._of_operand(node, operand)
        return own is not None and own.false(operand)

    def _of_operand(self, node: fx.Node, operand: Any) -> Range | None:
        """The entries of an operand that those in the range come from; None if it has others."""
        if self._aligned(node, operand):
            return self
        sizes = shape(operand)
        if not sizes:
            return None
        if operation(node) in SPREADS and same(sizes[-1], 1):
            return Range(0, 1)
        # A new last axis of length 1: the operand's own is another now.
        added = operation(node) == "unsqueeze" or adds_dimensions(node)
        return Range(0, sizes[-1]) if added and same(shape(node)[-1], 1) else None

    def _aligned(self, node: fx.Node, operand: Any) -> bool:
        """Whether an operand has the last axis of the result, so that the range means the same."""
        if not isinstance(operand, fx.Node):
            return True
        sizes = shape(operand)
        return bool(sizes) and same(sizes[-1], shape(node)[-1])

    def _keeps_last(self, node: fx.Node, source: Any) -> bool:
        sizes = shape(source)
        return bool(sizes) and same(sizes[-1], shape(node)[-1])

    def _padded(self, node: fx.Node) -> bool:
        """Padding of the last axis with True, or what is padded."""
        pads, source = argument(node, 1, "pad"), node.args[0]
        mode = argument(node, 2, "mode", default="constant")
        position = 2 if operation(node) == "constant_pad_nd" else 3
        if len(pads) != 2 or not (mode == "constant" or position == 2):
            return False
        left, filled = value(pads[0]), argument(node, position, "value", default=0) in (True, 1)
        if at_most(self.stop, left):
            return filled
        start, stop = self.start - left, self.stop - left
        inside = at_most(0, start) and at_most(stop, shape(source)[-1])
        return inside and Range(start, stop).true(source)

    def _concatenated(self, node: fx.Node, holds: Proof | None = None) -> bool:
        proof = holds or Range.true
        pieces = argument(node, 0, "tensors")
        dim = known_int(argument(node, 1, "dim", "axis", default=0))
        if dim is None:
            return False
        if (dim + len(shape(node))) % len(shape(node)) != len(shape(node)) - 1:
            return all(proof(self, item) for item in pieces)
        start: Extent = 0
        for index, item in enumerate(pieces):
            if same(start, self.start):
                return self._covered(pieces[index:], proof)
            start = start + shape(item)[-1]
        return False

    def _covered(self, pieces: Any, holds: Proof) -> bool:
        length: Extent = 0
        for item in pieces:
            size = shape(item)[-1]
            if not holds(Range(0, size), item):
                return False
            length = length + size
            if same(length, self.stop - self.start):
                return True
        return False

    def _compares(self, node: fx.Node, wanted: bool) -> bool:
        """Comparison of an index that runs along the last axis with a bound from below.

        Or of any integers with a number, by the least that they can be.
        """
        left, right = node.args[:2]
        name = operation(node)
        if self._is_beyond(left, right, above=name in ("gt", "le")):
            return wanted is (name in ("gt", "ge"))
        if self._is_beyond(right, left, above=name in ("lt", "ge")):
            return wanted is (name in ("lt", "le"))
        if is_index(left, shape(node)[-1]):
            bound, always = right, name in ("lt", "le")
        elif is_index(right, shape(node)[-1]):
            bound, always = left, name in ("gt", "ge")
        else:
            return False
        # index < stop <= bound: "index < bound" is always true and "index >= bound" always false.
        lowest = lower_bound(bound)
        return always is wanted and lowest is not None and at_most(self.stop, lowest)

    def _is_beyond(self, item: Any, number: Any, *, above: bool) -> bool:
        """Whether no entry of an integer tensor is below a number; above: nor equal to it."""
        bound, least = value(number), lower_bound(item) if isinstance(item, fx.Node) else None
        if least is None or not isinstance(bound, (int, torch.SymInt)):
            return False
        return at_most(bound + 1 if above else bound, least)


Proof = Callable[[Range, Any], bool]


def adds_dimensions(node: fx.Node) -> bool:
    """Whether a node indexes with None and full slices only."""
    if operation(node) != "getitem":
        return False
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    return all(item is None or item is Ellipsis or item == slice(None) for item in index)


def _is_finite(item: Any) -> bool:
    return isinstance(item, (bool, int, float)) and math.isfinite(item)


def _is_zero(item: Any) -> bool:
    return isinstance(item, (bool, int, float)) and item == 0
