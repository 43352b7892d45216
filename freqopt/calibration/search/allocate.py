"""Allocation: which choice for which head and timestep, so that the error target costs least.

Every (site, timestep bucket, head) has a curve of choices; one Lagrange multiplier over all of them
picks the point where another unit of error is worth the same everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from freqopt.calibration.search.choices import SiteChoices
from freqopt.calibration.search.cost import CostModel


@dataclass(frozen=True)
class SiteChoice:
    """What was chosen for a site: one choice index per row, or dense for all of them."""

    index: NDArray[np.int64]
    dense: bool


@dataclass(frozen=True)
class Allocation:
    """A choice for every site, with its totals.

    error: predicted relative L2 error of the model's output. density: share of pairs attended
    exactly, weighted by dense cost, dense sites counted as 1.
    """

    multiplier: float
    choices: list[SiteChoice]
    cost: float
    weighted_error: float
    error: float
    density: float


def split_cost(site: SiteChoices, index: NDArray[np.int64], cost: CostModel) -> float:
    """Cost of a site's calls with a choice for every row, weighted by the rows' shares."""
    density = site.density[np.arange(len(index)), index]
    split = float((site.weight * cost.split(site.shape, density)).sum())
    return split + order_cost(site, index, cost)


def order_cost(site: SiteChoices, index: NDArray[np.int64], cost: CostModel) -> float:
    """Cost of the orders by content in a site's calls, with a choice for every row."""
    largest = int(site.orders_of(index).max()) if site.orders > 1 else 0
    if not largest:
        return 0.0
    return cost.order(site.shape, site.key_heads or site.heads, site.chunks[largest])


def _best_split(
    site: SiteChoices, multiplier: float, cost: CostModel, *, loosest: bool = False
) -> tuple[NDArray[np.int64], float]:
    """The choices that minimise cost + multiplier * weighted error, and that minimum.

    Of choices that are alike on the samples the strictest, or the loosest. Key heads take the order
    that is best for them out of those up to a largest chunk, which is what the site pays for, and
    sites the largest chunk that is best for them: the grid's order where nothing is gained.
    """
    paid = site.weight[:, None] * cost.split(site.shape, site.density)
    sums = paid + multiplier * site.weighted_error
    rows = np.arange(len(sums))
    by_order, totals = [], []
    for order in range(site.orders):
        of_order = np.where(site.open_in(order), sums, np.inf)
        last = sums.shape[1] - 1 - np.argmin(of_order[:, ::-1], axis=1)
        by_order.append(last if loosest else np.argmin(of_order, axis=1))
        totals.append(site.by_key_head(sums[rows, by_order[-1]]).sum(1))
    best: tuple[NDArray[np.int64], float] | None = None
    for largest in range(site.orders):
        orders = site.of_rows(np.argmin(totals[: largest + 1], axis=0))
        index = np.stack(by_order)[orders, rows]
        weighted_error = float(site.weighted_error[rows, index].sum())
        least = split_cost(site, index, cost) + multiplier * weighted_error
        if best is None or least < best[1]:
            best = index, least
    assert best is not None
    return best


def allocate(
    sites: Sequence[SiteChoices], multiplier: float, cost: CostModel, *, loosest: bool = False
) -> Allocation:
    """The choices that minimise cost + multiplier * weighted error, exactly, over heads and sites.

    loosest: which of choices to take that are alike on the samples.
    """
    choices = []
    for site in sites:
        index, least = _best_split(site, multiplier, cost, loosest=loosest)
        cheaper = cost.dense(site.shape) * site.heads <= least
        choices.append(SiteChoice(index, not index.any() if site.forced else bool(cheaper)))
    return total(sites, choices, multiplier, cost)


def with_dense(
    sites: Sequence[SiteChoices], allocation: Allocation, names: Container[str], cost: CostModel
) -> Allocation:
    """The same allocation with the named sites dense."""
    choices = [
        replace(choice, dense=choice.dense or site.name in names)
        for site, choice in zip(sites, allocation.choices, strict=True)
    ]
    return total(sites, choices, allocation.multiplier, cost)


def total(
    sites: Sequence[SiteChoices], choices: list[SiteChoice], multiplier: float, cost: CostModel
) -> Allocation:
    """The allocation of these choices, with its totals."""
    spent = weighted_error = error = pairs = dense_total = 0.0
    for site, choice in zip(sites, choices, strict=True):
        dense_cost = cost.dense(site.shape) * site.heads
        dense_total += dense_cost
        if choice.dense:
            spent += dense_cost
            pairs += dense_cost
            continue
        row, index = np.arange(len(choice.index)), choice.index
        spent += split_cost(site, index, cost)
        weighted_error += site.weighted_error[row, index].sum()
        error += site.error[row, index].sum()
        pairs += dense_cost * site.mean_density(index)
    density = pairs / dense_total if dense_total else 1.0
    return Allocation(
        multiplier, choices, spent, weighted_error, math.sqrt(max(error, 0.0)), density
    )


def same_choices(first: Allocation, second: Allocation) -> bool:
    """Whether two allocations split the same sites with the same budgets."""
    return all(
        a.dense == b.dense and (a.dense or bool((a.index == b.index).all()))
        for a, b in zip(first.choices, second.choices, strict=True)
    )


def solve(
    sites: Sequence[SiteChoices],
    target: float,
    cost: CostModel,
    *,
    steps: int = 80,
) -> Allocation:
    """The cheapest allocation on the Lagrangian's path whose predicted error is within `target`.

    A small multiplier ignores errors and a large one allows none; the path between is monotone, so
    bisection of its logarithm suffices. An infinite target gives the loosest allocation.
    """
    scale = sum(cost.dense(site.shape) * site.heads for site in sites)
    low, high = math.log(scale * 1e-9), math.log(scale * 1e24)
    loosest = allocate(sites, math.exp(low), cost, loosest=True)
    if loosest.error <= target:
        return loosest
    best = allocate(sites, math.exp(high), cost)
    for _ in range(steps):
        middle = 0.5 * (low + high)
        trial = allocate(sites, math.exp(middle), cost)
        if trial.error <= target:
            best, high = trial, middle
        else:
            low = middle
    return best


def solve_density(
    sites: Sequence[SiteChoices], density: float, cost: CostModel, *, steps: int = 60
) -> Allocation:
    """The allocation of the least error on the Lagrangian's path within a predicted density.

    Where even the loosest allocation needs more, that one.
    """
    scale = math.log(sum(cost.dense(site.shape) * site.heads for site in sites))
    low, high = scale + math.log(1e-9), scale + math.log(1e24)
    best = allocate(sites, math.exp(low), cost, loosest=True)
    for _ in range(steps):
        middle = 0.5 * (low + high)
        trial = allocate(sites, math.exp(middle), cost)
        if trial.density <= density:
            best, low = trial, middle
        else:
            high = middle
    return best
