"""Bytes, products and the floor of each kernel beside its time: `python -m benchmarks.roofline`.

The floor is the larger of the time that the bytes take at the memory's rate and the time that the
products take on the tensor cores, both as the data sheet has them. Bytes are those that must cross
the memory bus at least once; a kernel that reads a tensor twice is charged for once.

Kernels are timed one after the other: those that run beside each other (`kernels/overlap.py`) share
the GPU, and each takes longer. The time of everything but attention is that of a call as it is.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from benchmarks.attention import GRIDS, graph_times, relative_errors, threshold_for
from benchmarks.common import environment, write
from benchmarks.tensors import zoo_attention
from freqopt.config import DEFAULT_PROBES, KEY_BLOCK, QUERY_TILE, SUB_TILE
from freqopt.kernels import content_order
from freqopt.kernels.hopper.launch import range_length
from freqopt.kernels.order_launches import MOMENT_PARTS
from freqopt.kernels.reference import RIDGE_PROBES
from freqopt.kernels.split_launches import GROUP, H_BAR_GROUP

DATA_SHEET = {"H200": (989.0, 4.8), "H100": (989.0, 3.35), "A100": (312.0, 2.04)}
"""Dense half-precision TFLOP/s and memory TB/s by part of the GPU's name."""

HOPPER_PROCESSORS = 132

CALLS = 5


class Work(NamedTuple):
    """What a kernel must do at least: bytes moved and floating-point operations."""

    bytes: float
    flops: float


class Problem(NamedTuple):
    """Extents of one call without text: heads, tokens, head dim, bytes per element, density.

    chunk: tokens of the chunks that are ordered by content, 0 for the grid's order.
    """

    heads: int
    tokens: int
    dim: int
    element: int
    density: float
    probes: int = DEFAULT_PROBES
    chunk: int = 0


def work_of_order(p: Problem) -> dict[str, Work]:
    """Least work of each kernel of an order by content of one head, all its levels together.

    Coordinates of 2 bytes are read once a level, and places read and written.
    """
    n, d, rank = p.tokens, p.dim, content_order.RANK
    levels = max(p.chunk // content_order.LEAF, 1).bit_length() - 1
    one_level = Work(n * (2 * rank + 8), 2 * n * rank * rank)
    square = 4 * d * (d + 1)
    return {
        "moments_kernel": Work(
            content_order.SAMPLES * d * p.element + MOMENT_PARTS * square,
            2 * content_order.SAMPLES * d * d,
        ),
        "directions_kernel": Work(
            MOMENT_PARTS * square, content_order.STEPS * 2 * d * rank * (d + 2 * rank)
        ),
        "project_kernel": Work(n * (d * p.element + 2 * rank + 4), 2 * n * d * rank),
        "halve_kernel": Work(levels * one_level.bytes, levels * one_level.flops),
        "leaf_kernel": one_level,
    }


def work_of(p: Problem) -> dict[str, Work]:
    """Least work of each kernel of a call, by the kernel's name, over all heads."""
    n, d, e = p.tokens, p.dim, p.element
    blocks, tiles = -(-n // KEY_BLOCK), -(-n // QUERY_TILE)
    pairs, rows = blocks * tiles, n * d * e
    spans, groups = -(-blocks // H_BAR_GROUP), -(-blocks // GROUP)
    ranges = -(-blocks // range_length(p.heads, blocks, HOPPER_PROCESSORS))
    summaries = 4 * rows + 4 * n + blocks * d * (4 + 2 * e)
    attended = p.density * n + blocks
    # Two passes of one product over sub-tiles; half the dispersion gives way to the score.
    score = Work(rows / SUB_TILE + 8 * pairs, 4 * (n / SUB_TILE) * blocks * d)
    fitted = min(p.probes, RIDGE_PROBES)
    per_head = {
        **(work_of_order(p) if p.chunk else {}),
        "summarise_kernel": Work(summaries, 0),
        # Does what the one above and first_order_kernel do, on Hopper.
        "prepare_hopper_kernel": Work(summaries + 4 * ranges * d * d, 2 * n * d * d),
        "total_kernel": Work(12 * groups * d, 0),
        "centre_kernel": Work(blocks * d * (4 + e), 0),
        "first_order_kernel": Work(2 * rows + 4 * spans * d * d, 2 * n * d * d),
        "h_bar_kernel": Work(4 * min(spans, ranges) * d * d, 0),
        "pool_tiles_kernel": Work(rows + (n / SUB_TILE + tiles) * d * e, 0),
        "disperse_kernel": Work((tiles + blocks) * d * e + 6 * pairs, 2 * tiles * blocks * d),
        "score_kernel": score,
        "score_hopper_kernel": score,
        "route_kernel": Work(pairs * (4 + 1 + 6 * p.density), 0),
        # Only in calls that resolve a density outside PyTorch, which has a sort for it.
        "density_kernel": Work(4 * pairs, 0),
        # Queries by keys, and weights by values twice: what is served exactly, and what is not.
        "probe_kernel": Work(2 * rows, 6 * p.probes * n * d),
        "estimate_kernel": Work(6 * p.probes * blocks, 2 * p.probes * blocks * d),
        "fit_kernel": Work(6 * p.probes * blocks, 2 * p.probes * blocks * d),
        # Products of 64 probes with each other, of their inverse, and of both with the matrix.
        "ridge_kernel": Work(
            12 * fitted * d + 2 * d * d * e, fitted**2 * (36 * fitted + 8 * d) + 4 * fitted * d * d
        ),
        "attend": Work(4 * rows + 4 * p.density * pairs, 4 * n * attended * d + 2 * n * d * d),
    }
    return {k: Work(p.heads * w.bytes, p.heads * w.flops) for k, w in per_head.items()}


def floor_ms(work: Work, tflops: float, tbs: float) -> tuple[float, str]:
    """The floor in milliseconds, and what sets it: memory or products."""
    memory, products = work.bytes / tbs / 1e9, work.flops / tflops / 1e9
    return (memory, "memory") if memory >= products else (products, "products")


def data_sheet(name: str) -> tuple[float, float] | None:
    """(TFLOP/s, TB/s) of a GPU by its name, or None."""
    return next((rates for part, rates in DATA_SHEET.items() if part in name), None)


def kernel_times(call: Callable[[], object]) -> dict[str, float]:
    """Milliseconds on the GPU of every kernel of a call, by its name, mean of a few calls."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()
    return {e.key: e.self_device_time_total / CALLS / 1e3 for e in profile.key_averages()}


@contextlib.contextmanager
def one_after_the_other() -> Iterator[None]:
    """Calls in here launch everything on one stream."""
    from freqopt.kernels import overlap

    with mock.patch.object(overlap, "OVERLAP_ROWS", 1 << 62):
        yield


def rows_of(
    times: dict[str, float], work: dict[str, Work], tflops: float, tbs: float
) -> list[dict[str, Any]]:
    """One row per kernel, slowest first; kernels of others count together as the rest."""
    rows, rest = [], 0.0
    for kernel, ms in times.items():
        name = "attend" if kernel.startswith("attend") else kernel
        if name not in work:
            rest += ms
            continue
        floor, bound = floor_ms(work[name], tflops, tbs)
        rows.append(
            {
                "kernel": kernel,
                "ms": ms,
                "floor_ms": floor,
                "bound": bound,
                "bytes": work[name].bytes,
                "flops": work[name].flops,
                "of_floor": floor / ms,
            }
        )
    rows.sort(key=lambda row: -row["ms"])
    rows.append({"kernel": "everything else", "ms": rest, "floor_ms": None})
    return rows


def plot(problems: list[dict[str, Any]], title: str, path: Path) -> None:
    """Time and floor of each kernel as bars."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(problems), figsize=(6 * len(problems), 4), squeeze=False)
    for ax, problem in zip(axes[0], problems, strict=True):
        rows = problem["rows"][::-1]
        names = [row["kernel"].removesuffix("_kernel") for row in rows]
        ax.barh(names, [row["ms"] for row in rows], color="#c6d8f3", label="time")
        floors = [row["floor_ms"] or 0.0 for row in rows]
        ax.barh(names, floors, height=0.4, color="#1f6feb", label="floor")
        ax.set(xlabel="ms", title=f"{problem['tokens']:,} tokens, {problem['density']:.0%} density")
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, loc="lower right")
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def measure(size: str, density: float, tflops: float, tbs: float, chunk: int = 0) -> dict[str, Any]:
    """All kernels of one call on the zoo DiT's tensors, and the call's error.

    chunk: as in `Problem`.
    """
    import torch.nn.functional as F

    import freqopt

    a = zoo_attention(GRIDS[size])
    threshold = threshold_for(a, density)
    order: dict[str, Any] = {"order": "content", "chunk": chunk} if chunk else {}

    def call() -> Any:
        return freqopt.split_attention(
            a.query, a.key, a.value, grid=a.grid, threshold=threshold, return_stats=True, **order
        )

    out, stats = call()
    l1, l2 = relative_errors(out, F.scaled_dot_product_attention(a.query, a.key, a.value))
    reached = float(stats.density.mean())
    _, heads, tokens, dim = a.query.shape
    problem = Problem(heads, tokens, dim, a.query.element_size(), reached, chunk=chunk)
    with one_after_the_other():
        rows = rows_of(kernel_times(call), work_of(problem), tflops, tbs)
    times = graph_times(call)
    print(f"{heads} heads x {tokens:,} tokens, density {reached:.3f}, L1 {l1:.4f}, L2 {l2:.4f}")
    for row in rows:
        floor = f"floor {row['floor_ms']:.3f} ms ({row['bound']})" if row["floor_ms"] else ""
        print(f"  {row['kernel']:24} {row['ms']:8.3f} ms  {floor}")
    print(
        f"  everything but attention {times['other_ms']:.3f} of {times['graph_ms']:.3f} ms, "
        f"{times['other_share']:.1%}"
    )
    return {
        "tokens": tokens,
        "heads": heads,
        "chunk": chunk,
        "density": reached,
        "l1": l1,
        "l2": l2,
        **times,
        "rows": rows,
    }


def table(result: dict[str, Any]) -> list[str]:
    """The documentation's table of the longest problem: every kernel, and the floor it has."""
    where = result["environment"]
    by_grid = [problem for problem in result["problems"] if not problem.get("chunk")]
    problem = max(by_grid, key=lambda p: int(p["tokens"]))
    attention = [row for row in problem["rows"] if row["kernel"].startswith("attend")]
    others = sum(row["ms"] for row in problem["rows"]) - sum(row["ms"] for row in attention)
    floors = sum(r["floor_ms"] or 0.0 for r in problem["rows"] if r not in attention)
    lines = [
        f"{problem['heads']} heads x {problem['tokens']:,} tokens at "
        f"{100 * problem['density']:.1f} % density, Triton {where['triton']}.",
        "",
        "| kernel | ms | floor, ms |",
        "|---|---|---|",
    ]
    for row in problem["rows"]:
        floor = f"{row['floor_ms']:.2f} ({row['bound']})" if row["floor_ms"] else ""
        lines.append(f"| `{row['kernel']}` | {row['ms']:.3f} | {floor} |")
    lines.append(f"| all but attention, one after the other | {others:.3f} | {floors:.2f} |")
    if "other_ms" in problem:
        lines.append(
            f"| all but attention, as a call runs them | {problem['other_ms']:.3f}, "
            f"{100 * problem['other_share']:.1f} % of {problem['graph_ms']:.2f} ms | |"
        )
    return [line.replace("`everything else`", "everything else") for line in lines]


ORDERING = frozenset(work_of_order(Problem(1, 1024, 64, 2, 0.1, chunk=1024)))
"""Kernels that order tokens by content."""


def tables_of_orders(result: dict[str, Any]) -> list[str]:
    """A table for each problem ordered by content: the kernels of the order, and their floors."""
    lines: list[str] = []
    for problem in (p for p in result["problems"] if p.get("chunk")):
        rows = [row for row in problem["rows"] if row["kernel"] in ORDERING]
        whole = sum(row["ms"] for row in rows)
        lines += [
            f"{problem['heads']} heads x {problem['tokens']:,} tokens in chunks of "
            f"{problem['chunk']:,}: {whole:.3f} ms, {100 * whole / problem['graph_ms']:.1f} % of a "
            f"call of {problem['graph_ms']:.2f} ms at {100 * problem['density']:.1f} % density.",
            "",
            "| kernel | ms | floor, ms |",
            "|---|---|---|",
            *(
                f"| `{r['kernel']}` | {r['ms']:.3f} | {r['floor_ms']:.3f} ({r['bound']}) |"
                for r in rows
            ),
            "",
        ]
    return lines[:-1]


def main(arguments: list[str] | None = None) -> None:
    """Run the command; `arguments` as on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=list(GRIDS), choices=GRIDS)
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--chunk", type=int, default=1024, help="of the order by content")
    parser.add_argument("--tflops", type=float, help="dense half-precision TFLOP/s of the GPU")
    parser.add_argument("--tbs", type=float, help="TB/s of its memory")
    parser.add_argument("--out", type=Path, default=None, help="folder of the results")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("this measures kernels, so it needs an NVIDIA GPU and none is visible")
    name = torch.cuda.get_device_name()
    known = data_sheet(name) or (given.tflops, given.tbs)
    tflops, tbs = given.tflops or known[0], given.tbs or known[1]
    if tflops is None or tbs is None:
        parser.error(f"the rates of a {name} are not known here: give --tflops and --tbs")
    problems = [
        measure(size, given.density, tflops, tbs, chunk)
        for size in given.sizes
        for chunk in (0, given.chunk)
    ]
    result = {"environment": environment(), "tflops": tflops, "tbs": tbs, "problems": problems}
    path = write("roofline", result, given.out)
    by_grid = [problem for problem in problems if not problem["chunk"]]
    plot(by_grid, f"freqopt on {name}", path.with_suffix(".png"))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
