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


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_five_hundred_calls() -> None:
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "soak.py"), "500"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": f"{SUPPORT.parents[1]}{os.pathsep}{SUPPORT}"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["wrong"] == 0 and found["interrupted"] == 500 // 37 and found["split"] > 0
    assert found["graphs"] < running.KEPT + 16
    assert found["grown"] < 64 * 2**20
