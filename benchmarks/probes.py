"""How many probes, and where: `python -m benchmarks.probes`.

For every layer of the zoo's DiT, at several timesteps, videos and densities: the error that probes
report of the call, against its true error with the coefficients that the same probes fitted. Probes
are strided in token order, as the op takes them, or drawn at random without replacement.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import RESULTS, environment, write
from benchmarks.split_case import Case, make_case, squared_errors
from benchmarks.tensors import noised_attention
from freqopt.calibration_call import head_error
from freqopt.kernels.reference import probe_positions
from freqopt.models_zoo.video_dit import load_pretrained

COUNTS = (16, 32, 64, 128, 256)
PLACEMENTS = ("strided", "random")
TIMES = (0.9, 0.6, 0.3)
DENSITIES = (0.15, 0.3)
VIDEOS = 2


def positions(placement: str, tokens: int, count: int, seed: int) -> Tensor:
    """Token-order positions of probes, (count,) int64."""
    if placement == "strided":
        return probe_positions(tokens, count, torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(tokens, generator=generator)[:count].sort().values


def judge(case: Case, at: Tensor) -> list[dict[str, float]]:
    """Of every head: reported and true relative error, and the signed part of the true one."""
    probe = case.probe(at)
    out = case.attend(probe)
    true = squared_errors(out, case.truth).sqrt()
    _, along = head_error(out, case.truth)
    bias = along / case.truth.square().sum((0, 2, 3))
    return [
        {"probe": float(p), "true": float(t), "bias": float(b)}
        for p, t, b in zip(probe.error[0], true, bias, strict=True)
    ]


def summary(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Agreement of reported with true errors over calls, and how large the true ones are."""
    reported, true, bias = (np.array([row[k] for row in rows]) for k in ("probe", "true", "bias"))
    ranks = np.stack([np.argsort(np.argsort(values)) for values in (reported, true)])
    return {
        "rank_correlation": float(np.corrcoef(ranks)[0, 1]),
        "mean_ratio": float((reported / true).mean()),
        "spread_of_ratio": float(np.log(reported / true).std()),
        "true_error": float(np.sqrt(np.square(true).mean())),
        "mean_size_of_bias": float(np.abs(bias).mean()),
    }


def measure(grid: tuple[int, int, int]) -> list[dict[str, Any]]:
    """A row for each placement and count."""
    model = load_pretrained()
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    for timestep in TIMES:
        for seed in range(VIDEOS):
            layers = noised_attention(model, grid, timestep=timestep, seed=seed)
            for layer, attention in enumerate(layers):
                for density in DENSITIES:
                    case = make_case(attention, density)
                    for placement in PLACEMENTS:
                        for count in COUNTS:
                            at = positions(placement, case.tokens, count, 100 * seed + layer)
                            found.setdefault((placement, count), []).extend(judge(case, at))
    return [
        {"placement": placement, "probes": count, "calls": len(rows), **summary(rows)}
        for (placement, count), rows in found.items()
    ]


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Agreement and true error against the number of probes."""
    import matplotlib
    from matplotlib.figure import Figure

    from freqopt.reporting_figures import BLUE, GREY, STYLE

    panels = {
        "rank_correlation": ("rank correlation with the true error", (0.8, 1.0)),
        "mean_ratio": ("reported / true error, mean", (0.9, 1.1)),
        "true_error": ("true relative L2 error, rms", (0.0, 0.2)),
    }
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11.5, 3.6), layout="constrained")
        axes = figure.subplots(1, 3)
        for ax, (name, (title, limits)) in zip(axes, panels.items(), strict=True):
            for placement, colour in zip(PLACEMENTS, (BLUE, GREY), strict=True):
                points = [(r["probes"], r[name]) for r in rows if r["placement"] == placement]
                ax.plot(*zip(*points, strict=True), "o-", color=colour, label=placement)
            ax.set(title=title, xlabel="probes per head", xscale="log", ylim=limits)
            ax.set_xticks(COUNTS, [str(count) for count in COUNTS])
            ax.minorticks_off()
        figure.axes[0].legend(loc="lower right")
        figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the experiment; writes probes.json and probes.png."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--grid", default="5,12,20", help="tokens t,h,w (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder (default: %(default)s)")
    given = parser.parse_args(arguments)
    t, h, w = (int(extent) for extent in given.grid.split(","))
    started = time.perf_counter()
    rows = measure((t, h, w))
    result = {
        "environment": environment(), "grid": [t, h, w], "times": TIMES, "densities": DENSITIES,
        "videos": VIDEOS, "rows": rows, "seconds": time.perf_counter() - started,
    }  # fmt: skip
    path = write("probes", result, given.out)
    draw(rows, path.with_suffix(".png"))
    for row in rows:
        print(
            f"{row['placement']:8} {row['probes']:4}  rank correlation "
            f"{row['rank_correlation']:.3f}  ratio {row['mean_ratio']:.3f} "
            f"(spread {row['spread_of_ratio']:.3f})  true error {row['true_error']:.4f}  "
            f"bias {row['mean_size_of_bias']:.5f}"
        )
    print(f"wrote {path} in {result['seconds']:.0f} s")


if __name__ == "__main__":
    main()
