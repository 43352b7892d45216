"""Video classes as they are run: by blocks, with weights cast layer by layer, with a step cache."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_cases import cases_of, load_all
from model_checks import tensors
from plans import plan_of
from torch import Tensor, nn

import freqopt
from freqopt.backend import freqopt_backend

LOUD = {"min_tokens": 0, "inner": "eager"}
BY_BLOCKS = sorted(name for name in cases_of("video") if load_all()[name].dense)


def made(name: str) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """A case's model, its inputs, and the grid that it has to be given, if it has."""
    cases = load_all()
    torch.manual_seed(0)
    torch._dynamo.reset()
    freqopt.reset_counters()
    grid, batch = cases[name].variant(list(cases).index(name))
    model, inputs = cases[name].make(grid, batch)
    return model, inputs, {"given": grid} if cases[name].source == "given" else {}


def worst(first: list[Tensor], second: list[Tensor]) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", BY_BLOCKS)
def test_every_planned_site_is_split_by_blocks(name: str) -> None:
    pytest.importorskip("diffusers")
    model, inputs, given = made(name)
    plan = plan_of(model, inputs, 0.0, **given)
    assert len(plan.sites) >= load_all()[name].dense
    blocks = [m for each in model.modules() if isinstance(each, nn.ModuleList) for m in each]
    with torch.no_grad():
        dense = tensors(model(**inputs))
        with freqopt.attach(model, plan):
            for block in blocks:
                block.compile(
                    backend=freqopt_backend, options=LOUD, fullgraph=load_all()[name].fullgraph
                )
            out = tensors(model(**inputs))
    assert freqopt.counters().split == len(plan.sites)
    assert worst(out, dense) < 1e-5


def cast(model: Any) -> None:
    model.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)


def cached(model: Any) -> None:
    diffusers = pytest.importorskip("diffusers")
    model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.0))


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("wan", "plan"),
        ("wan", "attached"),
        pytest.param("cogvideox", "attached", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("change", [cast, cached])
def test_hooks_of_diffusers_change_nothing(
    name: str, change: Callable[[Any], None], way: str
) -> None:
    model, inputs, given = made(name)
    model.half().float()  # what casting stores
    plan = plan_of(model, inputs, 5.0, **given)
    as_it_is = copy.deepcopy(model)
    change(model)
    with torch.no_grad(), model.cache_context("one"):
        whole = torch.compile(as_it_is, backend=freqopt_backend, options={**LOUD, "plan": plan})
        dense, expected = tensors(as_it_is(**inputs)), tensors(whole(**inputs))
        assert worst(expected, dense) > 1e-4
        torch._dynamo.reset()
        freqopt.reset_counters()
        options = {**LOUD, "plan": plan} if way == "plan" else LOUD
        if way == "attached":
            freqopt.attach(model, plan)
        out = tensors(torch.compile(model, backend=freqopt_backend, options=options)(**inputs))
    assert freqopt.counters().split == len(plan.sites)
    assert worst(out, expected) < 1e-5
