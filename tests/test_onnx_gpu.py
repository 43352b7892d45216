"""The library under onnxruntime's CUDA provider: right, ours, and as fast as in PyTorch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

from benchmarks.export import measure, prepare

pytestmark = pytest.mark.gpu


def test_library_under_the_cuda_provider(tmp_path: Path) -> None:
    """`measure` itself refuses wrong outputs and a node that ran elsewhere."""
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-gpu is not installed")
    major, minor = torch.cuda.get_device_capability()
    prepare(tmp_path, major * 10 + minor)
    times = measure(tmp_path)["ms"]
    assert times["library"] < 1.05 * times["pytorch"] + 0.1
    assert times["library"] < times["body"] / 3
