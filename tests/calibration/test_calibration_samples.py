"""What calibration accepts as samples, and what it says about the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from freqopt.calibration.samples import MAX_RECORDED, collect_samples, recording
from freqopt.errors import CalibrationError


class Model(nn.Module):
    def forward(self, video: Tensor, timestep: Any = None, *, extra: Any = None) -> Tensor:
        return video * 2


def steps(count: int) -> list[dict[str, Any]]:
    return [{"video": torch.ones(2) * i, "timestep": torch.tensor([i])} for i in range(count)]


def test_kwargs_and_pairs() -> None:
    pair = ((torch.ones(2), 500), {"extra": "text"})
    found = collect_samples(Model(), iter([*steps(3), pair]))
    assert len(found.fit) == 2 and len(found.held_out) == 2
    timed = {s.timestep for s in found.fit + found.held_out}
    assert timed == {0.0, 1.0, 2.0, 500.0} and found.timestep_name == "timestep"


def test_held_out_samples_are_not_fitted_and_spread_over_timesteps() -> None:
    found = collect_samples(Model(), reversed(steps(16)))
    held = [s.timestep for s in found.held_out]
    assert held == [1.0, 2.0, 5.0, 6.0, 9.0, 10.0, 13.0, 14.0]
    assert not set(held) & {s.timestep for s in found.fit}
    assert found.timestep_edges == [3.5, 7.5, 11.5]
    assert [found.bucket(s) for s in found.held_out] == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("count", [2, 3])
def test_few_samples_still_hold_one_out(count: int) -> None:
    found = collect_samples(Model(), steps(count))
    assert len(found.held_out) == 1 and len(found.fit) == count - 1
    assert found.held_out[0].timestep not in {s.timestep for s in found.fit}


def test_one_sample_serves_both_and_the_plan_says_so() -> None:
    found = collect_samples(Model(), steps(1))
    assert found.fit == found.held_out and "only one sample" in found.notes[0]


def test_without_timesteps_there_is_one_bucket() -> None:
    found = collect_samples(Model(), [{"video": torch.ones(1)}] * 4)
    assert found.timestep_edges == [] and found.timestep_name is None
    assert found.bucket(found.fit[0]) == 0


@pytest.mark.parametrize("count", [1, 5, MAX_RECORDED, 50, 200])
def test_callable_records_the_models_calls(count: int) -> None:
    model, video = Model(), torch.zeros(2)

    def pipeline() -> None:
        for i in range(count):
            video.fill_(i)  # in place: a recorded sample must not change with it
            model(video, timestep=i)

    found = collect_samples(model, pipeline)
    recorded = {id(s): s for s in found.fit + found.held_out}.values()
    assert len(recorded) == min(count, MAX_RECORDED)
    assert all(float(s.args[0][0]) == s.timestep for s in recorded)
    times = sorted(s.timestep for s in recorded if s.timestep is not None)
    assert times[0] == 0 and times[-1] >= 0.85 * (count - 1)
    assert not model._forward_pre_hooks


def test_hook_is_removed_when_the_pipeline_fails() -> None:
    model = Model()
    with pytest.raises(ZeroDivisionError):
        collect_samples(model, lambda: 1 / 0)
    assert not model._forward_pre_hooks


def test_recording_around_somebody_elses_code() -> None:
    model = torch.compile(Model(), backend="eager")
    with recording(model, most=4) as samples:
        for i in range(20):
            model(torch.full((2,), float(i)), timestep=torch.tensor(i))
    assert len(samples) == 4 and not model._forward_pre_hooks
    found = collect_samples(model, samples)
    assert [s.timestep for s in found.fit + found.held_out] == [0.0, 16.0, 4.0, 12.0]


def test_nan_names_the_sample_and_the_argument() -> None:
    bad = steps(3)
    bad[1]["video"][0] = torch.nan
    with pytest.raises(CalibrationError, match="sample 1: 'video' has 1 NaN or infinite values"):
        collect_samples(Model(), bad)
    bad[1] = {"video": torch.ones(1), "extra": {"deep": [torch.tensor([1.0, -torch.inf])]}}
    with pytest.raises(CalibrationError, match="sample 1: 'extra'"):
        collect_samples(Model(), bad)
    with pytest.raises(CalibrationError, match="sample 0: 'video'"):
        collect_samples(Model(), [((torch.tensor([torch.nan]),), {})])


@pytest.mark.parametrize("samples", [[3], ["video"], [(1, 2)], [torch.ones(2)], {"video": 1}])
def test_other_forms(samples: Any) -> None:
    with pytest.raises(CalibrationError, match="supported are a dict of keyword arguments"):
        collect_samples(Model(), samples)


def test_no_samples() -> None:
    with pytest.raises(CalibrationError, match="pass at least two"):
        collect_samples(Model(), [])
    with pytest.raises(CalibrationError, match="without calling the model"):
        collect_samples(Model(), lambda: None)
