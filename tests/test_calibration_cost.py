"""The measured cost model: the line through timed points, and what allocation makes of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calibration_models import make_model, make_sample

import freqopt
from freqopt import calibration_cost, calibration_measure
from freqopt.calibration_allocation import (
    AttentionShape,
    HeadCurves,
    ProductCost,
    allocate,
    make_choices,
    solve,
)
from freqopt.calibration_call import Call
from freqopt.calibration_cost import MeasuredCost, cost_model, fit_line, time_call
from freqopt.plan import Plan, SiteTiming
from freqopt.reporting_speed import site_times

LADDER = np.array([0.01, 0.1, 1.0, 10.0])


def timing(tokens: int, *, dense: float, base: float, slope: float) -> SiteTiming:
    return SiteTiming(
        heads=2, tokens=tokens, head_dim=64, dense_ms=dense, base_ms=base, density_ms=slope,
        points=[(0.1, base + 0.1 * slope)],
    )  # fmt: skip


@pytest.mark.parametrize(
    "points, line",
    [
        ([(0.1, 1.5), (0.3, 2.5), (0.5, 3.5)], (1.0, 5.0)),
        ([(0.1, 0.5), (0.3, 3.0)], (0.0, None)),  # a negative base would be nonsense
        ([(0.1, 3.0), (0.3, 2.9)], (None, 0.0)),  # and so would a negative slope
        ([(0.2, 7.0)], (7.0, 0.0)),
    ],
)
def test_fit_line(
    points: list[tuple[float, float]], line: tuple[float | None, float | None]
) -> None:
    for got, want in zip(fit_line(points), line, strict=True):
        assert got >= 0.0 and (want is None or got == pytest.approx(want, abs=1e-9))
    base, slope = fit_line(points)
    middle = sum(ms / (base + slope * d) for d, ms in points) / len(points)
    assert middle == pytest.approx(1.0, abs=0.35)


def test_costs_are_milliseconds_per_head() -> None:
    cost = MeasuredCost({AttentionShape(2, 1024, 64): timing(1024, dense=8, base=1, slope=10)})
    shape = AttentionShape(2, 1024, 64)
    assert cost.dense(shape) == 4.0
    np.testing.assert_allclose(cost.split(shape, np.array([0.0, 0.1, 0.5])), [0.5, 1.0, 3.0])


def test_without_timings_products_are_counted() -> None:
    assert isinstance(cost_model([]), ProductCost)
    assert isinstance(cost_model([timing(1024, dense=1, base=1, slope=1)]), MeasuredCost)


def test_allocation_leaves_dense_what_this_device_is_slow_at() -> None:
    density = np.array([[0.9, 0.5, 0.2, 0.05]] * 2)
    error = np.array([[1e-6, 1e-4, 1e-3, 1e-2]] * 2)
    sites = [
        make_choices(name, tokens, 64, LADDER, [HeadCurves(False, density, error, error)])
        for name, tokens in (("fast", 4096), ("slow", 1024))
    ]
    timings = [
        timing(4096, dense=8.0, base=0.5, slope=10.0),
        timing(1024, dense=1.0, base=1.5, slope=1.0),  # all overhead: never pays
    ]
    measured = solve(sites, math.inf, cost_model(timings))
    assert [choice.dense for choice in measured.choices] == [False, True]
    assert measured.cost == pytest.approx(0.5 + 10.0 * 0.05 + 1.0)
    assert not any(choice.dense for choice in solve(sites, math.inf, ProductCost()).choices)
    exact = allocate(sites, 1e12, cost_model(timings))
    assert all(choice.dense for choice in exact.choices) and exact.cost == pytest.approx(9.0)


def test_timing_covers_distinct_densities(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is replaced, as the real one needs a GPU; everything else is the real thing."""
    ran: list[str] = []

    def clock(run: object) -> float:
        assert callable(run)
        out = run()
        ran.append("dense" if isinstance(out, torch.Tensor) else "split")
        return 5.0 if ran[-1] == "dense" else 1.0 + 10.0 * float(out[1].mean())

    monkeypatch.setattr(calibration_cost, "milliseconds", clock)
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 1024, 16).unbind(0)
    call = Call(query * 2, key * 2, value, None, (4, 16, 16), 0, 0, 0.25)
    ladder = (0.01, 0.1, 0.5, 2.0, 30.0)
    density = torch.stack([call.split(torch.full((2, 2), t), 0)[1].mean(0) for t in ladder])
    found = time_call(call, ladder, density, 0)
    assert ran.count("dense") == 1 and 1 <= ran.count("split") <= 3
    assert found.dense_ms == 5.0 and (found.heads, found.tokens, found.head_dim) == (2, 1024, 16)
    if len(found.points) > 1:
        assert found.base_ms == pytest.approx(1.0, abs=1e-3)
        assert found.density_ms == pytest.approx(10.0, abs=1e-2)


@pytest.fixture
def simulated_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device on which dense attention takes 8 ms and split attention 0.5 + 10 * density."""

    def clock(run: Callable[[], Any], repeats: int = 0) -> float:
        out = run()
        return 8.0 if isinstance(out, torch.Tensor) else 0.5 + 10.0 * float(out[1].mean())

    for module in (calibration_cost, calibration_measure):
        monkeypatch.setattr(module, "milliseconds", clock)
    monkeypatch.setattr(calibration_measure, "has_clock", lambda x: True)


@pytest.mark.usefixtures("simulated_clock")
def test_a_plan_holds_what_was_timed(tmp_path: Path) -> None:
    samples = [make_sample(i) for i in range(4)]
    plan = freqopt.calibrate(make_model(), samples, target_error=0.1, progress=False)
    (found,) = plan.evidence.timings
    assert (found.heads, found.tokens, found.head_dim) == (2, 512, 16)
    assert (found.dense_ms, found.base_ms) == (8.0, pytest.approx(0.5, abs=1e-3))
    assert found.density_ms == pytest.approx(10.0, rel=1e-3)
    for name, (dense, split, modelled) in site_times(plan).items():
        assert dense == 8.0 and 0.5 < split < 8.0
        assert modelled == pytest.approx(0.5 + 10 * float(np.mean(plan.sites[name].density)))
    assert site_times(plan).keys() == {n for n, s in plan.sites.items() if s.decision == "split"}
    assert "costs measured at 1 shapes" in str(plan)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    freqopt.report(plan, tmp_path / "report.html")
    split = len(site_times(plan))
    assert f"{8 * split}.0 ms dense" in (tmp_path / "report.html").read_text().replace("\n", " ")


def test_a_plan_from_a_cpu_says_that_nothing_was_timed() -> None:
    samples = [make_sample(i) for i in range(2)]
    plan = freqopt.calibrate(make_model(), samples, target_error=0.2, progress=False)
    assert plan.evidence.timings == [] and site_times(plan) == {}
    assert "costs counted in multiply-adds, not measured on this cpu" in str(plan)


@pytest.mark.gpu
def test_times_on_a_gpu_grow_with_density() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 8, 8192, 64, device="cuda").bfloat16().unbind(0)
    call = Call(query * 2, key * 2, value, None, (8, 32, 32), 0, 0, 0.125)
    ladder = (0.003, 0.03, 0.3, 1.0, 3.0, 30.0)
    density = torch.stack([call.split(torch.full((2, 8), t), 64)[1].mean(0) for t in ladder])
    found = time_call(call, ladder, density.cpu(), 64)
    assert found.dense_ms > 0 and found.base_ms + found.density_ms > found.base_ms
