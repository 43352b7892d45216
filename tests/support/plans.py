"""Plans without a calibration: one look at a model, and one threshold for all that can be split."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from freqopt.calibration.measure.in_pieces import OTHER_FORM, EagerRecorders
from freqopt.calibration.measure.recorder import Desk, recording_backend
from freqopt.calibration.measure.requests import Dense, Visit
from freqopt.capture.modules import names_of
from freqopt.grid import Grid
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


def timed(plan: Plan) -> Plan:
    """Budgets that differ much between two ranges of the argument "time", at every site."""
    sites = {
        name: site.model_copy(
            update={"budgets": [Budget(threshold=[each] * site.heads) for each in (5.0, 0.5)]}
        )
        for name, site in plan.sites.items()
    }
    update = {"sites": sites, "timestep_name": "time", "timestep_edges": [500.0]}
    return plan.model_copy(update=update)


class _Noting(Dense):
    """Dense attention; notes the grids that it is asked for."""

    def __init__(self) -> None:
        self.grids: set[Grid] = set()

    def attend(self, visit: Visit) -> Tensor:
        self.grids.add(visit.call.grid)
        return super().attend(visit)


def _looked_at(model: nn.Module, inputs: dict[str, Any], grids: Grids) -> Desk:
    """What a call shows: without a compiler, unless some attention is only seen in a graph."""
    desk = Desk(_Noting())
    with torch.no_grad():
        EagerRecorders(model, desk, grids)((), inputs)
        if not desk.result.shapes or OTHER_FORM in desk.dense_sites.values():
            desk = Desk(_Noting())
            torch._dynamo.reset()
            backend = recording_backend(desk, grids, names_of(model))
            torch.compile(model, backend=backend, dynamic=False)(**inputs)
            torch._dynamo.reset()
    return desk


def plan_of(model: nn.Module, inputs: dict[str, Any], threshold: float, **grids: Any) -> Plan:
    """A plan for every site of a model that can be split; each layer has its own threshold.

    threshold: of the first site; the next ones' are larger by a tenth each.
    """
    desk = _looked_at(model, inputs, Grids(**grids))
    sites = {}
    for index, (name, site) in enumerate(desk.result.shapes.items()):
        budget = [threshold * (1 + index / 10)] * site.heads
        layouts = [
            SiteLayout(
                grid=k.grid, before=k.before, after=k.after, mask=k.mask, sources=list(k.sources)
            )
            for k in desk.layouts.get(name, ())
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
    assert isinstance(desk.request, _Noting)
    return Plan(
        model=ModelIdentity(class_name=type(model).__name__, fingerprint=model_fingerprint(model)),
        grids=sorted(desk.request.grids),
        device="cpu",
        versions=Versions(freqopt="0", torch="0"),
        target_error=0.1,
        measured_error=0.1,
        worst_error=0.1,
        mean_density=0.5,
        sites=sites,
        evidence=Evidence(samples=1, held_out=1, dense_sites=dict(desk.dense_sites)),
    )
