"""What every benchmark shares: the environment it ran in, timing, and where results go."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.pages import RESULTS
from freqopt.shown import shown_arguments


def environment() -> dict[str, Any]:
    """GPU, driver-visible versions and commit, for the head of a result file."""
    import triton

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    return {
        "device": gpu or platform.machine(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "command": "python -m " + " ".join([_module_name(), *shown_arguments(sys.argv[1:])]),
    }


def earlier(
    name: str,
    asked: dict[str, Any],
    folder: Path | None = None,
    parts: tuple[str, ...] = ("rows",),
) -> dict[str, Any]:
    """A new result with the rows that a file has, where they answer the same question.

    Each row says of which commit it is. asked: what the question is, as it stands in the file.
    parts: what the file calls its lists of rows.
    """
    path = (folder or RESULTS) / f"{name}.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    where = environment()
    if not found or {key: found.get(key) for key in asked} != asked:
        return {"environment": where, **asked, **{part: [] for part in parts}}
    commit = found["environment"].get("commit", "unknown")
    return {
        "environment": where | {"before": commands_before(found, where)},
        **asked,
        **{part: [{"commit": commit, **row} for row in found.get(part, [])] for part in parts},
    }


def commands_before(found: dict[str, Any], where: dict[str, Any]) -> list[str]:
    """Commands that made rows of an earlier result, but for the one that runs now."""
    was = found["environment"]
    commands = [*was.get("before", []), *([was["command"]] if "command" in was else [])]
    return [command for command in dict.fromkeys(commands) if command != where["command"]]


def _module_name() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec else Path(sys.argv[0]).name


def _commit() -> str:
    """The checkout's commit; FREQOPT_COMMIT where the code was copied without its history."""
    if given := os.environ.get("FREQOPT_COMMIT"):
        return given
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    )
    return found.stdout.strip() or "unknown"


LEAST_CALLS = 15
"""Calls that a median is taken of, however long they are: three tell of the clock more."""


def milliseconds(call: Callable[[], object], *, warmup: int = 25, repeat: int = 100) -> float:
    """Median time of a call on the GPU, in ms; `warmup` and `repeat` are ms spent on each."""
    from triton.testing import do_bench

    def median(spent: float) -> float:
        return float(do_bench(call, warmup=warmup, rep=spent, return_mode="median"))

    time = median(repeat)
    return time if LEAST_CALLS * time <= repeat else median(LEAST_CALLS * time)


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of a call: the median on a GPU, the better of two on a CPU."""
    if device.type == "cuda":
        return milliseconds(call)
    times = []
    for _ in range(2):
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return min(times)


def graph_milliseconds(call: Callable[[], object], *, warmup: int = 25, repeat: int = 100) -> float:
    """As `milliseconds`, of a CUDA graph of the call: the GPU's time, without Python's launches."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # compiles, and puts token orders on the device
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    found = milliseconds(graph.replay, warmup=warmup, repeat=repeat)
    graph.reset()
    return found


def write(name: str, result: dict[str, Any], folder: Path | None = None) -> Path:
    """Write `result` as <folder>/<name>.json, by default under benchmarks/results/."""
    folder = folder or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    part = path.with_suffix(".json.part")  # a run that is cut off leaves no half of a file
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(path)
    return path
