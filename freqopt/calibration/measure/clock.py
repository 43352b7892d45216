"""The clock: attention timed on its GPU at a few densities, and the line through the times."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from freqopt.calibration.measure.attention import AttentionCall
from freqopt.calibration.measure.ladder import LEAST_TOKENS
from freqopt.calibration.measure.orders import distinct, key_order
from freqopt.calibration.team import Team
from freqopt.plan.records import SiteTiming

TIMED_DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.4)
"""Densities near which the op is timed; also at threshold 0, which is density 1 for any input."""

APART = 1.25
"""Least ratio of two densities that are both worth timing."""

REPEATS = 7
COMPARED_RUNS, LONG_ENOUGH_MS = 5, 5e3
"""Runs of the whole model, dense and split, that are compared, and the time that suffices."""

LEAST_HEAD_START = 5e-3
"""Seconds that the GPU waits, at least, while calls to be timed are queued."""

CLOCK_HZ = 2e9
"""Rate of the clock that the wait is counted in; a slower one makes the wait longer."""


def time_call(
    call: AttentionCall,
    thresholds: Sequence[float],
    density: Tensor,
    probes: int,
    *,
    launches: bool = False,
) -> SiteTiming:
    """Time an attention on its GPU: dense, and split, and the line through the split's times.

    launches: a call takes no less than launching it does.

    thresholds, density (rungs, H): a ladder, ascending, and what it led to. Thresholds are
    interpolated where densities are TIMED_DENSITIES; the density that counts is that of the call,
    and of times at almost the same density one is taken.
    """
    shape = call.shape
    points: list[tuple[float, float]] = []
    for threshold in spread_thresholds(thresholds, density.mean(1).tolist()):
        every = torch.full((shape.heads,), threshold, device=call.query.device, dtype=torch.float32)
        reached = float(call.split(every, 0)[1].mean())
        if all(abs(math.log(reached / timed)) > math.log(APART) for timed, _ in points):
            ms = time_of(partial(call.split, every, probes), launches=launches)
            points.append((reached, ms))
    base, slope = fit_line(points)
    dense = time_of(call.dense, launches=launches)
    points.sort()
    return SiteTiming(
        **shape._asdict(), dense_ms=dense, base_ms=base, density_ms=slope, points=points
    )


def time_orders(call: AttentionCall, orders: Sequence[int]) -> list[tuple[int, float]]:
    """Time of making each order by content that acts on a call, as (chunk, ms for all heads)."""
    tokens = call.layout.tokens
    if tokens < LEAST_TOKENS:
        return []
    acting = {distinct(chunk, tokens): chunk for chunk in reversed(orders) if chunk}
    chunks = sorted(acting.values())
    return [(chunk, milliseconds(partial(key_order, call, chunk))) for chunk in chunks]


def spread_thresholds(thresholds: Sequence[float], density: Sequence[float]) -> list[float]:
    """Thresholds whose densities are near TIMED_DENSITIES, by interpolation; 0 comes first."""
    falling, steps = -np.log(np.maximum(density, 1e-9)), np.log(np.array(thresholds))
    falling = np.maximum.accumulate(falling)
    wanted = -np.log(np.array(TIMED_DENSITIES))
    inside = wanted[(falling[0] < wanted) & (wanted < falling[-1])]
    ends = falling[-1:] if falling[-1] > 0.0 else falling[:0]
    logs = np.interp(np.concatenate([np.sort(inside), ends]), falling, steps)
    return [0.0, *np.exp(logs).tolist()]


def fit_line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Least-squares (base, slope) through (density, ms) points, neither of them negative.

    Relative errors count, so that the cheap end, where plans live, is fitted as well as the other.
    A single point is at density 1, the only one that the input allows, and gives a constant.
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


def run_milliseconds(run: Callable[[], object]) -> float:
    """Time of a run of the whole model, launches included, until the GPU is done with it."""
    torch.cuda.synchronize()
    begun = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - begun)


def compare_runs(
    first: Callable[[], object], second: Callable[[], object], team: Team | None = None
) -> tuple[float, float]:
    """Least time of each of two runs of the whole model, in ms, taken in turn.

    Runs of long models are repeated less, as they vary less. team: processes that run them
    together, of which the first one's times count.
    """
    times: list[tuple[float, float]] = []
    while len(times) < COMPARED_RUNS and sum(map(sum, times)) < LONG_ENOUGH_MS:
        pair = run_milliseconds(first), run_milliseconds(second)
        times.append(pair if team is None else team.of_first(pair))
    return min(a for a, _ in times), min(b for _, b in times)


def time_of(run: Callable[[], object], repeats: int = REPEATS, *, launches: bool = False) -> float:
    """Time of a call in ms on the GPU; launches: or of launching it, where that takes longer."""
    ms = milliseconds(run, repeats)
    return max(ms, launch_milliseconds(run, repeats)) if launches else ms


def launch_milliseconds(run: Callable[[], object], repeats: int = REPEATS) -> float:
    """Mean time until Python has launched a call, whatever the GPU still has to do."""
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(repeats):
        run()
    took = time.perf_counter() - begun
    torch.cuda.synchronize()
    return 1e3 * took / repeats


def launched_and_done(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds until a run of the whole model, warmed up, is launched, and until it is done."""
    torch.cuda.synchronize()
    begun = time.perf_counter()
    run()
    launched = time.perf_counter() - begun
    torch.cuda.synchronize()
    return launched, time.perf_counter() - begun


def milliseconds(run: Callable[[], object], repeats: int = REPEATS) -> float:
    """Least time of several calls on the GPU, all of whose inputs must be there.

    The calls are queued behind a kernel that does nothing for a while, so that they run back to
    back and the time that Python needs for launching them does not count. A call that waits for the
    GPU, as a copy from ordinary memory does, would undo that. The least counts, as other processes
    on the GPU can only add to a time.
    """
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    run()
    torch.cuda.synchronize()
    begun = time.perf_counter()
    run()
    launch = time.perf_counter() - begun
    torch.cuda.synchronize()
    torch.cuda._sleep(int(CLOCK_HZ * max(2.0 * repeats * launch, LEAST_HEAD_START)))
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    marks[-1].synchronize()
    return min(float(a.elapsed_time(b)) for a, b in itertools.pairwise(marks))
