"""Copies of optimized models: dense, which is told, and free to be optimized themselves."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pieces_models as models
import pytest
import torch
from model_cases import load_all
from pipelines import far
from plans import plan_of
from torch import Tensor, nn

import freqopt
from freqopt.errors import SiteError
from freqopt.plan.plan import Plan

ROUTES = ("eager", "regional", "compile")


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_of(models.make(), models.inputs(), 1.0)


def ran(model: nn.Module) -> Tensor:
    torch._dynamo.reset()
    with torch.no_grad():
        out: Tensor = model(**models.inputs())
    return out


def copies(model: nn.Module) -> list[Any]:
    return [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]


def optimized(model: nn.Module, plan: Plan, route: Any, *, strict: bool = False) -> freqopt.Handle:
    return freqopt.optimize(model, plan, route=route, inner="eager", strict=strict)


def traces(model: nn.Module) -> list[object]:
    """What freqopt has left on the modules of a model."""
    found: list[object] = []
    for module in model.modules():
        found += [name for name in vars(module) if "freqopt" in name]
        found += [*module._forward_pre_hooks, *module._forward_hooks]
    return found


@pytest.mark.parametrize("route", ROUTES)
def test_they_are_dense_and_say_so_once(
    route: str, plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    model = models.make()
    dense = ran(model)
    with optimized(model, plan, route):
        split = ran(model)
        assert far(split, dense) > 1e-3
        for twin in copies(model):
            caplog.clear()
            for _ in range(2):
                assert far(ran(twin), dense) < 1e-6
            assert caplog.text.count("is a copy of a model that freqopt optimized") == 1
        assert far(ran(model), split) < 1e-5
    assert not traces(model)


@pytest.mark.parametrize("route", ROUTES)
def test_they_raise_where_all_must_be_split(route: str, plan: Plan) -> None:
    model = models.make()
    with optimized(model, plan, route, strict=True):
        for twin in copies(model):
            with pytest.raises(SiteError, match="call freqopt.optimize on the copy"):
                ran(twin)


@pytest.mark.parametrize("route", ROUTES)
def test_they_are_optimized_as_any_other(route: str, plan: Plan) -> None:
    model = models.make()
    dense = ran(model)
    with optimized(model, plan, route):
        split, twins = ran(model), copies(model)
    for twin in twins:
        for other in ROUTES:
            with optimized(twin, plan, other, strict=True):
                assert far(ran(twin), split) < 1e-5
        assert not traces(twin)
        assert far(ran(twin), dense) < 1e-6


def test_processors_of_diffusers_have_their_backend(caplog: pytest.LogCaptureFixture) -> None:
    """The dispatcher of a copy would ask for a plan that is not there."""
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model, inputs = load_all()["wan"].make((3, 6, 10), 1)
    inputs["return_dict"] = False
    plan = plan_of(model, inputs, 1.0)
    with torch.no_grad():
        (dense,) = model(**inputs)
        with optimized(model, plan, "eager", strict=True):
            (split,) = model(**inputs)
            twin = copy.deepcopy(model)
        with pytest.raises(SiteError, match="call freqopt.optimize on the copy"):
            twin(**inputs)
        with optimized(twin, plan, "eager", strict=True):
            assert far(twin(**inputs)[0], split) < 1e-5
        assert torch.equal(twin(**inputs)[0], dense) and torch.equal(model(**inputs)[0], dense)
    assert not traces(twin)
