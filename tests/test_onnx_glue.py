"""The kernels that stand in for PyTorch glue inside onnxruntime, against that glue."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("onnx_glue.py")
BOUNDS = {"float32": (1e-4, 2e-3), "float16": (2e-3, 4e-3)}


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("case", [1, 3, 4, 6])
def test_kernels_alone_are_the_gpu_path(case: int, dtype: str) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(case), dtype],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    out, coefficients = BOUNDS[dtype]
    assert found["out"] < out  # a NaN fails too
    assert found["coefficients"] < coefficients
