"""Allocation against brute force on problems small enough to enumerate."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from calibration_sites import random_site

from freqopt.calibration.measure.attention import AttentionShape
from freqopt.calibration.measure.ladder import REFINEMENT, ladder_choices
from freqopt.calibration.search.allocate import allocate, solve
from freqopt.calibration.search.choices import HeadCurves, SiteChoices, make_choices, refine
from freqopt.calibration.search.cost import ProductCost

COST = ProductCost()


def enumerate_all(sites: list[SiteChoices]) -> list[tuple[float, float]]:
    """(cost, error) of every possible allocation, dense sites included."""
    options = []
    for site in sites:
        shares = [share for share in site.shares for _ in range(site.heads)]
        cost = np.array(shares)[:, None] * COST.split(site.shape, site.density)
        rows = [(COST.dense(site.shape) * site.heads, 0.0)]
        for index in itertools.product(range(site.density.shape[1]), repeat=len(shares)):
            each = range(len(shares))
            rows.append((cost[each, index].sum(), site.weighted_error[each, index].sum()))
        options.append(rows)
    return [
        (sum(c for c, _ in pick), sum(d for _, d in pick)) for pick in itertools.product(*options)
    ]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("choices, shares", [(4, (1.0,)), (2, (0.25, 0.75))])
def test_nothing_cheaper_does_as_little_error(
    seed: int, choices: int, shares: tuple[float, ...]
) -> None:
    rng = np.random.default_rng(seed)
    sites = [random_site(rng, name, choices, shares) for name in "ab"]
    everything = enumerate_all(sites)
    for exponent in range(6, 16):
        found = allocate(sites, 10.0**exponent, COST)
        best = min(cost + found.multiplier * error for cost, error in everything)
        assert found.cost + found.multiplier * found.weighted_error == pytest.approx(
            best, rel=1e-12
        )
        cheapest = min(
            cost for cost, damage in everything if damage <= found.weighted_error * (1 + 1e-12)
        )
        assert found.cost == pytest.approx(cheapest, rel=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_solve_meets_the_target_and_stays_near_the_best(seed: int) -> None:
    rng = np.random.default_rng(100 + seed)
    sites = [random_site(rng, name) for name in "abc"]
    everything = enumerate_all(sites)
    for target in (0.02, 0.04, 0.08):
        found = solve(sites, target, COST)
        assert found.error <= target
        best = min(cost for cost, error in everything if error <= target**2)
        # the gap of a Lagrangian relaxation is at most one head's dearest choice
        slack = max(COST.split(s.shape, s.density).max() for s in sites)
        assert best * (1 - 1e-12) <= found.cost <= best + 2 * slack


def test_totals_weigh_timesteps_by_their_calls() -> None:
    site = random_site(np.random.default_rng(1), "a", 3, (0.25, 0.75))
    found = allocate([site], 0.0, COST)
    early, late = site.density[:2, 3].mean(), site.density[2:, 3].mean()
    assert found.density == pytest.approx(0.25 * early + 0.75 * late)
    assert found.cost == pytest.approx(2 * COST.split(site.shape, np.array(found.density)))


def test_ends_of_the_path() -> None:
    sites = [random_site(np.random.default_rng(0), name) for name in "ab"]
    exact = solve(sites, 0.0, COST)
    assert exact.error == 0.0 and exact.density == 1.0 and all(c.dense for c in exact.choices)
    loosest = solve(sites, math.inf, COST)
    assert not any(choice.dense for choice in loosest.choices)
    assert all((choice.index == 4).all() for choice in loosest.choices)


def test_cost_falls_as_the_target_rises() -> None:
    sites = [random_site(np.random.default_rng(s), str(s), choices=30) for s in range(5)]
    found = [solve(sites, float(t), COST) for t in np.geomspace(1e-3, 0.2, 25)]
    costs = [a.cost for a in found]
    assert costs == sorted(costs, reverse=True) and costs[0] > 2 * costs[-1]


def test_heads_with_little_effect_get_little() -> None:
    site = random_site(np.random.default_rng(3), "a", choices=20)
    density = np.repeat(site.density[:1], 2, 0)
    error = np.stack([site.weighted_error[0], 1e-4 * site.weighted_error[0]])
    same = replace(site, tokens=1024, density=density, error=error, weighted_error=error)
    index = allocate([same], 3e10, COST).choices[0].index
    assert density[0, index[0]] > density[1, index[1]]


def test_a_site_that_saves_nothing_stays_dense() -> None:
    ladder = np.array([0.1, 1.0])
    density = np.full((2, 2), 0.9)  # local blocks alone are most of a short sequence
    error = np.full((2, 2), 1e-9)
    site = make_choices(
        "a", AttentionShape(2, 128, 64), ladder, [HeadCurves(density, error, error)]
    )
    assert allocate([site], 1.0, COST).choices[0].dense


def test_refine_keeps_the_rungs_and_interpolates_on_log_axes() -> None:
    ladder = np.array([0.01, 0.1, 1.0])
    fine, rungs = ladder_choices(ladder), slice(None, None, REFINEMENT)
    assert len(fine) == 2 * REFINEMENT + 1
    np.testing.assert_allclose(fine[rungs], ladder)
    density = np.array([[1.0, 0.1, 0.01], [1.0, 0.5, 0.25]])
    error = np.array([[1e-4, 1e-2, 1.0], [1.0, 0.5, 0.25]])
    got, curve = refine(ladder, density, error)
    np.testing.assert_allclose(got[0], 0.01 / fine, rtol=1e-9)
    np.testing.assert_allclose(curve[0], fine**2, rtol=1e-9)
    np.testing.assert_allclose(curve[1, REFINEMENT // 2], 0.5**0.5)


def test_known_densities_are_kept_and_errors_follow_them() -> None:
    ladder = np.array([0.01, 0.1, 1.0])
    density, error = np.array([[1.0, 0.9, 0.01]]), np.array([[1e-8, 1e-6, 1e-2]])
    known = np.array([[1.0, 1.0, 0.99, 0.95, 0.9, 0.9, 0.9, 0.02, 0.01]])  # a fall all at once
    got, curve = refine(ladder, density, error, fine=known)
    np.testing.assert_allclose(got, known)
    assert (np.diff(curve[0]) >= 0.0).all()
    np.testing.assert_allclose(curve[0, 4:7], 1e-6)
    # An error like density^-2.05 between the last two rungs.
    np.testing.assert_allclose(
        np.log(curve[0, 7] / 1e-6) / np.log(0.9 / 0.02), np.log(1e4) / np.log(90.0)
    )
    guessed, _ = refine(ladder, density, error)
    assert guessed[0, 6] < 0.1  # what the rungs alone would make of 0.9


def test_equal_densities_of_two_rungs_leave_the_thresholds_to_interpolate_by() -> None:
    ladder = np.array([0.1, 1.0])
    density, error = np.full((1, 2), 0.3), np.array([[1e-4, 1e-2]])
    got, curve = refine(ladder, density, error, fine=np.full((1, REFINEMENT + 1), 0.3))
    np.testing.assert_allclose(got, 0.3)
    np.testing.assert_allclose(curve[0], 1e-4 * 100.0 ** np.linspace(0, 1, REFINEMENT + 1))
