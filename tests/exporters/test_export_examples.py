"""The examples run as they are, and stay short."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from freqopt.exporters.tensorrt import plugin

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    ("name", "said", "made"),
    [
        ("deploy_onnxruntime.py", "split sites by function body", "model.onnx"),
        ("build_tensorrt_engine.py", "build_engine.py", "model.trt.onnx"),
    ],
)
def test_example(
    name: str,
    said: str,
    made: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(plugin, "DEFAULT_CAPABILITIES", (90,))  # as test_tensorrt_export compiles
    monkeypatch.setattr(sys, "argv", [name, str(tmp_path)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    printed = capsys.readouterr().out
    assert said in printed
    assert (tmp_path / made).is_file() and (tmp_path / "manifest.json").is_file()
    if name == "deploy_onnxruntime.py":
        difference = float(printed.strip().rsplit(" ", 1)[1])
        assert 1e-6 < difference < 0.1


def test_examples_are_short() -> None:
    paths = list(EXAMPLES.glob("*.py"))
    assert len(paths) >= 2
    for path in paths:
        assert len(path.read_text().splitlines()) < 60, path
