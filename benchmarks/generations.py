"""Whole generations against the dense one: `python -m benchmarks.generations`.

The zoo's model makes the same clips dense, with split attention, and with the same blocks exact and
the rest dropped, as block-sparse attention does. The first 0, 2, 5 or 10 steps are left dense in
turn, as others do. Clips are compared one by one (their PSNR differs by 10 dB), by PSNR, SSIM and
SSIM at several scales, and by the objects of the dense clip that stay (`benchmarks.objects`);
beside them stands what another dense backend alone makes of a clip.
`--distilled` takes the model of four steps, and makes it a plan of its own for each density.
`--frames`, `--height`, `--width` and `--steps` make it small enough for a CPU.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import freqopt
from benchmarks import rival_calls
from benchmarks.common import environment, write
from benchmarks.objects import Objects
from freqopt.config import DEFAULT_PROBES
from freqopt.demo import video as pictures
from freqopt.errors import OptionError
from freqopt.kernels.op import split_attention_op
from freqopt.models_zoo.distilled import ADAPTER, STEPS, load_distilled
from freqopt.models_zoo.sampling import denoising_samples, sample
from freqopt.models_zoo.video_dit import load_pretrained

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Grid = tuple[int, int, int]

WARM = (0, 2, 5, 10)
"""Steps that are left dense at the beginning."""

WARM_DISTILLED = (0, 1)
"""The same of the model of four steps."""

DENSITIES = (0.05, 0.10, 0.20)

PLANNED_ON, PASSES = 8, 36
"""Inputs that a plan is made on, and runs of the model that it may take, as the demo's plan."""


@contextmanager
def attending(attend: Attend) -> Iterator[None]:
    """F.scaled_dot_product_attention is something else meanwhile."""
    original = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda query, key, value: attend(query, key, value)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


def called(grid: Grid, density: float, query: Tensor, key: Tensor, value: Tensor) -> Any:
    """What our op returns, every head at one density, in the grid's order."""
    thresholds = torch.zeros(query.shape[1], device=query.device)
    return split_attention_op(
        query,
        key,
        value,
        thresholds,
        None,
        list(grid),
        0,
        0,
        query.shape[-1] ** -0.5,
        density,
        DEFAULT_PROBES,
        None,
        0,
    )


def split(grid: Grid, density: float) -> Attend:
    """Our op."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = called(grid, density, query, key, value)[0]
        return out

    return attend


def dropping(grid: Grid, density: float) -> Attend:
    """The blocks that our op has exact, and nothing of the rest."""
    from freqopt.kernels import chunked, reference
    from freqopt.kernels.layout import Inputs, TokenLayout, unpack_route

    layout = TokenLayout(grid, 0, 0)

    def on_cpu(query: Tensor, key: Tensor, value: Tensor, route: Tensor) -> Tensor:
        inputs = Inputs(query, key, value, query.new_zeros(query.shape[1]), None, layout)
        placed = chunked.place(inputs, chunked.Orders(None, None))
        (*heads, _, blocks), dim = route.shape, query.shape[-1]
        means, matrix = torch.zeros(*heads, blocks, dim), torch.zeros(*heads, dim, dim)
        nothing = chunked.Low(means, means, torch.full(route.shape, -torch.inf), matrix)
        part = chunked.attend_video(placed, nothing, route, dim**-0.5)
        out = torch.empty_like(query)
        layout.store(out, part.out.flatten(2, 3)[:, :, : layout.tokens], None)
        return out

    def on_gpu(query: Tensor, key: Tensor, value: Tensor, route: Tensor) -> Tensor:
        from benchmarks.tensors import Attention

        exact = route == reference.EXACT
        listed = (~exact).to(torch.int8).sort(stable=True).indices.to(torch.int32)
        own = rival_calls.Route(density, listed, exact.sum(-1).to(torch.int32))
        (rival,) = rival_calls.flex(Attention(query, key, value, grid), [own])
        assert rival.order is not None
        out = torch.empty_like(query)
        out[:, :, rival.order] = rival.run()
        return out

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        route = unpack_route(called(grid, density, query, key, value)[3], layout.tokens)
        return (on_gpu if query.is_cuda else on_cpu)(query, key, value, route)

    return attend


def generate(
    model: nn.Module, attend: Attend | None, size: dict[str, Any], *, warm: int = 0
) -> Tensor:
    """A clip (3, T, H, W), dense without `attend`; its first steps are dense anyway."""
    if attend is None:
        return sample(model, **size)[0].cpu()
    done = 0

    def stepping(video: Tensor, timestep: Tensor) -> Tensor:
        nonlocal done
        done += 1
        if done <= warm:
            first: Tensor = model(video, timestep)
            return first
        with attending(attend):
            output: Tensor = model(video, timestep)
        return output

    return sample(stepping, **size)[0].cpu()  # type: ignore[arg-type]


def scales_of_ssim(video: Tensor, reference: Tensor) -> float:
    """Mean SSIM over the frames at full, half and quarter size: coarse structure counts too."""
    values = []
    for factor in (1, 2, 4):
        if min(video.shape[2:]) // factor < 11:
            break
        small = [
            F.avg_pool2d(v.transpose(0, 1), factor).transpose(0, 1) for v in (video, reference)
        ]
        values.append(pictures.ssim(*small))
    return sum(values) / max(len(values), 1)


def compared(video: Tensor, reference: Tensor) -> dict[str, float]:
    """How close a clip is to the dense one."""
    return {
        "psnr_db": min(pictures.psnr(video, reference), 100.0),
        "ssim": pictures.ssim(video, reference),
        "ssim_scales": scales_of_ssim(video, reference),
    }


class Truth:
    """A dense clip that others are judged by."""

    def __init__(self, video: Tensor) -> None:
        self.video, self.objects = video, Objects(video)

    def judge(self, video: Tensor) -> dict[str, float]:
        """How close a clip is, and which of the objects it has."""
        return {**compared(video, self.video), **self.objects.kept(video)._asdict()}


def other_dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Dense attention by another order of sums: what no method can be closer than."""
    weights = (query @ key.transpose(2, 3) * query.shape[-1] ** -0.5).softmax(-1)
    return weights @ value


def measure(
    model: nn.Module,
    size: dict[str, Any],
    seeds: Sequence[int],
    densities: Sequence[float],
    warm: Sequence[int],
) -> list[dict[str, Any]]:
    """A row for each seed, method, density and number of dense steps."""
    grid = (size["frames"], size["height"] // 4, size["width"] // 4)
    rows = []
    for seed in seeds:
        own = {**size, "seed": seed}
        truth = Truth(generate(model, None, own))
        floor = truth.judge(generate(model, other_dense, own))
        rows.append({"seed": seed, "method": "another dense backend", **floor})
        print(f"seed {seed}: another dense backend {floor['psnr_db']:.1f} dB", flush=True)
        for method, make in (("freqopt", split), ("the rest dropped", dropping)):
            for density in densities:
                for first in warm:
                    if first >= size["steps"]:
                        continue
                    video = generate(model, make(grid, density), own, warm=first)
                    row = {
                        "seed": seed,
                        "method": method,
                        "density": density,
                        "dense_steps": first,
                        **truth.judge(video),
                    }
                    print(
                        f"seed {seed}: {method:16} density {density:.3g}, {first:2} dense steps: "
                        f"{row['psnr_db']:.1f} dB, SSIM {row['ssim']:.4f}, "
                        f"objects kept {row['objects_kept']:.0%}",
                        flush=True,
                    )
                    rows.append(row)
    return rows


def planned(
    model: nn.Module, size: dict[str, Any], seeds: Sequence[int], densities: Sequence[float]
) -> tuple[list[dict[str, Any]], list[str]]:
    """A row for each seed and density, of the model with a plan made on steps of other clips.

    Also returned is why a density has none: short clips have no plan for low ones.
    """
    truths = {seed: Truth(generate(model, None, {**size, "seed": seed})) for seed in seeds}
    samples = denoising_samples(model, PLANNED_ON, **size)
    rows, without = [], []
    for density in densities:
        try:
            plan = freqopt.calibrate(
                model, samples, target_density=density, rounds=0, passes=PASSES, progress=False
            )
        except OptionError as error:
            without.append(f"density {density:g}: {error}")
            print(f"no plan: {without[-1]}", flush=True)
            continue
        split_sites = sum(site.decision == "split" for site in plan.sites.values())
        handle = freqopt.optimize(model, plan, route="eager")
        try:
            for seed, truth in truths.items():
                video = generate(model, None, {**size, "seed": seed})
                row = {
                    "seed": seed,
                    "method": "freqopt, own plan",
                    "density": density,
                    "dense_steps": 0,
                    "planned_density": plan.mean_density,
                    "split_sites": split_sites,
                    **truth.judge(video),
                }
                print(
                    f"seed {seed}: own plan, density {plan.mean_density:.3g}, {split_sites} sites "
                    f"split: {row['psnr_db']:.1f} dB, SSIM {row['ssim']:.4f}",
                    flush=True,
                )
                rows.append(row)
        finally:
            handle.disable()
    return rows, without


def main(arguments: list[str] | None = None) -> None:
    """Generate, compare, and write generations.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--frames", type=int, default=21)
    parser.add_argument("--height", type=int, default=120, help="pixels, a multiple of 4")
    parser.add_argument("--width", type=int, default=208, help="pixels, a multiple of 4")
    parser.add_argument("--distilled", action="store_true", help="the model of four steps")
    parser.add_argument("--adapter", type=Path, default=ADAPTER, help="its adapter's file")
    parser.add_argument("--steps", type=int, default=None, help="25, or distilled 4")
    parser.add_argument("--seeds", type=int, default=3, help="clips")
    parser.add_argument("--densities", nargs="+", type=float, default=list(DENSITIES))
    parser.add_argument("--warm", nargs="+", type=int, default=None, help="dense steps")
    parser.add_argument("--out", type=Path, default=None, help="folder of the results")
    given = parser.parse_args(arguments)
    warm = given.warm or (WARM_DISTILLED if given.distilled else WARM)
    dtype = torch.bfloat16 if given.device.startswith("cuda") else torch.float32
    size = {
        "frames": given.frames,
        "height": given.height,
        "width": given.width,
        "steps": given.steps or (STEPS if given.distilled else 25),
        "device": given.device,
        "dtype": dtype,
    }
    if given.distilled:
        model = load_distilled(device=given.device, dtype=dtype, path=given.adapter)
    else:
        model = load_pretrained(device=given.device, dtype=dtype)
    rows: list[dict[str, Any]] = []
    without: list[str] = []

    def written() -> Path:
        result = {
            "environment": environment(),
            "tokens": math.prod((given.frames, given.height // 4, given.width // 4)),
            "settings": {**size, "dtype": str(dtype)},
            "rows": rows,
            "without_plan": without,
        }
        name = "generations_distilled" if given.distilled else "generations"
        return write(name, result, given.out)

    with torch.no_grad():
        for seed in range(given.seeds):
            rows += measure(model, size, [seed], given.densities, warm)
            path = written()  # of long clips a run may be cut off
        if given.distilled:
            more, without = planned(model, size, range(given.seeds), given.densities)
            rows += more
            path = written()
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
