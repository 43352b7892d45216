"""The kernels that only onnxruntime launches: for text, and for a density."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from forks import SUPPORT, forks

pytest.importorskip("triton")


def run(script: str, *arguments: object) -> dict[str, Any]:
    done = forks(interpret=not torch.cuda.is_available()).run(SUPPORT / script, *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


BOUNDS = {"float32": 1e-4, "float16": 2e-3}


@pytest.mark.parametrize(
    "cases",
    [
        ["1 float32", "1 float16", "2 float16", "4 float32"],
        pytest.param(["2 float32", "4 float16"], marks=pytest.mark.slow),
    ],
)
def test_text_kernel_is_dense_attention(cases: list[str]) -> None:
    found = run("onnx_glue.py", *cases)
    assert list(found) == cases
    for name, seen in found.items():
        assert seen["text"] < BOUNDS[name.split()[1]], name  # a NaN fails too
        assert seen["video_untouched"], name


@pytest.mark.smoke
def test_density_kernel_finds_the_kth_score() -> None:
    """tiles x blocks x kept: all kept, one, fewer than a tile's own blocks, several steps."""
    cases = ["7x13x40", "7x13x1", "7x13x91", "3x5x5", "20x39x200"]
    assert run("onnx_density.py", *cases) == dict.fromkeys(cases, True)
