"""Allocation: which threshold for which head and timestep, so that the error target costs least.

Every (site, timestep bucket, head) has a curve of choices; one Lagrange multiplier over all of them
picks the point where another unit of error is worth the same everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from freqopt.config import KEY_BLOCK

Array = NDArray[np.float64]

REFINEMENT = 4
"""Choices per measured rung; between rungs curves are interpolated on logarithmic axes."""

LEVEL = 1e-3
"""Relative fall of the density between two rungs below which it says nothing about the error."""

SPLIT_EFFICIENCY = 0.6
"""Rate of the split's exact band over dense attention's (docs/design/calibration.md)."""

_TINY = 1e-30
_UNWANTED = 1e9  # density and error of choices that must not be taken; they keep their columns


class AttentionShape(NamedTuple):
    """What the cost of a site's attention depends on, beside its density."""

    heads: int
    tokens: int
    head_dim: int


class CostModel(Protocol):
    """Cost of attention at one site, per head; any unit, but one unit for all sites."""

    def dense(self, shape: AttentionShape) -> float:
        """Cost of one head of dense attention."""

    def split(self, shape: AttentionShape, density: Array) -> Array:
        """Cost of one head of split attention at the given densities (any shape)."""


@dataclass(frozen=True)
class ProductCost:
    """Cost in multiply-adds at dense attention's rate: what is true of a kernel near its peak."""

    efficiency: float = SPLIT_EFFICIENCY

    def dense(self, shape: AttentionShape) -> float:
        """See `CostModel`."""
        return 2.0 * shape.tokens * shape.tokens * shape.head_dim

    def split(self, shape: AttentionShape, density: Array) -> Array:
        """See `CostModel`; the low band costs one product per key block."""
        return self.dense(shape) * (density / self.efficiency + 1.0 / KEY_BLOCK)


@dataclass(frozen=True)
class SiteChoices:
    """Choices of one site, C for each of R rows; choice 0 is exact (threshold 0, no error).

    A row is a head in a timestep bucket: all heads of the first bucket, then of the next. shares:
    of the model's calls in each bucket, sum 1. threshold (C,): the choices. density, error, damage
    (R, C): share of pairs attended exactly; squared relative error that the row brings to the
    model's output, mean over all calls; the same with bias weighed up, which is what allocation
    minimises. forced: split it even where dense attention is cheaper, unless everything would be
    exact anyway.
    """

    name: str
    tokens: int
    head_dim: int
    threshold: Array
    density: Array
    error: Array
    damage: Array
    shares: tuple[float, ...] = (1.0,)
    forced: bool = False

    @property
    def heads(self) -> int:
        """Number of heads."""
        return int(self.density.shape[0]) // len(self.shares)

    @property
    def shape(self) -> AttentionShape:
        """What a cost model is asked about."""
        return AttentionShape(self.heads, self.tokens, self.head_dim)

    @property
    def weight(self) -> Array:
        """Share of the calls that each row stands for, (R,); sums to the number of heads."""
        return np.repeat(np.array(self.shares), self.heads)

    def mean_density(self, index: NDArray[np.int64]) -> float:
        """Density over heads and calls with a choice (R,) for every row."""
        rows = self.density[np.arange(len(index)), index]
        return float((self.weight * rows).sum()) / self.heads

    def scaled(self, factor: float) -> SiteChoices:
        """The same choices with errors larger by a factor."""
        square = factor * factor
        return replace(self, error=self.error * square, damage=self.damage * square)

    def near(self, index: NDArray[np.int64], factor: float) -> SiteChoices:
        """The same choices, of which those far from one of them are never taken.

        index: (R,) that choice. factor: how far a density may be from its own.
        """
        here = self.density[np.arange(len(index)), index]
        away = np.abs(np.log(self.density / here[:, None])) > math.log(factor) + 1e-9
        density, error, damage = (
            np.where(away, _UNWANTED, curve) for curve in (self.density, self.error, self.damage)
        )
        return replace(self, density=density, error=error, damage=damage)


class HeadCurves(NamedTuple):
    """Measured curves of a site's rows over the ladder, (R, rungs) each; see `SiteChoices`.

    fine: (R, choices) density at each of `ladder_choices`, where that is known.
    """

    density: Array
    error: Array
    damage: Array
    fine: Array | None = None


def join_curves(buckets: Sequence[HeadCurves]) -> HeadCurves:
    """Curves in successive timestep buckets as the rows of one."""
    density, error, damage = (
        np.concatenate(column) for column in list(zip(*buckets, strict=True))[:3]
    )
    known = [bucket.fine for bucket in buckets if bucket.fine is not None]
    fine = np.concatenate(known) if len(known) == len(buckets) else None
    return HeadCurves(density, error, damage, fine)


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
    damage: float
    error: float
    density: float


def ladder_choices(thresholds: Array) -> Array:
    """REFINEMENT thresholds per rung of a ladder (rungs,), evenly spaced on a logarithmic axis."""
    rungs = np.log(thresholds)
    at = np.arange((len(rungs) - 1) * REFINEMENT + 1) / REFINEMENT
    found: Array = np.exp(np.interp(at, np.arange(len(rungs)), rungs))
    return found


def refine(
    thresholds: Array, density: Array, *errors: Array, fine: Array | None = None
) -> tuple[Array, ...]:
    """Curves (R, rungs) over a ladder (rungs,) at all of `ladder_choices`: densities, then errors.

    Errors are interpolated over density, both logarithmic; values are kept above zero. Where the
    densities of the choices are not known (`fine`), they are interpolated over the thresholds.
    A head whose scores are alike goes from dense to sparse within a hundredth of a threshold, so
    that guess may be off several times, and an allocation would seek out where it is too low.
    """
    steps = np.arange((len(thresholds) - 1) * REFINEMENT + 1)
    rung = np.minimum(steps // REFINEMENT, len(thresholds) - 2)
    along = np.broadcast_to(steps / REFINEMENT - rung, (len(density), len(steps)))

    def between(logs: Array, where: Array) -> Array:
        mixed: Array = logs[:, rung] * (1.0 - where) + logs[:, rung + 1] * where
        return mixed

    logs = np.log(np.maximum(density, _TINY))
    if fine is None:
        found = between(logs, along)
    else:
        found = np.log(np.maximum(fine, _TINY)).clip(logs[:, rung + 1], logs[:, rung])
        found[:, ::REFINEMENT] = logs
        fall = logs[:, rung] - logs[:, rung + 1]
        along = np.where(fall > LEVEL, (logs[:, rung] - found) / np.maximum(fall, LEVEL), along)
    every = [between(np.log(np.maximum(curve, _TINY)), along) for curve in errors]
    return np.exp(found), *(np.exp(curve) for curve in every)


def make_choices(
    name: str,
    tokens: int,
    head_dim: int,
    ladder: Array,
    curves: HeadCurves,
    shares: Sequence[float] = (1.0,),
) -> SiteChoices:
    """All choices of a site: exact first, then the curves refined between the ladder's rungs."""
    one = np.ones((curves.density.shape[0], 1))
    density, error, damage = refine(
        ladder, curves.density, curves.error, curves.damage, fine=curves.fine
    )
    return SiteChoices(
        name,
        tokens,
        head_dim,
        np.concatenate([np.zeros(1), ladder_choices(ladder)]),
        np.concatenate([one, density], axis=1),
        np.concatenate([0.0 * one, error], axis=1),
        np.concatenate([0.0 * one, damage], axis=1),
        tuple(shares),
    )


def split_cost(site: SiteChoices, index: NDArray[np.int64], cost: CostModel) -> float:
    """Cost of a site's calls with a choice for every row, weighted by the rows' shares."""
    density = site.density[np.arange(len(index)), index]
    return float((site.weight * cost.split(site.shape, density)).sum())


def _best_split(
    site: SiteChoices, multiplier: float, cost: CostModel, *, loosest: bool = False
) -> tuple[NDArray[np.int64], float]:
    """The choices that minimise cost + multiplier * damage, and that minimum.

    Of choices that are alike on the samples the strictest, or the loosest.
    """
    paid = site.weight[:, None] * cost.split(site.shape, site.density)
    sums = paid + multiplier * site.damage
    last = sums.shape[1] - 1 - np.argmin(sums[:, ::-1], axis=1)
    index = last if loosest else np.argmin(sums, axis=1)
    damage = float(site.damage[np.arange(len(index)), index].sum())
    return index, split_cost(site, index, cost) + multiplier * damage


def allocate(
    sites: Sequence[SiteChoices], multiplier: float, cost: CostModel, *, loosest: bool = False
) -> Allocation:
    """The choices that minimise cost + multiplier * damage, exactly, over heads and dense sites.

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
    spent = damage = error = pairs = dense_total = 0.0
    for site, choice in zip(sites, choices, strict=True):
        dense_cost = cost.dense(site.shape) * site.heads
        dense_total += dense_cost
        if choice.dense:
            spent += dense_cost
            pairs += dense_cost
            continue
        row, index = np.arange(len(choice.index)), choice.index
        spent += split_cost(site, index, cost)
        damage += site.damage[row, index].sum()
        error += site.error[row, index].sum()
        pairs += dense_cost * site.mean_density(index)
    density = pairs / dense_total if dense_total else 1.0
    return Allocation(multiplier, choices, spent, damage, math.sqrt(max(error, 0.0)), density)


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
    """The allocation of the least damage on the Lagrangian's path within a predicted density.

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
