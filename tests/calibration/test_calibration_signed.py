"""Sensitivities from runs in which many heads have errors of random signs, within few passes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from calibration_models import TinyVideo, make_sample

import freqopt
from freqopt.calibration.checkpoint import Checkpoint
from freqopt.calibration.measure.requests import Dense
from freqopt.calibration.runner import opened
from freqopt.calibration.samples import collect_samples
from freqopt.calibration.search.probing import Probing
from freqopt.calibration.search.sensitivity import (
    FIXED_RUNS,
    TRIED_RUNS,
    measure_sensitivities,
    probed_samples,
)
from freqopt.calibration.search.signed import Draws, Group, estimate, scheme_of
from freqopt.calibration.search.workbench import Workbench
from freqopt.calibration.survey import measure_sites
from freqopt.progress import open_progress

LAYERS, HEADS = 6, 4


def synthetic(
    rng: np.random.Generator, squares: np.ndarray, draws: int, cosine: float, rounding: float = 0.0
) -> Draws:
    """Draws over heads whose errors have these squares, and a part in common."""
    heads, size = len(squares), 4000
    common = rng.normal(size=size)
    apart = rng.normal(size=(heads, size))
    vectors = cosine**0.5 * common + (1 - cosine) ** 0.5 * apart
    vectors *= np.sqrt(squares / size)[:, None]
    signs = rng.choice([-1.0, 1.0], (draws, heads))
    away = signs @ vectors + rounding / size**0.5 * rng.normal(size=(draws, size))
    return Draws(0, 0, signs, np.ones(heads), away @ away.T, rounding)


@pytest.mark.parametrize("cosine", [0.0, 0.1])
def test_squares_of_many_heads_come_out_of_fewer_runs(cosine: float) -> None:
    """24 heads from 12 runs in each of three samples: unbiased, and as far off as is said."""
    rng = np.random.default_rng(0)
    off, shifts, alike = [], [], []
    for _ in range(20):
        squares = np.exp(rng.normal(0.0, 0.5, 24))
        draws = [synthetic(rng, squares, 12, cosine, rounding=0.5) for _ in range(3)]
        found = estimate(draws, [2] * 12, 1)
        off.append((found.mean[0] - squares) / found.deviation[0])
        shifts.append(found.mean[0].mean() / squares.mean())
        alike.append(np.corrcoef(np.log(found.mean[0]), np.log(squares))[0, 1])
    assert np.mean(alike) > 0.85
    assert 0.6 < np.sqrt(np.square(off).mean()) < 1.6
    assert np.mean(shifts) == pytest.approx(1.0, abs=0.05)


def test_heads_without_runs_are_like_those_near_them() -> None:
    rng = np.random.default_rng(1)
    low, high = (synthetic(rng, np.full(4, level), 10, 0.0) for level in (0.2, 2.0))
    found = estimate([low._replace(first=0), high._replace(first=32)], [4] * 9, 2)
    mean = found.mean.reshape(2, 9, 4).mean(2)
    assert (np.diff(mean[0]) > -1e-9).all() and mean[0, 0] < 0.4 and mean[0, -1] > 1.4
    deviation = found.deviation.reshape(2, 9, 4).mean(2)
    assert deviation[0, 4] > 2 * deviation[0, 0]  # and less is known of them
    np.testing.assert_allclose(mean[1], mean[0], rtol=1.0)  # nor had the other bucket any
    assert (deviation[1] > deviation[0]).all()


def test_deviations_below_rounding_still_count() -> None:
    """As in large models of half precision: at least a tenth of what is seen is not rounding."""
    rng = np.random.default_rng(2)
    quiet = synthetic(rng, np.full(6, 1e-6), 1, 0.0, rounding=0.5)
    found = estimate([quiet._replace(rounding=0.6)], [2] * 3, 1)
    assert (found.mean > 0.1 * 0.2 / 6 * 0.5).all() and np.isfinite(found.mean).all()


def test_schemes_keep_the_budget() -> None:
    for sites, heads, parts in ((12, 2, True), (12, 2, False), (40, 40, True), (40, 40, False)):
        shares = [1.0 - i / sites if parts else 1.0 for i in range(sites)]
        for references, passes in ((8, 100), (8, 30), (4, 28), (2, 10), (1, 6), (4, 4)):
            found = scheme_of([heads] * sites, shares, references, passes, FIXED_RUNS)
            assert 1 <= len(found.references) <= references
            assert found.passes <= passes or (passes == 4 and found.passes <= 5)
            assert max(found.references) < references
            runs = sum(g.draws for each in found.groups for g in each)
            assert runs >= 1 or not found.groups
            assert found.passes > 0.5 * passes or passes == 100
            if sites == 12 and parts:
                assert (not found.groups) == (passes >= 28)  # heads one by one, in some samples
        assert scheme_of([heads] * sites, shares, 8, None, FIXED_RUNS).groups == []
    turns = scheme_of([40] * 40, [1 - i / 40 for i in range(40)], 4, 40, FIXED_RUNS).groups
    probed = [group.first for each in turns for group in each]
    assert sorted(set(probed)) == list(range(40))  # every site
    assert all(each == sorted(each) and {g.draws for g in each} == {1} for each in turns)


@pytest.fixture(scope="module")
def bench() -> Any:
    torch.manual_seed(0)
    model = TinyVideo(width=64, heads=HEADS, layers=LAYERS).eval()
    samples = collect_samples(model, [make_sample(i) for i in range(4)], buckets=1)
    with opened(model, samples, None, 0) as runner, open_progress(False) as bars:
        found = Workbench(runner, bars, Checkpoint(None, ""))
        measure_sites(found)
        for sample in samples.fit:
            found.reference(sample).compute()
        yield found


def squares(found: dict[str, Any]) -> Any:
    return np.square(np.concatenate([found[name] for name in found], 1))


def test_signed_runs_agree_with_heads_one_by_one(bench: Workbench) -> None:
    references = [bench.reference(sample) for sample in probed_samples(bench.samples)]
    heads = [HEADS] * LAYERS
    alone, drawn = Probing(bench, references), Probing(bench, references)
    for number, reference in enumerate(references):
        for probing in (alone, drawn):
            probing.rounding(number)
        replays = bench.replays(reference, Dense())
        for index in range(LAYERS):
            for head in range(HEADS):
                alone.inject(number, index, head, replays)
        for group in (Group(0, 3, 7), Group(3, 6, 7)):
            drawn.draw(number, group, replays)
    want = np.array(
        [np.mean(alone.squares[0][at, head]) for at in range(LAYERS) for head in range(HEADS)]
    )
    found = estimate(drawn.draws, heads, 1)
    off = (found.mean[0] - want) / found.deviation[0]
    assert np.sqrt(np.square(off).mean()) < 1.6 and np.abs(off).max() < 4.0
    assert np.corrcoef(np.log(found.mean[0]), np.log(want))[0, 1] > 0.85
    assert found.mean[0].mean() == pytest.approx(want.mean(), rel=0.15)
    assert (found.deviation[0] / found.mean[0]).mean() < 0.6


@pytest.mark.parametrize("passes", [32, 15, 10])
def test_passes_are_counted_in_calls_of_the_model(bench: Workbench, passes: int) -> None:
    references = [bench.reference(sample) for sample in probed_samples(bench.samples)]
    whole = measure_sensitivities(bench, references)
    bench.checkpoint.entries.clear()
    before = bench.runner.passes
    few = measure_sensitivities(bench, references, passes)
    spent = bench.runner.passes - before
    assert 0.4 * passes < spent <= few.passes <= passes
    assert whole.deviation is None and (few.deviation is None) == (passes == 32)
    assert few.deviation is None or 0 < few.deviation < 0.5
    ratio = np.sqrt(squares(few.values) / squares(whole.values))
    assert np.square(np.log(ratio)).mean() ** 0.5 < 0.35
    again = measure_sensitivities(bench, references, passes)  # out of what was kept
    assert bench.runner.passes - before == spent
    assert all((again.values[name] == few.values[name]).all() for name in few.values)
    assert few.passes > TRIED_RUNS + FIXED_RUNS


def test_a_model_that_cannot_be_run_in_part_says_so() -> None:
    class Broken(TinyVideo):
        def forward(self, video: Any, timestep: Any) -> Any:
            x = self.patch(video).flatten(2).transpose(1, 2) + timestep[:, None, None]
            for block in self.blocks:
                x = block(x)
                torch._dynamo.graph_break()
            return self.head(x)

    torch.manual_seed(0)
    model, samples = Broken().eval(), [make_sample(i) for i in range(2)]
    options: dict[str, Any] = {"target_error": 0.2, "rounds": 0, "progress": False}
    plan = freqopt.calibrate(model, samples, **options)
    said = "the model cannot be run in part (its graph is in pieces"
    assert plan.evidence.notes[0].startswith(said)
    whole = freqopt.calibrate(TinyVideo().eval(), samples, **options)
    assert not any("in part" in note for note in whole.evidence.notes)
