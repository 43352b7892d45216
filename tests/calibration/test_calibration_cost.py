"""The measured cost model: the line through timed points, and what allocation makes of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calibration_models import TinyVideo, make_model, make_sample

import freqopt
from freqopt.calibration import fewer, phases, survey, whole
from freqopt.calibration.measure import clock, requests
from freqopt.calibration.measure.ahead import compile_ahead
from freqopt.calibration.measure.attention import AttentionCall, AttentionShape
from freqopt.calibration.measure.clock import fit_line, time_call, time_orders
from freqopt.calibration.measure.curves import measure_curves
from freqopt.calibration.measure.ladder import ORDERS, THRESHOLDS
from freqopt.calibration.measure.tiles import SAMPLED_TILES
from freqopt.calibration.runner import Runner
from freqopt.calibration.search import workbench
from freqopt.calibration.search.allocate import allocate, solve
from freqopt.calibration.search.choices import HeadCurves, make_choices
from freqopt.calibration.search.cost import MeasuredCost, ProductCost, cost_model
from freqopt.plan.plan import Plan
from freqopt.plan.records import SiteTiming
from freqopt.plan.text import slow_sites
from freqopt.reporting.speed import site_times

LADDER = np.array([0.01, 0.1, 1.0, 10.0])


def timing(tokens: int, *, dense: float, base: float, slope: float) -> SiteTiming:
    line = {"dense_ms": dense, "base_ms": base, "density_ms": slope}
    points = [(0.1, base + 0.1 * slope)]
    return SiteTiming(heads=2, tokens=tokens, head_dim=64, points=points, **line)


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
        make_choices(
            name, AttentionShape(2, tokens, 64), LADDER, [HeadCurves(density, error, error)]
        )
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


class SimulatedGpu:
    """A device whose clock is replaced, as the real one needs a GPU; the rest is the real thing.

    Dense attention takes `dense` ms, and a split call 0.5 + 10 * density. slow: sites (by the order
    in which they are timed last) that take ten times as long when they are timed one by one.
    model_ms: of the whole model, dense and split.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        *,
        dense: float = 8.0,
        model_ms: tuple[float, float] = (100.0, 80.0),
    ):
        self.dense, self.slow, self.timed, self.launching = dense, set[int](), 0, 0.0
        self.calls: list[str] = []
        real, device = AttentionCall.split, self

        def split(call: AttentionCall, *args: Any) -> Any:
            device.kind = "split"
            return real(call, *args)

        monkeypatch.setattr(AttentionCall, "split", split)
        monkeypatch.setattr(clock, "milliseconds", self.clock)
        monkeypatch.setattr(clock, "launch_milliseconds", lambda run, repeats: self.launching)
        monkeypatch.setattr(requests, "has_clock", lambda x: True)
        monkeypatch.setattr(whole, "compare_runs", lambda first, second, team: model_ms)
        monkeypatch.setattr(whole, "launched_and_done", lambda run: run() and (0.0, 0.1))

    def clock(self, run: Callable[[], Any], repeats: int = 0) -> float:
        self.kind = "dense"
        out = run()
        self.calls.append(self.kind)
        if self.kind == "dense":
            return self.dense
        ms = 0.5 + 10.0 * float(out[1].mean())
        if repeats == requests.TIMED_REPEATS:  # a site at its budgets
            self.timed += 1
            ms *= 10.0 if self.timed - 1 in self.slow else 1.0
        return ms


def white_noise() -> AttentionCall:
    """All of its scores are alike, so that densities jump from one step of a ladder to the next."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 1024, 16).unbind(0)
    return AttentionCall(query * 2, key * 2, value, None, (4, 16, 16), 0, 0, 0.25)


def densities(call: AttentionCall, ladder: tuple[float, ...]) -> torch.Tensor:
    heads = call.query.shape[1]
    every = [torch.full((heads,), threshold) for threshold in ladder]
    return torch.stack([call.split(threshold, 0)[1].mean(0) for threshold in every])


@pytest.mark.parametrize(
    "ladder",
    [
        (0.01, 0.1, 0.5, 2.0, 30.0),
        (0.003, 0.01, 30.0),  # from everything to the local blocks in one step, as white noise does
        (300.0, 3000.0),  # nothing but local blocks
        (0.0001, 0.001),  # nothing but everything
    ],
)
def test_timing_spans_densities_whatever_the_ladder(
    ladder: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, call = SimulatedGpu(monkeypatch), white_noise()
    found = time_call(call, ladder, densities(call, ladder), 0)
    assert found.dense_ms == 8.0 and (found.heads, found.tokens, found.head_dim) == (2, 1024, 16)
    reached = [density for density, _ in found.points]
    assert reached == sorted(reached) and reached[-1] == 1.0
    assert all(b > clock.APART * a for a, b in pairwise(reached))
    assert gpu.calls.count("dense") == 1 and gpu.calls.count("split") == len(reached)
    if ladder[-1] < 1.0:
        assert found.points == [(1.0, 10.5)] and (found.base_ms, found.density_ms) == (10.5, 0.0)
        return
    assert len(reached) >= 2 and reached[0] <= 0.2
    assert found.base_ms == pytest.approx(0.5, abs=1e-3)
    assert found.density_ms == pytest.approx(10.0, abs=1e-2)


@pytest.fixture
def simulated_clock(monkeypatch: pytest.MonkeyPatch) -> SimulatedGpu:
    return SimulatedGpu(monkeypatch)


@pytest.mark.usefixtures("simulated_clock", "undrawn")
def test_a_plan_holds_what_was_timed(tmp_path: Path) -> None:
    samples = [make_sample(i) for i in range(4)]
    plan = freqopt.calibrate(make_model(), samples, target_error=0.1, progress=False)
    (found,) = plan.evidence.timings
    assert (found.heads, found.tokens, found.head_dim) == (2, 512, 16)
    assert (found.dense_ms, found.base_ms) == (8.0, pytest.approx(0.5, abs=1e-3))
    assert found.density_ms == pytest.approx(10.0, rel=1e-3)
    times = site_times(plan)
    assert times.keys() == {n for n, s in plan.sites.items() if s.decision == "split"} != set()
    for name, (dense, split, modelled) in times.items():
        assert dense == 8.0 and 0.5 < split < 8.0
        density = float(np.mean(plan.sites[name].density))
        assert modelled == pytest.approx(0.5 + 10 * density, rel=1e-4)
    assert "costs measured at 1 shapes" in str(plan)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    freqopt.report(plan, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text().replace("\n", " ")
    assert f"{8 * len(times)}.0 ms dense" in page


def test_a_plan_has_times_of_its_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    SimulatedGpu(monkeypatch)
    samples = [make_sample(i) for i in range(4)]
    plan = freqopt.calibrate(make_model(), samples, target_error=0.05, progress=False)
    assert plan.measured_error <= 0.05
    split = {name for name, site in plan.sites.items() if site.decision == "split"}
    assert split
    times = [e.times_ms for e in plan.evidence.sites.values() if e.times_ms]
    assert len(times) == len(split) and all(ms < dense for dense, ms in times)


def test_sites_where_no_split_is_faster_stay_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    SimulatedGpu(monkeypatch, dense=1.0)
    samples = [make_sample(i) for i in range(2)]
    plan = freqopt.calibrate(make_model(), samples, target_error=0.2, progress=False)
    assert [site.decision for site in plan.sites.values()] == ["dense", "dense"]
    for site in plan.sites.values():
        assert "the split is no faster here: as timed" in site.reason
        assert "dense attention 1 ms" in site.reason
    assert plan.evidence.notes[-1] == "splitting is no faster anywhere, so every site stays dense"
    assert (plan.measured_error, plan.mean_density) == (0.0, 1.0)


def test_a_site_that_is_slower_at_its_budgets_goes_back_to_dense(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The line promised less than the site then took; the plan is verified again without it."""
    gpu = SimulatedGpu(monkeypatch)
    gpu.slow = {0}
    samples = [make_sample(i) for i in range(2)]
    plan = freqopt.calibrate(make_model(), samples, target_error=0.2, progress=False)
    first, second = plan.sites.values()
    assert (first.decision, second.decision) == ("dense", "split")
    assert first.reason.startswith("the split is no faster here: as timed, it takes ")
    last, before = plan.evidence.trials[-1], plan.evidence.trials[-2]
    assert plan.measured_error == last.measured_error < before.measured_error <= 0.2
    assert plan.mean_density == last.mean_density > before.mean_density
    assert list(site_times(plan)) == [list(plan.sites)[1]]
    assert slow_sites(plan) == {}


def test_a_plan_that_makes_the_whole_model_slower_splits_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every site is faster by itself, and the model is not."""
    SimulatedGpu(monkeypatch, model_ms=(100.0, 100.5))
    samples = [make_sample(i) for i in range(2)]
    options = {"target_error": 0.2, "progress": False, "clock": "eager"}
    plan = freqopt.calibrate(make_model(), samples, **options)
    assert {site.decision for site in plan.sites.values()} == {"dense"}
    slower = "the whole model is no faster split: as timed, 100.5 ms against 100 ms dense"
    assert {site.reason for site in plan.sites.values()} == {slower}
    assert plan.evidence.notes[-1] == f"{slower}, so every site stays dense"
    alone = "with only the site that saves most the whole model is not clearly faster: 100.5 ms"
    assert any(note.startswith(alone) for note in plan.evidence.notes)
    assert (plan.measured_error, plan.mean_density) == (0.0, 1.0)
    assert plan.verified is not None and plan.verified.model_ms == (100.0, 100.5)


def layers_and_samples(layers: int) -> tuple[TinyVideo, list[dict[str, torch.Tensor]]]:
    torch.manual_seed(0)
    return TinyVideo(layers=layers), [make_sample(i) for i in range(4)]


def whole_clock(
    monkeypatch: pytest.MonkeyPatch, milliseconds: Callable[[int], float]
) -> list[set[str]]:
    """The whole model takes 100 ms dense, and what is said of the number of sites split.

    Returns the sites that were split whenever it was timed.
    """
    timed: list[set[str]] = []

    def compare(dense: Any, split: Any, team: Any) -> tuple[float, float]:
        timed.append(set(split().densities))
        return 100.0, milliseconds(len(timed[-1]))

    monkeypatch.setattr(whole, "compare_runs", compare)
    return timed


def test_sites_that_save_least_are_dropped_before_nothing_is_split(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each site costs the model the same, so a few of them pay and all of them do not."""
    SimulatedGpu(monkeypatch)
    timed = whole_clock(monkeypatch, lambda sites: 101.0 if sites > 2 else 90.0)
    model, samples = layers_and_samples(5)
    options = {"target_error": 0.06, "progress": False, "rounds": 0, "clock": "eager"}
    plan = freqopt.calibrate(model, samples, **options)
    assert [len(sites) for sites in timed] == [5, 3, 2]
    assert timed[2] < timed[1] < timed[0]
    split = {name for name, site in plan.sites.items() if site.decision == "split"}
    assert split == timed[2]
    saved = {
        name: found.times_ms[0] - found.times_ms[1]
        for name, found in plan.evidence.sites.items()
        if found.times_ms
    }
    assert len(saved) == 5 and len(set(saved.values())) > 3
    assert min(saved[name] for name in split) >= max(saved[n] for n in saved.keys() - split)
    slower = "the whole model is no faster split: as timed, 101 ms against 100 ms dense"
    for name in plan.sites.keys() - split:
        own = f"splitting this site saves {saved[name]:.3g} ms by itself, less than others do"
        assert plan.sites[name].reason == f"{slower}; {own}"
    told = f"{slower}; with only the 2 sites that save most it is faster: 90 ms against 100 ms"
    assert plan.evidence.notes[-1] == f"{told} dense"
    assert plan.verified is not None and plan.verified.model_ms == (100.0, 90.0)
    last, before = plan.evidence.trials[-1], plan.evidence.trials[-2]
    assert plan.measured_error == last.measured_error < before.measured_error <= 0.06
    assert plan.mean_density == last.mean_density > before.mean_density


@pytest.mark.parametrize("few_ms", [99.5, 104.0])
def test_fewer_sites_are_tried_a_few_times_and_must_be_clearly_faster(
    few_ms: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    SimulatedGpu(monkeypatch)
    monkeypatch.setattr(fewer, "ROUNDS", 2)
    timed = whole_clock(monkeypatch, lambda sites: 101.0 if sites > 3 else few_ms)
    model, samples = layers_and_samples(5)
    options = {"target_error": 0.2, "progress": False, "rounds": 0, "clock": "eager"}
    plan = freqopt.calibrate(model, samples, **options)
    assert [len(sites) for sites in timed] == [5, 3, 2]
    assert {site.decision for site in plan.sites.values()} == {"dense"}
    assert (plan.measured_error, plan.mean_density) == (0.0, 1.0)
    tried = [note for note in plan.evidence.notes if note.startswith("with only the")]
    told = f"save most the whole model is not clearly faster: {few_ms:g} ms against 100 ms dense"
    assert tried == [f"with only the {n} sites that {told}" for n in (3, 2)]


def test_fewer_sites_that_miss_the_target_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors of heads undo each other in part, so that of fewer sites may be larger."""
    SimulatedGpu(monkeypatch)
    whole_clock(monkeypatch, lambda sites: 101.0 if sites > 2 else 90.0)
    original = phases.Search.try_out

    def worse(search: Any, allocation: Any, notes: Any = ()) -> Any:
        found = original(search, allocation, notes)
        if sum(not choice.dense for choice in allocation.choices) != 2:
            return found
        trial = found.trial.model_copy(update={"measured_error": 0.21})
        return replace(found, trial=trial)

    monkeypatch.setattr(phases.Search, "try_out", worse)
    model, samples = layers_and_samples(5)
    options = {"target_error": 0.2, "progress": False, "rounds": 0, "clock": "eager"}
    plan = freqopt.calibrate(model, samples, **options)
    assert [site.decision for site in plan.sites.values()].count("split") == 1
    assert any("2 sites that save most the whole" in n for n in plan.evidence.notes)
    assert plan.measured_error <= 0.2


def test_a_density_that_makes_the_whole_model_slower_is_kept_and_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    SimulatedGpu(monkeypatch, model_ms=(100.0, 120.0))
    samples = [make_sample(i) for i in range(2)]
    plan = freqopt.calibrate(make_model(), samples, target_density=0.5, progress=False)
    assert {site.decision for site in plan.sites.values()} == {"split"}
    assert any("120 ms against 100 ms dense; the density" in n for n in plan.evidence.notes)


def test_whole_runs_are_compared_in_turn_and_the_least_time_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = iter([9.0, 7.0, 5.0, 8.0, 6.0, 9.0, 5.5, 6.5, 7.0, 7.0])
    monkeypatch.setattr(clock, "run_milliseconds", lambda run: run() or next(times))
    calls: list[str] = []
    dense, split = partial(calls.append, "dense"), partial(calls.append, "split")
    assert clock.compare_runs(dense, split) == (5.0, 6.5)
    assert calls == ["dense", "split"] * clock.COMPARED_RUNS
    calls.clear()
    monkeypatch.setattr(clock, "run_milliseconds", lambda run: run() or 3000.0)
    clock.compare_runs(dense, split)
    assert calls == ["dense", "split"]


def test_slow_models_have_few_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the output is known already, so that computing it takes no time."""
    SimulatedGpu(monkeypatch)
    monkeypatch.setattr(Runner, "on_gpu", True)
    ran: list[Any] = []
    real = Runner.run
    monkeypatch.setattr(Runner, "run", lambda self, *given: ran.append(given) or real(self, *given))

    def timed(run: Callable[[], Any]) -> tuple[float, float]:
        before = len(ran)
        run()
        return 0.0, 11.0 * (len(ran) - before)

    monkeypatch.setattr(whole, "launched_and_done", timed)
    monkeypatch.setattr(phases, "PASSES_WHEN_SLOW", 7)
    asked: list[int | None] = []
    original = phases.measure_sensitivities

    def measure(bench: Any, references: Any, passes: int | None) -> Any:
        asked.append(passes)
        return original(bench, references, passes)

    monkeypatch.setattr(phases, "measure_sensitivities", measure)
    expected: list[float] = []
    told = survey.runs_of
    monkeypatch.setattr(survey, "runs_of", lambda **o: expected.append(o["passes"]) or told(**o))
    samples = [make_sample(i) for i in range(2)]
    freqopt.calibrate(make_model(), samples, target_error=0.2, progress=False)
    assert asked == expected == [7]


def test_a_density_asked_for_rules_over_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sites are split although that is slower, and the plan and its report say so."""
    SimulatedGpu(monkeypatch, dense=1.0)
    samples = [make_sample(i) for i in range(4)]
    plan = freqopt.calibrate(make_model(), samples, target_density=0.5, progress=False)
    assert [site.decision for site in plan.sites.values()] == ["split", "split"]
    assert list(slow_sites(plan)) == list(plan.sites)
    assert "2 split sites" in str(plan) and "no faster than dense attention as timed" in str(plan)


def test_a_plan_from_a_cpu_says_that_nothing_was_timed() -> None:
    samples = [make_sample(i) for i in range(2)]
    plan = freqopt.calibrate(make_model(), samples, target_error=0.2, progress=False)
    assert plan.evidence.timings == [] and site_times(plan) == {}
    assert "costs counted in multiply-adds, not measured on this cpu" in str(plan)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
def test_nothing_is_left_to_compile_when_a_gpu_measures(
    dim: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from triton import knobs

    compiled: list[str] = []

    def note(**known: Any) -> None:
        if not known["cache_hit"]:
            compiled.append(known["src"].name)

    generator = torch.Generator("cuda").manual_seed(3)
    query, key, value = torch.randn(
        3, 1, 3, 5 * 24 * 30 + 7, dim, device="cuda", dtype=torch.bfloat16, generator=generator
    )
    call = AttentionCall(query, key, value, None, (5, 24, 30), 7, 0, dim**-0.5)
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(knobs.compilation, "listener", note)
    compile_ahead(call, ORDERS, SAMPLED_TILES, 64)
    assert compiled
    compiled.clear()
    reading = measure_curves("site", call, call.dense(), 64, 0, SAMPLED_TILES, ORDERS)
    density = torch.as_tensor(reading.curves["density"][0])
    time_call(call, THRESHOLDS, density, 64)
    time_orders(call, ORDERS)
    assert not compiled


@pytest.mark.gpu
def test_times_on_a_gpu_grow_with_density() -> None:
    """White noise goes from all blocks to the local ones within a step of the ladder.

    The size makes all blocks take several times as long as the local ones. Other processes on the
    device only add to a time, so that the least of several tells.
    """
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 16, 16384, 64, device="cuda").bfloat16().unbind(0)
    call = AttentionCall(query * 2, key * 2, value, None, (8, 32, 64), 0, 0, 0.125)
    ladder = (0.003, 0.03, 0.3, 1.0, 3.0, 30.0)
    reached = densities(call, ladder).cpu()
    timings = [time_call(call, ladder, reached, 64) for _ in range(5)]
    for found in timings:
        assert len(found.points) >= 2
        assert found.points[0][0] < 0.1 and found.points[-1][0] == pytest.approx(1.0)
    local, everything = (min(found.points[at][1] for found in timings) for at in (0, -1))
    assert everything > local > 0.0
    assert max(found.density_ms for found in timings) > 0.0
    assert min(found.dense_ms for found in timings) > 0.0


def test_a_call_takes_no_less_than_launching_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, call = SimulatedGpu(monkeypatch), white_noise()
    gpu.launching = 4.0
    ladder = (0.01, 0.1, 0.5, 2.0, 30.0)
    found = time_call(call, ladder, densities(call, ladder), 0, launches=True)
    assert found.dense_ms == 8.0
    assert min(ms for _, ms in found.points) == 4.0 and max(ms for _, ms in found.points) == 10.5
    assert time_call(call, ladder, densities(call, ladder), 0).points[0][1] < 4.0
    gpu.launching = 9.0
    assert time_call(call, ladder, densities(call, ladder), 0, launches=True).dense_ms == 9.0


@pytest.mark.usefixtures("no_code")
@pytest.mark.parametrize(
    "asked, bound, counted",
    [("auto", True, True), ("eager", False, False), ("graphs", True, False)],
)
def test_launches_count_where_the_gpu_waits_for_them(
    asked: str, bound: bool, counted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With launches that take as long as dense attention does, nothing is worth a split."""
    gpu = SimulatedGpu(monkeypatch)
    gpu.launching = 8.0
    monkeypatch.setattr(Runner, "on_gpu", True)
    times = 9e-3 if bound else 0.0, 9e-3
    monkeypatch.setattr(whole, "launched_and_done", lambda run: run() and times)
    samples = [make_sample(i) for i in range(2)]
    options = {"target_error": 0.2, "progress": False, "rounds": 0, "clock": asked}
    monkeypatch.setitem(whole.MODES, "graphs", None)
    plan = freqopt.calibrate(make_model(), samples, **options)
    assert {site.decision for site in plan.sites.values()} == {"dense" if counted else "split"}


@pytest.mark.parametrize(
    ("model_ms", "code"),
    [
        ((100.0, 80.0), False),
        ((100.0, 101.0), False),
        pytest.param((100.0, 80.0), True, marks=pytest.mark.slow),
        pytest.param((100.0, 101.0), True, marks=pytest.mark.slow),
    ],
)
def test_a_clock_that_compiles_times_the_compiled_model(
    model_ms: tuple[float, float],
    code: bool,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    SimulatedGpu(monkeypatch)
    if not code:
        request.getfixturevalue("no_code")
    outputs: list[list[torch.Tensor]] = []

    def compare(dense: Any, split: Any, team: Any) -> tuple[float, float]:
        outputs.append([run()["velocity"] for run in (dense, split)])
        return model_ms

    monkeypatch.setattr(whole, "compare_runs", compare)
    model, samples = make_model().eval(), [make_sample(i) for i in range(2)]
    options = {"target_error": 0.2, "progress": False, "rounds": 0, "clock": "compiled"}
    plan = freqopt.calibrate(model, samples, **options)
    with torch.no_grad():
        truth = model(**samples[1]).get("velocity")
    for dense, _ in outputs:
        torch.testing.assert_close(dense, truth)
    error, *fewer_sites = (float((split - truth).norm() / truth.norm()) for _, split in outputs)
    assert 0.01 < error <= 0.2
    assert all(1e-3 < each < 0.9 * error for each in fewer_sites)
    assert "the whole model was timed compiled" in plan.evidence.notes
    faster = model_ms[1] < model_ms[0]
    assert len(fewer_sites) == (0 if faster else 1)
    assert {site.decision for site in plan.sites.values()} == {"split" if faster else "dense"}
    if faster:
        assert error == pytest.approx(plan.measured_error, rel=1e-3)
    assert plan.verified is not None and plan.verified.model_ms == model_ms
    assert plan.verified.model_clock == "compiled"


@pytest.mark.parametrize("compiled", [(90.0, 60.0), (90.0, 91.0), None])
def test_before_sites_are_dropped_the_model_is_compiled(
    compiled: tuple[float, float] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a clock: eager it is no faster, compiled it may be, or it does not compile."""
    SimulatedGpu(monkeypatch)
    times = iter([(100.0, 101.0), compiled or (100.0, 101.0), *[(100.0, 101.0)] * 4])
    monkeypatch.setattr(whole, "compare_runs", lambda *_: next(times))

    @contextmanager
    def calls(*_: Any) -> Iterator[tuple[Any, Any]]:
        if compiled is None:
            raise RuntimeError("no compiler here")
        yield (lambda: None), (lambda: None)

    monkeypatch.setattr(Runner, "compiled_calls", calls)
    samples = [make_sample(i) for i in range(2)]
    options = {"target_error": 0.2, "progress": False, "rounds": 0}
    plan = freqopt.calibrate(make_model(), samples, **options)
    kept = compiled == (90.0, 60.0)
    assert {site.decision for site in plan.sites.values()} == {"split" if kept else "dense"}
    assert plan.verified is not None
    if kept:
        assert plan.verified.model_ms == (90.0, 60.0) and plan.verified.model_clock == "compiled"
        (told,) = (note for note in plan.evidence.notes if "eager" in note)
        assert "101 ms against 100 ms" in told and "compiled it is faster: 60 ms" in told
    else:
        assert plan.verified.model_clock == "eager"


def test_dense_outputs_of_measuring_are_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring attends densely, so what comes out is kept, and no other run is spent on it."""
    ran: list[tuple[int, str]] = []
    real = Runner.run

    def run(self: Runner, sample: Any, request: Any) -> Any:
        ran.append((id(sample), type(request).__name__))
        return real(self, sample, request)

    monkeypatch.setattr(Runner, "run", run)
    model, samples = make_model().eval(), [make_sample(i) for i in range(4)]
    found: list[tuple[Any, torch.Tensor]] = []
    known = workbench.Reference.know

    def know(self: Any, dense: list[torch.Tensor]) -> None:
        found.append((self.sample, dense[0]))
        known(self, dense)

    monkeypatch.setattr(workbench.Reference, "know", know)
    freqopt.calibrate(model, samples, target_error=0.2, progress=False, rounds=0)
    measured = [sample for sample, kind in ran if kind == "Measure"]
    assert len(measured) == 2 == len(found)
    assert not [each for each in ran if each[0] in measured and each[1] == "Dense"]
    with torch.no_grad():
        for sample, output in found:
            assert torch.equal(output, model(*sample.args, **sample.kwargs)["velocity"])


def test_a_model_that_does_not_compile_is_timed_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    SimulatedGpu(monkeypatch)

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(Runner, "compiled_calls", fail)
    samples = [make_sample(i) for i in range(2)]
    options = {"target_error": 0.2, "progress": False, "rounds": 0, "clock": "compiled"}
    plan = freqopt.calibrate(make_model(), samples, **options)
    assert any(
        "eager mode, as compiling it failed: RuntimeError: no" in n for n in plan.evidence.notes
    )
    assert plan.verified is not None and plan.verified.model_ms == (100.0, 80.0)
    assert plan.verified.model_clock == "eager"


def test_a_clock_that_there_is_not() -> None:
    with pytest.raises(freqopt.OptionError, match="clock 'wall' is none; supported: auto, eager"):
        freqopt.calibrate(make_model(), [make_sample(0)], clock="wall")


def test_the_least_of_several_times_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other processes add to some of the calls is no time of the call."""
    took = iter([50.0, 50.0, 9.0, 3.0, 30.0, 4.0])
    now = 0.0

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            self.at = float("nan")

        def record(self) -> None:
            self.at = now

        def synchronize(self) -> None: ...

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    def run() -> None:
        nonlocal now
        now += next(took)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    assert clock.milliseconds(run, 4) == 3.0
    assert next(took, None) is None  # two that warm up, and four that are timed
