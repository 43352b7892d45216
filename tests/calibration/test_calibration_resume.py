"""An interrupted calibration goes on where it stopped, and ends with the plan it would have had."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_models import make_model, make_sample
from hypothesis import given, settings
from hypothesis import strategies as st

import freqopt
from freqopt.calibration import checkpoint as calibration_journal
from freqopt.calibration.checkpoint import Journal
from freqopt.calibration.measure.recorder import Recorder
from freqopt.calibration.samples_file import save_samples
from freqopt.calibration.search import marginals as calibration_marginals
from freqopt.cli.app import INTERRUPTED
from freqopt.errors import CalibrationError
from freqopt.plan.plan import Plan


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def calibrate(checkpoint: Path | None, **options: Any) -> Plan:
    samples = [make_sample(i) for i in range(4)]
    settings = {"progress": False, "target_error": 0.05, **options}
    return freqopt.calibrate(make_model(), samples, checkpoint=checkpoint, **settings)


class Counter:
    """Counts calls of attention by mode, and interrupts at one of them."""

    def __init__(self, patch: pytest.MonkeyPatch, stop_at: int | None = None) -> None:
        self.modes: list[str] = []
        original = Recorder.__call__

        def call(recorder: Recorder, *args: Any) -> Any:
            self.modes.append(recorder.session.mode)
            if stop_at is not None and len(self.modes) == stop_at:
                raise KeyboardInterrupt
            return original(recorder, *args)

        patch.setattr(Recorder, "__call__", call)


@pytest.fixture(scope="module")
def whole() -> tuple[Plan, list[str]]:
    """The plan of a run without interruption, and the modes of its calls of attention."""
    with pytest.MonkeyPatch.context() as patch:
        counter = Counter(patch)
        plan = calibrate(None)
    assert {"measure", "probe", "split", "dense"} == set(counter.modes)
    return plan, counter.modes


@pytest.mark.parametrize("when", ["measure", "probe", "end"])
def test_interrupted_and_resumed_gives_the_identical_plan(
    whole: tuple[Plan, list[str]], when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, modes = whole
    path = tmp_path / "journal"
    calls = [i for i, mode in enumerate(modes) if mode == when] or [len(modes) - 1]
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
    left = {mode: counter.modes.count(mode) for mode in ("measure", "probe")}
    # one sample is measured again at most, and one head probed
    assert left["measure"] == (2 if when == "measure" else 0)
    assert when == "measure" or left["probe"] <= 2
    assert not path.exists()


def test_interrupted_among_the_marginals(
    whole: tuple[Plan, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was moved and compared before Ctrl-C is not run again."""
    expected, modes = whole
    path, seen = tmp_path / "journal", []
    original = calibration_marginals._squared_error

    def interrupt(*args: Any) -> float:
        seen.append(args)
        if len(seen) == 8:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(calibration_marginals, "_squared_error", interrupt)
        with pytest.raises(KeyboardInterrupt):
            calibrate(path)
    assert sum(key.startswith("marginal/") for key in Journal(path, identity(path)).entries) == 7
    counter = Counter(monkeypatch)
    assert calibrate(path) == expected
    assert {"measure", "probe"}.isdisjoint(counter.modes)
    sites = 2
    assert counter.modes.count("split") <= modes.count("split") - 7 * sites


def identity(path: Path) -> str:
    """What a journal's file says it belongs to."""
    from safetensors import safe_open

    with safe_open(str(path), "pt") as file:
        return str(file.metadata()["identity"])


def test_interrupted_many_times(
    whole: tuple[Plan, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, plan, runs = tmp_path / "journal", None, 0
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
    path = tmp_path / "journal"
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "remove", Journal.write)
        calibrate(path)
    counter = Counter(monkeypatch)
    plan = calibrate(path, target_error=0.1)
    assert "measure" not in counter.modes and "probe" not in counter.modes
    assert plan == calibrate(None, target_error=0.1)


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("journal") / "journal"
    with pytest.MonkeyPatch.context() as patch:
        Counter(patch, 20)
        with pytest.raises(KeyboardInterrupt):
            calibrate(path)
    return path


def test_the_file_is_readable_data(journal: Path) -> None:
    from safetensors import safe_open

    with safe_open(str(journal), "pt") as file:
        facts = json.loads(file.metadata()["facts"])
        assert "measure/0" in facts and any(key.startswith("measure/0|") for key in file.keys())
    assert [file.name for file in journal.parent.iterdir()] == ["journal"]


def test_other_weights_samples_and_seeds_are_refused(journal: Path) -> None:
    with pytest.raises(CalibrationError, match="other weights, samples"):
        calibrate(journal, seed=1)
    changed = make_model()
    with torch.no_grad():
        changed.head.bias[0] += 1.0
    samples = [make_sample(i) for i in range(4)]
    for model, given_samples in ((changed, samples), (make_model(), samples[::-1][:3])):
        with pytest.raises(CalibrationError, match="delete it to calibrate from the start"):
            freqopt.calibrate(model, given_samples, checkpoint=journal, progress=False)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_harmless(journal: Path, data: st.DataObject) -> None:
    from safetensors import safe_open

    with safe_open(str(journal), "pt") as file:
        identity = file.metadata()["identity"]
    original = journal.read_bytes()
    head = int.from_bytes(original[:8], "little") + 8
    at = data.draw(st.integers(0, head - 1) | st.integers(head, len(original) - 1))
    damage = data.draw(st.binary(max_size=8))
    damaged = original[:at] + damage + original[at + data.draw(st.integers(0, 30)) :]
    other = journal.with_suffix(".damaged")
    other.write_bytes(damaged)
    kept = Journal(journal, identity).entries
    try:
        found = Journal(other, identity).entries
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
    monkeypatch.setattr(calibration_journal, "WRITE_EVERY", 0.0)
    Counter(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        calibrate(None)
    assert list(tmp_path.iterdir()) == []


MODELS = """
import os, signal
import calibration_models
from freqopt.calibration.measure.recorder import Recorder

# A shell that runs tests in the background has its children ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)

def make():
    original, seen = Recorder._measure, []

    def measure(recorder, call):
        seen.append(recorder.site.name)
        if len(seen) == 4 and os.path.exists("stop"):
            os.remove("stop")
            os.kill(os.getpid(), signal.SIGINT)
        return original(recorder, call)

    Recorder._measure = measure
    return calibration_models.make_model()
"""


def test_ctrl_c_on_the_command_line(tmp_path: Path) -> None:
    """A real SIGINT, then the same command again."""
    (tmp_path / "models.py").write_text(MODELS)
    (tmp_path / "stop").touch()
    save_samples(tmp_path / "samples.safetensors", [make_sample(i) for i in range(4)])
    command = [
        sys.executable, "-m", "freqopt", "calibrate", "models:make", "--samples",
        "samples.safetensors", "--target-error", "0.05", "--device", "cpu", "--quiet",
    ]  # fmt: skip
    path = os.pathsep.join(
        [str(Path(__file__).parents[1] / "support"), str(Path(__file__).parents[2])]
    )
    run = functools.partial(
        subprocess.run, command, capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    done = run()
    assert done.returncode == INTERRUPTED, done.stderr
    assert "plan.json.resume; the same command goes on" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "plan.json").exists()
    done = run()
    assert done.returncode == 0, done.stderr
    assert Plan.load(tmp_path / "plan.json") == calibrate(None)
    assert not (tmp_path / "plan.json.resume").exists()
