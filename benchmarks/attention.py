"""Error against time of the whole op, beside dense attention: `python -m benchmarks.attention`.

Every row is one call on the trained DiT's Q, K and V under one order of its tokens: its relative
error against dense attention in the same run, the density reached, the time of the whole call, of
the order alone, of the parts one by one, and of everything but the attention kernel together. A row
whose correctness gate fails prints no time. FlexAttention on the grid's routes is measured in the
same run; `benchmarks.rivals` measures what else is installed. `--small` runs it all on a CPU, to
see that it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import freqopt
from benchmarks import orders, rival_calls
from benchmarks.common import environment, graph_milliseconds, milliseconds, timed, write
from benchmarks.orders import GRID, Ordering, head_errors
from benchmarks.tensors import Attention, zoo_attention
from freqopt.config import DEFAULT_PROBES, KEY_BLOCK
from freqopt.models_zoo.video_dit import load_pretrained

GRIDS = {"32K": (21, 30, 52), "75K": (21, 45, 80)}
SMALL = (2, 8, 10)
OF_KEYS, OF_QUERIES = (16, 64, 64), (2, 64, 64)
"""Grids of a rectangular call: a few frames against all of a cache, or a rank's share."""
RECTANGULAR_DENSITY = 0.1
DENSITIES = (0.02, 0.05, 0.075, 0.10, 0.15, 0.20, 0.30, 1.0)
CHOOSE_AT, CHOOSE_ON = (0.05, 0.10), {"seed": 1, "timestep": 0.3}
"""Densities and tensors that the order of each head is chosen on."""

DENSE = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def dense_times(a: Attention) -> dict[str, float]:
    """Milliseconds of each dense backend that runs here."""
    device = a.query.device

    def call() -> Tensor:
        return F.scaled_dot_product_attention(a.query, a.key, a.value)

    if device.type != "cuda":
        return {"cpu": timed(call, device)}
    times = {}
    for name, backend in DENSE.items():
        with sdpa_kernel(backend):
            times[name] = timed(call, device)
    return times


def relative_errors(out: Tensor, truth: Tensor) -> tuple[float, float]:
    """Relative L1 and L2 error, mean over heads."""
    l1, l2 = head_errors(out, truth)
    return float(l1.mean()), float(l2.mean())


def call_on(a: Attention, each: Ordering | None = None) -> Any:
    """The call of this problem, as its launches take it; in the grid's order if none is named."""
    from freqopt.kernels.forward.split import call_of
    from freqopt.kernels.layout import Inputs, Settings, TokenLayout

    layout = TokenLayout(a.grid, 0, 0)
    inputs = Inputs(a.query, a.key, a.value, a.query.new_zeros(a.query.shape[1]), None, layout)
    settings = Settings(a.query.shape[-1] ** -0.5, 0.0, DEFAULT_PROBES)
    if each is not None and each.largest:
        inputs = inputs._replace(chunks=each.chunks)
        settings = settings._replace(largest_chunk=each.largest)
    return call_of(inputs, settings, *inputs.order_memory(settings))


def threshold_for(a: Attention, density: float) -> float:
    """One threshold for all heads whose mean density is the given one (0 for density 1)."""
    from freqopt.kernels.autotune import threshold_at
    from freqopt.kernels.forward.summaries import summarise

    if density >= 1.0:
        return 0.0
    call = call_on(a)
    return threshold_at(call, summarise(call), density)


def part_times(a: Attention, threshold: float, each: Ordering) -> tuple[dict[str, float], Any]:
    """Milliseconds of each part of one call but the order, and its route."""
    from freqopt.kernels.forward import attention, routing, summaries
    from freqopt.kernels.forward.call import Target
    from freqopt.kernels.forward.probe import fit_probes, probe_space

    call = call_on(a, each)
    thresholds = torch.full((a.query.shape[1],), threshold, device=a.query.device)
    space = probe_space(call, -(-a.query.shape[2] // KEY_BLOCK), DEFAULT_PROBES)
    target = Target(torch.empty_like(a.query.transpose(1, 2)).transpose(1, 2), None)
    made: dict[str, Any] = {}

    def summarise() -> None:
        made["summaries"] = summaries.summarise(call)

    def route() -> None:
        made["route"] = routing.make_route(call, made["summaries"], thresholds)

    def probe() -> None:
        fit_probes(call, made["summaries"], made["route"], space)

    def attend() -> None:
        attention.attend(call, made["summaries"], made["route"], space.fitted, target)

    steps: list[Callable[[], None]] = [summarise, route, probe, attend]
    return {step.__name__: milliseconds(step, repeat=50) for step in steps}, made["route"]


@contextlib.contextmanager
def without_attention() -> Iterator[None]:
    """Calls in here leave out the attention kernel, and give no output: everything else is left."""
    from freqopt.kernels.forward import short
    from freqopt.kernels.repeat import REPEATER

    left_out = mock.patch.object(short, "attend", lambda *given, **options: None)
    with REPEATER.plainly(), left_out:
        yield


def graph_times(call: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of a whole call as a CUDA graph, of everything but attention, and its share."""
    whole = graph_milliseconds(call)
    with without_attention():
        other = graph_milliseconds(call)
    return {"graph_ms": whole, "other_ms": other, "other_share": other / whole}


def rival_row(rival: rival_calls.Rival, reference: Tensor, best: float) -> dict[str, Any] | None:
    """Error and time of a rival, None if it does not run here."""
    try:
        out = rival.run()
        time = milliseconds(rival.run)
    except Exception as error:  # whatever another package raises: the benchmark goes on
        print(f"  {rival.name} does not run here: {type(error).__name__}: {error}"[:200])
        return None
    l1, l2 = relative_errors(
        out, reference if rival.order is None else reference[:, :, rival.order]
    )
    print(
        f"density {rival.density:6.3f}  L1 {l1:.4f}  L2 {l2:.4f}  {'':12}  {time:7.3f} ms"
        f"  {best / time:5.2f}x  {rival.name}",
        flush=True,
    )
    return {
        "name": rival.name,
        "density": rival.density,
        "l1": l1,
        "l2": l2,
        "ms": time,
        "speedup": best / time,
    }


def order_row(
    a: Attention, each: Ordering, density: float, reference: Tensor, best: float
) -> tuple[dict[str, Any], Any] | None:
    """One call under an order, None where its gate fails; and its route, None on a CPU.

    best: milliseconds of the faster dense attention.
    """
    device, threshold = a.query.device, orders.threshold_at(each, a, density)

    def call() -> Any:
        return each.call(a, threshold=threshold)

    found = call()
    l1, l2 = relative_errors(found.out, reference)
    if not torch.isfinite(found.out).all() or (density >= 1.0 and l2 > 1e-2):
        print(f"density {density}, {each.name}: FAILED its gate (relative L2 {l2:.3g}); no time")
        return None
    total, make = timed(call, device), each.make(a.key, a.grid)
    order_ms = 0.0 if make is None else timed(make, device)
    row: dict[str, Any] = {
        "order": each.name,
        "density": float(found.density.mean()),
        "threshold": threshold,
        "by_density_ms": timed(lambda: each.call(a, density=density), device),
        "l1": l1,
        "l2": l2,
        "probe_error": float(found.probe_error.mean()),
        "ms": total,
        "speedup": best / total,
        "order_ms": order_ms,
        "order_share": order_ms / total,
    }
    said = (
        f"{each.name:14} density {row['density']:6.3f}  L1 {l1:.4f}  L2 {l2:.4f}"
        f"  probe {row['probe_error']:.4f}  {total:7.3f} ms  {best / total:5.2f}x"
        f"  order {order_ms:.3f} ms, {row['order_share']:.1%}"
    )
    route = None
    if device.type == "cuda":
        parts, route = part_times(a, threshold, each)
        flops = 4 * a.query.shape[1] * a.query.shape[2] ** 2 * a.query.shape[3]
        row |= {"parts_ms": parts, **graph_times(call)}
        row["attend_tflops"] = row["density"] * flops / parts["attend"] / 1e9
        said += (
            "  "
            + "  ".join(f"{k} {v:.3f}" for k, v in parts.items())
            + f"  {row['attend_tflops']:.0f} TFLOP/s useful  everything but attention "
            f"{row['other_ms']:.3f} ms, {row['other_share']:.1%}"
        )
    print(said, flush=True)
    return row, route


def dense_attention(a: Attention) -> Tensor:
    """What errors are measured against: flash attention where it runs."""
    with contextlib.ExitStack() as stack:
        if a.query.is_cuda:
            stack.enter_context(sdpa_kernel(SDPBackend.FLASH_ATTENTION))
        return F.scaled_dot_product_attention(a.query, a.key, a.value)


def measure(
    a: Attention, densities: tuple[float, ...], orderings: list[Ordering] | None = None
) -> dict[str, Any]:
    """All rows for one problem size: every order, the grid's if none is named, at every density."""
    dense = dense_times(a)
    best = min(dense.values())
    truth = F.scaled_dot_product_attention(
        a.query.float()[:, :2], a.key.float()[:, :2], a.value.float()[:, :2]
    )
    reference = dense_attention(a)
    floor = relative_errors(reference[:, :2], truth)
    rows: list[dict[str, Any]] = []
    others: list[dict[str, Any] | None] = []
    for each in orderings or orders.shared_orderings(a)[:1]:
        for density in densities:
            found = order_row(a, each, density, reference, best)
            if found is None:
                continue
            row, route = found
            rows.append(row)
            if density < 1.0 and each.name == GRID and route is not None:
                near = rival_calls.Route(row["density"], route.exact_list, route.counts)
                others += [rival_row(r, reference, best) for r in rival_calls.flex(a, [near])]
    return {
        "tokens": a.query.shape[2],
        "grid": a.grid,
        "heads": a.query.shape[1],
        "head_dim": a.query.shape[3],
        "dtype": str(a.query.dtype),
        "dense_ms": dense,
        "dense_bf16_l1": floor[0],
        "rows": rows,
        "rivals": [row for row in others if row],
    }


MARKS = {**dict.fromkeys(orders.CHUNKS, "o-"), orders.PER_HEAD: "^--"}
COLORS = ("#1f6feb", "#d29922", "#cf222e", "#8250df")
"""Of the curves of a plot, an order each."""


def plot(result: dict[str, Any], path: Path) -> None:
    """Error against time, both logarithmic, one curve a problem; dense as a vertical line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    figure, axes = plt.subplots(
        1, len(result["problems"]), figsize=(5.2 * len(result["problems"]), 3.8), squeeze=False
    )
    for ax, problem in zip(axes[0], result["problems"], strict=True):
        split = [r for r in problem["rows"] if r["density"] < 0.99]
        rows = [r for r in split if r["order"] == GRID]
        for (name, mark), color in zip(MARKS.items(), COLORS, strict=True):
            own = [r for r in split if r["order"] == name]
            ax.loglog(
                [r["ms"] for r in own],
                [r["l1"] for r in own],
                mark,
                color=color,
                label=f"split, {name}",
                markersize=5,
            )
        for r in rows:
            ax.annotate(
                f"{100 * r['density']:.3g} %  {r['speedup']:.1f}x",
                (r["ms"], r["l1"]),
                textcoords="offset points",
                xytext=(6, 4),
                fontsize=7,
                color=COLORS[0],
            )
        for name in sorted({r["name"] for r in problem.get("rivals", [])}):
            other = [r for r in problem["rivals"] if r["name"] == name]
            ax.plot(
                [r["ms"] for r in other],
                [r["l1"] for r in other],
                "s--",
                label=name,
                color="#888888",
                markersize=4,
                linewidth=1,
            )
        ax.legend(fontsize=8, frameon=False, loc="upper right", bbox_to_anchor=(0.93, 1))
        best = min(problem["dense_ms"].values())
        ax.axvline(best, color="#888", linestyle="--")
        ax.annotate(
            f"dense {best:.1f} ms",
            (best, rows[-1]["l1"]),
            rotation=90,
            va="bottom",
            ha="right",
            fontsize=8,
            color="#555",
        )
        ax.set(
            xlabel="time of the whole call, ms",
            ylabel="relative L1 error, mean over heads",
            title=f"{problem['heads']} heads x {problem['tokens']:,} tokens",
            xlim=(0.35 * rows[0]["ms"], 1.3 * best),
            ylim=(0.6 * min(r["l1"] for r in split), None),
        )
        ax.xaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
        ax.yaxis.set_minor_formatter("{x:g}")
        ax.tick_params(axis="y", which="minor", labelsize=7)
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"freqopt on {result['environment']['device']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def problem_of(
    grid: tuple[int, int, int], densities: tuple[float, ...], device: str
) -> dict[str, Any]:
    """All rows of one grid, with the choice per head that other tensors of it give."""
    model = load_pretrained(
        device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32
    )
    other = zoo_attention(grid, model=model, **CHOOSE_ON)
    chosen = orders.chosen_per_head(other, dense_attention(other), CHOOSE_AT)
    del other
    a = zoo_attention(grid, model=model)
    print(f"{a.query.shape[1]} heads x {a.query.shape[2]} tokens, {a.query.dtype}", flush=True)
    problem = measure(a, densities, [*orders.shared_orderings(a), chosen])
    problem["heads_by_content"] = int((chosen.chunks > 0).sum())
    print("dense: " + ", ".join(f"{k} {v:.2f} ms" for k, v in problem["dense_ms"].items()))
    return problem


def rectangular(
    keys: tuple[int, int, int], queries: tuple[int, int, int], device: str
) -> dict[str, Any]:
    """Queries of the first frames against all keys, in each order: error and time beside dense."""
    model = load_pretrained(
        device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32
    )
    whole = zoo_attention(keys, model=model)
    query = whole.query[:, :, : math.prod(queries)].contiguous()
    a = Attention(query, whole.key, whole.value, keys)
    reference, dense = dense_attention(a), min(dense_times(a).values())
    rows = []
    for order in ("grid", "content"):

        def call(order: str = order) -> tuple[Tensor, Any]:
            return freqopt.split_attention(
                *a[:3],
                grid=keys,
                query_grid=queries,
                order=order,
                density=RECTANGULAR_DENSITY,
                return_stats=True,
            )

        out, stats = call()
        l1, l2 = relative_errors(out, reference)
        time = timed(call, query.device)
        density = float(stats.density.mean())
        rows.append({"order": order, "density": density, "l1": l1, "l2": l2, "ms": time})
        rows[-1]["speedup"] = dense / time
        print(
            f"{query.shape[2]:,} x {whole.key.shape[2]:,}, {order}: density {density:.3f}  "
            f"L1 {l1:.4f}  L2 {l2:.4f}  {time:.3f} ms  {dense / time:.2f}x",
            flush=True,
        )
    lengths = {"queries": query.shape[2], "keys": whole.key.shape[2], "heads": query.shape[1]}
    return {**lengths, "dense_ms": dense, "rows": rows}


def main(arguments: list[str] | None = None) -> None:
    """Measure all problems; writes attention.json and attention.png."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=list(GRIDS), choices=GRIDS)
    parser.add_argument("--densities", nargs="+", type=float, default=list(DENSITIES))
    parser.add_argument(
        "--small", action="store_true", help=f"a grid of {SMALL} on a CPU instead of the sizes"
    )
    parser.add_argument("--out", type=Path, default=None, help="folder of the results")
    given = parser.parse_args(arguments)
    if given.small and given.out is None:
        parser.error("--small needs --out: its figures are no results of the benchmark")
    grids = [SMALL] if given.small else [GRIDS[size] for size in given.sizes]
    device = "cpu" if given.small else "cuda"
    cut = (SMALL, (1, *SMALL[1:])) if given.small else (OF_KEYS, OF_QUERIES)
    across = rectangular(*cut, device)
    problems: list[dict[str, Any]] = []
    result = {"environment": environment(), "problems": problems, "rectangular": across}
    for grid in grids:
        problems.append(problem_of(grid, tuple(given.densities), device))
        path = write("attention", result, given.out)
        plot(result, path.with_suffix(".png"))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
