"""Cost models: what attention at a site costs dense, and split at a density.

Times of the device at hand where it has a clock; what a choice saves depends on the kernel, the GPU
and the site's shape. Elsewhere products are counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from freqopt.calibration.measure.attention import AttentionShape
from freqopt.calibration.measure.ladder import Array
from freqopt.config import KEY_BLOCK
from freqopt.plan.records import SiteTiming

SPLIT_EFFICIENCY = 0.6
"""Rate of the split's exact band over dense attention's (docs/design/calibration.md)."""


class CostModel(Protocol):
    """Cost of attention at one site, per head; any unit, but one unit for all sites."""

    def dense(self, shape: AttentionShape) -> float:
        """Cost of one head of dense attention."""

    def split(self, shape: AttentionShape, density: Array) -> Array:
        """Cost of one head of split attention at the given densities (any shape)."""


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


def cost_model(timings: Iterable[SiteTiming]) -> CostModel:
    """The cost model of a plan or of a calibration: measured where there are timings."""
    by_shape = {AttentionShape(t.heads, t.tokens, t.head_dim): t for t in timings}
    return MeasuredCost(by_shape) if by_shape else ProductCost()
