"""What a plan knows, for other kernels: densities, orders and errors by layer, head and timestep.

Plain dicts, lists, numbers and strings that are JSON as they are; docs/densities.md has the schema.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from freqopt.config import KEY_BLOCK, QUERY_TILE
from freqopt.plan.content import PlanContent
from freqopt.plan.curves import EXACT, Point, chunks_by_head, planned_points, tokens_of_chunk
from freqopt.plan.records import SiteEvidence, SitePlan

FORMAT = "freqopt-densities"
VERSION = 1
"""Of the schema; raised when a reader of the old one could misread a new document."""

Rows = list[list[float | None]]
"""A value for each timestep range and head."""


def densities_of(plans: Mapping[str, PlanContent]) -> dict[str, Any]:
    """The document about plans, by the names of their models."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "models": {name: _model(plan) for name, plan in plans.items()},
    }


def _model(plan: PlanContent) -> dict[str, Any]:
    edges: list[float | None] = [None, *plan.timestep_edges, None]
    verified = None if plan.timestep_range is None else list(plan.timestep_range)
    return {
        "class_name": plan.model.class_name,
        "fingerprint": plan.model.fingerprint,
        "component": plan.component,
        "grids": [list(grid) for grid in plan.grids],
        "query_tile": QUERY_TILE,
        "key_block": KEY_BLOCK,
        "output_error": {
            "measured": plan.measured_error,
            "worst": plan.worst_error,
            "target": plan.target_error,
            "quantile": plan.target_quantile,
            "predicted": plan.predicted,
        },
        "mean_density": plan.mean_density,
        "timestep": plan.timestep_name,
        "timesteps_verified": verified,
        "ranges": [{"above": above, "up_to": up_to} for above, up_to in pairwise(edges)],
        "sites": [
            _site(name, site, plan.evidence.sites.get(name), plan)
            for name, site in plan.sites.items()
        ],
        "never_split": [
            {"name": name, "layer": layer_of(name), "reason": reason}
            for name, reason in plan.evidence.dense_sites.items()
        ],
    }


def layer_of(name: str) -> int | None:
    """The number in a site's name (3 in blocks.3.attn1); None where it has none, or several."""
    numbers = [int(part) for part in name.partition("@")[0].split(".") if part.isdecimal()]
    return numbers[0] if len(numbers) == 1 else None


def _site(
    name: str, site: SitePlan, evidence: SiteEvidence | None, plan: PlanContent
) -> dict[str, Any]:
    source, density, error = _values(site, evidence, plan)
    split = site.decision == "split"
    chunks = chunks_by_head(site) if split else [0] * site.heads
    return {
        "name": name,
        "layer": layer_of(name),
        "heads": site.heads,
        "head_dim": site.head_dim,
        "tokens": site.tokens,
        "decision": site.decision,
        "reason": site.reason,
        "order": ["content" if chunk else "grid" for chunk in chunks],
        "chunk": [tokens_of_chunk(chunk, site.tokens) if chunk else None for chunk in chunks],
        "source": source,
        "density": density,
        "error": error,
    }


def _values(
    site: SitePlan, evidence: SiteEvidence | None, plan: PlanContent
) -> tuple[str, Rows, Rows]:
    """Where densities and errors of a site come from, and both."""
    ranges = range(len(plan.timestep_edges) + 1)
    if site.decision == "dense":
        return "dense", *_columns([[EXACT] * site.heads for _ in ranges])
    told = len(ranges) == 1 and site.density and site.error
    if evidence is not None and not told:
        return "curves", *_columns([planned_points(site, evidence, each) for each in ranges])
    unknown: list[float | None] = [None] * site.heads
    rows = (site.density or unknown, site.error or unknown)
    density, error = ([list(row) for _ in ranges] for row in rows)
    if not site.density and not site.error:
        return "none", density, error
    if len(ranges) > 1:
        return "mean", density, error
    return "curves" if plan.predicted else "measured", density, error


def _columns(points: Sequence[Sequence[Point | None]]) -> tuple[Rows, Rows]:
    density: Rows = [[None if p is None else _round(p.density) for p in row] for row in points]
    error: Rows = [[None if p is None else _round(p.error) for p in row] for row in points]
    return density, error


def _round(value: float) -> float:
    return float(f"{value:.5g}")
