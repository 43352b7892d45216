"""The cost model of the device at hand: attention timed at a few densities, and a line through it.

What a choice saves depends on the kernel, the GPU and the site's shape, not on products alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from freqopt.calibration_allocation import Array, AttentionShape, CostModel, ProductCost
from freqopt.calibration_call import Call
from freqopt.plan import SiteTiming

TIMED_DENSITIES = (0.03, 0.1, 0.3)
"""Densities near which the op is timed."""

REPEATS = 7
HEAD_START = 20_000_000
"""Clock cycles, some 10 ms, that the GPU waits while calls to be timed are queued."""


@dataclass(frozen=True)
class MeasuredCost:
    """Milliseconds per head, from a time that is linear in the mean density of a site's heads."""

    timings: Mapping[AttentionShape, SiteTiming]

    def dense(self, shape: AttentionShape) -> float:
        """See `CostModel`."""
        return self.timings[shape].dense_ms / shape.heads

    def split(self, shape: AttentionShape, density: Array) -> Array:
        """See `CostModel`."""
        found = self.timings[shape]
        return (found.base_ms + found.density_ms * density) / shape.heads


def cost_model(timings: Sequence[SiteTiming]) -> CostModel:
    """The cost model of a plan or of a calibration: measured where there are timings."""
    if not timings:
        return ProductCost()
    return MeasuredCost({AttentionShape(t.heads, t.tokens, t.head_dim): t for t in timings})


def time_call(call: Call, thresholds: Sequence[float], density: Tensor, probes: int) -> SiteTiming:
    """Time an attention on its GPU: dense, and split at thresholds near TIMED_DENSITIES.

    density: (rungs, H), of the thresholds, without mid band.
    """
    heads = call.query.shape[1]
    means = density.mean(1)
    rungs = sorted({int((means - target).abs().argmin()) for target in TIMED_DENSITIES})
    points = []
    for rung in rungs:
        budget = torch.full((2, heads), thresholds[rung])
        ms = milliseconds(lambda budget=budget: call.split(budget, probes))  # type: ignore[misc]
        points.append((float(means[rung]), ms))
    base, slope = fit_line(points)
    return SiteTiming(
        heads=heads, tokens=call.query.shape[2], head_dim=call.query.shape[3],
        dense_ms=milliseconds(call.dense), base_ms=base, density_ms=slope, points=points,
    )  # fmt: skip


def fit_line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Least-squares (base, slope) through (density, ms) points, neither of them negative.

    Relative errors count, so that the cheap end, where plans live, is fitted as well as the other.
    """
    densities, times = np.array(points).T
    if len(points) == 1:
        return float(times[0]), 0.0
    weight = 1.0 / times
    columns = np.stack([weight, weight * densities], 1)
    base, slope = np.linalg.lstsq(columns, np.ones(len(times)), rcond=None)[0]
    if base < 0.0:
        return 0.0, float((densities * weight).sum() / np.square(densities * weight).sum())
    if slope < 0.0:
        return float(1.0 / weight.mean()), 0.0
    return float(base), float(slope)


def has_clock(x: Tensor) -> bool:
    """Whether work on a tensor's device can be timed here; if not, products are counted."""
    return x.is_cuda


def milliseconds(run: Callable[[], object], repeats: int = REPEATS) -> float:
    """Mean time of a call on the GPU.

    The calls are queued behind a kernel that does nothing for a while, so that they run back to
    back and the time that Python needs for launching them does not count.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    run()
    torch.cuda._sleep(HEAD_START)
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / repeats
