"""The kernels that only onnxruntime launches: for text, and for a density."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent


def run(script: str, *arguments: object) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(HERE / script), *map(str, arguments)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-4), ("float16", 2e-3)])
@pytest.mark.parametrize("case", [1, 2, 4])
def test_text_kernel_is_dense_attention(case: int, dtype: str, bound: float) -> None:
    found = run("onnx_glue.py", case, dtype)
    assert found["text"] < bound  # a NaN fails too
    assert found["video_untouched"]


@pytest.mark.smoke
def test_density_kernel_finds_the_kth_score() -> None:
    """tiles x blocks x kept: all kept, one, fewer than a tile's own blocks, several steps."""
    cases = ["7x13x40", "7x13x1", "7x13x91", "3x5x5", "20x39x200"]
    assert run("onnx_density.py", *cases) == dict.fromkeys(cases, True)
