"""An interrupted calibration goes on where it stopped, and ends with the plan it would have had."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_models import make_model, make_sample
from forks import forks
from hypothesis import given, settings
from hypothesis import strategies as st

import freqopt
from freqopt.calibration import checkpoint
from freqopt.calibration.checkpoint import Checkpoint
from freqopt.calibration.measure.recorder import Recorder
from freqopt.calibration.samples_file import save_samples
from freqopt.calibration.search import marginals
from freqopt.cli.app import INTERRUPTED
from freqopt.errors import CalibrationError
from freqopt.plan.plan import Plan


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def calibrate(path: Path | None, **options: Any) -> Plan:
    samples = [make_sample(i) for i in range(4)]
    settings = {"progress": False, "target_error": 0.05, **options}
    return freqopt.calibrate(make_model(), samples, checkpoint=path, **settings)


class Counter:
    """Keeps what every call of attention was asked for, and interrupts at one of them."""

    def __init__(self, patch: pytest.MonkeyPatch, stop_at: int | None = None) -> None:
        self.kinds: list[str] = []
        original = Recorder.__call__

        def call(recorder: Recorder, *args: Any) -> Any:
            self.kinds.append(type(recorder.desk.request).__name__)
            if stop_at is not None and len(self.kinds) == stop_at:
                raise KeyboardInterrupt
            return original(recorder, *args)

        patch.setattr(Recorder, "__call__", call)


@pytest.fixture(scope="module")
def whole() -> tuple[Plan, list[str]]:
    """The plan of a run without interruption, and the kinds of its calls of attention."""
    with pytest.MonkeyPatch.context() as patch:
        counter = Counter(patch)
        plan = calibrate(None)
    assert {"Measure", "Inject", "Split", "Dense"} == set(counter.kinds)
    return plan, counter.kinds


@pytest.mark.parametrize("when", ["Measure", "Inject", "end"])
def test_interrupted_and_resumed_gives_the_identical_plan(
    whole: tuple[Plan, list[str]], when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, kinds = whole
    path = tmp_path / "checkpoint"
    calls = [i for i, kind in enumerate(kinds) if kind == when] or [len(kinds) - 1]
    stop_at = calls[-1] + 1  # the last call of that kind: all before it is kept
    with monkeypatch.context() as patch:
        Counter(patch, stop_at)
        with pytest.raises(KeyboardInterrupt):
            calibrate(path)
    assert path.exists()
    with monkeypatch.context() as patch:
        counter = Counter(patch)
        resumed = calibrate(path)
    assert resumed == expected
    left = {kind: counter.kinds.count(kind) for kind in ("Measure", "Inject")}
    # one sample is measured again at most, and one head probed
    assert left["Measure"] == (2 if when == "Measure" else 0)
    assert when == "Measure" or left["Inject"] <= 2
    assert not path.exists()


def test_interrupted_among_the_marginals(
    whole: tuple[Plan, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was moved and compared before Ctrl-C is not run again."""
    expected, kinds = whole
    path, seen = tmp_path / "checkpoint", []
    original = marginals._squared_error

    def interrupt(*args: Any) -> float:
        seen.append(args)
        if len(seen) == 8:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(marginals, "_squared_error", interrupt)
        with pytest.raises(KeyboardInterrupt):
            calibrate(path)
    assert sum(key.startswith("marginal/") for key in Checkpoint(path, identity(path)).entries) == 7
    counter = Counter(monkeypatch)
    assert calibrate(path) == expected
    assert {"Measure", "Inject"}.isdisjoint(counter.kinds)
    sites = 2
    assert counter.kinds.count("Split") <= kinds.count("Split") - 7 * sites


def identity(path: Path) -> str:
    """What a checkpoint's file says it belongs to."""
    from safetensors import safe_open

    with safe_open(str(path), "pt") as file:
        return str(file.metadata()["identity"])


def test_interrupted_many_times(
    whole: tuple[Plan, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, plan, runs = tmp_path / "checkpoint", None, 0
    while plan is None:
        runs += 1
        with monkeypatch.context() as patch:
            Counter(patch, 18)
            try:
                plan = calibrate(path)
            except KeyboardInterrupt:
                assert runs < 40
    assert plan == whole[0] and runs > 2


def test_measurements_serve_another_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint"
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "remove", Checkpoint.write)
        calibrate(path)
    counter = Counter(monkeypatch)
    plan = calibrate(path, target_error=0.1)
    assert {"Measure", "Inject"}.isdisjoint(counter.kinds)
    assert plan == calibrate(None, target_error=0.1)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "checkpoint"
    with pytest.MonkeyPatch.context() as patch:
        Counter(patch, 20)
        with pytest.raises(KeyboardInterrupt):
            calibrate(path)
    return path


def test_the_file_is_readable_data(interrupted: Path) -> None:
    from safetensors import safe_open

    with safe_open(str(interrupted), "pt") as file:
        facts = json.loads(file.metadata()["facts"])
        assert "measure/0" in facts and any(key.startswith("measure/0|") for key in file.keys())
    assert [file.name for file in interrupted.parent.iterdir()] == ["checkpoint"]


def test_other_weights_samples_and_seeds_are_refused(interrupted: Path) -> None:
    with pytest.raises(CalibrationError, match="other weights, samples"):
        calibrate(interrupted, seed=1)
    changed = make_model()
    with torch.no_grad():
        changed.head.bias[0] += 1.0
    samples = [make_sample(i) for i in range(4)]
    for model, given_samples in ((changed, samples), (make_model(), samples[::-1][:3])):
        with pytest.raises(CalibrationError, match="delete it to calibrate from the start"):
            freqopt.calibrate(model, given_samples, checkpoint=interrupted, progress=False)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_harmless(interrupted: Path, data: st.DataObject) -> None:
    from safetensors import safe_open

    with safe_open(str(interrupted), "pt") as file:
        identity = file.metadata()["identity"]
    original = interrupted.read_bytes()
    head = int.from_bytes(original[:8], "little") + 8
    at = data.draw(st.integers(0, head - 1) | st.integers(head, len(original) - 1))
    damage = data.draw(st.binary(max_size=8))
    damaged = original[:at] + damage + original[at + data.draw(st.integers(0, 30)) :]
    other = interrupted.with_suffix(".damaged")
    other.write_bytes(damaged)
    kept = Checkpoint(interrupted, identity).entries
    try:
        found = Checkpoint(other, identity).entries
    except CalibrationError as error:
        assert "delete it" in str(error)
    else:
        assert found.keys() == kept.keys()
        for key, entry in found.items():
            facts, tensors = kept[key]
            assert entry.facts == facts and entry.tensors.keys() == tensors.keys()
            assert all(torch.equal(x, tensors[name]) for name, x in entry.tensors.items())


def test_nothing_is_written_without_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint, "WRITE_EVERY", 0.0)
    Counter(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        calibrate(None)
    assert list(tmp_path.iterdir()) == []


MODELS = """
import os, signal
import calibration_models
from freqopt.calibration.measure.requests import Measure

# A shell that runs tests in the background has its children ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)

def make():
    original, seen = Measure.attend, []

    def attend(request, visit):
        seen.append(visit.site)
        if len(seen) == 4 and os.path.exists("stop"):
            os.remove("stop")
            os.kill(os.getpid(), signal.SIGINT)
        return original(request, visit)

    Measure.attend = attend
    return calibration_models.make_model()
"""

COMMAND = """
import os, runpy, sys
folder = os.path.dirname(sys.argv[0])
os.chdir(folder)
sys.path.insert(0, folder)
runpy.run_module("freqopt", run_name="__main__", alter_sys=True)
"""
"""`python -m freqopt` in the folder of this script."""


def test_ctrl_c_on_the_command_line(whole: tuple[Plan, list[str]], tmp_path: Path) -> None:
    """A real SIGINT, then the same command again."""
    (tmp_path / "models.py").write_text(MODELS)
    (tmp_path / "command.py").write_text(COMMAND)
    (tmp_path / "stop").touch()
    save_samples(tmp_path / "samples.safetensors", [make_sample(i) for i in range(4)])
    options = "models:make --samples samples.safetensors --target-error 0.05 --device cpu --quiet"
    run = functools.partial(
        forks(interpret=False).run, tmp_path / "command.py", "calibrate", *options.split()
    )
    done = run()
    assert done.returncode == INTERRUPTED, done.stderr
    assert "plan.json.resume; the same command goes on" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "plan.json").exists()
    done = run()
    assert done.returncode == 0, done.stderr
    assert Plan.load(tmp_path / "plan.json") == whole[0]
    assert not (tmp_path / "plan.json.resume").exists()
