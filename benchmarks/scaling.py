"""Time, density and memory from 8K to 1M tokens at one error: `python -m benchmarks.scaling`.

At every length the budget is searched that gives the target error by the op's own probes; the
error beside each time is then measured against exact attention of sampled queries, in the same run.
Tokens are in the grid's order, and by content in chunks and all together.
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

from benchmarks import orders
from benchmarks.common import earlier, environment, graph_milliseconds, write
from benchmarks.natural import natural_attention
from benchmarks.orders import CHUNKS, Called, Ordering
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


def threshold_for_error(
    each: Ordering, a: Attention, target: float, error_of: Callable[[Called], float]
) -> float:
    """The largest budget whose error does not exceed the target, by bisection.

    error_of: from what a call gives.
    """
    low, high = -4.0, 4.0
    for _ in range(SEARCH_STEPS):
        middle = (low + high) / 2
        near = error_of(each.call(a, threshold=10.0**middle)) <= target
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


def measure_field(
    each: Ordering, a: Attention, sample: Sample, target: float
) -> dict[str, Any] | None:
    """Budget, errors and time of one field at both targets, or None where it fails the gate."""
    device = a.query.device

    def at(threshold: float) -> dict[str, Any]:
        called = each.call(a, threshold=threshold)
        l1, l2 = sample.errors(called.out)
        return {
            "threshold": threshold,
            "density": float(called.density.mean()),
            "l1": l1,
            "l2": l2,
            "probe_error": float(called.probe_error.mean()),
        }

    def timed_at(threshold: float) -> float:
        return timed(lambda: each.call(a, threshold=threshold), device)

    def by_probes(called: Called) -> float:
        return float(called.probe_error.mean())

    found = at(threshold_for_error(each, a, target, by_probes))
    if not found["l2"] <= GATE * target:
        tokens = a.query.shape[2]
        print(f"{tokens:9,} tokens, {each.name}: FAILED its gate (relative L2 {found['l2']:.3g})")
        return None
    found["ms"] = timed_at(found["threshold"])
    other = at(threshold_for_error(each, a, target, lambda x: sample.errors(x.out)[1]))
    found["sampled"] = {**other, "ms": timed_at(other["threshold"])}
    return found


def geometric_mean(values: Sequence[float]) -> float:
    """exp of the mean logarithm, of positive numbers."""
    return math.exp(sum(map(math.log, values)) / len(values))


MEANS = ("density", "l1", "l2", "probe_error", "ms")
"""What a row has the geometric mean over its fields of."""


def measure(
    size: str, target: float, device: torch.device, heads: int, fields: int, names: Sequence[str]
) -> list[dict[str, Any]]:
    """A row for each order, but for those that fail the gate in one of the fields."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    same: dict[str, dict[str, Any]] = {}  # by order, for all fields: what no content changes
    dense_ms = math.nan
    for seed in range(0, fields * heads, heads):
        a = natural_attention(
            GRIDS[size], heads=heads, dim=HEAD_DIM, dtype=dtype, device=device, seed=seed
        )
        if not seed:
            dense_ms = timed(lambda a=a: F.scaled_dot_product_attention(*a[:3]), device)  # type: ignore[misc]
        sample = sample_of(a)
        for each in (each for each in orders.shared_orderings(a) if each.name in found):
            field = measure_field(each, a, sample, target)
            if field is None:
                print("  no time reported")
                del found[each.name]
                continue
            found[each.name].append({"seed": seed, **field})
            if each.name not in same:
                same[each.name] = memory_of(each, a, field["threshold"])
    return [
        row_of(size, name, {"dense_ms": dense_ms, **same[name]}, of_fields)
        for name, of_fields in found.items()
    ]


def row_of(
    size: str, name: str, same: dict[str, Any], fields: list[dict[str, Any]]
) -> dict[str, Any]:
    """The row of an order at a length."""
    row: dict[str, Any] = {
        "commit": environment()["commit"],
        "size": size,
        "order": name,
        "tokens": math.prod(GRIDS[size]),
        "grid": GRIDS[size],
        **same,
        **{mean: geometric_mean([f[mean] for f in fields]) for mean in MEANS},
        "sampled": {mean: geometric_mean([f["sampled"][mean] for f in fields]) for mean in MEANS},
        "fields": fields,
    }
    extra = row["extra_per_key_value"]
    memory = "" if extra is None else f"  beside inputs {extra:.2f} x (K + V)"
    print(
        f"{row['tokens']:9,} tokens  {name:13}  density {row['density']:6.3f}  L1 {row['l1']:.4f}  "
        f"L2 {row['l2']:.4f}  probe {row['probe_error']:.4f}  {row['ms']:9.3f} ms  dense "
        f"{row['dense_ms']:9.2f} ms  {row['dense_ms'] / row['ms']:5.2f}x{memory}  sampled: density "
        f"{row['sampled']['density']:.3f}, {row['sampled']['ms']:.3f} ms",
        flush=True,
    )
    return row


def memory_of(each: Ordering, a: Attention, threshold: float) -> dict[str, Any]:
    """Memory of a call beside its inputs and its output."""
    bytes_out = a.query.numel() * a.query.element_size()
    extra = extra_memory(lambda: each.call(a, threshold=threshold), a.query.device, bytes_out)
    key_value = 2 * a.key.numel() * a.key.element_size()
    return {
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


def growths(rows: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """By order, and of dense attention: exponents of time by all lengths and by the ends alone."""
    found: dict[str, dict[str, float | None]] = {}
    of_orders: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        of_orders.setdefault(row["order"], []).append(row)
    for name, own in of_orders.items():
        tokens = [row["tokens"] for row in own]
        ms, sampled = [row["ms"] for row in own], [row["sampled"]["ms"] for row in own]
        found[name] = _growth(tokens, ms) | {
            f"sampled_{key}": value for key, value in _growth(tokens, sampled).items()
        }
    lengths = {row["tokens"]: row["dense_ms"] for row in rows}
    found["dense"] = _growth(list(lengths), list(lengths.values()))
    return found


def _growth(tokens: list[int], times: list[float]) -> dict[str, float | None]:
    return {
        "all": growth(tokens, times, GROWTH_FROM),
        "ends": ends(tokens, times, GROWTH_FROM),
    }


COLOURS = dict(zip(CHUNKS, ("#1f6feb", "#d1570a", "#2a8a3a"), strict=True))
"""Of the orders."""


def plot(result: dict[str, Any], path: Path) -> None:
    """Time against length, both logarithmic, and density."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    rows = result["rows"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    dense = {row["tokens"]: row["dense_ms"] for row in rows}
    left.loglog(list(dense), list(dense.values()), "o-", color="#888888", label="dense")
    for name, colour in COLOURS.items():
        own = [row for row in rows if row["order"] == name]
        if not own:
            continue
        tokens = [row["tokens"] for row in own]
        split = [row["sampled"]["ms"] for row in own]
        left.loglog(tokens, split, "o-", color=colour, label=f"split, {name}")
        density = [100 * row["sampled"]["density"] for row in own]
        right.semilogx(tokens, density, "o-", color=colour, label=name)
    left.set(xlabel="tokens", ylabel="ms", title=f"{result['heads']} head(s), head dim {HEAD_DIM}")
    right.set(
        xlabel="tokens",
        ylabel="density, %",
        ylim=(0, None),
        title=f"at relative L2 error {result['target']:g}",
    )
    for ax in (left, right):
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.legend(frameon=False)
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"freqopt on {result['environment']['device']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def table(result: dict[str, Any]) -> list[str]:
    """The documentation's tables: an order each, and how their times grow."""
    where, target = result["environment"], result["target"]
    heads = f"{result['heads']} head" + "s" * (result["heads"] > 1)
    fields = len(result["rows"][0]["fields"])
    lines = [
        f"{heads} of {HEAD_DIM}, bfloat16, Triton {where['triton']}, CUDA graphs.",
        f"The budget is that of relative L2 {target:g} by the op's own probes.",
        f"*error* is that of {SAMPLED_QUERIES:,} queries.",
        "On the right is the call whose *error* is the target.",
        f"Figures are geometric means of {fields} fields.",
        "*Memory* is what a call needs beside Q, K, V and its output, in sizes of K and V.",
        "",
        "| tokens | order | density | error | whole call, ms | dense, ms | against dense | "
        "memory | density at that error | call, ms | commit |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        other = row["sampled"]
        memory = row["extra_per_key_value"]
        lines.append(
            f"| {row['tokens']:,} | {row['order']} | {100 * row['density']:.2f} % | "
            f"{row['l2']:.4f} | {row['ms']:.2f} | {row['dense_ms']:.2f} | "
            f"{row['dense_ms'] / row['ms']:.1f}x | "
            f"{'' if memory is None else f'{memory:.2f}'} | "
            f"{100 * other['density']:.2f} % | {other['ms']:.2f} | "
            f"{row.get('commit', where['commit'])} |"
        )
    return [*lines, *_growth_table(growths(result["rows"]))]


def _growth_table(growths: dict[str, dict[str, float | None]]) -> list[str]:
    dense = growths["dense"]
    if dense["all"] is None:
        return []
    lines = [
        "",
        f"Exponents p of time as tokens^p, from {GROWTH_FROM:,} tokens on.",
        "In brackets: of the first and the last length alone.",
        "",
        "| order | error by the probes | error of the queries |",
        "|---|---|---|",
    ]
    for name, own in growths.items():
        if name != "dense":
            lines.append(
                f"| {name} | {own['all']:.2f} ({own['ends']:.2f}) | "
                f"**{own['sampled_all']:.2f}** ({own['sampled_ends']:.2f}) |"
            )
    return [*lines, f"| dense | {dense['all']:.2f} ({dense['ends']:.2f}) | |"]


def joined(rows: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows by length and order; of two of one length and order the new one."""
    kept = {(row["tokens"], row["order"]): row for row in [*rows, *new]}
    names = list(CHUNKS)
    return [kept[key] for key in sorted(kept, key=lambda key: (key[0], names.index(key[1])))]


def main(arguments: list[str] | None = None) -> None:
    """Run the command; `arguments` as on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=list(DEFAULT_SIZES), choices=GRIDS)
    parser.add_argument("--target", type=float, default=0.06, help="relative L2 error of the op")
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--fields", type=int, default=3, help="fields of each length")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=None, help="folder of the results")
    parser.add_argument("--orders", nargs="+", default=list(CHUNKS), choices=CHUNKS)
    given = parser.parse_args(arguments)
    asked = {"target": given.target, "heads": given.heads}
    device, result = torch.device(given.device), earlier("scaling", asked, given.out)
    for size in given.sizes:
        new = measure(size, given.target, device, given.heads, given.fields, given.orders)
        result["rows"] = joined(result["rows"], new)
        write("scaling", result, given.out)
    rows = result["rows"]
    print("\n".join(_growth_table(growths(rows))))
    path = write("scaling", result, given.out)
    if rows:
        plot(result, path.with_suffix(".png"))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
