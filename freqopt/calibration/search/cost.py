"""Cost models: what attention at a site costs dense, and split at a density.

Times of the device at hand where it has a clock; what a choice saves depends on the kernel, the GPU
and the site's shape. Elsewhere products are counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from freqopt.calibration.measure.attention import AttentionShape
from freqopt.calibration.measure.ladder import Array
from freqopt.calibration.measure.orders import distinct
from freqopt.config import KEY_BLOCK, SMALLEST_CHUNK
from freqopt.plan.records import SiteTiming

SPLIT_EFFICIENCY = 0.6
"""Rate of the split's exact band over dense attention's (docs/design/calibration.md)."""

ORDER_PRODUCTS, LEVEL_PRODUCTS = 1.0e5, 2.6e4
"""Cost of ordering a token of a key head by content in the smallest chunks, and of each doubling of
them, in multiply-adds at dense attention's rate. From times on an H200 with 24 heads of 128, bf16:
0.42 ms for 256, 0.52 for 1,024, 0.67 for 4,096 and 1.05 for all of 32,760 tokens, 0.76, 0.97, 1.30
and 2.42 of 75,600, less 0.1 ms of launches; dense attention makes 2.9e11 multiply-adds in a ms."""


class CostModel(Protocol):
    """Cost of attention at one site, per head; any unit, but one unit for all sites."""

    def dense(self, shape: AttentionShape) -> float:
        """Cost of one head of dense attention."""

    def split(self, shape: AttentionShape, density: Array) -> Array:
        """Cost of one head of split attention at the given densities (any shape)."""

    def order(self, shape: AttentionShape, key_heads: int, chunk: int) -> float:
        """Cost of ordering the tokens of all key heads by content, the largest chunks so large.

        One set of launches serves all of them, so heads with smaller chunks, or by the grid, cost
        no less.
        """


@dataclass(frozen=True)
class ProductCost:
    """Cost in multiply-adds at dense attention's rate: what is true of a kernel near its peak."""

    efficiency: float = SPLIT_EFFICIENCY

    def dense(self, shape: AttentionShape) -> float:
        """See `CostModel`."""
        return 2.0 * shape.tokens * shape.tokens * shape.head_dim

    def split(self, shape: AttentionShape, density: Array) -> Array:
        """See `CostModel`; the low band costs one product per key block."""
        return self.dense(shape) * (density / self.efficiency + 1.0 / KEY_BLOCK)

    def order(self, shape: AttentionShape, key_heads: int, chunk: int) -> float:
        """See `CostModel`; launches are left out here too."""
        chunk = distinct(chunk, shape.tokens)
        levels = (chunk // SMALLEST_CHUNK).bit_length() - 1
        return shape.tokens * key_heads * (ORDER_PRODUCTS + levels * LEVEL_PRODUCTS)


@dataclass(frozen=True)
class MeasuredCost:
    """Milliseconds per head, from a time that is linear in the mean density of a site's heads."""

    timings: Mapping[AttentionShape, SiteTiming]

    def dense(self, shape: AttentionShape) -> float:
        """See `CostModel`."""
        return self.timings[shape].dense_ms / shape.heads

    def split(self, shape: AttentionShape, density: Array) -> Array:
        """See `CostModel`."""
        timing = self.timings[shape]
        return (timing.base_ms + timing.density_ms * density) / shape.heads

    def order(self, shape: AttentionShape, key_heads: int, chunk: int) -> float:
        """See `CostModel`; an order that was not timed must not be taken."""
        return dict(self.timings[shape].orders).get(chunk, math.inf)


def cost_model(timings: Iterable[SiteTiming]) -> CostModel:
    """The cost model of a plan or of a calibration: measured where there are timings."""
    by_shape = {AttentionShape(t.heads, t.tokens, t.head_dim): t for t in timings}
    return MeasuredCost(by_shape) if by_shape else ProductCost()
