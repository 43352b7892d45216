"""Error against time of the whole op, beside dense attention: `python -m benchmarks.attention`.

Every row is one call on the trained DiT's own Q, K and V: its relative error against dense
attention in the same run, the density reached, the time of the whole call, of its parts one by one,
and of everything but the attention kernel together. A row whose correctness gate fails prints no
time. Rivals that run here (`benchmarks.rivals`) are measured
in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import rivals
from benchmarks.common import environment, graph_milliseconds, milliseconds, write
from benchmarks.tensors import Attention, zoo_attention
from freqopt.config import DEFAULT_PROBES, KEY_BLOCK

GRIDS = {"32K": (21, 30, 52), "75K": (21, 45, 80)}
DENSITIES = (0.02, 0.05, 0.075, 0.10, 0.15, 0.20, 0.30, 1.0)
DENSE = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def dense_times(a: Attention) -> dict[str, float]:
    """Milliseconds of each dense backend that runs here."""
    times = {}
    for name, backend in DENSE.items():
        with sdpa_kernel(backend):
            times[name] = milliseconds(
                lambda: F.scaled_dot_product_attention(a.query, a.key, a.value)
            )
    return times


def relative_errors(out: Tensor, truth: Tensor) -> tuple[float, float]:
    """Relative L1 and L2 error, mean over heads."""
    out, truth = out.float(), truth.float()
    l1 = (out - truth).abs().sum((2, 3)) / truth.abs().sum((2, 3))
    l2 = (out - truth).square().sum((2, 3)).sqrt() / truth.square().sum((2, 3)).sqrt()
    return float(l1.mean()), float(l2.mean())


def call_on(a: Attention) -> Any:
    """The call of this problem, as its launches take it."""
    from freqopt.kernels.forward.split import call_of
    from freqopt.kernels.layout import Inputs, Settings, TokenLayout

    layout = TokenLayout(a.grid, 0, 0)
    inputs = Inputs(a.query, a.key, a.value, a.query.new_zeros(a.query.shape[1]), None, layout)
    return call_of(inputs, Settings(a.query.shape[-1] ** -0.5, 0.0, DEFAULT_PROBES), None, None)


def threshold_for(a: Attention, density: float) -> float:
    """One threshold for all heads whose mean density is the given one (0 for density 1)."""
    from freqopt.kernels.autotune import threshold_at
    from freqopt.kernels.forward.summaries import summarise

    if density >= 1.0:
        return 0.0
    call = call_on(a)
    return threshold_at(call, summarise(call), density)


def part_times(a: Attention, threshold: float) -> tuple[dict[str, float], Any]:
    """Milliseconds of each part of one call, and its route."""
    from freqopt.kernels.forward import attention, routing, summaries
    from freqopt.kernels.forward.call import Target
    from freqopt.kernels.forward.probe import fit_probes, probe_space

    call = call_on(a)
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
        attention.attend(call, made["summaries"], made["route"], space.coefficients, target)

    steps: list[Callable[[], None]] = [summarise, route, probe, attend]
    return {step.__name__: milliseconds(step, repeat=50) for step in steps}, made["route"]


@contextlib.contextmanager
def without_attention() -> Iterator[None]:
    """Calls in here leave out the attention kernel, and give no output: everything else is left."""
    from freqopt.kernels.forward import short

    with mock.patch.object(short, "attend", lambda *given, **options: None):
        yield


def graph_times(call: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of a whole call as a CUDA graph, of everything but attention, and its share."""
    whole = graph_milliseconds(call)
    with without_attention():
        other = graph_milliseconds(call)
    return {"graph_ms": whole, "other_ms": other, "other_share": other / whole}


def rival_row(rival: rivals.Rival, reference: Tensor, best: float) -> dict[str, Any] | None:
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
        "name": rival.name, "density": rival.density, "l1": l1, "l2": l2, "ms": time,
        "speedup": best / time,
    }  # fmt: skip


def measure(a: Attention, densities: tuple[float, ...]) -> dict[str, Any]:
    """All rows for one problem size."""
    import freqopt

    dense = dense_times(a)
    best = min(dense.values())
    truth = F.scaled_dot_product_attention(a.query.float()[:, :2], a.key.float()[:, :2],
                                           a.value.float()[:, :2])  # fmt: skip
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        reference = F.scaled_dot_product_attention(a.query, a.key, a.value)
    floor = relative_errors(reference[:, :2], truth)
    rows: list[dict[str, Any]] = []
    others = [rival_row(rival, reference, best) for rival in rivals.installed(a)]
    flops = 4 * a.query.shape[1] * a.query.shape[2] ** 2 * a.query.shape[3]
    for density in densities:
        threshold = threshold_for(a, density)

        def call(threshold: float = threshold) -> Any:
            return freqopt.split_attention(
                a.query, a.key, a.value, grid=a.grid, threshold=threshold, return_stats=True
            )

        out, stats = call()
        l1, l2 = relative_errors(out, reference)
        if not torch.isfinite(out).all() or (density >= 1.0 and l2 > 1e-2):
            print(f"density {density}: FAILED its gate (relative L2 {l2:.3g}); no time reported")
            continue
        total = milliseconds(call)
        parts, route = part_times(a, threshold)
        reached = float(stats.density.mean())
        rows.append(
            {
                "density": reached, "threshold": threshold, "l1": l1, "l2": l2,
                "probe_error": float(stats.probe_error.mean()), "ms": total,
                "speedup": best / total, "parts_ms": parts, **graph_times(call),
                "attend_tflops": reached * flops / parts["attend"] / 1e9,
            }
        )  # fmt: skip
        print(
            f"density {reached:6.3f}  L1 {l1:.4f}  L2 {l2:.4f}  probe {rows[-1]['probe_error']:.4f}"
            f"  {total:7.3f} ms  {best / total:5.2f}x  "
            + "  ".join(f"{k} {v:.3f}" for k, v in parts.items())
            + f"  {rows[-1]['attend_tflops']:.0f} TFLOP/s useful  everything but attention "
            f"{rows[-1]['other_ms']:.3f} ms, {rows[-1]['other_share']:.1%}",
            flush=True,
        )
        if density < 1.0:
            found = rivals.at_density(a, reached, route.exact_list, route.counts)
            others += [rival_row(rival, reference, best) for rival in found]
    return {
        "tokens": a.query.shape[2], "grid": a.grid, "heads": a.query.shape[1],
        "head_dim": a.query.shape[3], "dtype": str(a.query.dtype), "dense_ms": dense,
        "dense_bf16_l1": floor[0], "rows": rows, "rivals": [row for row in others if row],
    }  # fmt: skip


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
        rows = [r for r in problem["rows"] if r["density"] < 1]
        ax.loglog(
            [r["ms"] for r in rows], [r["l1"] for r in rows], "o-", color="#1f6feb", label="split"
        )
        for r in rows:
            ax.annotate(
                f"{100 * r['density']:.3g} %  {r['speedup']:.1f}x", (r["ms"], r["l1"]),
                textcoords="offset points", xytext=(-5, -3), ha="right", va="top", fontsize=7,
            )  # fmt: skip
        for name in sorted({r["name"] for r in problem.get("rivals", [])}):
            other = [r for r in problem["rivals"] if r["name"] == name]
            ax.plot([r["ms"] for r in other], [r["l1"] for r in other], "s--", label=name,
                    color="#888888", markersize=4, linewidth=1)  # fmt: skip
        ax.legend(fontsize=8, frameon=False, loc="upper right", bbox_to_anchor=(0.93, 1))
        best = min(problem["dense_ms"].values())
        ax.axvline(best, color="#888", linestyle="--")
        ax.annotate(f"dense {best:.1f} ms", (best, rows[-1]["l1"]), rotation=90, va="bottom",
                    ha="right", fontsize=8, color="#555")  # fmt: skip
        ax.set(
            xlabel="time of the whole call, ms", ylabel="relative L1 error, mean over heads",
            title=f"{problem['heads']} heads x {problem['tokens']:,} tokens",
            xlim=(0.35 * rows[0]["ms"], 1.3 * best), ylim=(0.6 * rows[-1]["l1"], None),
        )  # fmt: skip
        ax.xaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
        ax.yaxis.set_minor_formatter("{x:g}")
        ax.tick_params(axis="y", which="minor", labelsize=7)
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"freqopt on {result['environment']['device']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure all problems; writes attention.json and attention.png."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=list(GRIDS), choices=GRIDS)
    parser.add_argument("--densities", nargs="+", type=float, default=list(DENSITIES))
    parser.add_argument("--out", type=Path, default=None, help="folder of the results")
    arguments = parser.parse_args()
    problems = []
    for size in arguments.sizes:
        a = zoo_attention(GRIDS[size])
        print(f"{a.query.shape[1]} heads x {a.query.shape[2]} tokens, {a.query.dtype}", flush=True)
        problems.append(measure(a, tuple(arguments.densities)))
        print("dense: " + ", ".join(f"{k} {v:.2f} ms" for k, v in problems[-1]["dense_ms"].items()))
    result = {"environment": environment(), "problems": problems}
    path = write("attention", result, arguments.out)
    plot(result, path.with_suffix(".png"))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
