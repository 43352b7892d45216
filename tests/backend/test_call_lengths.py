"""Grids and lengths that a plan was not verified at are told, or refused, at whichever call."""

from __future__ import annotations

from typing import Any

import pieces_models as models
import pytest
import torch
from plans import plan_of
from torch import Tensor

import freqopt
from freqopt.errors import PlanError

ROUTES = ["eager", "regional", "compile"]


def on_grid(t: int, h: int, w: int) -> dict[str, Tensor]:
    torch.manual_seed(t * h * w)
    return {**models.inputs(), "video": torch.randn(1, 4, t, 2 * h, 2 * w)}


def optimized(route: Any) -> tuple[Any, Any]:
    torch._dynamo.reset()
    model = models.make(2)
    plan = plan_of(model, models.inputs(), 1.0)
    return model, freqopt.optimize(
        model, plan, route=route, **({} if route == "eager" else {"inner": "eager"})
    )


@pytest.mark.parametrize("first", [True, False], ids=["after the usual", "alone"])
@pytest.mark.parametrize("route", ROUTES)
def test_what_is_more_than_eight_times_off_is_refused(route: Any, first: bool) -> None:
    model, handle = optimized(route)
    with handle, torch.no_grad():
        if first:
            model(**models.inputs())
        for _ in range(2):
            with pytest.raises(PlanError, match="more than a factor of 8"):
                model(**on_grid(27, 6, 10))
        model(**models.inputs())


@pytest.mark.parametrize("route", ROUTES)
def test_each_new_length_is_told_once(route: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, handle = optimized(route)
    with handle, torch.no_grad():
        for t in (3, 5, 7, 5, 7, 3, 5):
            model(**on_grid(t, 6, 10))
    told = [line for line in caplog.messages if "the plan was verified at 3x6x10" in line]
    assert ["used at 300" in line for line in told] == [True, False]
    assert "used at 420 tokens" in told[1]


@pytest.mark.parametrize("route", ROUTES)
def test_each_new_grid_is_told_once(route: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Of as many tokens, so that no length tells it."""
    model, handle = optimized(route)
    with handle, torch.no_grad():
        for grid in ((3, 6, 10), (3, 10, 6), (5, 6, 6), (3, 10, 6), (5, 6, 6), (3, 6, 10)):
            model(**on_grid(*grid))
    told = [line for line in caplog.messages if "lie on a grid of" in line]
    assert [line.partition("grid of ")[2][:6] for line in told] == ["3x10x6", "5x6x6."]


@pytest.mark.parametrize("dynamic", [False, True, None])
def test_budgets_that_modules_bring_along_are_held_to_lengths_too(
    dynamic: bool | None, caplog: pytest.LogCaptureFixture
) -> None:
    torch._dynamo.reset()
    model = models.make(2)
    freqopt.attach(model, plan_of(model, models.inputs(), 1.0))
    compiled = torch.compile(model, backend="freqopt", options={"inner": "eager"}, dynamic=dynamic)
    with torch.no_grad():
        for t in (3, 5, 7, 5):
            compiled(**on_grid(t, 6, 10))
        with pytest.raises(PlanError, match="more than a factor of 8"):
            compiled(**on_grid(27, 6, 10))
    told = [line for line in caplog.messages if "the plan was verified at 3x6x10" in line]
    assert len(told) == 2 and "used at 300" in told[0] and "used at 420" in told[1]
