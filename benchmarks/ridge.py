"""Would a first-order matrix fitted in calibration do better than the probe? A closed question.

`python -m benchmarks.ridge`: per head and timestep, the error that the split leaves after its own
probes is regressed on what H-bar is multiplied with (the query times its low-band mass), over all
queries of several videos. The matrix found is added on videos that were not fitted. For comparison
the same regression inside the call, from some of its own queries.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import RESULTS, environment, write
from benchmarks.split_case import Case, make_case, squared_errors
from benchmarks.tensors import noised_attention
from freqopt.config import DEFAULT_PROBES
from freqopt.kernels.reference import probe_positions
from freqopt.models_zoo.video_dit import load_pretrained

TIMES = (0.9, 0.6, 0.3)
FITTED, UNSEEN = 4, 2
STRENGTHS = (0.01, 0.1, 1.0, 10.0)
"""Ridge penalties tried, in units of the mean square of a feature; the best on the inputs that it
is judged on counts, in favour of the ridge."""

IN_CALL = (256, 1024)
"""Probes of the regression inside the call."""

Moments = tuple[Tensor, Tensor]
"""Sums over queries, (H, D, D) each: features by features, and residuals by features."""


def moments(case: Case, positions: Tensor | None = None) -> Moments:
    """Of the residual that the probe leaves, at all queries or at some."""
    probe = case.probe(probe_positions(case.tokens, DEFAULT_PROBES, case.query.device))
    features, left = case.low_queries(probe)[0], (case.truth - case.attend(probe))[0]
    if positions is not None:
        features, left = features[:, positions], left[:, positions]
    return features.mT @ features, left.mT @ features


def ridge(found: Sequence[Moments], strength: float) -> Tensor:
    """(H, D, D) matrices W of least squares, residual = W feature, with a penalty on W."""
    gram, cross = (torch.stack(parts).sum(0) for parts in zip(*found, strict=True))
    size = gram.shape[-1]
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    return torch.linalg.solve(gram + strength * mean * torch.eye(size), cross.mT).mT


def judge(case: Case, matrices: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    """Squared errors (H,) with the probe alone, and with each matrix of each way added."""
    probe = case.probe(probe_positions(case.tokens, DEFAULT_PROBES, case.query.device))
    out, features = case.attend(probe), case.low_queries(probe)
    found = {"probe alone": [squared_errors(out, case.truth)]}
    for name, several in matrices.items():
        found[name] = [squared_errors(out + features @ w.mT, case.truth) for w in several]
    return found


def measure(grid: tuple[int, int, int], density: float) -> dict[str, Any]:
    """Mean square error over layers, timesteps and unseen videos by way of fitting."""
    model = load_pretrained()
    fits: dict[tuple[float, int], list[Moments]] = {}
    for timestep in TIMES:
        for seed in range(FITTED):
            layers = noised_attention(model, grid, timestep=timestep, seed=seed)
            for layer, attention in enumerate(layers):
                fits.setdefault((timestep, layer), []).append(
                    moments(make_case(attention, density))
                )
    total: dict[str, list[list[Tensor]]] = {}
    for timestep in TIMES:
        for seed in range(FITTED, FITTED + UNSEEN):
            layers = noised_attention(model, grid, timestep=timestep, seed=seed)
            for layer, attention in enumerate(layers):
                case = make_case(attention, density)
                every = [m for time_ in TIMES for m in fits[time_, layer]]
                ways = {
                    "ridge per head and timestep": fits[timestep, layer],
                    "ridge per head": every,
                    "ridge on all queries of the call itself": [moments(case)],
                }
                for probes in IN_CALL:
                    at = probe_positions(case.tokens, probes, case.query.device)
                    ways[f"ridge in the call, {probes} probes"] = [moments(case, at)]
                matrices = {n: [ridge(found, s) for s in STRENGTHS] for n, found in ways.items()}
                for name, errors in judge(case, matrices).items():
                    total.setdefault(name, []).append(errors)
    return {name: summary(rows, total["probe alone"]) for name, rows in total.items()}


def summary(rows: list[list[Tensor]], probe: list[list[Tensor]]) -> dict[str, Any]:
    """Root mean square error at the best strength, and how many heads gained against the probe."""
    square = torch.stack([torch.stack(row) for row in rows])  # (cases, strengths, H)
    best = int(square.mean((0, 2)).argmin())
    alone = torch.stack([torch.stack(row) for row in probe])[:, 0]
    return {
        "error": float(square[:, best].mean().sqrt()),
        "strength": STRENGTHS[best] if square.shape[1] > 1 else None,
        "relative to the probe alone": float((square[:, best].mean() / alone.mean()).sqrt()),
        "median over heads": float((square[:, best] / alone).sqrt().median()),
        "share of heads better": float((square[:, best] < alone).float().mean()),
        "heads": square[:, 0].numel(),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the experiment; writes ridge.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--grid", default="5,18,24", help="tokens t,h,w (default: %(default)s)")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.15, 0.3])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder (default: %(default)s)")
    given = parser.parse_args(arguments)
    t, h, w = (int(extent) for extent in given.grid.split(","))
    started = time.perf_counter()
    result: dict[str, Any] = {"environment": environment(), "grid": [t, h, w], "densities": {}}
    for density in given.densities:
        found = measure((t, h, w), density)
        result["densities"][density] = found
        result["seconds"] = time.perf_counter() - started
        path = write("ridge", result, given.out)
        print(f"density {density:.0%}")
        for name, row in found.items():
            print(
                f"  {name:40} error {row['error']:.4f}, {row['relative to the probe alone']:.3f} "
                f"of the probe's, median {row['median over heads']:.3f}, better in "
                f"{row['share of heads better']:.0%} of {row['heads']} heads",
                flush=True,
            )
    print(f"wrote {path} in {result['seconds']:.0f} s")


if __name__ == "__main__":
    main()
