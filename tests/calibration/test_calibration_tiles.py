"""Errors from a sample of query tiles: unbiased, of known deviation, those of the op on them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import freqopt
from freqopt.calibration.measure import tiles
from freqopt.calibration.measure.attention import AttentionCall, AttentionShape
from freqopt.calibration.measure.curves import measure_curves
from freqopt.calibration.measure.heads import head_tokens
from freqopt.calibration.measure.ladder import (
    EVERY_RUNG,
    FEW_RUNS,
    THRESHOLDS,
    on_every_rung,
    rungs_of,
)
from freqopt.calibration.measure.readings import CURVES, MeasuredSite, Sums, Survey
from freqopt.calibration.measure.tiles import (
    SAMPLED_TILES,
    even_sample,
    fit_probes,
    offset_of,
    tile_errors,
    variance_of_sum,
)
from freqopt.calibration.survey import (
    MOST_TILES,
    WELL_KNOWN,
    relative_deviation,
    tiles_wanted,
)

GRID = (5, 16, 20)  # 1,600 tokens: 12 whole tiles and a ragged one
CPU = torch.device("cpu")


def make_call(grid: tuple[int, int, int] = GRID, batch: int = 1) -> AttentionCall:
    torch.manual_seed(0)
    tokens = grid[0] * grid[1] * grid[2]
    query, key, value = torch.randn(3, batch, 2, tokens, 16).unbind(0)
    drift = torch.linspace(-2, 2, tokens)[:, None]
    return AttentionCall(1.5 * query + drift, key - drift, value, None, grid, 0, 0, 0.25)


@pytest.fixture(scope="module")
def call() -> AttentionCall:
    return make_call()


def errors(call: AttentionCall, chosen: Tensor, probes: int = 64) -> Tensor:
    thresholds, tokens = torch.tensor(THRESHOLDS), head_tokens(call, 1)
    return tile_errors(tokens, thresholds, chosen, fit_probes(tokens, thresholds, probes)).error


@pytest.mark.parametrize("probes", [64, 0])
@pytest.mark.parametrize("grid, batch", [((3, 6, 10), 1), ((5, 7, 9), 2), ((1, 1, 600), 1)])
def test_every_tile_has_the_error_that_the_op_makes_there(
    probes: int, grid: tuple[int, int, int], batch: int
) -> None:
    call = make_call(grid, batch)
    count = -(-call.query.shape[2] // 128)
    thresholds, tokens = torch.tensor(THRESHOLDS), head_tokens(call, 1)
    probe_fit = fit_probes(tokens, thresholds, probes)
    got = tile_errors(tokens, thresholds, torch.arange(count), probe_fit)
    order = freqopt.grid.token_order(grid, CPU).long()
    dense = call.dense()[:, 1, order]
    for rung in (1, 7, 9, 12):
        out, _, probe = call.split(torch.full((2,), THRESHOLDS[rung]), probes)
        wrong = out[:, 1, order] - dense
        for tile in range(count):
            rows = slice(128 * tile, 128 * tile + 128)
            error, along = wrong[:, rows].square().sum(), (wrong * dense)[:, rows].sum()
            torch.testing.assert_close(got.error[rung, tile], error, rtol=2e-3, atol=1e-5)
            torch.testing.assert_close(got.along[rung, tile], along, rtol=2e-3, atol=2e-4)
        torch.testing.assert_close(
            probe_fit.error[:, rung], probe[:, 1], rtol=2e-3, atol=1e-6, equal_nan=True
        )
    assert got.error[12].min() > 1e-2


def test_errors_are_numbers_where_means_have_next_to_nothing_of_the_sum(
    call: AttentionCall,
) -> None:
    sharp = replace(call, query=600 * call.query)
    found = errors(sharp, torch.arange(2))
    assert found.isfinite().all()
    energy = sharp.dense()[:, 1].square().sum() * 128 / sharp.query.shape[2]
    assert found[-1].mean() > 0.2 * energy, "the case must show"


def test_expanded_sums_are_unbiased_over_offsets(call: AttentionCall) -> None:
    """Offsets that take every tile equally often have the mean of all tiles."""
    whole = errors(call, torch.arange(13)).sum(1)
    for count in (4, 5):
        steps = 13 * count
        samples = [even_sample(13, count, (i + 0.5) / steps, CPU) for i in range(steps)]
        taken = torch.cat(samples).bincount(minlength=13)
        assert taken.min() == taken.max() == steps * count / 13
        mean = sum(13 / count * errors(call, chosen).sum(1) for chosen in samples) / steps
        torch.testing.assert_close(mean, whole, rtol=1e-4, atol=1e-6)


def test_samples_are_even_and_all_tiles_where_there_are_few() -> None:
    assert even_sample(591, 32, 0.3, CPU).diff().unique().tolist() == [18, 19]
    assert even_sample(9, 32, 0.999, CPU).tolist() == list(range(9))
    offsets = torch.tensor([offset_of(f"blocks.{i}.attn", n) for i in range(40) for n in range(8)])
    assert offsets.min() >= 0.0 and offsets.max() < 1.0
    assert torch.histc(offsets, 8, 0, 1).min() > 20


def test_the_deviation_is_that_of_samples_over_offsets() -> None:
    """Errors of 640 tiles, rough or smooth along the curve; the mean variance is the true one."""
    generator = torch.Generator().manual_seed(1)
    smooth = 2.0 + torch.sin(torch.linspace(0, 3, 640))
    samples = [even_sample(640, 32, (i + 0.5) / 20, CPU) for i in range(20)]
    for roughness in (1.0, 0.3):
        true, said = [], []
        for _ in range(12):
            noise = torch.rand(640, generator=generator, dtype=torch.float64)
            values = smooth * (1.0 + roughness * (noise - 0.5))
            true.append(torch.stack([20 * values[x].sum() for x in samples]).var(correction=0))
            said += [variance_of_sum(values[x], 640) for x in samples]
        ratio = torch.stack(said).mean() / torch.stack(true).mean()
        assert 0.8 < ratio < 1.5
    assert variance_of_sum(values, 640) == 0.0


def test_a_reading_of_some_tiles_is_near_that_of_all(call: AttentionCall) -> None:
    dense = call.dense()
    whole = measure_curves("a", call, dense, 64)
    assert not whole.curves["variance"].any()
    far = []
    for number in range(8):
        part = measure_curves("a", call, dense, 64, number, sampled=6)
        for name in ("density", "fine", "probe"):
            torch.testing.assert_close(part.curves[name], whole.curves[name])
        away = (part.curves["site"] - whole.curves["site"])[0, 8:]
        far.append(away / part.curves["variance"][0, 8:].sqrt())
    # 16 rungs and heads that go together, 8 samples: unbiased, and as far off as is said
    assert torch.stack(far).mean().abs() < 0.5
    assert 0.4 < torch.stack(far).square().mean().sqrt() < 1.8


def test_two_runs_measure_all_rungs_between_them() -> None:
    for runs in (1, FEW_RUNS - 1):
        assert all(rungs_of(number, runs) == EVERY_RUNG for number in range(runs))
    for number in range(3):
        one, other = rungs_of(number, FEW_RUNS), rungs_of(number + 1, FEW_RUNS)
        assert set(one) | set(other) == set(EVERY_RUNG) and list(one) == sorted(set(one))
        assert {*one} & {*other} == {EVERY_RUNG[0], EVERY_RUNG[-1]}


def test_between_rungs_curves_follow_density() -> None:
    power = torch.tensor([0.5, -1.5, 2.0], dtype=torch.float64)
    density = torch.linspace(1.0, 0.01, len(THRESHOLDS), dtype=torch.float64)[:, None].repeat(1, 3)
    density[3:7, 2] = density[3, 2]  # nothing lies between these rungs
    curves = power * density.log()
    for number in range(2):
        rungs = list(rungs_of(number, FEW_RUNS))
        filled = on_every_rung(curves[rungs], rungs, density)
        torch.testing.assert_close(filled, curves)


@pytest.mark.parametrize("probes", [0, 64])
def test_half_of_the_rungs_tell_what_all_do(call: AttentionCall, probes: int) -> None:
    dense = call.dense()
    whole = measure_curves("a", call, dense, probes).curves
    halves = [
        measure_curves("a", call, dense, probes, rungs=rungs_of(number, FEW_RUNS)).curves
        for number in range(2)
    ]
    for number, half in enumerate(halves):
        measured = list(rungs_of(number, FEW_RUNS))
        for name, curve in half.items():
            at = slice(None) if name in ("density", "fine") else measured
            same = {"rtol": 1e-5, "atol": 1e-12, "equal_nan": True}
            torch.testing.assert_close(curve[:, at], whole[name][:, at], **same)
    near = (whole["density"] > 0.02) & (whole["density"] < 0.8)
    assert near.sum() > 4
    for name in ("own", "site"):
        mean = (halves[0][name] + halves[1][name]) / 2
        ratio = (mean / whole[name])[near]
        assert ((ratio > 0.88) & (ratio < 1.13)).all() and abs(ratio.mean() - 1.0) < 0.03


def test_chunks_do_not_change_the_result(
    call: AttentionCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = errors(call, torch.arange(13))
    monkeypatch.setattr(tiles, "CHUNK_BYTES", 1)
    torch.testing.assert_close(errors(call, torch.arange(13)), whole)


def test_more_tiles_are_measured_where_errors_are_not_well_known(call: AttentionCall) -> None:
    """Errors of 3 tiles of 13 tell little, those of all tell everything."""
    dense = call.dense()
    survey = Survey()
    survey.add_readings([measure_curves("rough", call, dense, 64, sampled=3)], 0)
    survey.add_readings([measure_curves("whole", call, dense, 64)], 0)
    rough, whole = survey.sites["rough"], survey.sites["whole"]
    assert relative_deviation(whole) == 0.0 < WELL_KNOWN < relative_deviation(rough)
    wanted = tiles_wanted(survey, 1, 1)
    assert list(wanted) == ["rough"] and SAMPLED_TILES < wanted["rough"] <= MOST_TILES
    before = relative_deviation(rough)
    survey.add_readings([measure_curves("rough", call, dense, 64, 1, wanted["rough"])], 0)
    assert relative_deviation(rough) < 0.7 * before


def site_known_to(deviation: float, calls: int) -> Survey:
    """A survey of one site whose squared error has this relative standard error after so many."""
    shape, sums = AttentionShape(1, 4096, 8), Sums()
    curves = {name: torch.ones(1, 1, 1, dtype=torch.float64) for name in CURVES}
    curves["variance"] *= (deviation * calls**0.5) ** 2
    for _ in range(calls):
        sums.add(torch.ones(1), curves)
    return Survey({"a": MeasuredSite("a", shape, buckets={0: sums})})


@pytest.mark.parametrize("calls, left", [(1, 3), (1, 15), (2, 2), (4, 1)])
@pytest.mark.parametrize("deviation", [0.11, 0.15, 0.25, 0.4])
def test_runs_to_come_take_the_tiles_that_are_wanted_of_them_all(
    calls: int, left: int, deviation: float
) -> None:
    """With one call a run: what is known in the end is WELL_KNOWN, unless no number gives that."""
    survey = site_known_to(deviation, calls)
    assert relative_deviation(survey.sites["a"]) == pytest.approx(deviation)
    tiles = tiles_wanted(survey, calls, left).get("a", SAMPLED_TILES)
    of_one = deviation**2 * calls
    variance = (calls * of_one + left * of_one * SAMPLED_TILES / tiles) / (calls + left) ** 2
    if tiles < MOST_TILES:
        assert variance**0.5 < 1.01 * WELL_KNOWN
        fewer = left * of_one * SAMPLED_TILES / max(tiles - 1, 1)
        enough = (calls * of_one + fewer) / (calls + left) ** 2 <= WELL_KNOWN**2
        assert tiles == SAMPLED_TILES or not enough
    else:
        assert variance**0.5 > 0.9 * WELL_KNOWN
