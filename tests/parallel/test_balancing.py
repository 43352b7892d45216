"""Heads in another order, so that ranks have equal work: nothing but the time changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parallel_models import compiled, flux, relative, uneven_plan, wan
from plans import plan_of
from torch import Tensor, nn

import freqopt
from freqopt.errors import InputError, OptionError, PlanError
from freqopt.parallel.costs import balanced_order, imbalance, loads
from freqopt.plan.plan import Plan

FLUX = {"likely": ((1, 16, 20),), "believed": True}


def with_densities(plan: Plan, densities: list[float]) -> Plan:
    sites = {
        name: site.model_copy(update={"density": densities}) for name, site in plan.sites.items()
    }
    return plan.model_copy(update={"sites": sites})


@pytest.mark.parametrize(("make", "grids"), [(wan, {}), (flux, FLUX)], ids=["wan", "flux"])
def test_only_the_order_of_heads_changes(make: Any, grids: dict[str, Any]) -> None:
    model, call = make()
    plan = with_densities(uneven_plan(model, call, **grids), [0.9, 0.8, 0.1, 0.05])
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        dense, split = model(**call)[0], compiled(model, call, plan=plan)
        found = freqopt.parallel.balance(model, plan, 2, call)
        assert not found.reasons and set(found.orders) == set(plan.sites)
        assert set(found.orders[next(iter(plan.sites))][:2]) == {0, 3}
        assert found.before > 1.5 > 1.1 > found.after
        assert relative(model(**call)[0], dense) < 1e-5
        assert relative(compiled(model, call, plan=found.plan), split) < 1e-5
        for use in (
            lambda: compiled(model, call, plan=plan),
            lambda: freqopt.attach(model, plan),
            lambda: freqopt.inspect(model, **call, plan=plan),
        ):
            with pytest.raises(PlanError, match="Use the plan that balance returned"):
                use()
    moved = [n for n, tensor in model.state_dict().items() if not torch.equal(tensor, weights[n])]
    assert len(moved) > 4 * len(plan.sites)
    assert all("attn" in name or name.startswith("single") for name in moved)
    assert Plan.parse(found.plan.text()).sites == found.plan.sites


WIDTH, HEADS, DIM, GRID = 48, 6, 8, (3, 6, 10)


class Fused(nn.Module):
    """One projection for all, grouped heads, a gate; `told` tells its heads apart."""

    def __init__(self, key_heads: int = HEADS, *, gated: bool = False, told: bool = False) -> None:
        super().__init__()
        self.patch = nn.Conv3d(4, WIDTH, (1, 2, 2), (1, 2, 2))
        self.sizes = [HEADS * DIM, key_heads * DIM, key_heads * DIM]
        self.qkv, self.out = nn.Linear(WIDTH, sum(self.sizes)), nn.Linear(HEADS * DIM, WIDTH)
        self.gate = nn.Linear(WIDTH, HEADS) if gated else None
        self.slope = torch.arange(1.0, 1.0 + HEADS) if told else None

    def forward(self, video: Tensor) -> Tensor:
        x = self.patch(video).flatten(2).transpose(1, 2)
        q, k, v = (
            part.unflatten(2, (-1, DIM)).transpose(1, 2)
            for part in self.qkv(x).split(self.sizes, 2)
        )
        if self.slope is not None:
            q = torch.cumsum(q, 1)
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=k.shape[1] != HEADS)
        if self.gate is not None:
            out = out * self.gate(x).sigmoid().transpose(1, 2)[..., None]
        return self.out(out.transpose(1, 2).flatten(2))


def fused(**options: Any) -> tuple[Fused, dict[str, Tensor], Plan]:
    torch.manual_seed(0)
    model, call = Fused(**options).eval(), {"video": torch.randn(2, 4, 3, 12, 20)}
    plan = with_densities(plan_of(model, call, 0.3), [0.9, 0.8, 0.7, 0.1, 0.1, 0.1])
    chunks = [0] * (options.get("key_heads", HEADS))
    sites = {name: site.model_copy(update={"chunks": chunks}) for name, site in plan.sites.items()}
    return model, call, plan.model_copy(update={"sites": sites})


@pytest.mark.parametrize("options", [{}, {"gated": True}, {"key_heads": 2}], ids=str)
def test_weights_of_any_form(options: dict[str, Any]) -> None:
    model, call, plan = fused(**options)
    with torch.no_grad():
        before = model(**call)
        found = freqopt.parallel.balance(model, plan, 2, call)
        assert relative(model(**call), before) < 1e-5
    if "key_heads" in options:  # two groups of three heads on two ranks: nothing can be better
        assert not found.orders and not found.reasons
    else:
        assert found.orders and found.after < 1.2 < found.before


def test_groups_of_heads_stay_together() -> None:
    model, call, plan = fused(key_heads=3)
    with torch.no_grad():
        before = model(**call)
        found = freqopt.parallel.balance(model, plan, 3, call)
        assert relative(model(**call), before) < 1e-5
    (order,) = found.orders.values() or [list(range(6))]
    assert all(order[i] // 2 == order[i + 1] // 2 for i in (0, 2, 4))
    left = freqopt.parallel.balance(model, plan, 2, call)
    assert "3 key heads do not divide among 2 ranks" in next(iter(left.reasons.values()))


def test_what_cannot_be_balanced_says_why() -> None:
    model, call, plan = fused()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    left = freqopt.parallel.balance(model, plan, 4, call)
    assert "6 heads do not divide among 4 ranks" in str(left) and not left.orders
    with pytest.raises(OptionError, match="2 or more"):
        freqopt.parallel.balance(model, plan, 1, call)
    with pytest.raises(PlanError):
        freqopt.parallel.balance(model, uneven_plan(*wan()), 2, call)
    told, call, plan = fused(told=True)
    found = freqopt.parallel.balance(told, plan, 2, call)
    assert "cumsum is not known to keep heads apart" in next(iter(found.reasons.values()))
    assert all(torch.equal(tensor, weights[n]) for n, tensor in told.state_dict().items())


class Uneven(Fused):
    """Its heads are told apart by what no graph shows."""

    def forward(self, video: Tensor) -> Tensor:
        found = super().forward(video)
        return found + self.qkv.weight[DIM : 2 * DIM].sum().item()


def test_a_model_that_does_something_else_is_left_as_it_was() -> None:
    _, call, plan = fused()
    torch.manual_seed(0)
    model = Uneven().eval()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    update = {"model": plan.model.model_copy(update={"class_name": "Uneven"})}
    with pytest.raises(InputError, match="does something else: its output"):
        freqopt.parallel.balance(model, plan.model_copy(update=update), 2, call)
    assert all(torch.equal(tensor, weights[n]) for n, tensor in model.state_dict().items())


def test_the_slowest_rank_is_as_fast_as_it_can_be() -> None:
    costs = [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
    order = balanced_order(costs, 4)
    assert sorted(order) == list(range(8))
    assert max(loads([costs[i] for i in order], 4)) == 9.0
    assert max(loads([costs[i] for i in balanced_order(costs, 2)], 2)) == 18.0
    assert imbalance(fused()[2], 5) == 1.0  # heads that do not divide are left out
