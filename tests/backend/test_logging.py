"""What torch's own tools show of the passes: TORCH_LOGS and the structured trace."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import torch
from passes_toys import Toy, video
options = {"threshold": 0.0, "min_tokens": 1, "inner": "eager"}
with torch.no_grad():
    torch.compile(Toy(), backend="freqopt", options=options, dynamic=False)(video((3, 6, 10)))
"""


def compiled_in_a_process(**environment: str) -> str:
    """Compile the toy in a process of its own; what it wrote to standard error."""
    path = os.pathsep.join([str(Path(__file__).parents[1] / "support"), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stderr


def test_torch_logs_and_the_structured_trace(tmp_path: Path) -> None:
    shown = compiled_in_a_process(TORCH_LOGS="+freqopt", TORCH_TRACE=str(tmp_path))
    assert "blocks.1: self, 2 heads of 8, 180 queries, grid (3, 6, 10)" in shown
    assert "blocks.1: split, threshold 0" in shown
    assert "2 of 2 attention sites rewritten" in shown
    traced = "".join(file.read_text() for file in tmp_path.iterdir())
    assert traced.index("freqopt_before") < traced.index("freqopt_after")
    assert "split_attention" in traced[traced.index("freqopt_after") :]


def test_the_plus_sign_adds_what_was_seen() -> None:
    shown = compiled_in_a_process(TORCH_LOGS="freqopt")
    assert "blocks.1: split, threshold 0" in shown and "180 queries" not in shown
