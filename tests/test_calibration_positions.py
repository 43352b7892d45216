"""A grid that only data holds: calibration reads it off the samples, the plan carries it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
from model_cases_packed import flux

import freqopt
from freqopt.calibration_samples import collect_samples

GRID = (1, 14, 18)


def flux_samples(grids: list[tuple[int, int, int]]) -> tuple[torch.nn.Module, list[dict[str, Any]]]:
    torch.manual_seed(0)
    made = [flux(grid, 1) for grid in grids]
    return made[0][0].eval(), [inputs for _, inputs in made]


def test_a_model_of_packed_tokens_needs_no_grid() -> None:
    model, samples = flux_samples([GRID] * 4)
    plan = freqopt.calibrate(model, samples, target_error=0.2, timestep_buckets=1, progress=False)
    assert plan.grids == [GRID]
    assert all(site.decision in ("split", "dense") for site in plan.sites.values())
    names = [name for name, site in plan.sites.items() if site.budgets]
    assert len(plan.sites) == 2

    torch._dynamo.reset()
    freqopt.reset_counters()
    options = {"plan": plan, "min_tokens": 1, "inner": "eager", "strict": True}
    compiled = torch.compile(model, backend="freqopt", options=options)
    with torch.no_grad():
        expected, got = model(**samples[0])[0], compiled(**samples[0])[0]
    counted = freqopt.counters()
    assert counted.split == len(names) > 0
    assert float((got - expected).norm() / expected.norm()) < 0.4


def test_samples_of_several_grids_name_none() -> None:
    model, samples = flux_samples([GRID, (1, 18, 14), GRID, GRID])
    assert collect_samples(model, samples).grids == []
    assert collect_samples(model, samples[2:]).grids == [GRID]
