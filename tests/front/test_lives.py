"""What happens to optimized models: copied, swapped, called in their own calls, optimized again."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import weakref
from typing import Any

import pieces_models as models
import pytest
import torch
import torch.nn.functional as F
from pipelines import far, made
from plans import plan_of
from served_models import called, optimized
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

import freqopt
from freqopt.errors import OptionError, PlanError, SiteError
from freqopt.plan.plan import Plan
from freqopt.plan.records import Budget
from freqopt.telling import running

ROUTES: tuple[Any, ...] = ("eager", "regional", "compile")


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_of(models.make(), models.inputs(), 1.0)


@pytest.mark.parametrize("route", ROUTES)
def test_the_outermost_block_of_a_handle_undoes_it(route: str, plan: Plan) -> None:
    model = models.make()
    dense = called(model)
    handle = optimized(model, plan, route)
    with handle:
        with handle:
            split = called(model)
        assert handle.enabled and torch.equal(called(model), split) and far(split, dense) > 1e-3
    assert not handle.enabled and torch.equal(called(model), dense)
    with handle:
        assert torch.equal(called(model), split)
        handle.disable()
    assert torch.equal(called(model), dense)


@pytest.mark.parametrize("route", ROUTES)
def test_a_block_that_runs_twice_counts_twice(route: str) -> None:
    model = models.make()
    model.blocks[1] = model.blocks[0]
    plan = plan_of(model, models.inputs(), 1.0)
    assert "blocks.0.attn@1" in plan.sites
    with optimized(model, plan, route) as handle:
        assert handle.components["model"].row()[1] == "0 of 3"
        called(model)
        assert handle.components["model"].row()[1] == "3 of 3"


def test_leaving_a_block_that_was_not_entered_keeps_the_count(plan: Plan) -> None:
    handle = optimized(models.make(), plan, "eager")
    handle.__exit__(None, None, None)
    with handle:
        assert handle.enabled
    assert not handle.enabled


@pytest.mark.parametrize("route", ROUTES)
def test_a_call_on_meta_has_its_shapes(route: str, plan: Plan) -> None:
    """As it has without us: what counts operations or plans memory calls models so."""
    model = models.make()
    split = optimized(model, plan, route)
    wanted = called(model)
    weights = model.state_dict()
    model.to("meta")
    with torch.no_grad():
        out = model(**{name: x.to("meta") for name, x in models.inputs().items()})
    assert out.is_meta and out.shape == wanted.shape
    model.load_state_dict(weights, assign=True)
    assert torch.equal(called(model), wanted)
    split.disable()


@pytest.mark.parametrize("inside", ["blocks.1", "blocks.1.attn", "blocks.1.attn.q"])
def test_the_rest_of_a_call_is_dense_when_it_is_disabled_meanwhile(inside: str, plan: Plan) -> None:
    """As by another thread."""
    model = models.make()
    dense, handle = called(model), optimized(model, plan, "eager")
    split = called(model)
    module = model.get_submodule(inside)
    hook = module.register_forward_pre_hook(lambda *given: handle.disable())
    partly = called(model)
    hook.remove()
    assert not _get_current_function_mode_stack()
    assert far(partly, dense) > 1e-3 and far(partly, split) > 1e-3
    assert torch.equal(called(model), dense)
    with handle:
        assert torch.equal(called(model), split)


@pytest.mark.parametrize("route", ROUTES)
def test_a_handle_tells_of_its_own_calls_alone(route: str, plan: Plan) -> None:
    model, zero = models.make(), plan_of(models.make(), models.inputs(), 0.0)
    with optimized(model, plan, route) as first:
        called(model)
    measured = first.components["model"].row()
    with freqopt.optimize(model, zero, route=route, inner="eager") as second:  # graphs are kept
        assert second.components["model"].row()[3] == "not called yet"
        called(model)
        assert float(second.components["model"].row()[3].split()[0]) < 1e-5
    assert first.components["model"].row() == measured and float(measured[3].split()[0]) > 1e-3
    with freqopt.optimize(model, plan, route=route, inner="eager") as third:
        assert third.components["model"].row()[3] == "not called yet"
        called(model)
        assert third.components["model"].row()[3] == measured[3]


@pytest.mark.parametrize("route", ROUTES)
def test_a_copy_is_dense_says_so_and_can_be_optimized(
    route: str, plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    piped = made("wan")
    dense, plans = piped.run(), piped.plans(1.0)
    with optimized(piped.pipe, plans, route):
        split = piped.run()
        twins = [copy.deepcopy(piped.pipe.transformer)]
        twins.append(pickle.loads(pickle.dumps(piped.pipe.transformer)))
        for twin in twins:
            own = made("wan")
            own.pipe.transformer = twin
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                assert torch.equal(own.run(), dense)
            assert "is a copy" in caplog.text or "0 of 2 planned sites split" in caplog.text
            with optimized(own.pipe, plans, route, strict=True):
                assert torch.equal(own.run(), split)
            assert torch.equal(own.run(), dense)
            names = {name for module in twin.modules() for name in vars(module)}
            assert not [name for name in names if name.startswith("freqopt")]
            hooks = [h for m in twin.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]
            assert not [key for key in hooks if key < 0]
        assert torch.equal(piped.run(), split)
    with freqopt.attach(twins[0], plans["transformer"]), pytest.raises(PlanError, match="already"):
        freqopt.optimize(twins[0], plans["transformer"], route="eager")


def test_a_backend_that_was_chosen_meanwhile_is_kept(plan: Plan) -> None:
    piped = made("wan")
    plans = piped.plans(1.0)
    processors = [block.attn1.processor for block in piped.pipe.transformer.blocks]
    with optimized(piped.pipe, plans, "eager"):
        assert {processor._attention_backend for processor in processors} == {"freqopt"}
        piped.pipe.transformer.set_attention_backend("native")
        split = piped.run()
    assert {processor._attention_backend.value for processor in processors} == {"native"}
    assert far(split, piped.run()) > 1e-4  # it was served all the same
    processors[0]._SUPPORTED_BACKENDS = ("native",)
    with optimized(piped.pipe, plans, "eager", strict=True):
        assert processors[0]._attention_backend.value == "native"
        assert torch.equal(piped.run(), split)


def test_a_module_that_took_a_components_place_is_told() -> None:
    piped = made("wan")
    plans = piped.plans(1.0)
    with optimized(piped.pipe, plans, "eager") as handle:
        old = piped.pipe.transformer
        assert "another module" not in str(handle)
        piped.pipe.transformer = made("wan").pipe.transformer
        assert "transformer: the pipeline has another module by this name now" in str(handle)
        piped.pipe.transformer = torch.compile(old, backend="eager")
        assert "another module" not in str(handle)


@pytest.mark.parametrize("known", [True, False])
def test_a_model_may_be_called_within_its_own_call(known: bool, plan: Plan) -> None:
    """As by a hook in an attention module: the call around it goes on as it began."""
    model = models.make()
    with optimized(model, plan, "eager", strict=True):
        expected = called(model)
    inside: list[Tensor] = []

    def again(*_: Any) -> None:
        if not inside:
            inside.append(torch.empty(0))
            inside.append(called(model))

    with optimized(model, plan, "eager", strict=True):
        if known:
            called(model)
        hook = model.blocks[1].attn.q.register_forward_hook(again)
        freqopt.reset_counters()
        assert torch.equal(called(model), expected) and torch.equal(inside[1], expected)
        assert {site.calls for site in freqopt.counters().sites if site.split} == {2}
        hook.remove()
        assert torch.equal(called(model), expected)


class Inner(nn.Module):
    """Two attentions, the first of which is planned to be dense."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q = 3 * self.q(x).unflatten(-1, (2, 16)).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, q, q)
        return F.scaled_dot_product_attention(-q, q, mixed).transpose(1, 2).flatten(2)


class Outer(nn.Module):
    """An attention of its own, and a module with others."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv3d(4, 32, (1, 2, 2), (1, 2, 2))
        self.inner = Inner()

    def forward(self, video: Tensor) -> Tensor:
        x = self.patch(video).flatten(2).transpose(1, 2)
        q = 3 * x.unflatten(-1, (2, 16)).transpose(1, 2)
        return self.inner(F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2))


def test_attention_in_a_planned_module_within_another_is_counted_once() -> None:
    torch.manual_seed(0)
    model, inputs = Outer().eval(), {"video": models.inputs()["video"]}
    found = plan_of(model, inputs, 0.0)
    loose = Budget(threshold=[1e9, 1e9])
    sites = {
        name: site.model_copy(update={"budgets": [loose]})
        if name == "inner#1"
        else site.model_copy(update={"decision": "dense", "reason": "as the test wants it"})
        if name == "inner"
        else site
        for name, site in found.sites.items()
    }
    assert list(sites) == ["model", "inner", "inner#1"]
    plan = found.model_copy(update={"sites": sites})
    outputs = []
    for route in ("eager", "compile"):
        with torch.no_grad(), optimized(model, plan, route, strict=True):
            outputs.append(model(**inputs))
    assert far(outputs[0], outputs[1]) < 1e-6
    assert far(outputs[1], model(**inputs).detach()) > 1e-2


def test_models_that_are_gone_leave_no_more_than_their_latest_counts(plan: Plan) -> None:
    model = models.make()
    before = list(running.graphs)  # of which some may be forgotten meanwhile
    for _ in range(3):
        with optimized(model, plan, "eager"):
            called(model)
    gc.collect()
    own = [graph for graph in running.graphs if all(graph is not each for each in before)]
    assert own and all(graph.gone for graph in own)


@pytest.mark.parametrize("route", ROUTES)
def test_an_optimized_model_is_looked_at_as_if_it_were_not(
    route: str, plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    model = models.make(layers=2)
    plan = plan_of(model, models.inputs(), 1.0)
    samples = [models.inputs(), {n: x + 0.1 for n, x in models.inputs().items()}]
    quick: Any = {"rounds": 0, "progress": False, "order": "grid"}

    def looked_at() -> Any:
        return (
            plan.verify(model, samples).measured_error,
            freqopt.inspect(model, **models.inputs(), min_tokens=0).to_dict(),
            freqopt.calibrate(model, samples, target_density=0.6, **quick),
        )

    expected = looked_at()
    assert expected[0] > 1e-3
    with optimized(model, plan, route, strict=True):
        split = called(model)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert looked_at() == expected
        assert not [each for each in caplog.records if each.name.startswith("freqopt")]
        assert torch.equal(called(model), split)


@pytest.mark.parametrize("set_up", ["as it is", "casting"])
def test_a_pipeline_that_is_served_is_measured_as_if_it_were_not(set_up: str) -> None:
    piped = made("wan")
    plan, model = piped.plans(1.0)["transformer"], piped.pipe.transformer
    with freqopt.recording(model, most=2) as samples:
        piped.run()
    if set_up == "casting":  # its graph is in pieces, and it is measured without a compiler
        model.half().float()
        model.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    expected = plan.verify(model, samples).measured_error
    assert expected > 1e-3
    with optimized(piped.pipe, {"transformer": plan}, "eager", strict=True):
        split = piped.run()
        assert plan.verify(model, samples).measured_error == expected
        assert torch.equal(piped.run(), split)


def first_block() -> Any:
    return pytest.importorskip("diffusers").FirstBlockCacheConfig(threshold=1.0)


def broadcast() -> Any:
    return pytest.importorskip("diffusers").PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: None,  # as outside of a call of the pipeline
    )


@pytest.mark.parametrize("cache", [first_block, broadcast])
def test_a_step_cache_is_left_out_while_a_model_is_looked_at(cache: Any) -> None:
    piped = made("wan")
    plan, model = piped.plans(1.0)["transformer"], piped.pipe.transformer
    with freqopt.recording(model, most=2) as samples:
        piped.run()
    args, kwargs = samples[0]

    def looked_at() -> Any:
        found = freqopt.inspect(model, *args, min_tokens=0, **kwargs)
        return plan.verify(model, samples).measured_error, found.to_dict()

    expected, config = looked_at(), cache()
    model.enable_cache(config)
    assert looked_at() == expected
    assert model.is_cache_enabled and model._cache_config is config
    with optimized(piped.pipe, {"transformer": plan}, "eager"):
        assert looked_at() == expected


@pytest.mark.slow
def test_a_pipeline_with_a_step_cache_is_calibrated() -> None:
    piped = made("wan")
    quick: Any = {"rounds": 0, "progress": False, "order": "grid", "timestep_buckets": 1}
    piped.pipe.transformer.enable_cache(first_block())
    dense = piped.run(num_inference_steps=4)
    with freqopt.optimize(
        piped.pipe,
        prompts=[{**piped.call, "num_inference_steps": 4}],
        target_density=0.6,
        calibration=quick,
    ):
        assert far(piped.run(num_inference_steps=4), dense) > 1e-4
    assert torch.equal(piped.run(num_inference_steps=4), dense)


def test_budgets_on_a_model_are_refused_before_it_is_calibrated(plan: Plan) -> None:
    def run() -> None:
        raise AssertionError("the pipeline ran")

    model = models.make()
    with freqopt.attach(model, plan), pytest.raises(OptionError, match="has budgets already"):
        freqopt.optimize(model, samples=run)


@pytest.mark.parametrize("name", ["its forward", "a block"])
def test_a_part_that_is_called_in_no_call_of_the_model_says_that_it_is_dense(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    piped = made("wan")
    plans, model = piped.plans(1.0), piped.pipe.transformer
    given: list[Any] = []
    part = model if name == "its forward" else model.blocks[0]

    def keep(_: Any, args: Any, kwargs: Any) -> None:
        given[:] = args, kwargs

    hook = part.register_forward_pre_hook(keep, with_kwargs=True)
    piped.run()
    hook.remove()
    args, kwargs = given
    call = model.forward if name == "its forward" else part
    with torch.no_grad():
        dense = call(*args, **kwargs)[0]
        with optimized(piped.pipe, plans, "eager"):
            split = piped.run()
            for said in (1, 1):
                with caplog.at_level(logging.WARNING):
                    assert torch.equal(call(*args, **kwargs)[0], dense)
                assert caplog.text.count("was called in no call of the model") == said
            assert torch.equal(piped.run(), split)
        with optimized(piped.pipe, plans, "eager", strict=True):
            with pytest.raises(SiteError, match="blocks.0.attn1 was called in no call"):
                call(*args, **kwargs)
            assert torch.equal(piped.run(), split)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("disabled", [True, False])
@pytest.mark.parametrize("make", [models.make, Outer])  # the latter has attention itself
def test_a_model_that_nobody_has_is_freed(route: str, disabled: bool, make: Any) -> None:
    model = make().eval()
    inputs = {n: x for n, x in models.inputs().items() if n == "video" or make is models.make}
    handle = optimized(model, plan_of(model, inputs, 1.0), route)
    with torch.no_grad():
        model(**inputs)
    if disabled:
        handle.disable()
    held = weakref.ref(model)
    del model, handle
    gc.collect()
    assert held() is None


def test_a_model_that_was_looked_at_is_freed_and_its_samples(plan: Plan) -> None:
    quick: Any = {"rounds": 0, "progress": False, "order": "grid"}
    looks: list[Any] = [
        lambda model, samples: freqopt.inspect(model, **samples[0]),
        lambda model, samples: plan.verify(model, samples),
        lambda model, samples: freqopt.calibrate(model, samples, target_density=0.6, **quick),
    ]
    for look in looks:
        model, samples = models.make(), [models.inputs(), models.inputs()]
        look(model, samples)
        held = [weakref.ref(model), weakref.ref(samples[0]["video"])]
        del model, samples
        gc.collect()
        assert [each() for each in held] == [None, None]
