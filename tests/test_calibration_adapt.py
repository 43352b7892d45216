"""The closed loop: where the op measures more error than the plan allows, it tightens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_calibration_timestep import TIMES, make_plan, video
from test_calibration_timestep import model as model  # a fixture
from torch import Tensor, nn

import freqopt
from freqopt.backend import freqopt_backend
from freqopt.errors import OptionError, PlanError
from freqopt.models_zoo.video_dit import VideoDiT
from freqopt.passes.adapt import LEAST_FACTOR, MOST_LOOSER, MOST_TIGHTER, next_factor
from freqopt.plan import Plan

LAST = torch.tensor([TIMES[2]])


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    freqopt.reset_counters()
    yield
    torch._dynamo.reset()


def bounded(model: nn.Module, bound: float, **changes: Any) -> Plan:
    plan = make_plan(model, **changes)
    sites = {
        name: site.model_copy(update={"bounds": [[bound] * site.heads] * len(site.budgets)})
        for name, site in plan.sites.items()
    }
    return plan.model_copy(update={"sites": sites})


def compiled(model: nn.Module, plan: Plan, inner: str = "aot_eager", adapt: bool = True) -> Any:
    options = {"plan": plan, "inner": inner, "min_tokens": 0, "strict": True, "adapt": adapt}
    return torch.compile(model, backend=freqopt_backend, options=options, fullgraph=True)


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def test_factors() -> None:
    one, bound = torch.ones(6), torch.full((6,), 0.1)
    error = torch.tensor([[0.05, 0.1, 0.2, 9.0, torch.nan, torch.inf]])
    want = [1.0, 1.0, 0.5, MOST_TIGHTER, 1.0, MOST_TIGHTER]
    torch.testing.assert_close(next_factor(one, error, bound), torch.tensor(want))
    half = 0.5 * one
    error = torch.tensor([[0.0, 0.06, 0.07, 0.099, 0.1, 0.2], [0.0] * 6])  # the worst item counts
    want = [0.5 * MOST_LOOSER, 0.5 * 7 / 6, 0.5, 0.5, 0.5, 0.25]
    torch.testing.assert_close(next_factor(half, error, bound), torch.tensor(want))
    least = next_factor(torch.full((1,), LEAST_FACTOR), torch.tensor([[1.0]]), bound[:1])
    assert float(least) == LEAST_FACTOR


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_errors_above_the_bound_tighten_the_next_call(model: VideoDiT, inner: str) -> None:
    with torch.no_grad():
        dense = model(video(), LAST)
        plain = compiled(model, bounded(model, 0.01), inner, adapt=False)(video(), LAST)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        freqopt.reset_counters()
        step = compiled(model, bounded(model, 0.01), inner)
        outs = [step(video(), LAST) for _ in range(6)]
        assert graphs() == 1
        errors = [float((out - dense).norm() / dense.norm()) for out in outs]
        assert (outs[0] - plain).norm() < 1e-5 * plain.norm()  # starts from the plan's own budget
        assert errors[-1] < 0.5 * errors[0]
        factors = [site.factor for site in freqopt.counters().sites]
        assert len(factors) == 2 and all(f is not None and f < 0.3 for f in factors)
        assert "thresholds x 0." in str(freqopt.counters())
        freqopt.reset_counters()
        again = step(video(), LAST)
        assert (again - outs[0]).norm() < 1e-5 * again.norm()
        assert graphs() == 1


def test_the_factor_is_that_of_the_calls_own_probe_error(
    model: VideoDiT, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Tensor, ...]] = []
    original = F.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        seen.append((q, k, v))
        return original(q, k, v, **options)

    plan = bounded(model, 0.05)
    with torch.no_grad():
        with monkeypatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", spy)
            model(video(), LAST)
        compiled(model, plan)(video(), LAST)
        budget = plan.budget("blocks.0.attn", 2)
        _, stats = freqopt.split_attention(
            *seen[0], grid=(4, 9, 11), threshold=budget[0], mid_band=budget[1] < budget[0],
            return_stats=True,
        )  # fmt: skip
    want = next_factor(torch.ones(2), stats.probe_error, torch.full((2,), 0.05)).min()
    assert want < 1
    assert freqopt.counters().sites[0].factor == pytest.approx(float(want), rel=1e-4)


def test_budget_is_given_back_when_the_input_calms_down(model: VideoDiT) -> None:
    torch.manual_seed(1)
    calm = torch.zeros_like(video())  # nothing in it: no error
    with torch.no_grad():
        step = compiled(model, bounded(model, 0.05))
        for _ in range(3):
            step(video(), LAST)
        tight = [site.factor for site in freqopt.counters().sites]
        for _ in range(12):
            step(calm, LAST)
        assert graphs() == 1
    loose = [site.factor for site in freqopt.counters().sites]
    assert all(a is not None and b is not None and a < b for a, b in zip(tight, loose, strict=True))
    assert max(f for f in loose if f is not None) == 1.0


def test_within_the_bound_nothing_changes(model: VideoDiT) -> None:
    with torch.no_grad():
        plain = compiled(model, bounded(model, 9.0), adapt=False)(video(), LAST)
        torch._dynamo.reset()
        step = compiled(model, bounded(model, 9.0))
        for _ in range(3):
            assert torch.equal(step(video(), LAST), plain)
    assert [s.factor for s in freqopt.counters().sites][-1] == 1.0


def test_one_block_for_all_layers_keeps_a_factor_for_each(model: VideoDiT) -> None:
    plan = bounded(model, 0.02)
    with torch.no_grad():
        whole = compiled(model, plan)
        wanted = [whole(video(), LAST) for _ in range(3)]
        factors = [site.factor for site in freqopt.counters().sites]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options = {"inner": "aot_eager", "min_tokens": 0, "strict": True}
    try:
        with freqopt.attach(model, plan, adapt=True) as attached, torch.no_grad():
            for block in model.blocks:
                block.compile(backend=freqopt_backend, options=options, fullgraph=True)
            for want in wanted:
                out = model(video(), LAST)
                assert (out - want).norm() < 1e-4 * want.norm()
            assert graphs() == 1
            found = [float(factor.min()) for factor in attached.factors()]
    finally:
        for block in model.blocks:
            block._compiled_call_impl = None
    assert found == pytest.approx(factors, rel=1e-3) and found[0] != found[1]


def test_plans_and_options_that_cannot_adapt(model: VideoDiT) -> None:
    with pytest.raises(PlanError, match="no bounds of errors for 'blocks.0.attn'"):
        freqopt.attach(model, make_plan(model), adapt=True)
    with pytest.raises(OptionError, match="adapt needs a plan"):
        freqopt_backend(torch.fx.symbolic_trace(nn.Identity()), [], options={"adapt": True})
    with pytest.raises(OptionError, match="must be True or False"):
        freqopt_backend(torch.fx.symbolic_trace(nn.Identity()), [], options={"adapt": 2})
