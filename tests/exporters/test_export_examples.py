"""The examples run as their users would run them, and stay short."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    ("name", "said", "made"),
    [
        ("deploy_onnxruntime.py", "split sites by function body", "model.onnx"),
        ("build_tensorrt_engine.py", "build_engine.py", "model.trt.onnx"),
    ],
)
def test_example(name: str, said: str, made: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert said in done.stdout
    assert (tmp_path / made).is_file() and (tmp_path / "manifest.json").is_file()
    if name == "deploy_onnxruntime.py":
        difference = float(done.stdout.strip().rsplit(" ", 1)[1])
        assert 1e-6 < difference < 0.1


def test_examples_are_short() -> None:
    paths = list(EXAMPLES.glob("*.py"))
    assert len(paths) >= 2
    for path in paths:
        assert len(path.read_text().splitlines()) < 60, path
