"""The text kernel, which only onnxruntime launches, against dense attention."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("onnx_glue.py")


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-4), ("float16", 2e-3)])
@pytest.mark.parametrize("case", [1, 2, 4])
def test_text_kernel_is_dense_attention(case: int, dtype: str, bound: float) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(case), dtype],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["text"] < bound  # a NaN fails too
    assert found["video_untouched"]
