"""A server's day in minutes: resolutions change, plans are swapped, calls are interrupted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from freqopt.telling import running

SUPPORT = Path(__file__).parents[1] / "support"


CALLS = 500

OURS = 32 * 2**20
"""Bytes that the process may grow beyond what compiling with PyTorch's eager backend leaves behind:
PyTorch keeps something of every compilation, even of those that a reset has forgotten."""


FLAT = 16 * 2**20
"""Bytes that a process may grow in hundreds of calls without a compiler, most of them at first."""


def soaked(way: str, calls: int = CALLS) -> dict[str, int]:
    """What the calls came to."""
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "soak.py"), str(calls), way],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": f"{SUPPORT.parents[1]}{os.pathsep}{SUPPORT}"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    assert found["wrong"] == 0 and found["interrupted"] == calls // 37
    return found


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_five_hundred_calls() -> None:
    found, without = soaked("compiled"), soaked("pytorch")
    assert found["split"] > 0 == without["split"]
    assert found["graphs"] < running.KEPT + 16
    assert found["grown"] < without["grown"] + OURS


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize("calls", [200, pytest.param(CALLS, marks=pytest.mark.slow)])
def test_hundreds_of_calls_without_a_compiler(calls: int) -> None:
    found = soaked("uncompiled", calls)
    assert found["split"] > 0 and found["graphs"] < running.KEPT + 16
    assert found["grown"] < FLAT
