"""The content order as an ONNX function: median splits along principal directions, level by level.

A transcription of `freqopt.kernels.content_order` into plain ONNX operators, computed in float32.
The levels of the tree are one Loop, as its segments halve; so are the subspace iteration and the
elimination that makes its columns orthonormal. Memory: some 600 bytes a token and head.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx
from freqopt.exporters.onnx.body import DOMAIN
from freqopt.exporters.onnx.graph import Nodes, Value
from freqopt.kernels.content_order import (
    LEAF,
    LEAST_VARIANCE,
    RANK,
    SAMPLES,
    SEGMENT_SAMPLES,
    SQUARINGS,
    STEPS,
)
from onnx import TensorProto, helper

CONTENT_NAME = "ContentOrder"
CONTENT_INPUTS = ("tokens", "base", "chunks", "text_before")
CONTENT_ATTRIBUTES = ("largest_chunk",)

LARGEST = 6e4
"""That a coordinate may be."""

LEAF_LEVELS = 3
"""Levels of a leaf, which share one covariance."""

MAX_BITS = 31
"""Bits of a number of tokens."""

MATRIX = (TensorProto.FLOAT, [None] * 4)
PLACES = (TensorProto.INT64, [None] * 3)
NUMBER = (TensorProto.INT64, [None])


class _Tree:
    """Builds the body; one method per function of `content_order`, same shapes."""

    def __init__(self, nodes: Nodes) -> None:
        self.n = nodes
        tokens, base, chunks, before = (Value(nodes, name) for name in CONTENT_INPUTS)
        self.base, self.chunks = base.cast(TensorProto.INT64), chunks.cast(TensorProto.INT64)
        self.batch, self.heads = tokens.size(0), tokens.size(1)
        self.dim, self.length = tokens.size(3), self.base.size(0)
        self.rank = self.dim.minimum(RANK)
        self.tokens = tokens.gather(self.base + before, 2).float()
        given = nodes.attribute("largest_chunk", "int", onnx.AttributeProto.INT)
        self.largest = self.enclosing().minimum(given.unsqueeze(0)).maximum(LEAF)

    def enclosing(self) -> Value:
        """(1,): the smallest power of two, from LEAF up, that holds all tokens."""
        powers = self.n.constant([2**i for i in range(MAX_BITS)])
        bits = (powers < self.length).cast(TensorProto.INT64).sum(0, keep=True)
        return powers.gather(bits, 0).maximum(LEAF)

    def unit(self, size: Value) -> Value:
        """(size, size) float32: ones on the diagonal."""
        number = self.n.range(0, size)
        return number.unsqueeze(1).equals(number.unsqueeze(0)).float()

    def trace_of(self, square: Value, unit: Value) -> Value:
        """Sums of the diagonals, kept as extents of 1, at least a very small number."""
        return (square * unit).sum(-2, -1, keep=True).maximum(1e-30)

    def signs(self, rows: Value, columns: Value | int) -> Value:
        """(rows, columns) float32, as `content_order.signs`."""
        row = self.n.range(1, rows + 1).unsqueeze(1)
        column = self.n.range(1, columns + 1).unsqueeze(0)
        bits = self.n.op("BitwiseAnd", row, column * 37 % 1021)
        for shift in (8, 4, 2, 1):
            bits = self.n.op("BitwiseXor", bits, bits // 2**shift)
        return 1.0 - (bits % 2).float() * 2.0

    def coordinates(self) -> Value:
        """(B, H, T, R), 0 where that is no number."""
        n = self.n
        step = (self.length + (SAMPLES - 1)) // SAMPLES
        sample = n.op("Slice", self.tokens, [0], self.length, [2], step)
        count = sample.size(2).float()
        mean = sample.sum(2, keep=True) / count
        off = sample - mean
        covariance = off.transposed(0, 1, 3, 2) @ off / count
        unit = self.unit(self.dim)
        scale = self.trace_of(covariance, unit)
        many = self.dim > RANK
        scaled = covariance / scale
        variance = (scaled * unit).sum(3, keep=True).maximum(LEAST_VARIANCE)
        signs = self.signs(self.dim, self.rank) / variance
        start = n.where(many, signs, unit.slice(1, 0, self.rank))

        def iterate(_: Value, axes: Value) -> list[Value]:
            return [self.orthonormal(scaled @ axes)]

        steps = n.where(many, STEPS, 0).squeeze(0)
        (axes,) = n.loop(steps, iterate, start, kinds=[MATRIX])
        at = (self.tokens - mean) @ (axes / scale.sqrt())
        return n.where(n.op("IsNaN", at), 0.0, at).maximum(-LARGEST).minimum(LARGEST)

    def orthonormal(self, columns: Value) -> Value:
        """An orthonormal basis of the columns' span, by elimination."""
        n, rank = self.n, self.rank
        gram = columns.transposed(0, 1, 3, 2) @ columns
        unit, number = self.unit(rank), n.range(0, rank)
        least = self.trace_of(gram, unit) * 1e-7 / rank.float()
        identity = unit.expand(self.batch, self.heads, 1, 1)

        def eliminate(step: Value, both: Value) -> list[Value]:
            at = step.unsqueeze(0)
            row, column = both.gather(at, 2), both.gather(at, 3)
            pivot = row.gather(at, 3).maximum(least)
            below = number.unsqueeze(1) > step
            return [both - n.where(below, column / pivot, 0.0) * row]

        both = n.concat(3, gram + least * unit, identity)
        (both,) = n.loop(rank.squeeze(0), eliminate, both, kinds=[MATRIX])
        diagonal = (both.slice(3, 0, rank) * unit).sum(3, keep=True).maximum(least)
        factor = both.slice(3, rank, rank * 2) / diagonal.sqrt()
        return columns @ factor.transposed(0, 1, 3, 2)

    def main_directions(self, covariance: Value, count: int) -> list[Value]:
        """The first principal directions (.., R), nearly: orthogonal to one another."""
        n, unit = self.n, self.unit(self.rank)
        power = covariance / self.trace_of(covariance, unit)
        for _ in range(SQUARINGS):
            power = power @ power
        widest = n.op("ArgMax", (covariance * unit).sum(-1), axis=-1, keepdims=1)
        chosen = n.range(0, self.rank).equals(widest).float()
        found = [self.scaled((power * chosen.unsqueeze(-2)).sum(-1))]
        for i in range(count - 1):
            sign = self.signs(self.rank, count - 1).slice(1, i, i + 1).squeeze(1)
            direction = self.scaled((power * sign).sum(-1))
            for other in found:
                length = (other * other).sum(-1, keep=True).maximum(1e-30)
                direction = direction - (direction * other).sum(-1, keep=True) / length * other
            found.append(self.scaled(direction))
        return found

    def scaled(self, direction: Value) -> Value:
        """A direction whose largest component is 1, or zeros."""
        largest = self.n.op("Abs", direction).max(-1, keep=True)
        return direction / largest.maximum(1e-37)

    def split(self, rows: Value, real: Value, size: Value, levels: int) -> Value:
        """Order (B, H, S, size) of segments' rows (B, H, S, size, R), halved by the median."""
        n = self.n
        step = (size // SEGMENT_SAMPLES).maximum(1)
        sample = n.op("Slice", rows, [0], size, [3], step)
        there = n.op("Slice", real, [0], size, [3], step).float().unsqueeze(4)
        count = there.sum(3, keep=True).maximum(1.0)
        mean = (sample * there).sum(3, keep=True) / count
        off = (sample - mean) * there
        covariance = off.transposed(0, 1, 2, 4, 3) @ off / count
        order: Value | None = None
        for level, direction in enumerate(self.main_directions(covariance, levels)):
            along = ((rows - mean) * direction.unsqueeze(-2)).sum(-1)
            along = n.where(real, along, float("inf"))
            if order is not None:
                along = n.op("GatherElements", along, order, axis=3)
            part, half = size // 2**level, size // 2 ** (level + 1)
            shape = (0, 0, 0, 2**level, part)
            # Of equal numbers TopK takes those with the lower index first: a stable sort.
            _, ranked = n.ops("TopK", 2, along.reshape(*shape), part, largest=0)
            halves = ranked.reshape(0, 0, 0, 2 ** (level + 1), half)
            kept, _ = n.ops("TopK", 2, halves, half, largest=0)
            kept = kept.reshape(*shape)
            if order is not None:
                kept = n.op("GatherElements", order.reshape(*shape), kept, axis=4)
            order = kept.reshape(0, 0, 0, size)
        assert order is not None
        return order

    def build(self) -> Value:
        """The order (B, H, T) int64."""
        n, length = self.n, self.length
        padded = (length + self.largest - 1) // self.largest * self.largest
        pads = n.shape(0, 0, 0, 0, 0, 0, padded - length, 0)
        coordinates = n.op("Pad", self.coordinates(), pads)
        group = self.heads // self.chunks.size(0)
        chunks = self.chunks.unsqueeze(1).expand(1, group).reshape(1, -1, 1, 1)

        def level(place: Value, size: Value, levels: int) -> Value:
            segments = place.reshape(0, 0, -1, size)
            rows = n.op("GatherND", coordinates, place.unsqueeze(3), batch_dims=2)
            rows = rows.reshape(self.batch, self.heads, -1, size, self.rank)
            order = self.split(rows, segments < length, size, levels)
            moved = n.op("GatherElements", segments, order, axis=3)
            return n.where(chunks >= size, moved, segments).reshape(0, 0, -1)

        def descend(_: Value, place: Value, size: Value) -> Sequence[Value]:
            return [level(place, size, 1), size // 2]

        powers = n.constant([LEAF * 2**i for i in range(MAX_BITS - 6)])
        above = (powers < self.largest).cast(TensorProto.INT64).sum(0)
        place = n.range(0, padded).expand(self.batch, self.heads, 1)
        place, _ = n.loop(above, descend, place, self.largest, kinds=[PLACES, NUMBER])
        place = level(place, n.constant([LEAF]), LEAF_LEVELS)
        return self.base.gather(place.slice(2, 0, length), 0)


def content_function(opset: int) -> onnx.FunctionProto:
    """The body of `freqopt::ContentOrder` at an opset of the default domain (18 or later).

    Inputs: tokens (B, H, N, D) of a floating type; base (T,) int64, the base order, counted from
    the first token that is no text; chunks (H or a divisor of it,) int32, tokens of the heads'
    chunks, 0 for the base order; text_before (1,) int64. Attribute: largest_chunk, at least the
    largest of them. Output: order (B, H, T) int64.
    """
    nodes = Nodes(opset)
    order = _Tree(nodes).build()
    nodes.nodes.append(helper.make_node("Identity", [order.name], ["order"]))
    return helper.make_function(
        DOMAIN,
        CONTENT_NAME,
        list(CONTENT_INPUTS),
        ["order"],
        nodes.nodes,
        [helper.make_opsetid("", opset)],
        attributes=list(CONTENT_ATTRIBUTES),
    )
