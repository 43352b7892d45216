"""Reads densities and errors off the curves that a plan keeps, between their rungs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from freqopt.config import ALL
from freqopt.plan.records import BucketCurves, ContentCurve, Curve, SiteEvidence, SitePlan

LEAST = 1e-12
"""Densities and errors below this are drawn and interpolated as if they were this."""


class Point(NamedTuple):
    """What a head does at a budget: share of pairs attended exactly, and relative L2 error."""

    density: float
    error: float


EXACT = Point(1.0, 0.0)
"""Of a head whose threshold is 0, and of all heads of a dense site."""


def curve_of(measured: SiteEvidence | BucketCurves, chunk: int) -> Curve | ContentCurve | None:
    """The curve in one order of the tokens, None where that was not measured.

    chunk: 0 for the grid's order.
    """
    if not chunk:
        return measured.curve
    return next((curve for curve in measured.content if curve.chunk == chunk), None)


def chunks_by_head(site: SitePlan) -> list[int]:
    """Chunk of every query head's order, 0 for the grid's."""
    chunks = site.chunks or [0] * site.heads
    share = site.heads // len(chunks)
    return [chunks[head // share] for head in range(site.heads)]


def tokens_of_chunk(chunk: int, tokens: int) -> int:
    """How many tokens a chunk has in a sequence; all of them where it is the largest."""
    return tokens if chunk == ALL else min(chunk, tokens)


def measured_in(evidence: SiteEvidence, bucket: int) -> SiteEvidence | BucketCurves:
    """What was measured of a site in a timestep bucket; over all samples where none fell in it."""
    return next((each for each in evidence.buckets if each.bucket == bucket), evidence)


def point_at(
    curve: Curve | ContentCurve, ladder: Sequence[float], threshold: float, head: int
) -> Point:
    """Density and error of a head at a threshold, interpolated on logarithmic axes.

    Beyond the ladder they are those of its ends.
    """
    if threshold <= 0.0:
        return EXACT
    at, rungs = math.log(threshold), np.log(ladder)
    found = []
    for rows in (curve.density, curve.error):
        values = np.log(np.maximum([row[head] for row in rows], LEAST))
        found.append(float(np.exp(np.interp(at, rungs, values))))
    return Point(*found)


def planned_points(
    site: SitePlan, evidence: SiteEvidence, bucket: int, heads: int | None = None
) -> list[Point | None]:
    """Points of a site's first heads at its budgets in a timestep bucket, by the curves measured.

    heads: how many, all where it is None. None stands for a head whose order was not measured.
    """
    shown = range(site.heads if heads is None else min(heads, site.heads))
    if site.decision == "dense":
        return [EXACT for _ in shown]
    measured, chunks = measured_in(evidence, bucket), chunks_by_head(site)
    thresholds, points = site.budgets[bucket].threshold, []
    for head in shown:
        curve = curve_of(measured, chunks[head])
        points.append(
            None if curve is None else point_at(curve, evidence.thresholds, thresholds[head], head)
        )
    return points


def error_at(curve: Curve | ContentCurve, density: float, head: int) -> float | None:
    """Error of a head at a density, interpolated on logarithmic axes; None beyond the curve."""
    shares = np.array([row[head] for row in curve.density])
    errors = np.array([row[head] for row in curve.error])
    order = np.argsort(shares, kind="stable")
    if not shares[order[0]] * 0.999 <= density <= shares[order[-1]] * 1.001 or density <= 0.0:
        return None
    logs = [np.log(np.maximum(values[order], LEAST)) for values in (shares, errors)]
    return float(np.exp(np.interp(math.log(density), *logs)))
