"""One compiled block for all layers: each keeps its own budget, and nothing compiles twice."""

from __future__ import annotations

import copy
import pickle

import pieces_models as models
import pytest
import torch
from plans import plan_of
from torch import nn

import freqopt
from freqopt.backend import freqopt_backend
from freqopt.errors import PlanError
from freqopt.models_zoo.video_dit import VideoDiT, VideoDiTConfig
from freqopt.plan.plan import Plan
from freqopt.plan.records import Budget

GRID = (4, 9, 11)


@pytest.fixture(scope="module")
def model() -> VideoDiT:
    torch.manual_seed(0)
    model = VideoDiT(VideoDiTConfig(width=32, layers=4, mlp_width=64, rope_axes=(4, 6, 6))).eval()
    nn.init.normal_(model.head.weight, std=0.2)
    nn.init.normal_(model.modulation.weight, std=0.3)
    return model


@pytest.fixture(scope="module")
def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, 3, 4, 36, 44, generator=generator), torch.full((1,), 0.5)


@pytest.fixture(scope="module")
def plan(model: VideoDiT, inputs: tuple[torch.Tensor, torch.Tensor]) -> Plan:
    return plan_of(model, {"video": inputs[0], "timestep": inputs[1]}, 1.0)


def compile_blocks(model: VideoDiT) -> None:
    options = {"inner": "eager", "min_tokens": 0, "strict": True}
    for block in model.blocks:
        block.compile(backend=freqopt_backend, options=options, fullgraph=True)


def uncompile(model: VideoDiT) -> None:
    for block in model.blocks:
        block._compiled_call_impl = None


def test_regional_equals_full_model_compilation(
    model: VideoDiT, inputs: tuple[torch.Tensor, torch.Tensor], plan: Plan
) -> None:
    torch._dynamo.reset()
    options = {"plan": plan, "inner": "eager", "min_tokens": 0}
    whole = torch.compile(model, backend=freqopt_backend, options=options)
    with torch.no_grad():
        dense, expected = model(*inputs), whole(*inputs)
    assert (expected - dense).norm() > 1e-4 * dense.norm()

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    freqopt.reset_counters()
    try:
        with freqopt.attach(model, plan), torch.no_grad():
            compile_blocks(model)
            out = model(*inputs)
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    finally:
        uncompile(model)
    assert graphs == 1
    found = freqopt.counters()
    assert (found.split, found.dense) == (4, 0)
    assert (out - expected).norm() < 1e-5 * expected.norm()
    with torch.no_grad():
        assert torch.equal(model(*inputs), dense)
    assert not any(name.endswith("freqopt_budget") for name, _ in model.named_buffers())


def test_attaching_changes_nothing_without_a_compiler(
    model: VideoDiT, inputs: tuple[torch.Tensor, torch.Tensor], plan: Plan
) -> None:
    with torch.no_grad():
        dense = model(*inputs)
        keys = list(model.state_dict())
        with freqopt.attach(model, plan):
            assert torch.equal(model(*inputs), dense)
            assert list(model.state_dict()) == keys


def test_a_plan_of_another_model_is_refused(plan: Plan) -> None:
    other = VideoDiT(VideoDiTConfig(width=64, layers=2, mlp_width=64, rope_axes=(8, 12, 12)))
    with pytest.raises(PlanError):
        freqopt.attach(other, plan)


def test_diffusers_compile_repeated_blocks() -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=3,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
    ).eval()

    def call(seed: int) -> dict[str, object]:
        generator = torch.Generator().manual_seed(seed)
        return {
            "hidden_states": torch.randn(1, 4, 5, 16, 24, generator=generator),
            "timestep": torch.tensor([100 + seed]),
            "encoder_hidden_states": torch.randn(1, 7, 16, generator=generator),
            "return_dict": False,
        }

    torch._dynamo.reset()
    plan = plan_of(model, call(0), 1.0)
    options = {"inner": "eager", "min_tokens": 0}
    torch._dynamo.reset()
    whole = torch.compile(model, backend=freqopt_backend, options={**options, "plan": plan})
    with torch.no_grad():
        dense, expected = model(**call(9))[0], whole(**call(9))[0]
    assert (expected - dense).norm() > 1e-4 * dense.norm()

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    freqopt.reset_counters()
    with freqopt.attach(model, plan), torch.no_grad():
        model.compile_repeated_blocks(backend=freqopt_backend, options=options, fullgraph=True)
        out = model(**call(9))[0]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert (freqopt.counters().split, freqopt.counters().dense) == (3, 3)
    assert (out - expected).norm() < 1e-5 * expected.norm()


LOUD = {"inner": "eager", "min_tokens": 0}


@pytest.fixture(scope="module")
def pieces_plan() -> Plan:
    return plan_of(models.make(), models.inputs(), 1.0)


def by_blocks(model: nn.Module, **options: object) -> torch.Tensor:
    torch._dynamo.reset()
    freqopt.reset_counters()
    for block in model.blocks:
        block.compile(backend=freqopt_backend, options={**LOUD, **options})
    with torch.no_grad():
        return model(**models.inputs())


def whole(plan: Plan) -> torch.Tensor:
    torch._dynamo.reset()
    compiled = torch.compile(models.make(), backend=freqopt_backend, options={**LOUD, "plan": plan})
    with torch.no_grad():
        return compiled(**models.inputs())


@pytest.mark.parametrize(
    "change", [models.adapted, models.wrapping_blocks, models.wrapping_attention]
)
def test_adapters_and_replaced_blocks_keep_their_plan(change: object, pieces_plan: Plan) -> None:
    expected = whole(pieces_plan)
    model = models.make()
    change(model)
    with torch.no_grad():
        torch._dynamo.reset()
        freqopt.reset_counters()
        options = {**LOUD, "plan": pieces_plan}
        out = torch.compile(model, backend=freqopt_backend, options=options)(**models.inputs())
    assert freqopt.counters().split == 3
    assert (out - expected).norm() < 1e-5 * expected.norm()
    with freqopt.attach(model, pieces_plan):
        out = by_blocks(model)
    assert freqopt.counters().split == 3
    assert (out - expected).norm() < 1e-5 * expected.norm()


def test_a_module_around_the_calibrated_model(pieces_plan: Plan) -> None:
    expected = whole(pieces_plan)
    model = models.make()
    around = models.Wrapped(models.Wrapped(model))
    torch._dynamo.reset()
    freqopt.reset_counters()
    compiled = torch.compile(around, backend=freqopt_backend, options={**LOUD, "plan": pieces_plan})
    with torch.no_grad():
        out = compiled(**models.inputs())
    names = [site.site for site in freqopt.counters().sites if site.split]
    assert names == [f"blocks.{i}.attn" for i in range(3)]
    assert (out - expected).norm() < 1e-5 * expected.norm()
    with freqopt.attach(around, pieces_plan):
        assert (by_blocks(model) - expected).norm() < 1e-5 * expected.norm()
        assert freqopt.counters().split == 3


def test_budgets_survive_what_becomes_of_a_model(pieces_plan: Plan) -> None:
    expected = whole(pieces_plan)
    model = models.make()
    freqopt.attach(model, pieces_plan)
    wanted = {name: pieces_plan.budget(name) for name in pieces_plan.sites}
    kept = copy.deepcopy(model.state_dict())
    model.half().float().to("meta").to_empty(device="cpu").load_state_dict(kept)
    for made in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for name, budget in wanted.items():
            assert torch.equal(made.get_submodule(name).freqopt_budget, budget)
        assert not any("freqopt" in name for name, _ in made.named_buffers())
        assert (by_blocks(made) - expected).norm() < 1e-5 * expected.norm()
        assert freqopt.counters().split == 3


def test_copies_are_told_the_grid_of_their_calls(
    pieces_plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    tall = {**models.inputs(), "video": models.inputs()["video"].mT.contiguous()}
    model = models.make()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=freqopt_backend, options={**LOUD, "plan": pieces_plan})
    with torch.no_grad():
        expected = compiled(**tall)
        freqopt.attach(model, pieces_plan)
        for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            by_blocks(made)
            assert (made(**tall) - expected).norm() < 1e-5 * expected.norm()
            sites = freqopt.counters().sites
            assert {site.site for site in sites if site.split} == set(pieces_plan.sites)
            made.freqopt_handle.remove()
            assert not any(module._forward_pre_hooks for module in made.modules())
    assert "on the calibrated grid" not in caplog.text


def test_a_module_at_two_places_is_called_twice(caplog: pytest.LogCaptureFixture) -> None:
    def make() -> models.Video:
        model = models.make()
        model.blocks[2] = model.blocks[0]
        return model

    twice = plan_of(make(), models.inputs(), 1.0)
    assert list(twice.sites) == ["blocks.0.attn", "blocks.1.attn", "blocks.0.attn@1"]
    torch._dynamo.reset()
    freqopt.reset_counters()
    options = {**LOUD, "plan": twice, "strict": True}
    with torch.no_grad():
        torch.compile(make(), backend=freqopt_backend, options=options)(**models.inputs())
    assert [site.site for site in freqopt.counters().sites if site.split] == list(twice.sites)
    model = make()
    with freqopt.attach(model, twice):
        by_blocks(model, strict=True)
    assert freqopt.counters().split == 3


@pytest.mark.parametrize("careful", ["blocks.0.attn", "blocks.0.attn@1"])
@pytest.mark.parametrize("way", ["attach", "plan", "eager"])
def test_no_call_of_a_module_is_less_exact_than_planned(way: str, careful: str) -> None:
    """Calls of one module are not told apart: all of them have the smallest threshold."""
    model = models.make()
    model.blocks[2] = model.blocks[0]
    plan = plan_of(model, models.inputs(), 1.0)
    lower = {"budgets": [Budget(threshold=[0.25, 1.0])]}
    sites = {**plan.sites, careful: plan.sites[careful].model_copy(update=lower)}
    plan = plan.model_copy(update={"sites": sites})
    with torch.no_grad():
        for site in ("blocks.0.attn", "blocks.0.attn@1"):
            sites[site] = sites[careful]
        both = plan.model_copy(update={"sites": dict(sites)})
        torch._dynamo.reset()
        options = {**LOUD, "plan": both, "strict": True}
        expected = torch.compile(model, backend=freqopt_backend, options=options)(**models.inputs())
        torch._dynamo.reset()
        if way == "eager":
            with freqopt.optimize(model, plan, route="eager", strict=True):
                got = model(**models.inputs())
        elif way == "attach":
            with freqopt.attach(model, plan):
                got = by_blocks(model, strict=True)
        else:
            got = by_blocks(model, strict=True, plan=plan)
    assert (got - expected).norm() < 1e-5 * expected.norm()


def test_a_plan_of_two_models_in_one_graph_is_refused_for_what_it_is(pieces_plan: Plan) -> None:
    class Both(nn.Module):
        """Two experts of one class."""

        def __init__(self) -> None:
            super().__init__()
            self.high, self.low = models.make(), models.make()

        def forward(self, **given: torch.Tensor) -> torch.Tensor:
            return self.high(**given) + self.low(**given)

    torch._dynamo.reset()
    options = {**LOUD, "plan": pieces_plan}
    with pytest.raises(PlanError, match=r"more than once \(high\.blocks\.0\.attn, low\.blocks"):
        torch.compile(Both(), backend=freqopt_backend, options=options)(**models.inputs())


def test_attaching_twice_is_refused_and_removing_twice_is_not(pieces_plan: Plan) -> None:
    model = models.make()
    first = freqopt.attach(model, pieces_plan)
    with pytest.raises(PlanError, match=r"has budgets already: call remove\(\)"):
        freqopt.attach(model, pieces_plan)
    model.freqopt_handle.remove()
    second = freqopt.attach(model, pieces_plan)
    first.remove()
    assert all("freqopt_budget" in block.attn.__dict__ for block in model.blocks)
    second.remove()
    second.remove()
    for module in model.modules():
        assert not module._forward_pre_hooks and not any("freqopt" in k for k in vars(module))


def test_attaching_under_inference_mode_and_after_a_first_run(pieces_plan: Plan) -> None:
    expected = whole(pieces_plan)
    model = models.make()
    dense = by_blocks(model)
    torch._dynamo.reset()
    with torch.inference_mode():
        handle = freqopt.attach(model, pieces_plan)
    out = by_blocks(model)
    assert (out - expected).norm() < 1e-5 * expected.norm()
    handle.remove()
    with torch.inference_mode():
        assert (by_blocks(model, threshold=0.0, grid=models.GRID) - dense).abs().max() < 1e-5


def test_another_depth_is_refused(pieces_plan: Plan) -> None:
    for layers in (2, 4):
        with pytest.raises(PlanError, match="depth"):
            freqopt.attach(models.make(layers), pieces_plan)
    longer = models.make(3)
    longer.extra = models.Block()
    freqopt.attach(longer, pieces_plan).remove()
