"""The front door on small models: routes, arguments, handles, and nothing left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pieces_models as models
import pytest
import torch
from pipelines import far
from plans import plan_of
from torch import Tensor, nn

import freqopt
from freqopt.errors import CalibrationError, InputError, OptionError, PlanError
from freqopt.front.state import choose_route, state_of
from freqopt.plan.plan import Plan

ROUTES = ("eager", "regional", "compile")


class Pipe:
    """A pipeline of somebody's own: two experts share the steps, noisy ones first."""

    def __init__(self, experts: int = 2) -> None:
        torch.manual_seed(0)
        self.transformer = Timed().eval()
        self.transformer_2 = Timed().eval() if experts == 2 else None
        self.calls = 0

    def __call__(
        self, prompt: str | None = None, steps: int = 8, output_type: str = "pixels"
    ) -> Tensor:
        self.calls += 1
        assert output_type in ("pixels", "latent")
        inputs = models.inputs()
        noise = inputs["video"] + len(prompt or "") / 100
        with torch.no_grad():
            for step in range(steps):
                time = 1 - step / steps
                model = self.transformer_2 if self.transformer_2 and time <= 0.5 else None
                out = (model or self.transformer)(
                    noise, text=inputs["text"], timestep=torch.tensor([time])
                )
                noise = noise - 0.01 * out.mean()
        return noise


class Timed(models.Video):
    def forward(self, video: Tensor, text: Tensor, timestep: Tensor) -> Tensor:
        return super().forward(video + timestep.mean() / 10, text)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_of(models.make(), models.inputs(), 1.0)


@pytest.fixture(scope="module")
def handle_of_pipe() -> tuple[Pipe, freqopt.Handle]:
    pipe = Pipe()
    quick = {"rounds": 0, "progress": False, "timestep_buckets": 1}
    return pipe, freqopt.optimize(
        pipe,
        prompts=["a cat", "two dogs"],
        target_density=0.6,
        route="eager",
        run_options={"steps": 4},
        calibration=quick,
    )


def state(model: nn.Module) -> Any:
    every = list(model.modules())
    hooks = [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in every]
    return [dict(vars(m)) for m in every], hooks


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_gives_the_same_and_leaves_nothing(route: str, plan: Plan) -> None:
    model, inputs = models.make(), models.inputs()
    before = state(model)
    with torch.no_grad():
        dense = model(**inputs)
        with freqopt.optimize(model, plan, route="eager"):
            expected = model(**inputs)
        assert far(expected, dense) > 1e-3
        handle = freqopt.optimize(model, plan, route=route, inner="eager", strict=True)
        assert far(model(**inputs), expected) < 1e-5
        handle.disable()
        handle.disable()
        assert torch.equal(model(**inputs), dense) and state(model) == before
        with handle:
            assert far(model(**inputs), expected) < 1e-5
            shown = str(handle)
        assert state(model) == before
    assert "3 of 3" in shown and route in shown and "not called yet" not in shown
    assert str(handle).startswith("disabled") and len(repr(handle)) < 100


def test_optimizing_twice_and_half_way_errors_change_nothing(plan: Plan) -> None:
    model, inputs = models.make(), models.inputs()
    with freqopt.optimize(model, plan, route="eager") as handle, torch.no_grad():
        out, held = model(**inputs), state(model)
        with pytest.raises(OptionError, match="optimized already"):
            freqopt.optimize(model, plan)
        assert state(model) == held and torch.equal(model(**inputs), out)
    handle.disable()
    other = models.make()
    with freqopt.attach(other, plan):
        kept = state(model), state(other)
        with pytest.raises(PlanError, match="budgets already"):
            freqopt.optimize({"a": model, "b": other}, {"a": plan, "b": plan}, route="eager")
        assert (state(model), state(other)) == kept


@pytest.mark.parametrize(
    ("change", "route", "why"),
    [
        (lambda model: None, "regional", "3 blocks are alike"),
        (models.breaking_blocks, "eager", "has replaced the forward of blocks.0"),
        (models.breaking_linears, "eager", "hooks"),
        (models.adapted, "eager", "parameters are not the plan's"),
        (lambda model: model.compile(backend="eager"), "compile", "as a whole"),
        (lambda model: model.blocks[0].compile(backend="eager"), "regional", "were compiled"),
    ],
)
def test_the_route_is_chosen_by_what_is_on_the_model(
    change: Any, route: str, why: str, plan: Plan
) -> None:
    model = models.make()
    change(model)
    choice = choose_route(state_of(model, plan))
    assert choice.route == route and why in choice.why
    with freqopt.optimize(model, plan, inner="eager") as handle:
        assert handle.components["model"].choice == choice and why in str(handle)


def test_what_was_compiled_in_place_is_put_back(plan: Plan) -> None:
    model = models.make()
    model.compile(backend="eager")
    compiled = model._compiled_call_impl
    with freqopt.optimize(model, plan, inner="eager"):
        assert model._compiled_call_impl is not compiled
    assert model._compiled_call_impl is compiled


PLAN = object()


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({}, OptionError, "pass a plan, or else prompts"),
        ({"prompts": ["a"], "samples": []}, OptionError, "both given"),
        ({"prompts": ["a"], "target_error": 0.1, "target_density": 0.1}, OptionError, "both given"),
        ({"prompts": ["a"], "target_error": 2.0}, OptionError, "outside"),
        ({"prompts": ["a"], "target_psnr": 30.0}, OptionError, "one component"),
        ({"prompts": []}, OptionError, "empty"),
        ({"prompts": [3]}, OptionError, "a prompt is a int"),
        ({"prompts": 3}, OptionError, "prompts is a int"),
        ({"prompts": ["a"], "run_options": 3}, OptionError, "run_options is a int"),
        ({"prompts": ["a"], "calibration": 3}, OptionError, "calibration is a int"),
        ({"prompts": ["a"], "calibration": ["rounds"]}, OptionError, "calibration is a list"),
        ({"prompts": [{"promt": "a"}]}, OptionError, "takes no argument 'promt'"),
        ({"prompts": ["a"], "run_options": {"step": 3}}, OptionError, "takes no argument 'step'"),
        ({"samples": [{}], "run_options": {"steps": 3}}, OptionError, "run_options are for"),
        ({"prompts": ["a"], "calibration": {"pases": 3}}, OptionError, "'pases'"),
        ({"prompts": ["a"], "calibration": {"rounds": -1}}, OptionError, "rounds -1"),
        ({"prompts": ["a"], "calibration": {"order": "up"}}, OptionError, "order 'up'"),
        ({"prompts": ["a"], "seed": 0.5}, OptionError, "seed 0.5"),
        ({"prompts": ["a"], "route": "fast"}, OptionError, "route 'fast'"),
        ({"prompts": ["a"], "inner": "freqopt"}, OptionError, "freqopt"),
        ({"prompts": ["a"], "inner": "indcutor"}, OptionError, "did you mean inductor"),
        ({"prompts": ["a"], "components": 3}, OptionError, "list of names"),
        ({"prompts": ["a"], "components": ["unet"]}, OptionError, "holds no module 'unet'"),
        ({"prompts": ["a"], "components": "transformer"}, OptionError, "list of names"),
        ({"prompts": ["a"], "components": []}, OptionError, "it is empty"),
        ({"prompts": ["a"], "components": [nn.Identity()]}, OptionError, "holds a Identity"),
        ({"prompts": ["a"], "components": [""]}, OptionError, "holds a str without one"),
        ({"plan": PLAN, "target_error": 0.1}, OptionError, "plan and target_error"),
        ({"plan": PLAN}, PlanError, "each needs a plan of its own"),
        ({"plan": {"transformer": PLAN}}, PlanError, "no plan for transformer_2"),
        ({"plan": 3}, OptionError, "not int"),
        ({"plan": "nowhere.json"}, PlanError, "No such file"),
        ({"plan": "nowhere/"}, PlanError, "no folder here"),
        ({"plan": "x" * 5000}, PlanError, "no folder here"),
        ({"plan": "x" * 5000 + ".json"}, PlanError, "File name too long"),
        ({"plan": "a\0b.json"}, PlanError, "not a name of a file"),
    ],
)
def test_arguments_are_checked_before_anything_runs(
    arguments: dict[str, Any], error: type[Exception], words: str, plan: Plan
) -> None:
    pipe = Pipe()
    given = arguments.get("plan")
    if given is PLAN:
        arguments = {**arguments, "plan": plan}
    elif isinstance(given, dict):
        arguments = {**arguments, "plan": {"transformer": plan}}
    before = state(pipe.transformer)
    with pytest.raises(error, match=words):
        freqopt.optimize(pipe, **arguments)
    assert pipe.calls == 0 and state(pipe.transformer) == before


def test_what_the_pipeline_needs_is_asked_for_before_it_runs() -> None:
    class Strict(Pipe):
        def __call__(self, prompt: str, image: str) -> Tensor:  # type: ignore[override]
            raise AssertionError

    with pytest.raises(OptionError, match="needs an argument 'image'"):
        freqopt.optimize(Strict(), prompts=["a"])


def test_modules_are_given_by_names(plan: Plan) -> None:
    for name in (1, "", None):
        with pytest.raises(InputError, match="is no name"):
            freqopt.optimize({name: models.make()}, plan)


def test_what_denoises_is_found_or_named(plan: Plan) -> None:
    class Odd:
        def __init__(self) -> None:
            self.net, self.text = models.make(), nn.Linear(2, 2)

    with pytest.raises(InputError, match=r"holds net \(Video\), text \(Linear\).*components="):
        freqopt.optimize(Odd(), plan)
    with freqopt.optimize(Odd(), plan, components=["net"], route="eager") as handle:
        assert list(handle.components) == ["net"]
    wrapped = torch.compile(models.make(), backend="eager")
    with pytest.raises(InputError, match="_orig_mod"):
        freqopt.optimize(wrapped, plan)


def test_a_pipeline_is_calibrated_in_one_run(
    handle_of_pipe: tuple[Pipe, freqopt.Handle], tmp_path: Path
) -> None:
    pipe, handle = handle_of_pipe
    assert pipe.calls == 2 and list(handle.plans) == ["transformer", "transformer_2"]
    ranges = [each.timestep_range for each in handle.plans.values()]
    assert ranges == [(0.75, 1.0), (0.25, 0.5)]
    out = pipe("a cat")
    with handle:
        handle.save(tmp_path)
    dense = pipe("a cat")
    assert far(out, dense) > 0
    again = freqopt.optimize(pipe, tmp_path, route="eager")
    assert torch.equal(pipe("a cat"), out)
    assert "transformer_2" in str(again) and "3 of 3" in str(again)
    again.disable()


def test_swapped_plans_are_refused(handle_of_pipe: tuple[Pipe, freqopt.Handle]) -> None:
    pipe, handle = handle_of_pipe
    handle.disable()
    plans = handle.plans
    swapped = {"transformer": plans["transformer_2"], "transformer_2": plans["transformer"]}
    with pytest.raises(PlanError, match="is the plan of transformer_2.*swapped"):
        freqopt.optimize(pipe, swapped)
    unnamed = {n: plan.model_copy(update={"component": None}) for n, plan in swapped.items()}
    before = state(pipe.transformer)
    told = pytest.raises(PlanError, match="transformer is called at timestep 1.*swapped")
    with freqopt.optimize(pipe, unnamed, route="eager"), told:
        pipe("a cat", steps=4)
    assert state(pipe.transformer) == before


def test_a_failing_pipeline_leaves_the_models_as_they_were() -> None:
    pipe = Pipe(experts=1)
    before = state(pipe.transformer)
    with pytest.raises(CalibrationError, match="without calling"):
        freqopt.optimize({"a": pipe.transformer, "b": models.make()}, samples=lambda: pipe())
    with pytest.raises(TypeError):
        freqopt.optimize(pipe, prompts=[{"prompt": 3}])
    assert state(pipe.transformer) == before
