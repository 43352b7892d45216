"""Choices of a site: an order and a threshold for every head, at what density and error.

What was measured on the ladder is carried to the model's output and interpolated between rungs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from freqopt.calibration.measure.attention import AttentionShape
from freqopt.calibration.measure.ladder import (
    ORDERS,
    REFINEMENT,
    THRESHOLDS,
    Array,
    ladder_choices,
)
from freqopt.calibration.measure.readings import FINE, MeasuredSite

BIAS_WEIGHT = 4.0
"""How much more a squared bias counts than noise: it adds up over layers and denoising steps."""

LEVEL = 1e-3
"""Relative fall of the density between two rungs below which it says nothing about the error."""

_TINY = 1e-30
_UNWANTED = 1e9  # density and error of choices that must not be taken; they keep their columns


@dataclass(frozen=True)
class SiteChoices:
    """Choices of one site, C for each of R rows; choice 0 is exact (threshold 0, no error).

    All rows whose heads share a key head take one order, as keys have one; choice 0 goes with any.
    A row is a head in a timestep bucket: all heads of the first bucket, then of the next. shares:
    of the model's calls in each bucket, sum 1. threshold, order (C,): the choices; order is an
    index into `chunks`, of length 1 where all have the same. density, error, weighted_error (R, C):
    share of pairs attended exactly; squared relative error that the row brings to the model's
    output, mean over all calls; the same with bias weighed up, which is what allocation minimises.
    forced: split it even where dense attention is cheaper, unless everything would be exact anyway.
    key_heads: as many as heads where it is 0. chunks: of the orders, ascending, the grid's first.
    """

    name: str
    tokens: int
    head_dim: int
    threshold: Array
    density: Array
    error: Array
    weighted_error: Array
    shares: tuple[float, ...] = (1.0,)
    forced: bool = False
    order: NDArray[np.int64] = field(default_factory=lambda: np.zeros(1, np.int64))
    key_heads: int = 0
    chunks: tuple[int, ...] = ORDERS

    @property
    def heads(self) -> int:
        """Number of heads."""
        return int(self.density.shape[0]) // len(self.shares)

    @property
    def shape(self) -> AttentionShape:
        """What a cost model is asked about."""
        return AttentionShape(self.heads, self.tokens, self.head_dim)

    @property
    def orders(self) -> int:
        """Number of orders to choose from."""
        return int(self.order.max()) + 1

    def by_key_head(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Values (R,) of rows as (key heads, rows that share one)."""
        buckets, key_heads = len(self.shares), self.key_heads or self.heads
        return rows.reshape(buckets, key_heads, -1).swapaxes(0, 1).reshape(key_heads, -1)

    def of_rows(self, key_heads: NDArray[Any]) -> NDArray[Any]:
        """Values of the key heads for each row, (R,)."""
        return np.tile(np.repeat(key_heads, self.heads // len(key_heads)), len(self.shares))

    def orders_of(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """Order of each key head, with a choice (R,) for every row; the grid's if all is exact."""
        orders = np.broadcast_to(self.order, self.threshold.shape)[index]
        of_heads: NDArray[np.int64] = self.by_key_head(orders).max(1)
        return of_heads

    def open_in(self, order: int) -> NDArray[np.bool_]:
        """(C,) which choices go with an order."""
        with_it = np.broadcast_to(self.order == order, self.threshold.shape).copy()
        with_it[0] = True
        return with_it

    @property
    def ladder(self) -> int:
        """Number of choices in the first order, the exact one among them; they come first."""
        return int((np.broadcast_to(self.order, self.threshold.shape) == 0).sum())

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
        return replace(self, error=self.error * square, weighted_error=self.weighted_error * square)

    def near(self, index: NDArray[np.int64], factor: float) -> SiteChoices:
        """The same choices, of which those far from one of them are never taken.

        index: (R,) that choice; orders stay what they are. factor: how far a density may be from
        its own.
        """
        here = self.density[np.arange(len(index)), index]
        away = np.abs(np.log(self.density / here[:, None])) > math.log(factor) + 1e-9
        if self.orders > 1:
            orders = self.of_rows(self.orders_of(index))
            away |= ~np.stack([self.open_in(order) for order in range(self.orders)])[orders]
        density, error, weighted_error = (
            np.where(away, _UNWANTED, curve)
            for curve in (self.density, self.error, self.weighted_error)
        )
        return replace(self, density=density, error=error, weighted_error=weighted_error)


class HeadCurves(NamedTuple):
    """Measured curves of a site's rows over the ladder, (R, rungs) each; see `SiteChoices`.

    fine: (R, choices) density at each of `ladder_choices`, where that is known.
    """

    density: Array
    error: Array
    weighted_error: Array
    fine: Array | None = None


def join_curves(buckets: Sequence[HeadCurves]) -> HeadCurves:
    """Curves in successive timestep buckets as the rows of one."""
    density, error, weighted_error = (
        np.concatenate(column) for column in list(zip(*buckets, strict=True))[:3]
    )
    read = [bucket.fine for bucket in buckets if bucket.fine is not None]
    fine = np.concatenate(read) if len(read) == len(buckets) else None
    return HeadCurves(density, error, weighted_error, fine)


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
        refined = between(logs, along)
    else:
        refined = np.log(np.maximum(fine, _TINY)).clip(logs[:, rung + 1], logs[:, rung])
        refined[:, ::REFINEMENT] = logs
        fall = logs[:, rung] - logs[:, rung + 1]
        along = np.where(fall > LEVEL, (logs[:, rung] - refined) / np.maximum(fall, LEVEL), along)
    every = [between(np.log(np.maximum(curve, _TINY)), along) for curve in errors]
    return np.exp(refined), *(np.exp(curve) for curve in every)


def make_choices(
    name: str,
    shape: AttentionShape,
    ladder: Array,
    by_order: Sequence[HeadCurves],
    shares: Sequence[float] = (1.0,),
    key_heads: int = 0,
    chunks: tuple[int, ...] = ORDERS,
) -> SiteChoices:
    """All choices of a site: exact first, then for each order the curves between its rungs.

    by_order: curves in the first of the orders that have these chunks.
    """
    one = np.ones((by_order[0].density.shape[0], 1))
    columns: list[tuple[Array, ...]] = [(one, 0.0 * one, 0.0 * one)]
    for curves in by_order:
        errors = curves.error, curves.weighted_error
        columns.append(refine(ladder, curves.density, *errors, fine=curves.fine))
    density, error, weighted = (np.concatenate(c, axis=1) for c in zip(*columns, strict=True))
    rungs = ladder_choices(ladder)
    return SiteChoices(
        name,
        shape.tokens,
        shape.head_dim,
        np.concatenate([np.zeros(1), np.tile(rungs, len(by_order))]),
        density,
        error,
        weighted,
        tuple(shares),
        order=np.concatenate([[0], np.repeat(np.arange(len(by_order)), len(rungs))]),
        key_heads=key_heads,
        chunks=chunks,
    )


def site_choices(site: MeasuredSite, sensitivity: Array, samples: Sequence[int]) -> SiteChoices:
    """The choices of a site from what was measured, errors carried to the model's output.

    Args:
        sensitivity: (buckets, H), from `measure_sensitivities`.
        samples: fitted samples in each timestep bucket. A site that was not reached in one of them
            is taken to behave there as it does on average.
    """
    shares = [count / sum(samples) for count in samples]
    total = site.total()
    by_order: list[HeadCurves] = []
    for order in range(total.orders):
        rows: list[HeadCurves] = []
        for bucket, share in enumerate(shares):
            sums = site.buckets.get(bucket, total)
            density, error, bias, fine = (
                sums.mean(name, order).T.numpy() for name in ("density", "site", "site_bias", FINE)
            )
            weighted = error + (BIAS_WEIGHT - 1.0) * bias
            scale = share * np.square(sensitivity[bucket])[:, None]
            rows.append(HeadCurves(density, scale * error, scale * weighted, fine))
        by_order.append(join_curves(rows))
    ladder = np.array(THRESHOLDS)
    return make_choices(site.name, site.shape, ladder, by_order, shares, site.key_heads)
