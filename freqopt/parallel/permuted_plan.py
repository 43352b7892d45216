"""A plan for a model whose heads were put in another order: its rows in that order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from freqopt.plan.plan import Plan
from freqopt.plan.records import (
    BucketCurves,
    Budget,
    ContentCurve,
    Curve,
    SiteEvidence,
    SitePlan,
    Spectrum,
)

T = TypeVar("T")


def with_heads(plan: Plan, orders: Mapping[str, Sequence[int]]) -> Plan:
    """The plan with the heads of some sites in another order.

    orders: by site, numbers of the heads as they were, in the order that they have now; heads that
    share a key head stay together, in their order.
    """
    sites = {
        name: _site(site, orders[name]) if name in orders else site
        for name, site in plan.sites.items()
    }
    evidence = {
        name: _evidence(each, orders[name]) if name in orders else each
        for name, each in plan.evidence.sites.items()
    }
    known = plan.evidence.model_copy(update={"sites": evidence})
    return plan.model_copy(update={"sites": sites, "evidence": known})


def key_order(order: Sequence[int], key_heads: int) -> list[int]:
    """The order of key heads that goes with one of query heads."""
    share = len(order) // key_heads
    return [order[i * share] // share for i in range(key_heads)]


def _row(values: Sequence[T], order: Sequence[int]) -> list[T]:
    """A row of heads, or of key heads, in the order."""
    if not values:
        return []
    if len(values) != len(order):
        order = key_order(order, len(values))
    return [values[i] for i in order]


def _rows(rows: Sequence[Sequence[T]], order: Sequence[int]) -> list[list[T]]:
    return [_row(row, order) for row in rows]


def _site(site: SitePlan, order: Sequence[int]) -> SitePlan:
    update: dict[str, Any] = {
        "budgets": [Budget(threshold=_row(b.threshold, order)) for b in site.budgets],
        "chunks": _row(site.chunks, order),
        "density": _row(site.density, order),
        "error": _row(site.error, order),
        "gains": _rows(site.gains, order),
        "marginals": _rows(site.marginals, order),
    }
    return site.model_copy(update=update)


def _curve(curve: Curve, order: Sequence[int]) -> Curve:
    return Curve(**{name: _rows(rows, order) for name, rows in curve.model_dump().items()})


def _content(curves: Sequence[ContentCurve], order: Sequence[int]) -> list[ContentCurve]:
    return [
        ContentCurve(chunk=c.chunk, density=_rows(c.density, order), error=_rows(c.error, order))
        for c in curves
    ]


def _evidence(site: SiteEvidence, order: Sequence[int]) -> SiteEvidence:
    buckets = [
        BucketCurves(
            bucket=each.bucket,
            samples=each.samples,
            energy=_row(each.energy, order),
            curve=_curve(each.curve, order),
            content=_content(each.content, order),
        )
        for each in site.buckets
    ]
    spectrum = site.spectrum
    if spectrum is not None:
        spectrum = Spectrum(
            edges=spectrum.edges,
            power=_row(spectrum.power, order),
            cutoff=spectrum.cutoff,
            low=_row(spectrum.low, order),
        )
    update: dict[str, Any] = {
        "energy": _row(site.energy, order),
        "curve": _curve(site.curve, order),
        "content": _content(site.content, order),
        "buckets": buckets,
        "spectrum": spectrum,
    }
    return site.model_copy(update=update)
