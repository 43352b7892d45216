"""Split against dense attention on a CPU: `python -m benchmarks.cpu`.

Newcomers meet freqopt on a laptop. Dense is PyTorch's own; both have the same threads and float32
tensors with the statistics of natural video. Times are medians of rounds in which the two take
turns, so that another process on the machine slows both.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import orders
from benchmarks.common import environment, write
from benchmarks.natural import natural_attention
from benchmarks.orders import Ordering
from benchmarks.tensors import Attention

GRID = (16, 32, 32)
HEADS, HEAD_DIM = 2, 64
DENSITIES = (0.04, 0.10, 0.20)


def processor() -> str:
    """Name of the CPU, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def medians(calls: list[Callable[[], object]], rounds: int) -> list[float]:
    """Median milliseconds of calls that take turns, after one round that is not counted."""
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(rounds + 1):
        for call, own in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            if turn:
                own.append(1000 * (time.perf_counter() - start))
    return [statistics.median(own) for own in times]


def row_of(a: Attention, each: Ordering, density: float, rounds: int) -> dict[str, Any]:
    """Error, and time beside dense attention's in the same rounds."""

    def dense() -> torch.Tensor:
        return F.scaled_dot_product_attention(a.query, a.key, a.value)

    threshold = orders.threshold_at(each, a, density)
    found = each.call(a, threshold=threshold)
    l1, l2 = (float(x.mean()) for x in orders.head_errors(found.out, dense()))
    make = each.make(a.key, a.grid)
    calls: list[Callable[[], object]] = [dense, lambda: each.call(a, threshold=threshold)]
    dense_ms, ms, *order_ms = medians([*calls, make] if make else calls, rounds)
    row = {
        "order": each.name,
        "density": float(found.density.mean()),
        "threshold": threshold,
        "l1": l1,
        "l2": l2,
        "ms": ms,
        "dense_ms": dense_ms,
        "speedup": dense_ms / ms,
        "order_ms": sum(order_ms),
        "order_share": sum(order_ms) / ms,
    }
    print(
        f"{each.name:14} density {row['density']:.3f}  L1 {l1:.4f}  L2 {l2:.4f}  {ms:.1f} ms  dense"
        f" {dense_ms:.1f} ms  {row['speedup']:.2f}x  order {row['order_share']:.1%}",
        flush=True,
    )
    return row


def measure(grid: tuple[int, int, int], densities: list[float], rounds: int) -> dict[str, Any]:
    """All rows of one grid."""
    a = natural_attention(grid, heads=HEADS, dim=HEAD_DIM, dtype=torch.float32, device="cpu")
    print(f"{HEADS} heads x {a.query.shape[2]} tokens, {torch.get_num_threads()} threads")
    rows = [
        row_of(a, each, density, rounds)
        for each in orders.shared_orderings(a)
        for density in densities
    ]
    return {
        "environment": {**environment(), "device": processor()},
        "threads": torch.get_num_threads(),
        "grid": grid,
        "tokens": a.query.shape[2],
        "heads": HEADS,
        "head_dim": HEAD_DIM,
        "dtype": str(a.query.dtype),
        "rounds": rounds,
        "rows": rows,
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write cpu.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--grid", type=int, nargs=3, default=GRID, help="frames, rows, columns")
    parser.add_argument("--densities", nargs="+", type=float, default=list(DENSITIES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None, help="default: PyTorch's own")
    parser.add_argument("--out", type=Path, default=None, help="folder of the results")
    given = parser.parse_args(arguments)
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    with torch.no_grad():
        result = measure(tuple(given.grid), given.densities, given.rounds)
    print(f"wrote {write('cpu', result, given.out)}")


if __name__ == "__main__":
    main()
