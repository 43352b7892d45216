"""The arithmetic of benchmarks/calibration.py: what a variant may choose, and what is compared."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from calibration_sites import random_site

from benchmarks.calibration import Results, density_ratio
from benchmarks.calibration_variants import (
    allocated,
    by_grid,
    heads_tied,
    timesteps_tied,
    uniform,
)
from freqopt.calibration.measure.requests import SiteThresholds
from freqopt.calibration.search.allocate import allocate
from freqopt.calibration.search.choices import SiteChoices
from freqopt.calibration.search.cost import ProductCost

SHARES = (0.25, 0.75)


def make_sites(choices: int = 12) -> list[SiteChoices]:
    rng = np.random.default_rng(0)
    return [random_site(rng, name, choices, SHARES) for name in "abc"]


def test_tied_rows_choose_alike_and_totals_stay() -> None:
    for tie, groups in ((heads_tied, [[0, 1], [2, 3]]), (timesteps_tied, [[0, 2], [1, 3]])):
        for site in make_sites():
            found = tie(site)
            for multiplier in (1e5, 1e8, 1e10):
                index = allocate([found], multiplier, ProductCost()).choices[0].index
                assert all(index[a] == index[b] for a, b in groups)
            for choice in range(13):
                same = np.full(4, choice)
                assert found.mean_density(same) == pytest.approx(site.mean_density(same))
                assert found.error[:, choice].sum() == pytest.approx(site.error[:, choice].sum())


def density_of(site: SiteChoices, budget: SiteThresholds) -> float:
    """Of a site at its thresholds (buckets, heads); between its choices, on logarithmic axes."""
    ladder = np.log(np.maximum(site.threshold, 1e-9))
    rows = [
        np.interp(np.log(max(threshold, 1e-9)), ladder, site.density[row])
        for row, threshold in enumerate(budget.threshold.flatten().tolist())
    ]
    return float(site.weight @ rows / site.heads)


@pytest.mark.parametrize("density", [0.2, 0.4, 0.6])
def test_allocated_and_uniform_reach_the_density(density: float) -> None:
    sites, cost = make_sites(40), ProductCost()
    chosen = allocated(sites, cost, density)
    assert list(chosen) == ["a", "b", "c"]
    assert all(budget.threshold.shape == (2, 2) for budget in chosen.values())
    dense = np.array([cost.dense(site.shape) for site in sites])
    each = np.array([density_of(site, chosen[site.name]) for site in sites])
    assert 0.75 * density < dense @ each / dense.sum() <= density  # curves of few, random steps
    equal = uniform(sites, density)
    assert len({float(x) for budget in equal.values() for x in budget.threshold.flatten()}) == 1
    mean = np.mean([density_of(site, equal[site.name]) for site in sites])
    assert mean == pytest.approx(density, rel=0.01)


def test_by_the_grid_no_other_order_is_open() -> None:
    """And one threshold for all is that of the grid's ladder, whatever orders there are."""
    rng = np.random.default_rng(0)
    alone = [random_site(rng, name, 12, SHARES) for name in "abc"]
    both = []
    for site in alone:
        twice = [np.concatenate([x, 0.3 * x[:, 1:]], 1) for x in (site.error, site.weighted_error)]
        both.append(
            replace(
                site,
                threshold=np.concatenate([site.threshold, site.threshold[1:]]),
                density=np.concatenate([site.density, site.density[:, 1:]], 1),
                error=twice[0],
                weighted_error=twice[1],
                order=np.repeat([0, 1], [13, 12]),
            )
        )
    assert [site.orders for site in both] == [2, 2, 2]
    for site, other in zip(alone, map(by_grid, both), strict=True):
        assert other.orders == 1
        np.testing.assert_array_equal(other.threshold, site.threshold)
        np.testing.assert_array_equal(other.error, site.error)
    for one, other in zip(uniform(alone, 0.3).values(), uniform(both, 0.3).values(), strict=True):
        assert torch.equal(one.threshold, other.threshold)


def test_density_ratio_is_read_at_equal_error() -> None:
    other = [(d, 0.1 / d) for d in (0.05, 0.1, 0.2, 0.4)]
    ours = [(d / 2, error) for d, error in other]
    assert density_ratio(ours, other) == pytest.approx(0.5)
    assert density_ratio([(0.1, 99.0)], other) is None


def test_a_run_that_is_cut_off_leaves_a_file_with_the_summary_so_far(tmp_path: Path) -> None:
    results = Results(tmp_path, (0.1, 0.05))
    path = results.add(settings={})
    found = json.loads(path.read_text())
    assert set(found["summary"].values()) == {None}
    results.add(plan={"unseen_error": 0.031, "target_error": 0.03, "seconds": 80.0})
    row = {"variant": "calibrated", "wanted_density": 0.05, "psnr": 33.0}
    results.add(variants=[row, {**row, "variant": "one threshold for all", "psnr": 35.0}])
    found = json.loads(path.read_text())["summary"]
    assert found["error on unseen samples / target"] == pytest.approx(0.031 / 0.03)
    assert found["PSNR at the second density, dB"] == 33.0
    assert found["PSNR at the first density, dB"] is None
    assert found["probe error / true error"] is None
    assert [file.name for file in tmp_path.iterdir()] == ["calibration.json"]
