"""Compiling, inspecting, calibrating and exporting agree on plans and on grids no graph tells."""

from __future__ import annotations

import pytest
import torch
from accounts import Case, Said, compiled, exported, inspected, recorded
from passes_toys import DIM, HEADS, WIDTH, Attention
from torch import Tensor, nn

import freqopt
from freqopt.errors import PlanError
from freqopt.plan.plan import Plan, model_fingerprint
from freqopt.plan.records import Budget, Evidence, ModelIdentity, SitePlan, Versions

GRID = (3, 6, 10)


class Packed(nn.Module):
    """Two attentions over tokens that were packed before the model."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention() for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        for block in self.blocks:
            tokens = tokens + block(tokens)
        return tokens


def packed_case() -> Case:
    return Case(Packed().eval(), {"tokens": torch.randn(2, 180, WIDTH)}, 2)


def plan_of(case: Case, *grids: tuple[int, int, int], dense: str = "") -> Plan:
    """A plan for both attentions of a packed case, or for all but one."""
    site = {"heads": HEADS, "head_dim": DIM, "tokens": 180}
    budget = Budget(threshold=[0.5] * HEADS)
    split = SitePlan(**site, decision="split", reason="", budgets=[budget])
    sites = {f"blocks.{i}": split for i in range(2)}
    if dense:
        sites[dense] = SitePlan(**site, decision="dense", reason="too sensitive")
    return Plan(
        model=ModelIdentity(class_name="Packed", fingerprint=model_fingerprint(case.model)),
        grids=list(grids),
        device="cpu",
        versions=Versions(freqopt="0", torch="0"),
        target_error=0.03,
        measured_error=0.02,
        worst_error=0.02,
        mean_density=0.5,
        sites=sites,
        evidence=Evidence(samples=1, held_out=1),
    )


def test_they_agree_on_a_grid_that_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    case = packed_case()
    for grid, split in ((GRID, 2), ((3, 6, 11), 0)):
        found = compiled(case, grid=grid)
        assert [said.grid for said in found.values()] == [grid if split else None] * 2
        assert inspected(case, grid=grid) == found
        assert recorded(case, monkeypatch, grid) == found
        assert exported(case, grid=grid) == found


def test_they_agree_on_grids_to_choose_from(monkeypatch: pytest.MonkeyPatch) -> None:
    case, grids = packed_case(), ((5, 7, 9), GRID)
    found = compiled(case, grids=grids)
    assert [said.grid for said in found.values()] == [GRID] * 2
    assert inspected(case, grids=grids) == found
    assert recorded(case, monkeypatch, None, grids) == found


def test_they_agree_on_the_grids_and_the_budgets_of_a_plan() -> None:
    """What a plan keeps dense stays so for its reason; a grid that is given goes before."""
    case = packed_case()
    for grids, grid, want in (
        (((5, 7, 9), GRID), None, GRID),
        ((GRID,), (6, 3, 10), (6, 3, 10)),
    ):
        plan = plan_of(case, *grids, dense="blocks.1")
        options = {"plan": plan} if grid is None else {"plan": plan, "grid": grid}
        found = compiled(case, **options)
        assert found == {
            "blocks.0": Said(want),
            "blocks.1": Said(None, "by the plan: too sensitive"),
        }
        assert inspected(case, **options) == found
        assert exported(case, **options) == found


def test_they_agree_on_a_model_with_budgets_attached(monkeypatch: pytest.MonkeyPatch) -> None:
    """The modules bring their budgets along, and the grids of the plan that these are of."""
    case = packed_case()
    with freqopt.attach(case.model, plan_of(case, (5, 7, 9), GRID, dense="blocks.1")):
        found = compiled(case)
        assert found == {"blocks.0": Said(GRID), "blocks.1": Said(GRID)}
        assert inspected(case) == found
        assert recorded(case, monkeypatch) == found


def test_a_plan_calibrated_with_a_grid_is_enough_for_all() -> None:
    """The grid is in the plan: neither the exporter nor anybody else has to be told again."""
    torch.manual_seed(0)
    case = packed_case()
    plan = freqopt.calibrate(
        case.model, [case.inputs], target_density=0.5, grid=GRID, rounds=0, progress=False
    )
    found = compiled(case, plan=plan)
    assert found == {"blocks.0": Said(GRID), "blocks.1": Said(GRID)}
    assert inspected(case, plan=plan) == found
    assert exported(case, plan=plan) == found
    other = plan.model_copy(update={"sites": {"layers.0": plan.sites["blocks.0"]}})
    with pytest.raises(PlanError, match="none of the 2 sites of this graph .* another model"):
        inspected(case, plan=other)
    untold = {n: site.model_copy(update={"layouts": []}) for n, site in plan.sites.items()}
    unknown = plan.model_copy(update={"grids": [], "sites": untold})
    with pytest.raises(PlanError, match="none of the 2 sites"):
        exported(case, plan=unknown)
