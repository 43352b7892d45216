"""Marginals on a model that is a sum of error vectors, one per head: all about it is known.

The output is wrong by sum of a_h v_h, a_h the error that head h makes alone. Heads whose vectors
are alike add up, heads whose vectors are opposite undo each other, and errors measured one head at
a time say nothing about either.
"""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from freqopt.calibration.checkpoint import Checkpoint
from freqopt.calibration.measure.attention import AttentionShape
from freqopt.calibration.measure.readings import Survey
from freqopt.calibration.measure.requests import Request, Result, Split
from freqopt.calibration.search.allocate import allocate, total
from freqopt.calibration.search.choices import SiteChoices
from freqopt.calibration.search.cost import ProductCost
from freqopt.calibration.search.marginals import (
    BOUNDS,
    Neighbours,
    coupled,
    couplings_of,
    marginal_units,
    measure_neighbours,
)
from freqopt.calibration.search.refine import ALONE, TIED, Refinement, best_at_density, cheapest
from freqopt.calibration.search.strategies import Strategy
from freqopt.calibration.search.verify import mean_density, thresholds_of
from freqopt.calibration.search.workbench import Workbench
from freqopt.calibration.team import Team
from freqopt.progress import Step

TOKENS, CHOICES = 4096, 40
COST = ProductCost()


class Silent:
    """A progress display that counts."""

    def __init__(self) -> None:
        self.units: dict[str, int] = {}

    def phase(self, title: str, total: int | None) -> Any:
        from contextlib import contextmanager

        @contextmanager
        def open_phase() -> Any:
            outer = self

            class Counting(Step):
                def __call__(self, units: int = 1) -> None:
                    outer.units[title] = outer.units.get(title, 0) + units

            yield Counting()

        return open_phase()


class SumModel:
    """Stands for a runner: one site with H heads in some timestep buckets, one sample in each.

    vectors: (buckets, H, P), of length 1. scale: (buckets, H), error of each head alone at 10 %
    density; errors fall with the square root of the density.
    """

    team = Team()

    def __init__(self, vectors: NDArray[np.float64], scale: NDArray[np.float64]) -> None:
        self.vectors, self.scale = torch.tensor(vectors), torch.tensor(scale)
        buckets, heads = scale.shape
        threshold = np.concatenate([[0.0], np.geomspace(0.1, 10.0, CHOICES)])
        falling = np.geomspace(0.8, 0.01, CHOICES)
        density = np.tile(np.concatenate([[1.0], falling]), (buckets * heads, 1))
        alone = np.concatenate([[0.0], np.sqrt(0.1 / falling)])
        error = (scale.reshape(-1, 1) * alone) ** 2 / buckets
        points = zip(density[0].tolist(), alone.tolist(), strict=True)
        self.curve = dict(zip(np.float32(threshold).tolist(), points, strict=True))
        shares = (1.0 / buckets,) * buckets
        curves = density, error, error
        self.site = SiteChoices("site", TOKENS, 64, threshold, *curves, shares, forced=True)
        self.samples = SimpleNamespace(
            buckets=buckets, bucket=lambda sample: sample, fit=list(range(buckets))
        )
        self.bench = Workbench(self, Silent(), Checkpoint(None, ""), Survey())  # type: ignore[arg-type]
        self.bench.survey.add_sites({"site": AttentionShape(heads, TOKENS, 64)}, {})

    def run(self, bucket: int, request: Request) -> Result:
        """The dense output is a unit vector that no error has a part in."""
        dense = torch.zeros(self.vectors.shape[-1] + 1, dtype=torch.float64)
        dense[-1] = 1.0
        result = Result([dense])
        if isinstance(request, Split) and "site" in request.thresholds:
            points = [self.curve[t] for t in request.thresholds["site"].threshold[bucket].tolist()]
            result.densities["site"] = [torch.tensor([density for density, _ in points])]
            away = torch.tensor([error for _, error in points]) * self.scale[bucket]
            dense[:-1] = away @ self.vectors[bucket]
        return result

    def replays(self, bucket: int, base: Request) -> Any:
        """Runs of parts, all of which are whole."""
        return SimpleNamespace(run=lambda site, request: self.run(bucket, request))

    def refinement(self) -> Refinement:
        references = [self.bench.reference(bucket) for bucket in self.samples.fit]
        return Refinement(self.bench, references, 3)

    def true_error(self, strategy: Strategy, allocation: Any) -> float:
        request, squares = Split(thresholds_of(strategy.sites, allocation)), []
        for bucket in self.samples.fit:
            output = self.run(bucket, request).output[0]
            squares.append(float(output[:-1].square().sum()))
        return math.sqrt(sum(squares) / len(squares))


def pair(cosine: float) -> NDArray[np.float64]:
    """Three unit vectors (1, 3, 3): the second has a cosine to the first, the third is apart."""
    return np.array([[[1, 0, 0], [cosine, math.sqrt(1 - cosine**2), 0], [0, 0, 1]]], float)


@pytest.mark.parametrize("cosine", [1.0, 0.5, 0.0, -0.5, -0.9])
def test_couplings_are_twice_the_products_with_all_others(cosine: float) -> None:
    model = SumModel(pair(cosine), np.array([[0.02, 0.015, 0.01]]))
    refinement = model.refinement()
    allocation = Strategy(ALONE, [model.site]).solve_density(0.1, COST)
    errors = refinement.fitted(1.0).measure(thresholds_of([model.site], allocation)).errors
    points = list(zip(range(1), refinement.references, errors, strict=True))
    neighbours = measure_neighbours(model.bench, [model.site], allocation, points)
    found = couplings_of([model.site], allocation, neighbours)[0]
    row = np.arange(3)
    alone = np.sqrt(model.site.error[row, allocation.choices[0].index])
    expected = 2 * np.array([cosine * alone[1], cosine * alone[0], 0.0])
    low, high = BOUNDS
    np.testing.assert_allclose(found[0], expected.clip(low * alone, high * alone), atol=1e-7)


def test_couplings_are_drawn_together_less_the_more_samples_tell() -> None:
    """Two buckets whose heads make the same errors alone, coupled by 1 and by 3 times those."""
    model = SumModel(np.repeat(np.eye(3)[None], 2, 0), np.full((2, 3), 0.01))
    allocation = Strategy(ALONE, [model.site]).solve_density(0.1, COST)
    rows = np.arange(6)
    alone = np.sqrt(2 * model.site.error[rows, allocation.choices[0].index]).reshape(2, 3)
    for samples, drawn in ((1, 0.5), (2, 1 / 3), (4, 0.2)):
        neighbours = [
            Neighbours(
                bucket, (1.0 + 2.0 * bucket) * alone[bucket], np.array([True, True, bucket > 0])
            )
            for bucket in (0, 1)
            for _ in range(samples)
        ]
        ratio = couplings_of([model.site], allocation, neighbours)[0] / alone
        np.testing.assert_allclose(ratio[:, :2], np.array([[1 + drawn] * 2, [3 - drawn] * 2]))
        np.testing.assert_allclose(ratio[:, 2], 3.0)  # where nothing is known, what others know


def test_rounds_take_samples_in_turn_and_the_latest_of_each_counts() -> None:
    model = SumModel(np.repeat(np.eye(3)[None], 2, 0), np.full((2, 3), 0.01))
    refinement = model.refinement()
    dense = refinement.references
    refinement.references = [dense[i // 8] for i in range(16)]  # eight of each bucket
    turns = [refinement._turn(number) for number in range(4)]
    assert turns[0] == [0, 1, 2, 3, 8, 9, 10, 11] and turns[1] == [4, 5, 6, 7, 12, 13, 14, 15]
    assert turns[2] == turns[3] == list(range(16))
    refinement.references = [dense[0], dense[1], dense[1]]
    assert [refinement._turn(number) for number in range(3)] == [[0, 1, 2]] * 3
    refinement.references = [dense[i // 8] for i in range(16)]
    allocation = Strategy(ALONE, [model.site]).solve_density(0.1, COST)
    errors = refinement.fitted(1.0).measure(thresholds_of([model.site], allocation)).errors

    def known(number: int) -> int:
        return len(refinement._neighbours([model.site], allocation, errors, number))

    assert [known(number) for number in range(3)] == [8, 16, 16]
    assert known(0) == 8  # another allocation's first


def optimum(model: SumModel, density: float) -> float:
    """Least true error of three heads within a mean density, by trying all."""
    falling = np.array([d for d, _ in model.curve.values()])
    alone = np.array([a for _, a in model.curve.values()])
    scale, vectors = model.scale[0].numpy(), model.vectors[0].numpy()
    gram, best = vectors @ vectors.T, math.inf
    for pick in itertools.product(range(1, CHOICES + 1), repeat=3):
        if falling[list(pick)].mean() <= density:
            a = alone[list(pick)] * scale
            best = min(best, float(a @ gram @ a))
    return math.sqrt(best)


@pytest.mark.parametrize("cosine", [0.95, 0.5, -0.5, -0.8])
def test_rounds_come_near_the_optimum_where_errors_alone_mislead(cosine: float) -> None:
    model = SumModel(pair(cosine), np.array([[0.02, 0.015, 0.01]]))
    refinement = model.refinement()
    ways = refinement.strategies_at_density([model.site], 0.1)
    errors = {way.name: model.true_error(way, way.solve_density(0.1, COST)) for way in ways}
    best = best_at_density(ways, refinement.fitted(1.0), 0.1, model.bench)[0].strategy
    least = optimum(model, 0.1)
    chosen = model.true_error(best, best.solve_density(0.1, COST))
    assert least <= chosen * (1 + 1e-9)
    assert chosen <= 1.05 * least
    assert chosen <= min(errors.values()) * 1.03
    if cosine < -0.6:
        assert errors[ALONE] > 1.04 * chosen


def least_cost(model: SumModel, way: Strategy, target: float) -> tuple[float, float]:
    """Cost at which a way meets a true error, infinite if never; and its least true error."""
    least, found = math.inf, [(math.inf, 0.0)]

    def scan(predictions: NDArray[np.float64]) -> None:
        nonlocal least
        for predicted in predictions:
            allocation = way.solve(float(predicted), COST)
            error = model.true_error(way, allocation)
            least = min(least, error)
            if error <= target:
                found.append((allocation.cost, float(predicted)))

    coarse = np.geomspace(1e-3, 0.3, 40)
    scan(coarse)
    at = max(min(found)[1], 1e-3)
    scan(np.geomspace(at, at * coarse[1] / coarse[0], 20)[1:-1])
    return min(found)[0], least


@pytest.mark.parametrize("seed", range(6))
def test_no_way_that_is_taken_costs_more_than_one_threshold(seed: int) -> None:
    """Errors alone are made to lie: the heads that look worst are the ones that cancel."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(2, 5, 7))
    vectors[:, 1] = -vectors[:, 0] + 0.05 * rng.normal(size=(2, 7))
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    scale = rng.uniform(0.002, 0.03, (2, 5))
    scale[:, :2] = 0.03
    model = SumModel(vectors, scale)
    refinement = model.refinement()
    target = 0.03
    ways = refinement.strategies([model.site], target)
    order = cheapest(ways, refinement.fitted(target), model.bench)
    found = {way.name: least_cost(model, way, target) for way in ways}
    # The first comes to the target; that of seed 1 ends two thousandths above it.
    assert found[order[0].strategy.name][1] <= 1.002 * target
    costs = [found[settled.strategy.name][0] for settled in order]
    taken = next(cost for cost in costs if cost < math.inf)
    assert taken <= 1.01 * found[TIED][0]
    assert taken <= 1.01 * found[ALONE][0]


def test_one_threshold_moves_a_site_at_a_time() -> None:
    model = SumModel(np.eye(3)[None], np.full((1, 3), 0.01))
    sites = [model.site, SiteChoices(**{**vars(model.site), "name": "other"})]
    way = Strategy(TIED, sites, tied=True)
    steps = [way.solve(target, COST) for target in (0.0, 0.004, 0.02, 0.05, math.inf)]
    for target, found in zip((0.0, 0.004, 0.02, 0.05, math.inf), steps, strict=True):
        assert found.error <= target
        indices = [choice.index for choice in found.choices]
        assert all((index == index[0]).all() for index in indices)
        assert indices[0][0] - indices[1][0] in (0, 1)
    assert steps[0].density == 1.0 and steps[-1].choices[1].index[0] == CHOICES
    for density in (0.9, 0.3, 0.02):
        found = way.solve_density(density, COST)
        assert found.density <= density
        assert found.density > 0.88 * density
    assert way.solve_density(0.001, COST).density == pytest.approx(0.01)


def test_densities_stay_within_reach_of_the_working_point() -> None:
    model = SumModel(np.eye(3)[None], np.array([[0.03, 0.01, 0.001]]))
    base = Strategy(ALONE, [model.site]).solve_density(0.1, COST)
    here = model.site.density[np.arange(3), base.choices[0].index]
    way = Strategy("near", [model.site], around=(base, 1.5))
    for target in (0.0, 0.02, math.inf):
        index = way.solve(target, COST).choices[0].index
        there = model.site.density[np.arange(3), index]
        assert (np.abs(np.log(there / here)) <= math.log(1.5) + 1e-6).all()


def test_what_is_coupled_may_gain_from_more_error() -> None:
    """A head that undoes another's error is not made exact, however dear errors are."""
    model = SumModel(pair(-0.9), np.array([[0.02, 0.015, 0.01]]))
    site = coupled(model.site, np.array([[0.0, -0.04, 0.0]]))
    choice = allocate([site], 1e18, COST).choices[0]
    assert choice.index[0] == choice.index[2] == 0 < choice.index[1]
    assert site.error[1, choice.index[1]] == pytest.approx(-(0.02**2), rel=0.01)
    found = total([site], [choice], 1.0, COST)
    assert found.error >= 0.0 and math.isfinite(found.error)


def test_models_of_many_heads_are_moved_a_site_at_a_time() -> None:
    rng = np.random.default_rng(0)
    heads = 40
    vectors = np.eye(heads)[None]
    model = SumModel(vectors, rng.uniform(0.001, 0.02, (1, heads)))
    sites = [SiteChoices(**{**vars(model.site), "name": name}) for name in "abcd"]
    allocation = Strategy(ALONE, sites).solve_density(0.1, COST)
    units = marginal_units(sites, allocation)
    assert [tuple(unit) for unit in units] == [(0, -1), (1, -1), (2, -1), (3, -1)]


def test_densities_are_weighted_by_what_sites_cost() -> None:
    model = SumModel(np.eye(3)[None], np.full((1, 3), 0.01))
    small = SiteChoices(**{**vars(model.site), "name": "small", "tokens": TOKENS // 2})
    found = {"site": torch.tensor([0.1, 0.1, 0.4])}
    assert mean_density([model.site, small], found, COST) == pytest.approx((4 * 0.2 + 1) / 5)
