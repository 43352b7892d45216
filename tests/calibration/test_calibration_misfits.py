"""Inputs that a model cannot run: which of them, and what about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_models import TinyVideo, make_model, make_sample
from torch import Tensor

import freqopt
from freqopt.errors import CalibrationError, InputError, OptionError

QUICK: dict[str, Any] = {"progress": False, "rounds": 0, "target_density": 0.5, "order": "grid"}
SAMPLES = [make_sample(i) for i in range(4)]
Change = Callable[[int, dict[str, Tensor]], dict[str, Tensor]]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def half(number: int, sample: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.half() for name, value in sample.items()}


def fewer_channels(number: int, sample: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**sample, "video": sample["video"][:, :2]} if number == 2 else sample


def flat(number: int, sample: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**sample, "timestep": sample["timestep"][0]} if number == 3 else sample


def empty(number: int, sample: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value[:0] for name, value in sample.items()} if number == 1 else sample


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (half, r"sample 0 cannot be run .*'video' is float16 and the model float32"),
        (fewer_channels, r"sample 2 cannot be run .*'video' is \(1, 2, .*and \(1, 3, .* sample 0"),
        (flat, r"sample 3 cannot be run .*'timestep' is \(\) and \(1,\) in sample"),
        (empty, r"sample 1: 'video' is \(0, 3, .*an empty batch"),
    ],
)
def test_the_sample_and_the_argument_are_named(change: Change, said: str) -> None:
    given = [change(i, sample) for i, sample in enumerate(SAMPLES)]
    with pytest.raises(CalibrationError, match=said):
        freqopt.calibrate(make_model(), given, **QUICK)


def test_a_model_without_weights_is_named() -> None:
    with pytest.raises(CalibrationError, match=r"patch\.weight is on meta.*load its weights"):
        freqopt.calibrate(make_model().to("meta"), SAMPLES, **QUICK)


def test_an_error_of_the_model_that_inputs_do_not_explain_stands() -> None:
    class Failing(TinyVideo):
        def forward(self, video: Tensor, timestep: Tensor) -> dict[str, Tensor]:
            raise ValueError("no such thing")

    with pytest.raises(ValueError, match="no such thing") as caught:
        freqopt.calibrate(Failing(), SAMPLES, **QUICK)
    assert not isinstance(caught.value, freqopt.FreqoptError)


def test_a_timestep_is_a_time() -> None:
    with pytest.raises(CalibrationError, match=r"'video' was given as the timestep.*\(B, N\)"):
        freqopt.calibrate(make_model(), SAMPLES, timestep="video", **QUICK)


def test_inspecting_what_the_model_does_not_take() -> None:
    model = make_model()
    for inputs in ({}, {"foo": 1}):
        with pytest.raises(InputError, match="do not fit the model: .*TinyVideo takes video"):
            freqopt.inspect(model, **inputs)
    with pytest.raises(InputError, match="'video' is float16 and the model float32"):
        freqopt.inspect(model, **half(0, SAMPLES[0]))


def test_a_grid_that_the_graph_contradicts_is_said(caplog: pytest.LogCaptureFixture) -> None:
    told = "grid=(8, 8, 8) was given and the graph shows 4x16x8"
    for grid, said in (((8, 8, 8), True), ((4, 16, 8), False)):
        plan = freqopt.calibrate(make_model(), SAMPLES[:2], grid=grid, passes=1, **QUICK)
        assert any(told in note for note in plan.evidence.notes) == said
        caplog.clear()
        freqopt.inspect(make_model(), **SAMPLES[0], grid=grid)
        assert any(told in record.message for record in caplog.records) == said


def test_a_sparse_sample_is_not_kept(tmp_path: Path) -> None:
    sparse = {"pairs": torch.ones(2, 2).to_sparse()}
    with pytest.raises(InputError, match=r"0/pairs is a tensor of layout sparse_coo.*to_dense"):
        freqopt.save_samples(tmp_path / "samples.safetensors", [sparse])


@pytest.mark.parametrize("path", [3, "", None])
def test_what_is_no_path_is_said(path: Any) -> None:
    plan = freqopt.calibrate(make_model(), SAMPLES[:2], passes=1, **QUICK)
    for call in (
        plan.save,
        plan.save_pretrained,
        freqopt.Plan.load,
        freqopt.Plan.from_pretrained,
        lambda path: freqopt.save_samples(path, SAMPLES),
        lambda path: freqopt.report(plan, path),
    ):
        with pytest.raises(OptionError, match="the path of a file or folder is needed"):
            call(path)
