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


class _Open:
    """A site's choices by order and what they cost, which is the same at every multiplier."""

    def __init__(self, site: SiteChoices, cost: CostModel) -> None:
        self.site, self.cost = site, cost
        self.dense = cost.dense(site.shape) * site.heads
        self.paid = site.weight[:, None] * cost.split(site.shape, site.density)
        self.rows = np.arange(len(self.paid))
        self.columns = [np.flatnonzero(site.open_in(order)) for order in range(site.orders)]

    def chosen(self, multiplier: float, *, loosest: bool) -> SiteChoice:
        """What is chosen at a multiplier: see `allocate`."""
        index, least = self._best_split(multiplier, loosest)
        dense = not index.any() if self.site.forced else bool(self.dense <= least)
        return SiteChoice(index, dense)

    def _best_split(self, multiplier: float, loosest: bool) -> tuple[NDArray[np.int64], float]:
        """The choices that minimise cost + multiplier * weighted error, and that minimum.

        Of choices that are alike on the samples the strictest, or the loosest. Key heads take the
        order that is best for them out of those up to a largest chunk, which is what the site pays
        for, and sites the largest chunk that is best for them: the grid's order where nothing is
        gained.
        """
        site, rows = self.site, self.rows
        sums = self.paid + multiplier * site.weighted_error
        by_order = np.empty((len(self.columns), len(rows)), np.int64)
        for order, columns in enumerate(self.columns):
            of_order = sums[:, columns] if len(self.columns) > 1 else sums
            last = len(columns) - 1 - np.argmin(of_order[:, ::-1], axis=1) if loosest else None
            by_order[order] = columns[np.argmin(of_order, axis=1) if last is None else last]
        totals = np.stack([site.by_key_head(sums[rows, index]).sum(1) for index in by_order])
        best: tuple[NDArray[np.int64], float] | None = None
        for largest in range(len(totals)):
            of_key_heads = np.argmin(totals[: largest + 1], axis=0)
            if largest and not (of_key_heads == largest).any():
                continue  # as with smaller chunks
            index = by_order[site.of_rows(of_key_heads), rows]
            weighted_error = float(site.weighted_error[rows, index].sum())
            paid = float(self.paid[rows, index].sum()) + order_cost(site, index, self.cost)
            least = paid + multiplier * weighted_error
            if best is None or least < best[1]:
                best = index, least
        assert best is not None
        return best


def _choices(
    sites: Sequence[_Open], logarithm: float, *, loosest: bool = False
) -> list[SiteChoice]:
    """What is chosen at a multiplier, given its logarithm."""
    return [site.chosen(math.exp(logarithm), loosest=loosest) for site in sites]


def allocate(
    sites: Sequence[SiteChoices], multiplier: float, cost: CostModel, *, loosest: bool = False
) -> Allocation:
    """The choices that minimise cost + multiplier * weighted error, exactly, over heads and sites.

    loosest: which of choices to take that are alike on the samples.
    """
    choices = [_Open(site, cost).chosen(multiplier, loosest=loosest) for site in sites]
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
    spent = weighted_error = 0.0
    for site, choice in zip(sites, choices, strict=True):
        if choice.dense:
            spent += cost.dense(site.shape) * site.heads
            continue
        spent += split_cost(site, choice.index, cost)
        weighted_error += site.weighted_error[np.arange(len(choice.index)), choice.index].sum()
    error, density = _error(sites, choices), _density(sites, choices, cost)
    return Allocation(multiplier, choices, spent, weighted_error, error, density)


def _error(sites: Sequence[SiteChoices], choices: list[SiteChoice]) -> float:
    """Predicted relative error of the model's output."""
    error = 0.0
    for site, choice in zip(sites, choices, strict=True):
        if not choice.dense:
            error += site.error[np.arange(len(choice.index)), choice.index].sum()
    return math.sqrt(max(error, 0.0))


def _density(sites: Sequence[SiteChoices], choices: list[SiteChoice], cost: CostModel) -> float:
    """Share of pairs attended exactly, weighted by dense cost."""
    pairs = dense_total = 0.0
    for site, choice in zip(sites, choices, strict=True):
        dense = cost.dense(site.shape) * site.heads
        dense_total += dense
        pairs += dense if choice.dense else dense * site.mean_density(choice.index)
    return pairs / dense_total if dense_total else 1.0


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
) -> Allocation:
    """The cheapest allocation on the Lagrangian's path whose predicted error is within `target`.

    A small multiplier ignores errors and a large one allows none; the path between is monotone, so
    bisection of its logarithm suffices, until there is no number between. An infinite target gives
    the loosest allocation.
    """
    open_sites = [_Open(site, cost) for site in sites]
    scale = sum(site.dense for site in open_sites)
    low, high = math.log(scale * 1e-9), math.log(scale * 1e24)
    loosest = total(sites, _choices(open_sites, low, loosest=True), math.exp(low), cost)
    if loosest.error <= target:
        return loosest
    best = _choices(open_sites, high)
    while low < (middle := 0.5 * (low + high)) < high:
        trial = _choices(open_sites, middle)
        if _error(sites, trial) <= target:
            best, high = trial, middle
        else:
            low = middle
    return total(sites, best, math.exp(high), cost)


def solve_density(sites: Sequence[SiteChoices], density: float, cost: CostModel) -> Allocation:
    """The allocation of the least error on the Lagrangian's path within a predicted density.

    Where even the loosest allocation needs more, that one.
    """
    open_sites = [_Open(site, cost) for site in sites]
    scale = math.log(sum(site.dense for site in open_sites))
    low, high = scale + math.log(1e-9), scale + math.log(1e24)
    best = _choices(open_sites, low, loosest=True)
    while low < (middle := 0.5 * (low + high)) < high:
        trial = _choices(open_sites, middle)
        if _density(sites, trial, cost) <= density:
            best, low = trial, middle
        else:
            high = middle
    return total(sites, best, math.exp(low), cost)
