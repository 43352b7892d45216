"""Another backend around a model that has a plan: dense, which is told."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pieces_models as models
import pytest
import torch
from plans import plan_of, timed
from torch import Tensor, nn

import freqopt
from freqopt.backend import freqopt_backend
from freqopt.errors import SiteError
from freqopt.exporters.program import make_program
from freqopt.plan.plan import Plan

WORDS = "another backend than freqopt's compiled the model, or blocks of it"


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_of(models.make(), models.inputs(), 5.0)


@pytest.fixture(autouse=True, scope="module")
def alone() -> None:
    """Models that other tests optimized are gone, or they would be told of as well."""
    gc.collect()


@pytest.fixture(autouse=True)
def anew() -> None:
    torch._dynamo.reset()
    freqopt.reset_counters()


class Step(nn.Module):
    """A step of a pipeline around a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Any:
        return self.model(**inputs)


def in_place(model: nn.Module, backend: Any) -> Callable[..., Any]:
    model.compile(backend=backend)
    return model


def around(model: nn.Module, backend: Any) -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(Step(model), backend=backend)
    return compiled


@pytest.mark.parametrize(
    ("place", "route", "backend"),
    [
        (in_place, "eager", "eager"),
        (in_place, "regional", "aot_eager"),
        (in_place, "compile", "eager"),
        (around, "eager", "aot_eager"),
        (around, "regional", "eager"),
        (around, "compile", "eager"),
    ],
)
def test_it_is_dense_and_told_once(
    place: Any, route: Any, backend: str, plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    model = models.make()
    with torch.no_grad():
        dense = model(**models.inputs(batch=2))
        with freqopt.optimize(model, plan, route=route, inner="eager"):
            compiled = place(model, backend)
            for batch in (1, 2, 2):
                out = compiled(**models.inputs(batch=batch))
            assert torch.allclose(out, dense, atol=1e-5)
    assert caplog.text.count(WORDS) == 1


@pytest.mark.parametrize("route", ["eager", "regional", "compile"])
def test_it_is_an_error_where_all_must_be_split(route: Any, plan: Plan) -> None:
    model = models.make()
    with (
        torch.no_grad(),
        freqopt.optimize(model, plan, route=route, inner="eager", strict=True),
        pytest.raises(SiteError, match=WORDS),
    ):
        in_place(model, "eager")(**models.inputs())


@pytest.mark.parametrize("place", [in_place, around])
def test_our_own_is_split_and_nothing_said(
    place: Any, plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    model = models.make()
    with torch.no_grad(), freqopt.optimize(model, plan, route="eager"):
        expected = model(**models.inputs())

        def ours(gm: Any, examples: Any) -> Any:
            return freqopt_backend(gm, examples, options={"min_tokens": 0, "inner": "eager"})

        assert torch.allclose(place(model, ours)(**models.inputs()), expected, atol=1e-5)
    assert WORDS not in caplog.text


def exported(model: nn.Module, *, strict: bool) -> Tensor:
    """What a program of a model gives that torch.export made."""
    inputs = models.inputs()
    program = torch.export.export(Step(model), (), inputs, strict=strict)
    out: Tensor = program.module()(**inputs)
    return out


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("route", ["eager", "regional", "compile"])
def test_an_export_is_dense_and_told(
    route: Any, strict: bool, plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    model = models.make()
    with torch.no_grad():
        dense = model(**models.inputs())
        with freqopt.optimize(model, plan, route=route, inner="eager"):
            assert torch.allclose(exported(model, strict=strict), dense, atol=1e-5)
            split = model(**models.inputs())
    assert not torch.allclose(split, dense, atol=1e-3)
    assert caplog.text.count("torch.export takes the model as it is without freqopt") == 1


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("route", ["eager", "regional"])
def test_an_export_selects_no_budgets(route: Any, strict: bool) -> None:
    model = models.Timed(2).eval()
    inputs = {**models.inputs(), "time": torch.tensor([0.0])}
    by_time = timed(plan_of(model, inputs, 5.0))
    with torch.no_grad(), freqopt.optimize(model, by_time, route=route, inner="eager"):
        program = torch.export.export(Step(model), (), inputs, strict=strict)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets and not any("copy" in name or "freqopt" in name for name in targets)


@pytest.mark.parametrize("route", ["eager", "regional"])
def test_our_own_export_of_an_optimized_model_is_split_and_nothing_said(
    route: Any, plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    model = models.make()
    with torch.no_grad(), freqopt.optimize(model, plan, route=route, inner="eager"):
        program = make_program(model, (), models.inputs(), plan=plan)
        assert len(program.split) == 3
    assert "torch.export takes" not in caplog.text


def test_a_trace_of_torch_jit_is_dense_and_told(
    plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    model, inputs = models.make(), models.inputs()
    with torch.no_grad():
        dense = model(**inputs)
        with freqopt.optimize(model, plan, route="eager"):
            traced = torch.jit.trace(model, tuple(inputs.values()), check_trace=False)
            assert torch.allclose(traced(*inputs.values()), dense, atol=1e-5)
            assert not torch.allclose(model(**inputs), dense, atol=1e-3)
    assert caplog.text.count("called inside torch.jit.trace") == 1


def test_a_copy_says_once_what_it_is(plan: Plan, caplog: pytest.LogCaptureFixture) -> None:
    model = models.make()
    with torch.no_grad(), freqopt.optimize(model, plan, route="eager"):
        other = copy.deepcopy(model)
        other(**models.inputs())
        other(**models.inputs())
    assert caplog.text.count("is a copy of a model that freqopt optimized") == 1
    assert "planned sites split" not in caplog.text
