"""Token order as an ONNX function, for grids that are only known when the model runs.

A transcription of `freqopt.grid`: the Hilbert curve's bit loop becomes an ONNX Loop whose length
follows the grid, so one file serves every grid. Static grids are stored as an initialiser instead.
"""

from __future__ import annotations

import onnx
from freqopt.exporters.onnx.body import DOMAIN, ORDER_NAME
from freqopt.exporters.onnx.graph import Nodes, Value
from onnx import TensorProto, helper

MAX_BITS = 21
"""Bits per coordinate whose three-dimensional index still fits an int64."""


def order_function(opset: int) -> onnx.FunctionProto:
    """The body of `freqopt::TokenOrder`: grid (3,) int64, extents (t, h, w) -> order (T,) int64."""
    n = Nodes(opset)
    grid = Value(n, "grid")
    t, h, w = (grid.slice(0, i, i + 1) for i in range(3))
    raster = n.range(0, t * h * w)
    coordinates = n.concat(
        0, *(x.unsqueeze(0) for x in (raster // (h * w), raster // w % h, raster % w))
    )
    # Extents of 1 are dropped: the axes that remain come first, in their own order.
    kept = (grid > 1).cast(TensorProto.INT64)
    dims = kept.sum(0, keep=True)
    _, first = n.ops("TopK", 2, kept * 3 - n.constant([0, 1, 2]), [3])
    axes = [coordinates.gather(first, 0).gather(i, 0) for i in range(3)]
    second, third = dims > 1, dims > 2

    powers = n.constant([2**i for i in range(MAX_BITS + 1)])
    widest = (grid - 1).max(0, keep=True)
    bits = (powers.slice(0, 0, MAX_BITS) < widest + 1).cast(TensorProto.INT64).sum(0, keep=True)

    def xor(a: Value, b: Value) -> Value:
        return n.op("BitwiseXor", a, b)

    def and_(a: Value, b: Value) -> Value:
        return n.op("BitwiseAnd", a, b)

    def level_bit(iteration: Value) -> Value:
        """2 ** level of an iteration, from the highest level down; (1,)."""
        return powers.gather(bits - 1 - iteration, 0)

    def turn(iteration: Value, *state: Value) -> list[Value]:
        bit = level_bit(iteration)
        below = bit - 1
        now = list(state)
        for i, present in enumerate((None, second, third)):
            is_set = and_(now[i], bit) > 0
            swap = n.where(is_set, 0, and_(xor(now[0], now[i]), below))
            if present is not None:
                swap = n.where(present, swap, 0)
            now[0] = n.where(is_set, xor(now[0], below), xor(now[0], swap))
            if i:
                now[i] = xor(now[i], swap)
        return now

    levels = (bits - 1).maximum(0).squeeze(0)
    a, b, c = n.loop(levels, turn, *axes)
    b = xor(b, a)
    c = n.where(third, xor(c, b), 0)
    last = n.where(third, c, b)

    def flipped(iteration: Value, flip: Value) -> list[Value]:
        bit = level_bit(iteration)
        return [n.where(and_(last, bit) > 0, xor(flip, bit - 1), flip)]

    (flip,) = n.loop(levels, flipped, raster * 0)
    a, b, c = (xor(x, flip) for x in (a, b, c))

    def interleave(iteration: Value, index: Value) -> list[Value]:
        bit = level_bit(iteration)
        for axis, present in ((a, None), (b, None), (c, third)):
            longer = index * 2 + axis // bit % 2
            index = longer if present is None else n.where(present, longer, index)
        return [index]

    (index,) = n.loop(bits.squeeze(0), interleave, raster * 0)
    _, order = n.ops("TopK", 2, index, raster.size(0), largest=0)
    n.nodes.append(helper.make_node("Where", [second.name, order.name, raster.name], ["order"]))
    return helper.make_function(
        DOMAIN, ORDER_NAME, ["grid"], ["order"], n.nodes, [helper.make_opsetid("", opset)]
    )
