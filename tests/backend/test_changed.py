"""The file of a plan that is written anew while what was compiled with it lives."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pieces_models as models
import pytest
import torch
from plans import plan_of
from torch import Tensor, nn

import freqopt
from freqopt.plan.plan import Plan

WORDS = "holds another plan than when it was compiled with"


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_of(models.make(), models.inputs(), 1.0)


def run(model: nn.Module, plan: Any) -> Tensor:
    compiled = torch.compile(model, backend="freqopt", options={"plan": plan, "inner": "eager"})
    with torch.no_grad():
        out: Tensor = compiled(**models.inputs())
    return out


def test_a_plan_that_was_written_anew_is_told_once(
    plan: Plan, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch._dynamo.reset()
    model, path = models.make(), tmp_path / "plan.json"
    other = plan_of(model, models.inputs(), 0.0)
    plan.save(path)
    first = run(model, str(path))
    plan.save(path)  # the same one
    os.utime(path, (1, 1))
    assert torch.equal(run(model, str(path)), first)
    path.rename(tmp_path / "away")  # the graphs have it
    assert torch.equal(run(model, str(path)), first)
    path.write_text('{"format": ')  # as somebody is about to write it
    assert torch.equal(run(model, str(path)), first) and WORDS not in caplog.text
    other.save(path)
    for _ in range(2):
        assert torch.equal(run(model, str(path)), first)
        assert caplog.text.count(WORDS) == 1 and "torch._dynamo.reset()" in caplog.text
    torch._dynamo.reset()
    second = run(model, str(path))
    assert not torch.equal(second, first) and torch.equal(run(model, str(path)), second)
    assert torch.equal(run(model, freqopt.Plan.load(tmp_path / "away")), first)
    assert caplog.text.count(WORDS) == 1
