"""The benchmark of a large transformer, on a tiny one: its parts are kept, and a run can be cut."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
pytest.importorskip("diffusers")

import freqopt
from benchmarks import large

TINY = (
    "--device cpu --grid 3x8x10 --layers 2 --heads 2 --head-dim 24 --mlp 64 --text 32 "
    "--samples 4 --density 0.5 --order grid --parts calibration split --out"
).split()


def rows(folder: Path) -> Any:
    return json.loads((folder / "large.json").read_text())["rows"]


@pytest.mark.usefixtures("no_code")
def test_a_run_that_is_cut_keeps_what_it_has_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calibrate = freqopt.calibrate

    def cut(*_: object, **__: object) -> None:
        time.sleep(0.01)
        raise large.TimeUp

    monkeypatch.setattr(freqopt, "calibrate", cut)
    large.main([*TINY, str(tmp_path)])
    row = rows(tmp_path)["3x8x10"]
    assert row["tokens"] == 240 and row["calibration"]["stopped_s"] >= 0.01 and "split" not in row
    monkeypatch.setattr(freqopt, "calibrate", calibrate)
    large.main([*TINY, str(tmp_path)])
    row = rows(tmp_path)["3x8x10"]
    found = row["calibration"]
    assert found["pieces"] == 2 and found["split"] == 2 and 0.4 < found["density"] <= 0.5
    assert found["seconds"] > found["phases"]["measuring sites"] > 0
    assert 0 < row["split"]["error"] < 0.1 and row["split"]["step_s"] > 0
    monkeypatch.setattr(large.Bench, "calibration", cut)
    large.main([*TINY, str(tmp_path)])  # what is there is not run again
    assert rows(tmp_path)["3x8x10"] == row


def test_time_that_is_up_ends_a_run() -> None:
    with pytest.raises(large.TimeUp), large.at_most(1):
        time.sleep(20)
    with large.at_most(None):
        pass
