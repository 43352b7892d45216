"""Another backend around a model that has a plan: dense, which is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pieces_models as models
import pytest
import torch
from plans import plan_of
from torch import Tensor, nn

import freqopt
from freqopt.backend import freqopt_backend
from freqopt.errors import SiteError
from freqopt.plan.plan import Plan

WORDS = "another backend than freqopt's compiled the model as a whole"


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_of(models.make(), models.inputs(), 5.0)


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


@pytest.mark.parametrize("route", ["eager", "regional", "compile"])
@pytest.mark.parametrize("place", [in_place, around])
def test_it_is_dense_and_told_once(
    route: Any, place: Any, plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    model = models.make()
    with torch.no_grad():
        dense = model(**models.inputs(batch=2))
        with freqopt.optimize(model, plan, route=route, inner="eager"):
            compiled = place(model, "aot_eager")
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
