"""Runs a module of ours in another Python, as Triton's interpreter may be on in this one.

The current folder, which Python would search first, is not searched: what lies there is not ours.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import freqopt

ROOT = Path(freqopt.__file__).resolve().parents[1]

START = """
import runpy, sys
root, name = sys.argv[1:3]
sys.path = [folder for folder in sys.path if folder]
if root not in sys.path:
    sys.path.insert(0, root)
sys.argv[1:3] = []
runpy.run_module(name, run_name="__main__", alter_sys=True)
"""


def run_module(name: str, folder: Path, request: str) -> subprocess.CompletedProcess[str]:
    """Run a module with a folder as its argument and text on its standard input."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", START, str(ROOT), name, str(folder)]
    return subprocess.run(
        command,
        input=request,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        env=environment,
        check=False,
    )
