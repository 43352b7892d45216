"""A grid that only data holds: calibration reads it off the samples, the plan carries it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
from model_cases_packed import flux

import freqopt
from freqopt.calibration.samples import collect_samples

GRID = (1, 14, 18)
QUICK: dict[str, Any] = {"timestep_buckets": 1, "rounds": 0, "order": "grid", "progress": False}


def flux_samples(grids: list[tuple[int, int, int]]) -> tuple[torch.nn.Module, list[dict[str, Any]]]:
    torch.manual_seed(0)
    made = [flux(grid, 1) for grid in grids]
    return made[0][0].eval(), [inputs for _, inputs in made]


def test_a_model_of_packed_tokens_needs_no_grid() -> None:
    model, samples = flux_samples([GRID] * 4)
    plan = freqopt.calibrate(model, samples, target_error=0.2, **QUICK)
    assert plan.grids == [GRID]
    names = [name for name, site in plan.sites.items() if site.decision == "split"]
    assert len(plan.sites) == 2 and all(plan.sites[name].budgets for name in names)

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


def test_positions_of_the_video_are_found_between_those_of_other_tokens() -> None:
    from model_cases import load_all, positions

    from freqopt.positions import grid_of_positions, grids_of_positions

    for name in ("cosmos3", "minimax_h3"):
        for grid in ((3, 6, 10), (1, 7, 9)):
            _, inputs = load_all()[name].make(grid, 1)
            assert grids_of_positions((), inputs)["position_ids"] == grid
    table = positions((3, 6, 10)).long()
    text = torch.arange(7)[:, None].expand(-1, 3)
    whole = torch.cat([text, table, text])
    for found in (
        whole,
        whole.T,
        whole[None].expand(2, -1, -1),
        whole.T[:, None].expand(-1, 2, -1),
    ):
        assert grid_of_positions(found) == (3, 6, 10)
    for other in (text, torch.cat([table, table]), table.flip(0), whole[:, :1], torch.zeros(3, 9)):
        assert grid_of_positions(other) is None


def test_a_model_that_places_tokens_by_index_needs_no_grid() -> None:
    from model_cases import load_all

    case = load_all()["cosmos3"]
    torch.manual_seed(0)
    model, inputs = case.make((3, 6, 10), 1)
    table = str(freqopt.inspect(model, **inputs))
    assert "position_ids holds the positions of a 3x6x10 grid" in table
    torch._dynamo.reset()
    samples = [{**inputs, "vision_tokens": [torch.randn(1, 2, 3, 6, 10)]} for _ in range(4)]
    plan = freqopt.calibrate(model, samples, target_error=0.2, **QUICK)
    assert plan.grids == [(3, 6, 10)]
    split = [name for name, site in plan.sites.items() if site.decision == "split"]
    torch._dynamo.reset()
    freqopt.reset_counters()
    options = {"plan": plan, "min_tokens": 1, "inner": "eager", "strict": True}
    with torch.no_grad():
        torch.compile(model, backend="freqopt", options=options)(**inputs)
    assert freqopt.counters().split == len(split) > 0
