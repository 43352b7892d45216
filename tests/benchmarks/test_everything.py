"""The run of all benchmarks: every result file has one, and what cannot run is told."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks import everything
from benchmarks.everything import JOBS, Job
from benchmarks.pages import RESULTS

OF_OTHERS = {
    *(
        "attention_h100",
        "attention_dd5b6b5",
        "export_564acc8",
        "calibration_7dae3f7",
        "scaling_4418b3f",
    ),
    *("parallel_2", "parallel_4", "parallel_4_262144"),
}
"""Results of another GPU, of earlier commits, and of several GPUs, which `torchrun` measures."""


def test_every_result_file_has_a_benchmark() -> None:
    made = {name for job in JOBS for name in job.results}
    assert {path.stem for path in RESULTS.glob("*.json")} - OF_OTHERS <= made
    for job in JOBS:
        module = job.words.split()[0]
        assert importlib.util.find_spec(module) is not None, module


def test_what_cannot_run_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(everything, "ADAPTER", tmp_path / "absent")
    reasons = [everything.reason_against(job, None, gpu=True) for job in JOBS]
    assert sum(reason is not None for reason in reasons) == 5
    assert any(reason is not None and "pip download" in reason for reason in reasons)
    without = [everything.reason_against(job, tmp_path, gpu=False) for job in JOBS]
    assert sum(reason is None for reason in without) == sum(not job.gpu for job in JOBS) >= 3


def test_one_failure_does_not_stop_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "fails.py").write_text("import sys\nsys.exit(3)\n")
    (tmp_path / "demo_like.py").write_text(
        "import pathlib, sys\nfolder = pathlib.Path(sys.argv[1])\nfolder.mkdir(parents=True)\n"
        "(folder / 'result.json').write_text('{\"made\": 1}')\n"
    )
    monkeypatch.setattr(everything, "ROOT", tmp_path)
    out = tmp_path / "out"
    jobs = (Job("fails", ("a",)), Job("demo_like FOLDER", ("b",)), Job("x", ("c",), gpu=True))
    assert everything.run_all(jobs[:2], out, None, gpu=True) == ["fails"]
    assert json.loads((out / "b.json").read_text()) == {"made": 1}
    assert not (out / "work").exists()
    assert everything.run_all(jobs[2:], out, None, gpu=False) == []
    said = capfd.readouterr().out
    assert "exit status 3" in said and "left out: x: it needs an NVIDIA GPU" in said


def test_unknown_results_are_refused() -> None:
    with pytest.raises(SystemExit):
        everything.main(["--only", "nothing"])
