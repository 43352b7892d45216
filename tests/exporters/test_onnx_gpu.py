"""The library under onnxruntime's CUDA provider: right, ours, and by the kernel meant for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

from benchmarks.export import CASES, measure, prepare

pytestmark = pytest.mark.gpu


def test_library_under_the_cuda_provider(tmp_path: Path) -> None:
    """`measure` itself refuses wrong outputs and a node that ran elsewhere."""
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-gpu is not installed")
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) != (9, 0):
        pytest.skip("the cases name the kernels of compute capability 9.0")
    prepare(tmp_path, 90)
    for case, row in zip(CASES, measure(tmp_path)["rows"], strict=True):
        assert "wrong" not in row, row["wrong"]
        if case.tokens > 10_000:  # below that, launching takes longer than computing
            # It is 68 to 196 times; against PyTorch the benchmark's table tells, as that is close.
            assert row["ms"]["library"] < row["ms"]["body"] / 20, case.name
