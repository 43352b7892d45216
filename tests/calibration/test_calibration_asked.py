"""What cannot be calibrated is said, before anything runs where that can be: what and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pieces_models as models
import pytest
import torch
from calibration_models import make_model, make_sample
from torch import Tensor, nn

import freqopt
from freqopt.calibration.asked import checked
from freqopt.calibration.search.signed import scheme_of
from freqopt.capture.signatures import forward_signature, named_arguments
from freqopt.errors import CalibrationError, InputError, OptionError, PlanError

QUICK: dict[str, Any] = {"rounds": 0, "progress": False, "order": "grid"}


def samples(count: int = 2) -> list[dict[str, Tensor]]:
    inputs = models.inputs()
    return [{name: value + 0.01 * i for name, value in inputs.items()} for i in range(count)]


NAN = float("nan")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_error": 0.03, "target_density": 0.5}, "target_error and target_density were bo"),
        ({"target_density": "0.5"}, "target_density '0.5' must be a number"),
        ({"target_density": True}, "must be a number"),
        ({"target_error": NAN}, "outside"),
        ({"target_psnr": float("inf")}, "outside 5 to 100"),
        ({"target_density": 0.5, "quantile": 0.5}, "of no other"),
        ({"passes": 1.5}, "passes 1.5 must be a whole number"),
        ({"rounds": 1.5}, "must be a whole number"),
        ({"timestep_buckets": True}, "must be a whole number"),
        ({"seed": 1.5}, "seed 1.5 must be a whole number"),
        ({"seed": 2**64}, "outside"),
        ({"grid": "3,6,10"}, "three positive extents"),
        ({"timestep": 3}, "name of an argument"),
        ({"output": 3}, "output is 3; the path of a file"),
        ({"output": ""}, "output is ''; the path of a file"),
        ({"checkpoint": 3}, "checkpoint is 3; the path"),
    ],
)
def test_an_option_is_refused_before_anything_runs(options: dict[str, Any], words: str) -> None:
    def run() -> None:
        raise AssertionError("the pipeline ran")

    with pytest.raises(OptionError, match=words):
        freqopt.calibrate(models.make(), run, **{**QUICK, **options})


def test_numbers_of_other_libraries_are_numbers() -> None:
    found = checked({"target_density": np.float32(0.5), "passes": np.int64(3), "seed": np.int8(1)})
    assert found["target_density"] == 0.5 and type(found["target_density"]) is float
    assert found["target_error"] is None
    assert [type(found[name]) for name in ("passes", "seed")] == [int, int]
    assert checked({})["target_error"] == 0.03


def test_a_checkpoint_does_not_take_the_plan_with_it(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    model = models.make()
    with pytest.raises(OptionError, match="a name of its own"):
        freqopt.calibrate(model, samples(), output=path, checkpoint=str(path), **QUICK)
    pair = {"a": model, "json": models.make()}
    with pytest.raises(OptionError, match="a name of its own"):
        freqopt.calibrate(pair, lambda: None, output=path, checkpoint=tmp_path / "plan", **QUICK)
    assert not path.exists()


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_the_fewest_passes_make_a_plan(passes: int) -> None:
    plan = freqopt.calibrate(models.make(), samples(), target_density=0.6, passes=passes, **QUICK)
    assert 0.0 < plan.measured_error < 1.0
    scheme = scheme_of([2, 2, 2], [1.0, 0.7, 0.3], 2, passes - 2.0, 2.0)
    assert scheme.references and sum(g.draws for groups in scheme.groups for g in groups) >= 1


class Wrapped(nn.Module):
    """A model whose outputs are changed."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.change = models.make(), change

    def forward(self, video: Tensor, text: Tensor) -> Any:
        return self.change(self.inner(video, text))


class Odd:
    def __init__(self, held: Tensor) -> None:
        self.held = held


@dataclasses.dataclass
class Found:
    sample: Tensor


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (Odd, "returns a Odd, of which"),
        (lambda out: None, "returns a NoneType"),
        (lambda out: (out.long(), None), "a tuple of a tensor of torch.int64, a NoneType"),
        (lambda out: {}, "a dict of nothing"),
    ],
)
def test_outputs_of_which_no_error_can_be_told(change: Any, words: str) -> None:
    with pytest.raises(CalibrationError, match=words):
        freqopt.calibrate(Wrapped(change), samples(), **QUICK)


def test_outputs_are_found_wherever_they_are() -> None:
    expected = freqopt.calibrate(models.make(), samples(), target_density=0.6, **QUICK)
    for change in (
        lambda out: torch.complex(out, torch.zeros_like(out)),
        lambda out: {"a": [Found(out)], "b": None},
    ):
        found = freqopt.calibrate(Wrapped(change), samples(), target_density=0.6, **QUICK)
        assert found.measured_error == pytest.approx(expected.measured_error, rel=1e-4)


class Counting(nn.Module):
    """Its outputs are others at every call: of a buffer, or of an attribute that graphs guard."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.inner, self.by = models.make(layers=1), by
        self.register_buffer("count", torch.zeros(()))
        self.number = 0

    def forward(self, video: Tensor, text: Tensor) -> Tensor:
        self.count += 1
        self.number += 1
        times = self.count if self.by == "buffer" else self.number
        return self.inner(video, text) * (1 + 0.1 * times)


@pytest.mark.parametrize("by", ["buffer", "attribute"])
def test_a_model_that_differs_from_call_to_call_is_told(by: str) -> None:
    with pytest.raises(CalibrationError, match="two dense runs of the model on one sample differ"):
        freqopt.calibrate(Counting(by), samples(), target_density=0.6, **QUICK)


def generator(model: nn.Module) -> Iterator[Any]:
    yield model(**samples()[0])


def test_what_are_no_samples_is_said() -> None:
    model = models.make()
    for given, words in (
        ("calls.safetensors", r"load_samples\('calls.safetensors'\)"),
        (Path("calls.safetensors"), "load_samples"),
        (None, "samples is a NoneType"),
        (torch.zeros(2), "samples is a Tensor"),
        ([], "there are no samples"),
        (lambda: generator(model), "returned a generator, of which nothing has run"),
        (lambda: None, "finished without calling the model"),
    ):
        with pytest.raises(CalibrationError, match=words):
            freqopt.calibrate(model, given, **QUICK)  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match="returned a generator.*calling a, b"):
        freqopt.calibrate({"a": model, "b": models.make()}, lambda: generator(model), **QUICK)
    assert freqopt.calibrate(model, iter(samples()), target_density=0.6, **QUICK).sites
    for most in (1, 2.5, True):
        with pytest.raises(OptionError, match="2 or more"), freqopt.recording(model, most=most):  # type: ignore[arg-type]
            pass


class Around(nn.Module):
    """A wrapper that passes on whatever it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = make_model()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def test_the_timestep_is_found_among_what_a_wrapper_passes_on() -> None:
    timed = [make_sample(i) for i in range(8)]
    quick = {**QUICK, "target_density": 0.9, "timestep_buckets": 2}
    plan = freqopt.calibrate(Around().eval(), timed, **quick)
    assert plan.timestep_name == "timestep" and len(plan.timestep_edges) == 1
    broken = [{**timed[0], "video": timed[0]["video"] * NAN}, timed[1]]
    with pytest.raises(CalibrationError, match="sample 0: 'video' has"):
        freqopt.calibrate(Around().eval(), broken, **quick)
    args = [((each["video"], each["timestep"]), {}) for each in timed]
    named = named_arguments(forward_signature(Around()), *args[0])
    assert list(named) == ["argument 0", "argument 1"]


def test_a_call_that_the_model_does_not_take_is_named() -> None:
    calls = samples(3)
    del calls[1]["text"]
    with pytest.raises(CalibrationError, match=r"sample 1 does not fit.*'text'; a Video takes vid"):
        freqopt.calibrate(models.make(), calls, **QUICK)


def test_a_folder_that_cannot_hold_the_plans_is_said_before_anything_runs(tmp_path: Path) -> None:
    def run() -> None:
        raise AssertionError("the pipeline ran")

    pair = {"a": models.make(), "b/c": models.make()}
    with pytest.raises(InputError, match="'b/c' cannot be part of a file's name"):
        freqopt.calibrate(pair, run, output=tmp_path / "plans", **QUICK)
    (tmp_path / "README.md").write_text("# About something else\n")
    with pytest.raises(PlanError, match="would be lost"):
        freqopt.calibrate(models.make(), run, output=tmp_path, **QUICK)
    assert (tmp_path / "README.md").read_text() == "# About something else\n"


def test_samples_of_all_models_are_checked_before_one_is_measured() -> None:
    first, second = models.make(), models.make()
    first.register_forward_pre_hook(lambda *_: pytest.fail("it was measured"))
    broken = samples()
    broken[1] = {**broken[1], "video": broken[1]["video"] * NAN}
    with pytest.raises(CalibrationError, match="sample 1: 'video' has"):
        freqopt.calibrate({"a": first, "b": second}, {"a": samples(), "b": broken}, **QUICK)
