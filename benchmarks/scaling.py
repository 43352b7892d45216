"""Time, density and memory from 8K to 1M tokens at one error: `python -m benchmarks.scaling`.

At every length the budget is searched that gives the target error by the op's own probes; the
error beside each time is then measured against exact attention of sampled queries, in the same run.
64 probes are few, and where density goes as error^-3 a tenth too much of error is a quarter too
little of density: so the budget of the target error of the sampled queries is searched as well.
The density an error needs is a property of the field, of which one has few large waves: so every
length has several fields, whose geometric means are reported.
Times are those of CUDA graphs: below 256K tokens one head is done before Python has launched it.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import freqopt
from benchmarks.common import environment, graph_milliseconds, write
from benchmarks.natural import natural_attention
from benchmarks.tensors import Attention

GRIDS = {
    "1K": (6, 13, 13),
    "2K": (8, 16, 16),
    "4K": (10, 20, 20),
    "8K": (13, 25, 25),
    "16K": (16, 32, 32),
    "32K": (20, 40, 41),
    "64K": (25, 51, 51),
    "128K": (32, 64, 64),
    "256K": (41, 80, 80),
    "512K": (51, 101, 102),
    "1M": (64, 128, 128),
}
"""Grids of one proportion, 1:2:2 as nearly as whole numbers allow. What of a natural field's power
varies along time and what along space depends on the proportion, and with it the density at an
error: between 1:2:2 and 1:8:8 it changes by ten times at one length."""

DEFAULT_SIZES = ("8K", "16K", "32K", "64K", "128K", "256K", "512K", "1M")
HEAD_DIM = 128
SEARCH_STEPS = 12
SAMPLED_QUERIES = 1024
GATE = 1.5
"""A row whose sampled error exceeds the target by more than this factor reports no time."""

GROWTH_FROM = 65_000
"""Tokens from which the growth of time is fitted."""


class Sample(NamedTuple):
    """Evenly spaced queries: their positions (Q,) and exact attention (heads, Q, D), float32."""

    at: Tensor
    truth: Tensor

    def errors(self, out: Tensor) -> tuple[float, float]:
        """Relative L1 and L2 error of an output (1, heads, N, D) on these queries."""
        off = out[0, :, self.at].float() - self.truth
        l1 = off.abs().sum() / self.truth.abs().sum()
        return float(l1), float(off.norm() / self.truth.norm())


def sample_of(a: Attention, count: int = SAMPLED_QUERIES) -> Sample:
    """Exact attention of `count` queries of each head."""
    tokens = a.query.shape[2]
    at = torch.linspace(0, tokens - 1, min(count, tokens), device=a.query.device).long()
    heads = []
    for query, key, value in zip(a.query[0], a.key[0].float(), a.value[0].float(), strict=True):
        logits = (query[rows].float() @ key.T * query.shape[-1] ** -0.5 for rows in at.split(64))
        heads.append(torch.cat([x.softmax(-1) @ value for x in logits]))
    return Sample(at, torch.stack(heads))


def split_call(a: Attention, threshold: float) -> tuple[Tensor, Any]:
    """The op's output and stats."""
    found: tuple[Tensor, Any] = freqopt.split_attention(
        a.query, a.key, a.value, grid=a.grid, threshold=threshold, return_stats=True
    )
    return found


def threshold_for_error(
    a: Attention, target: float, error_of: Callable[[Tensor, Any], float]
) -> float:
    """The largest budget whose error does not exceed the target, by bisection.

    error_of: from the op's output and stats.
    """
    low, high = -4.0, 4.0
    for _ in range(SEARCH_STEPS):
        middle = (low + high) / 2
        near = error_of(*split_call(a, 10.0**middle)) <= target
        low, high = (middle, high) if near else (low, middle)
    return 10.0**low


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of a call: the median of its CUDA graph, the better of two on a CPU."""
    if device.type == "cuda":
        return graph_milliseconds(call)
    best = math.inf
    for _ in range(2):
        start = time.perf_counter()
        call()
        best = min(best, 1000 * (time.perf_counter() - start))
    return best


def extra_memory(call: Callable[[], object], device: torch.device, output: int) -> int | None:
    """Bytes a call needs at its peak beside its inputs and its output; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - output


def measure_field(a: Attention, target: float) -> dict[str, Any] | None:
    """Budget, errors and time of one field at both targets, or None where it fails the gate."""
    device, sample = a.query.device, sample_of(a)

    def at(threshold: float) -> dict[str, Any]:
        out, stats = split_call(a, threshold)
        l1, l2 = sample.errors(out)
        return {
            "threshold": threshold,
            "density": float(stats.density.mean()),
            "l1": l1,
            "l2": l2,
            "probe_error": float(stats.probe_error.mean()),
        }

    def timed_at(threshold: float) -> float:
        return timed(lambda: split_call(a, threshold), device)

    def by_probes(_out: Tensor, stats: Any) -> float:
        return float(stats.probe_error.mean())

    found = at(threshold_for_error(a, target, by_probes))
    if not found["l2"] <= GATE * target:
        tokens = a.query.shape[2]
        print(f"{tokens:9,} tokens: FAILED its gate (relative L2 {found['l2']:.3g})")
        return None
    found["ms"] = timed_at(found["threshold"])
    other = at(threshold_for_error(a, target, lambda out, stats: sample.errors(out)[1]))
    found["sampled"] = {**other, "ms": timed_at(other["threshold"])}
    return found


def geometric_mean(values: Sequence[float]) -> float:
    """exp of the mean logarithm, of positive numbers."""
    return math.exp(sum(map(math.log, values)) / len(values))


MEANS = ("density", "l1", "l2", "probe_error", "ms")
"""What a row has the geometric mean over its fields of."""


def measure(
    size: str, target: float, device: torch.device, heads: int, fields: int
) -> dict[str, Any] | None:
    """One row, or None where the error of one of its fields fails the gate."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    found: list[dict[str, Any]] = []
    same: dict[str, Any] = {}  # for all fields: what does not depend on the content
    for seed in range(fields):
        a = natural_attention(
            GRIDS[size], heads=heads, dim=HEAD_DIM, dtype=dtype, device=device, seed=seed * heads
        )
        field = measure_field(a, target)
        if field is None:
            print("  no time reported")
            return None
        found.append({"seed": seed * heads, **field})
        if not same:
            same = content_free(a, field["threshold"])
    row: dict[str, Any] = {
        "size": size,
        "tokens": a.query.shape[2],
        "grid": a.grid,
        **same,
        **{name: geometric_mean([f[name] for f in found]) for name in MEANS},
        "sampled": {name: geometric_mean([f["sampled"][name] for f in found]) for name in MEANS},
        "fields": found,
    }
    extra = row["extra_per_key_value"]
    memory = "" if extra is None else f"  beside inputs {extra:.2f} x (K + V)"
    print(
        f"{row['tokens']:9,} tokens  density {row['density']:6.3f}  L1 {row['l1']:.4f}  L2 "
        f"{row['l2']:.4f}  probe {row['probe_error']:.4f}  {row['ms']:9.3f} ms  dense "
        f"{row['dense_ms']:9.2f} ms  {row['dense_ms'] / row['ms']:5.2f}x{memory}  sampled: density "
        f"{row['sampled']['density']:.3f}, {row['sampled']['ms']:.3f} ms",
        flush=True,
    )
    return row


def content_free(a: Attention, threshold: float) -> dict[str, Any]:
    """Time of dense attention, and memory of a call beside its inputs and its output."""
    device = a.query.device
    bytes_out = a.query.numel() * a.query.element_size()
    extra = extra_memory(lambda: split_call(a, threshold), device, bytes_out)
    key_value = 2 * a.key.numel() * a.key.element_size()
    return {
        "dense_ms": timed(lambda: F.scaled_dot_product_attention(a.query, a.key, a.value), device),
        "extra_bytes": extra,
        "extra_per_key_value": None if extra is None else extra / key_value,
    }


def growth(tokens: list[int], times: list[float], least: int) -> float | None:
    """Exponent p of time ~ tokens^p by least squares, over lengths of at least `least` tokens."""
    pairs = zip(tokens, times, strict=True)
    points = [(math.log(n), math.log(time)) for n, time in pairs if n >= least]
    if len(points) < 2:
        return None
    mean_x, mean_y = (sum(p[i] for p in points) / len(points) for i in range(2))
    above = sum((x - mean_x) * (y - mean_y) for x, y in points)
    return above / sum((x - mean_x) ** 2 for x, _ in points)


def ends(tokens: list[int], times: list[float], least: int) -> float | None:
    """The same from the first such length and the last alone."""
    kept = [i for i, n in enumerate(tokens) if n >= least]
    if len(kept) < 2:
        return None
    first, last = kept[0], kept[-1]
    return math.log(times[last] / times[first]) / math.log(tokens[last] / tokens[first])


def plot(result: dict[str, Any], path: Path) -> None:
    """Time against length, both logarithmic, and density."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = result["rows"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    tokens = [r["tokens"] for r in rows]
    for name, label, colour in (("dense_ms", "dense", "#888888"), ("ms", "split", "#1f6feb")):
        left.loglog(tokens, [r[name] for r in rows], "o-", color=colour, label=label)
    left.set(xlabel="tokens", ylabel="ms", title=f"{result['heads']} head(s), head dim {HEAD_DIM}")
    left.legend(frameon=False)
    right.semilogx(tokens, [100 * r["density"] for r in rows], "o-", color="#1f6feb")
    right.set(
        xlabel="tokens",
        ylabel="density, %",
        ylim=(0, None),
        title=f"at relative L2 error {result['target']:g}",
    )
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"freqopt on {result['environment']['device']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def table(result: dict[str, Any]) -> list[str]:
    """The documentation's table."""
    where, target = result["environment"], result["target"]
    heads = f"{result['heads']} head" + "s" * (result["heads"] > 1)
    fields = len(result["rows"][0]["fields"])
    lines = [
        f"{heads} of {HEAD_DIM}, bfloat16, Triton {where['triton']}, CUDA graphs.",
        f"The budget is that of relative L2 {target:g} by the op's own probes.",
        f"*error* is that of {SAMPLED_QUERIES:,} queries.",
        "On the right is the call whose *error* is the target.",
        f"Figures are geometric means of {fields} fields.",
        "",
        "| tokens | density | error | whole call | dense | against dense | beside Q, K, V, O | "
        "density, call at that error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        other = row["sampled"]
        memory = row["extra_per_key_value"]
        lines.append(
            f"| {row['tokens']:,} | {100 * row['density']:.1f} % | {row['l2']:.4f} | "
            f"{row['ms']:.2f} ms | {row['dense_ms']:.2f} ms | {row['dense_ms'] / row['ms']:.1f}x | "
            f"{'' if memory is None else f'{memory:.2f} x (K + V)'} | "
            f"{100 * other['density']:.1f} %, {other['ms']:.2f} ms |"
        )
    if result["growth"] is not None:
        exact = result["growth_sampled"]
        lines += [
            "",
            f"From {result['growth_from']:,} tokens on time grows as "
            f"tokens^**{result['growth']:.2f}**.",
            f"At the target of the sampled queries it grows as tokens^**{exact:.2f}**, "
            f"dense attention's as tokens^{result['dense_growth']:.2f}.",
            "From the first to the last of these lengths alone the exponents are "
            f"{result['ends']['growth']:.2f}, {result['ends']['growth_sampled']:.2f} and "
            f"{result['ends']['dense_growth']:.2f}.",
        ]
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Run the command; `arguments` as on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=list(DEFAULT_SIZES), choices=GRIDS)
    parser.add_argument("--target", type=float, default=0.06, help="relative L2 error of the op")
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--fields", type=int, default=3, help="fields of each length")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=None, help="folder of the results")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    found = [measure(size, given.target, device, given.heads, given.fields) for size in given.sizes]
    rows = [row for row in found if row is not None]
    tokens = [row["tokens"] for row in rows]
    times = {
        "growth": [row["ms"] for row in rows],
        "growth_sampled": [row["sampled"]["ms"] for row in rows],
        "dense_growth": [row["dense_ms"] for row in rows],
    }
    result = {
        "environment": environment(),
        "target": given.target,
        "heads": given.heads,
        "rows": rows,
        "growth_from": GROWTH_FROM,
        **{name: growth(tokens, found, GROWTH_FROM) for name, found in times.items()},
        "ends": {name: ends(tokens, found, GROWTH_FROM) for name, found in times.items()},
    }
    if result["growth"] is not None:
        print(
            f"time grows as tokens^{result['growth']:.3f}, at the sampled error "
            f"{result['growth_sampled']:.3f} (dense {result['dense_growth']:.3f}); from the first "
            f"to the last alone {result['ends']}"
        )
    path = write("scaling", result, given.out)
    if rows:
        plot(result, path.with_suffix(".png"))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
