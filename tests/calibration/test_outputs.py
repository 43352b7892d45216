"""What was measured for hours is not lost: outputs are tried first, checkpoints go last."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_plans import full_plan
from torch import nn
from typer.testing import CliRunner

import freqopt
from freqopt.calibration import calibrate as calibrating
from freqopt.calibration.checkpoint import open_checkpoint
from freqopt.cli.app import app
from freqopt.errors import CalibrationError, FileError
from freqopt.plan.plan import Plan


def test_an_output_that_cannot_be_written_is_said_first(tmp_path: Path) -> None:
    """Before anything is measured: neither a file nor a folder of plans can be in a file."""
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "plan.json"):
        with pytest.raises(FileError, match="cannot write"):
            freqopt.calibrate(nn.Identity(), [], output=path)
        arguments = ["calibrate", "no.such:model", "--samples", "none", "-o", str(path)]
        done = CliRunner().invoke(app, arguments)
        assert isinstance(done.exception, FileError)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A calibration that is done at once, and its checkpoint."""
    path = tmp_path / "plan.json.resume"

    def instantly(model: Any, samples: Any, options: Any, *given: Any, keep: bool = False) -> Plan:
        assert keep, "the checkpoint must outlive the measuring"
        Path(options["checkpoint"]).write_text("measured")
        return full_plan()

    monkeypatch.setattr(calibrating, "_collected", lambda *given: None)
    monkeypatch.setattr(calibrating, "_calibrate_one", instantly)
    return path


def test_the_checkpoint_goes_when_the_plan_is_there(measured: Path, tmp_path: Path) -> None:
    output = tmp_path / "plan.json"
    plan = freqopt.calibrate(nn.Identity(), [], checkpoint=measured, output=output)
    assert Plan.load(output) == plan and not measured.exists()


def test_the_checkpoint_stays_when_the_disk_is_full(
    measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(FileError, match="No space left"):
        freqopt.calibrate(nn.Identity(), [], checkpoint=measured, output=tmp_path / "plan.json")
    assert measured.exists() and not (tmp_path / "plan.json").exists()


@pytest.mark.parametrize("cause", [KeyboardInterrupt, CalibrationError])
def test_a_full_disk_does_not_hide_what_ended_a_calibration(
    cause: type[BaseException], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "folder").mkdir()
    with (
        pytest.raises(cause),
        open_checkpoint(tmp_path / "folder" / "kept", "identity") as kept,
    ):
        kept.keep("a", 1)
        (tmp_path / "folder").rmdir()
        (tmp_path / "folder").write_text("in its place")
        raise cause
    assert "is lost: cannot write" in caplog.text
