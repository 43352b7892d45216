"""What a plan holds: its fields and what must be true of them together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from freqopt.config import SPLIT_VERSION
from freqopt.plan.records import (
    Evidence,
    Extent,
    ModelIdentity,
    Record,
    SitePlan,
    Verified,
    Versions,
)
from freqopt.shown import shown

PLAN_VERSION = 3
"""Version of the file format; raised when a reader of the old one could misread a new file."""


class PlanContent(Record):
    """The fields of a `Plan`, which says what they are."""

    format: Literal["freqopt-plan"] = "freqopt-plan"
    version: int = PLAN_VERSION
    split_version: int = SPLIT_VERSION
    model: ModelIdentity
    component: str | None = None
    grids: list[tuple[Extent, Extent, Extent]]
    device: str
    versions: Versions
    seed: int = 0
    target_error: float = Field(gt=0)
    measured_error: float = Field(ge=0)
    worst_error: float = Field(ge=0)
    predicted: bool = False
    target_quantile: float | None = Field(default=None, gt=0, lt=1)
    verified: Verified | None = None
    target_psnr: float | None = None
    measured_psnr: float | None = None
    target_density: float | None = Field(default=None, gt=0, le=1)
    mean_density: float = Field(ge=0, le=1)
    timestep_name: str | None = None
    timestep_edges: list[float] = Field(default=[])
    timestep_range: tuple[float, float] | None = None
    sites: dict[str, SitePlan]
    evidence: Evidence

    @model_validator(mode="after")
    def _check(self) -> PlanContent:
        if self.timestep_edges != sorted(self.timestep_edges):
            raise ValueError("timestep_edges are not ascending")
        if self.timestep_edges and not self.timestep_name:
            raise ValueError("timestep_edges without a timestep_name")
        buckets = len(self.timestep_edges) + 1
        for name, site in self.sites.items():
            for what, rows in (
                ("budget", site.budgets),
                ("row of gains", site.gains),
                ("row of marginals", site.marginals),
            ):
                if rows and len(rows) != buckets:
                    raise ValueError(f"site {name!r} does not have one {what} per timestep bucket")
        if len(self.evidence.bucket_samples) not in (0, buckets):
            raise ValueError("evidence.bucket_samples is not one number per timestep bucket")
        for name, evidence in self.evidence.sites.items():
            if name not in self.sites:
                raise ValueError(f"evidence of {name!r}, which is no site of the plan")
            evidence.check(self.sites[name].heads, buckets)
        return self


def some_of(names: Mapping[str, Any]) -> str:
    """The first names, for a message."""
    return ", ".join(map(shown, list(names)[:2])) + (", ..." if len(names) > 2 else "")
