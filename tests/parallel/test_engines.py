"""Ulysses as engines write it: collectives that fill tensors, lists, heads in front."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engines import GRID, WAYS, engine
from parallel_models import LOUD, compiled, relative, turned, uneven_plan
from ranks import Ranks
from torch import Tensor

import freqopt
from freqopt.plan.plan import Plan

SPLIT_SHOWS, ROUNDING = 1e-3, 1e-5


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with Ranks(2) as ranks:
        yield ranks


@functools.cache
def of_one(packed: bool) -> tuple[Plan, Tensor, Tensor, Tensor]:
    """A plan, and outputs of one rank: dense, by the plan, and by it with heads in reverse."""
    model, call = engine(packed=packed)
    plan, dense = uneven_plan(model, call), model(**call)[0]
    alone = compiled(model, call, plan=plan)
    return plan, dense, alone, compiled(model, call, plan=turned(plan))


def of_two(name: str, packed: bool) -> dict[str, Any]:
    with torch.no_grad():
        plan, dense, alone, wrong = of_one(packed)
        model, call = engine(packed=packed)
        model.run(WAYS[name])
        shared = model(**call)[0]
        told = freqopt.inspect(model, **call, plan=plan)
        whole = compiled(model, call, plan=plan, strict=True)
        exact = compiled(model, call, threshold=0.0, strict=True)
        torch._dynamo.reset()
        with freqopt.attach(model, plan):
            for block in model.blocks:
                block.compile(backend="freqopt", options={**LOUD, "strict": True})
            by_blocks = model(**call)[0]
    return {
        "dense": relative(shared, dense),
        "split": relative(alone, dense),
        "mistake": relative(wrong, alone),
        "whole": relative(whole, alone),
        "by blocks": relative(by_blocks, alone),
        "exact": relative(exact, dense),
        "told": [(s.decision, s.grid, s.heads, s.ranks, s.reason) for s in told.sites],
        "graphs": told.graphs,
    }


OFTEN = ("filled", "lists", "gathered")
CASES = [
    pytest.param(name, packed, marks=() if name in OFTEN and not packed else pytest.mark.slow)
    for name, packed in [*((name, False) for name in WAYS), ("filled", True)]
]
"""Ways of `engines`, and whether queries, keys and values go through one exchange; some of them in
the default run."""

NO_LISTS = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12)
"""Whether gloo has no `all_to_all`."""


@pytest.mark.parametrize(("name", "packed"), CASES)
def test_rows_of_a_plan_land_on_their_heads(two: Ranks, name: str, packed: bool) -> None:
    if name == "lists" and NO_LISTS:
        pytest.skip("gloo of this PyTorch has no all_to_all, which lists of tensors go through")
    for found in two.call(of_two, name, packed):
        assert found["dense"] < ROUNDING
        assert found["split"] > SPLIT_SHOWS and found["mistake"] > SPLIT_SHOWS
        assert found["exact"] < ROUNDING
        assert found["whole"] < ROUNDING and found["by blocks"] < ROUNDING
        assert [each[:4] for each in found["told"]] == [("split", GRID, 2, 2)] * 2
        assert found["graphs"] == 1
