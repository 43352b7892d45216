"""Plans without a calibration: one look at a model, and one threshold for all that can be split."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from freqopt.calibration.measure.in_pieces import EagerRecorders
from freqopt.calibration.measure.recorder import Desk
from freqopt.passes.find import Grids
from freqopt.plan.plan import Plan, model_fingerprint
from freqopt.plan.records import (
    Budget,
    Evidence,
    ModelIdentity,
    SiteLayout,
    SitePlan,
    Versions,
)


def plan_of(model: nn.Module, inputs: dict[str, Any], threshold: float, **grids: Any) -> Plan:
    """A plan for every site of a model that can be split; each layer has its own threshold.

    threshold: of the first site; the next ones' are larger by a tenth each.
    """
    desk = Desk()
    with torch.no_grad():
        EagerRecorders(model, desk, Grids(**grids))((), inputs)
    sites = {}
    for index, (name, site) in enumerate(desk.result.shapes.items()):
        budget = [threshold * (1 + index / 10)] * site.heads
        layouts = [
            SiteLayout(
                grid=k.grid, before=k.before, after=k.after, mask=k.mask, sources=list(k.sources)
            )
            for k in desk.layouts[name]
        ]
        sites[name] = SitePlan(
            heads=site.heads,
            head_dim=site.head_dim,
            tokens=site.tokens,
            decision="split",
            reason="",
            budgets=[Budget(threshold=budget)],
            layouts=layouts,
        )
    found = sorted({k.grid for known in desk.layouts.values() for k in known})
    return Plan(
        model=ModelIdentity(class_name=type(model).__name__, fingerprint=model_fingerprint(model)),
        grids=found,
        device="cpu",
        versions=Versions(freqopt="0", torch="0"),
        target_error=0.1,
        measured_error=0.1,
        worst_error=0.1,
        mean_density=0.5,
        sites=sites,
        evidence=Evidence(samples=1, held_out=1, dense_sites=dict(desk.dense_sites)),
    )
