"""Modules that are replaced after a model was optimized: told, and nothing else is lost."""

from __future__ import annotations

import gc
import logging
from typing import Any

import pieces_models as models
import pytest
import torch
from plans import plan_of
from served_models import called, optimized
from torch import nn

import freqopt
from freqopt.backend import freqopt_backend
from freqopt.plan.plan import Plan

LINE = "are not in the model any more"


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_of(models.make(), models.inputs(), 1.0)


def split_in(model: nn.Module) -> list[str]:
    """Sites that a call of a model splits, with a budget."""
    freqopt.reset_counters()
    called(model)
    sites = freqopt.counters().sites
    return sorted(site.site for site in sites if site.split and site.site.startswith("blocks."))


ALL = [f"blocks.{i}.attn" for i in range(3)]


def test_layers_that_stay_are_split_and_what_comes_back_too(
    plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    model: Any = models.make()
    dense = called(model)
    handle = optimized(model, plan, "regional")
    out = called(model)
    for place in ("attn of 0", "block 1"):
        holder, name = (model.blocks[0], "attn") if place == "attn of 0" else (model.blocks, "1")
        old, site = holder._modules[name], f"blocks.{0 if name == 'attn' else 1}.attn"
        holder._modules[name] = models.make().get_submodule(
            "blocks.0.attn" if name == "attn" else "blocks.1"
        )
        caplog.clear()
        with caplog.at_level(logging.WARNING, "freqopt"):
            partly = called(model)
            assert torch.equal(called(model), partly)
        assert [LINE in text and site in text for text in caplog.messages] == [True]
        left = [name for name in ALL if name != site]
        assert [name for name in split_in(model) if name in ALL] == left
        assert not torch.equal(partly, out) and (partly - dense).norm() > 1e-3 * dense.norm()
        holder._modules[name] = old
        assert torch.equal(called(model), out)
    handle.disable()


def test_where_all_must_be_split_each_such_call_is_an_error(plan: Plan) -> None:
    model: Any = models.make()
    handle = optimized(model, plan, "regional", strict=True)
    out = called(model)
    old, model.blocks[2].attn = model.blocks[2].attn, models.make().blocks[2].attn
    for _ in range(2):
        with pytest.raises(freqopt.SiteError, match=LINE):
            called(model)
    model.blocks[2].attn = old
    assert torch.equal(called(model), out)
    handle.disable()


def test_a_plan_is_put_on_what_has_come_by_a_handle(plan: Plan) -> None:
    model: Any = models.make()
    handle = optimized(model, plan, "regional", strict=True)
    out = called(model)
    model.blocks[0].attn = models.make().blocks[0].attn
    model.blocks[1] = models.make().blocks[1]
    handle.disable()
    gc.collect()
    with handle:
        assert torch.allclose(called(model), out, atol=1e-6)
        assert split_in(model) == ALL


def test_a_module_that_is_wrapped_is_in_the_model_still(
    plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    model: Any = models.make()
    handle = optimized(model, plan, "regional", strict=True)
    called(model)
    model.blocks[1] = models.Wrapped(model.blocks[1])
    with caplog.at_level(logging.WARNING, "freqopt"):
        called(model)
    assert LINE not in caplog.text
    handle.disable()


@pytest.mark.parametrize("change", [None, models.breaking_linears])
def test_a_plan_among_the_options_goes_by_names(change: Any, plan: Plan) -> None:
    torch._dynamo.reset()
    model: Any = models.make()
    if change is not None:
        change(model)
    options = {"plan": plan, "inner": "eager", "strict": True}
    model.compile(backend=freqopt_backend, options=options)
    out = called(model)
    model.blocks[0].attn = models.make().blocks[0].attn
    if change is not None:
        change(model.blocks[0].attn)
    assert torch.allclose(called(model), out, atol=1e-6)
    assert split_in(model) == ALL
