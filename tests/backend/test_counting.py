"""Run-time counters: every call of every site, split or dense, and nothing else."""

from __future__ import annotations

from typing import Any

import pieces_models as models
import pytest
import torch
from plans import plan_of

import freqopt
from freqopt.backend import freqopt_backend
from freqopt.models_zoo.video_dit import VideoDiT, VideoDiTConfig

TINY = VideoDiTConfig(width=32, layers=3, mlp_width=64, rope_axes=(4, 6, 6))


def test_calls_are_counted_by_site_and_kind() -> None:
    torch._dynamo.reset()
    freqopt.reset_counters()
    model = VideoDiT(TINY).eval()
    video, timestep = torch.randn(1, 3, 3, 24, 40), torch.rand(1)
    options = {"threshold": 0.5, "min_tokens": 100, "inner": "eager"}
    compiled = torch.compile(model, backend=freqopt_backend, options=options)
    with torch.no_grad():
        for _ in range(2):
            compiled(video, timestep)
    found = freqopt.counters()
    assert (found.split, found.dense) == (6, 0)
    assert [s.site for s in found.sites] == [f"blocks.{i}.attn" for i in range(3)]
    assert "6 attention calls split" in str(found)

    freqopt.reset_counters()
    torch._dynamo.reset()
    options["min_tokens"] = 10_000
    dense = torch.compile(model, backend=freqopt_backend, options=options)
    with torch.no_grad():
        dense(video, timestep)
        model(video, timestep)
    found = freqopt.counters()
    assert (found.split, found.dense) == (0, 3)
    assert "min_tokens" in found.sites[0].reason


@pytest.mark.parametrize("route", ["eager", "regional", "compile"])
def test_two_experts_of_one_class_are_told_apart(
    route: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "freqopt")
    torch._dynamo.reset()
    freqopt.reset_counters()
    names = ("transformer", "transformer_2")
    experts = {name: models.make() for name in names}
    plans = {
        name: plan_of(model, models.inputs(), 1.0).model_copy(update={"component": name})
        for name, model in experts.items()
    }
    with torch.no_grad(), freqopt.optimize(experts, plans, route=route, inner="eager"):
        for count, model in enumerate(experts.values(), 1):
            for _ in range(count):
                model(**models.inputs())
        found = {each.model: each.split for each in freqopt.counters().models if each.split}
    assert found == {"Video (transformer)": 3, "Video (transformer_2)": 6}
    for name in names:
        assert f"Video ({name}): 3 of 3 planned sites split" in caplog.text
