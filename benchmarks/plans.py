"""Plans that nobody calibrated, for times that need one: of given sites, or one threshold for all.

Without a compiler the split goes by plans alone. Their errors are not those of plans worth using.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

import freqopt
from freqopt.plan.identity import class_name_of
from freqopt.plan.plan import Plan, model_fingerprint
from freqopt.plan.records import (
    Budget,
    Evidence,
    ModelIdentity,
    SiteLayout,
    SitePlan,
    Versions,
)


def uniform_plan(
    model: nn.Module, call: dict[str, Any], threshold: float, grid: tuple[int, int, int]
) -> Plan:
    """The plan for a model's attention over the tokens of a grid.

    call: the model's arguments by name, for which its attention is looked at.

    Raises:
        RuntimeError: none of it can be split.
    """
    found = freqopt.inspect(model, **call)
    sites = {
        site.name: SitePlan(
            heads=site.heads,
            head_dim=site.head_dim,
            tokens=site.query_length,
            decision="split",
            reason="one threshold for all",
            budgets=[Budget(threshold=[threshold] * site.heads)],
            layouts=[SiteLayout(grid=grid, before=site.text_before, after=site.text_after)],
        )
        for site in found.sites
        if site.eligible and site.grid == grid
    }
    if not sites:
        raise RuntimeError(f"no attention over the tokens of {grid} can be split:\n{found}")
    return uncalibrated(model, grid, sites, mean_density=1.0)


def uncalibrated(
    model: nn.Module,
    grid: tuple[int, int, int],
    sites: Mapping[str, SitePlan],
    *,
    mean_density: float,
) -> Plan:
    """The plan of these sites; what it says of errors was not measured."""
    return Plan(
        model=ModelIdentity(class_name=class_name_of(model), fingerprint=model_fingerprint(model)),
        grids=[grid],
        device="none",
        versions=Versions(freqopt=freqopt.__version__, torch="none"),
        target_error=1.0,
        measured_error=1.0,
        worst_error=1.0,
        mean_density=mean_density,
        sites=dict(sites),
        evidence=Evidence(samples=1, held_out=1, notes=["nothing of it was measured"]),
    )
