"""Ulysses on two processes: every rank has some heads of all tokens, and its rows of a plan."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from parallel_models import (
    GRID,
    LOUD,
    compiled,
    flux,
    relative,
    share_out,
    turned,
    uneven_plan,
    wan,
)
from ranks import Ranks

import freqopt

SPLIT_SHOWS, ROUNDING = 1e-3, 1e-5


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with Ranks(2) as ranks:
        yield ranks


def wan_by_plan() -> dict[str, Any]:
    with torch.no_grad():
        model, call = wan()
        dense = model(**call)[0]
        plan = uneven_plan(model, call)
        alone = compiled(model, call, plan=plan)
        wrong = compiled(model, call, plan=turned(plan))
        share_out(model, call, ulysses_degree=2)
        told = freqopt.inspect(model, **call, plan=plan)
        whole = compiled(model, call, plan=plan, strict=True)
        exact = compiled(model, call, threshold=0.0, grid=GRID, strict=True)
        torch._dynamo.reset()
        with freqopt.attach(model, plan):
            model.compile_repeated_blocks(
                backend="freqopt", options={**LOUD, "strict": True}, fullgraph=True
            )
            regional = model(**call)[0]
            counted = str(freqopt.counters())
    return {
        "split": relative(alone, dense),
        "mistake": relative(wrong, alone),
        "whole": relative(whole, alone),
        "regional": relative(regional, alone),
        "exact": relative(exact, dense),
        "told": told,
        "counted": counted,
    }


def test_rows_of_a_plan_land_on_their_heads(two: Ranks) -> None:
    for found in two.call(wan_by_plan):
        assert found["split"] > SPLIT_SHOWS and found["mistake"] > SPLIT_SHOWS
        assert found["whole"] < ROUNDING and found["regional"] < ROUNDING
        assert found["exact"] < ROUNDING
        told = found["told"]
        ours = [site for site in told.sites if site.name.endswith("attn1")]
        assert [(s.decision, s.heads, s.ranks, s.grid) for s in ours] == [("split", 2, 2, GRID)] * 2
        assert told.graphs == 1
        assert told.imbalance is not None and "2 of 2 ranks x 16" in str(told)


def flux_by_plan() -> dict[str, Any]:
    with torch.no_grad():
        model, call = flux()
        dense = model(**call)[0]
        plan = uneven_plan(model, call, likely=((1, 16, 20),), believed=True)
        alone = compiled(model, call, plan=plan)
        share_out(model, call, ulysses_degree=2)
        whole = compiled(model, call, plan=plan, strict=True)
        exact = compiled(model, call, threshold=0.0, grid=(1, 16, 20), strict=True)
    return {
        "split": relative(alone, dense),
        "whole": relative(whole, alone),
        "exact": relative(exact, dense),
        "layouts": [plan.known(name) for name in plan.sites],
    }


def test_text_and_image_that_were_sharded_apart(two: Ranks) -> None:
    """The sequence is [txt0, img0, txt1, img1]."""
    for found in two.call(flux_by_plan):
        assert found["split"] > SPLIT_SHOWS
        assert found["whole"] < ROUNDING and found["exact"] < ROUNDING
        assert [known[0].around(328) for known in found["layouts"]] == [(8, 0)] * 2
