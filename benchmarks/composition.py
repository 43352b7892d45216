"""The split together with other ways to save time: `python -m benchmarks.composition`.

A transformer of Wan 2.1 14B's size (`benchmarks.large`; random weights) takes consecutive steps of
one trajectory, blocks compiled, dense and split, each alone and with diffusers' first-block cache,
cache-dit, guidance by a second branch, in CUDA graphs, and with linear layers in FP8 and INT8
(torchao); without a compiler alone and with diffusers' pyramid attention broadcast. Measured are
the time of a step, and the error of the outputs against the dense model's, of guided ones against
its guided ones. The latents of a dense and of a split step are decoded by Wan's autoencoder (random
weights), whole and in tiles. The zoo's trained model makes a clip in some of these ways: PSNR
against the dense clip. What is not installed or fails is a row with the reason. Rows are written
one by one, so that `--seconds` may end a run, and kept: another goes on. `--small` fits a CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import freqopt
from benchmarks import composition_decoder as decoding
from benchmarks import composition_ways as ways
from benchmarks import generations, large
from benchmarks.common import earlier, write
from benchmarks.natural import natural_field
from benchmarks.plans import uniform_plan
from freqopt.config import DEFAULT_PROBES
from freqopt.kernels.op import split_attention_op
from freqopt.models_zoo.video_dit import load_pretrained

Grid = tuple[int, int, int]

FIRST_LEVEL, LEVEL_STEP = 0.6, 0.02
"""Noise of the first step, and what each takes away: consecutive steps of fifty."""

PARTS = ("decoder", "zoo", "large")
"""In the order of their lengths."""

CHOICE = ("out", "small", "seconds", "additions", "parts")
"""Arguments that choose rows, or say how, and change none."""

SMALL = {
    "layers": 3,
    "heads": 2,
    "head_dim": 24,
    "mlp": 64,
    "text": 32,
    "grid": (3, 8, 10),
    "steps": 3,
    "density": 0.4,
    "zoo_grid": (2, 8, 10),
    "zoo_steps": 2,
    "decoder_width": 8,
    "tile": 64,
}
"""Settings of `--small`."""


def trajectory(
    grid: Grid, steps: int, size: large.Size, device: torch.device, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """Calls of the model at consecutive noise levels of one video, the same for every row."""
    t, h, w = grid
    generator = torch.Generator(device).manual_seed(0)
    video = natural_field((t, 2 * h, 2 * w), large.CHANNELS, generator)
    noise = torch.randn(video.shape, device=device, generator=generator)
    text = torch.randn(1, large.TEXT_TOKENS, size.text, device=device, generator=generator)
    levels = [FIRST_LEVEL - LEVEL_STEP * index for index in range(steps)]
    return [large.call_of(grid, video, noise, text, level, dtype) for level in levels]


def look_at_sites(
    model: nn.Module, call: dict[str, Any], tokens: int, each: Callable[..., None]
) -> None:
    """Run the model; `each` is shown query, key and value of every attention over all tokens."""
    original = F.scaled_dot_product_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **given: Any) -> Tensor:
        if query.shape[2] == key.shape[2] == tokens:
            each(query, key, value)
        return original(query, key, value, *args, **given)

    with torch.no_grad(), mock.patch.object(F, "scaled_dot_product_attention", attend):
        model(**call)


def density_at(site: Sequence[Tensor], grid: Grid, threshold: float) -> float:
    """What the op attends exactly at one threshold for all heads."""
    query, key, value = site
    thresholds = torch.full((query.shape[1],), threshold, device=query.device)
    scale = query.shape[-1] ** -0.5
    found = split_attention_op(
        query, key, value, thresholds, None, list(grid), 0, 0, scale, 0.0, DEFAULT_PROBES
    )
    return float(found[1].mean())


def threshold_for(
    model: nn.Module, call: dict[str, Any], grid: Grid, wanted: float
) -> tuple[float, float]:
    """The threshold at which the mean density of some sites is `wanted`, and that of all sites.

    Three sites decide, as a call of the op takes milliseconds and there are many calls.
    """
    sites: list[tuple[Tensor, ...]] = []
    count = len(model.blocks)  # type: ignore[arg-type]
    chosen, seen = {0, count // 2, count - 1}, 0

    def keep(*site: Tensor) -> None:
        nonlocal seen
        if seen in chosen:
            sites.append(site)
        seen += 1

    look_at_sites(model, call, math.prod(grid), keep)
    if not sites:
        raise RuntimeError(f"no attention over the {math.prod(grid):,} tokens of {grid} was met")
    low, high = 1e-4, 1e3
    for _ in range(20):
        middle = math.sqrt(low * high)
        if sum(density_at(site, grid, middle) for site in sites) > wanted * len(sites):
            low = middle
        else:
            high = middle
    densities: list[float] = []
    look_at_sites(
        model, call, math.prod(grid), lambda *s: densities.append(density_at(s, grid, high))
    )
    return high, sum(densities) / len(densities)


def error_of(outputs: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """Relative L2 error of all steps together."""
    pairs = [(a.double(), b.double()) for a, b in zip(outputs, truth, strict=True)]
    off = sum(float((a - b).square().sum()) for a, b in pairs)
    return math.sqrt(off / sum(float(b.square().sum()) for _, b in pairs))


class Bench:
    """Rows as they come, written one by one, in the place of those that a file has of them."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.device = given, torch.device(given.device)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.meter = large.Meter(self.device)
        self.additions = [ways.ADDITIONS[name] for name in given.additions]
        # Round trip: as a file has them, for comparison with those of one.
        settings = json.loads(json.dumps({k: v for k, v in vars(given).items() if k not in CHOICE}))
        asked = {"settings": settings}
        self.result = earlier("composition", asked, given.out, ("rows", "zoo", "decoded"))

    def keep(self, part: str, row: dict[str, Any]) -> None:
        """Add a row or replace it, say it, write all."""
        place = {(row["attention"], row["with"]): row for row in self.result[part]}
        place[row["attention"], row["with"]] = row
        self.result[part] = list(place.values())
        write("composition", self.result, self.given.out)
        print(f"{part}: {row}", flush=True)

    def steps(
        self, model: nn.Module, calls: list[dict[str, Any]], computed: list[bool]
    ) -> tuple[list[Tensor], dict[str, float]]:
        """Outputs of a trajectory gone through twice, and times of both.

        computed: is left with what the second one added to it.
        """
        outputs: list[Tensor] = []

        def run() -> None:
            outputs.clear()
            computed.clear()
            with ways.anew(model):
                for call in calls:
                    torch.compiler.cudagraph_mark_step_begin()
                    outputs.append(model(**call)[0].clone())

        with torch.no_grad():
            first = self.meter.seconds(run)
            again = self.meter.seconds(run)
        return outputs, {"step_s": again / len(calls), "first_s": first}

    def row(
        self,
        model: nn.Module,
        calls: list[dict[str, Any]],
        split: dict[str, Any] | None,
        addition: str,
    ) -> tuple[list[Tensor], dict[str, float]]:
        """Outputs, times and the share of calls that ran all blocks, of one way to run."""
        if addition == ways.GRAPHS and self.device.type != "cuda":
            raise ways.Absent("CUDA graphs need a GPU")
        computed: list[bool] = []
        freqopt.reset_counters()
        if addition == ways.GUIDANCE:
            calls = ways.Guided.of(calls).calls
        with ExitStack() as around:
            if addition not in ways.NOT_COMPILED:
                around.enter_context(ways.compiled(model, ways.how_to_compile(split, addition)))
            elif split is not None:
                plan = uniform_plan(model, calls[0], split["threshold"], split["grid"])
                around.enter_context(freqopt.optimize(model, plan, route="eager"))
            around.enter_context(self.caching(model, calls, addition, computed))
            outputs, row = self.steps(model, calls, computed)
        if split is not None and not freqopt.counters().split:
            raise RuntimeError("nothing was split")
        if addition == ways.GUIDANCE:
            outputs = [ways.Guided.joined(output) for output in outputs]
        if computed:
            row["computed"] = sum(computed) / len(computed)
        return outputs, row

    def caching(
        self, model: nn.Module, calls: list[dict[str, Any]], addition: str, computed: list[bool]
    ) -> AbstractContextManager[None]:
        """The cache that an addition is, if it is one."""
        if addition == ways.CACHE:
            return ways.cached(model, self.given.cache_threshold, computed)
        if addition == ways.CACHE_DIT:
            threshold = self.given.cache_threshold
            return ways.cached_by_cache_dit(model, threshold, len(calls), computed)
        if addition == ways.BROADCAST:
            return ways.broadcast(model, lambda: 1000 * FIRST_LEVEL, computed)
        return nullcontext()

    def large(self) -> None:
        """The rows of the large model. The dense one alone comes first: it is the truth."""
        given, grid = self.given, self.given.grid
        size = large.Size(given.layers, given.heads, given.head_dim, given.mlp, given.text)
        calls = trajectory(grid, given.steps, size, self.device, self.dtype)
        model = large.build(size, self.device, self.dtype)
        threshold, density = threshold_for(model, calls[0], grid, given.density)
        print(f"threshold {threshold:.4g}, density {density:.3g}", flush=True)
        self.result |= {"tokens": math.prod(grid), "threshold": threshold, "density": density}
        split = {"threshold": threshold, "grid": grid, "min_tokens": 0}
        truth, row = self.row(model, calls, None, ways.NOTHING)
        self.keep("rows", {"attention": "dense", "with": ways.NOTHING, **row, "error": 0.0})
        guided: list[Tensor] = []

        def measure(how: dict[str, Any] | None, addition: str) -> dict[str, Any]:
            outputs, row = self.row(model, calls, how, addition)
            if addition == ways.GUIDANCE and how is None:
                guided[:] = outputs
            reference = guided if addition == ways.GUIDANCE else truth
            return {**row, "error": error_of(outputs, reference)}

        for addition in self.additions:
            refused: dict[str, Any] = {}
            if addition in ways.QUANTISED:
                del model
                gc.collect()
                self.meter.forget()
                model = large.build(size, self.device, self.dtype)
                refused = ways.attempt(lambda: ways.quantise(model, addition) or {})  # noqa: B023
            for name, how in (("dense", None), ("split", split)):
                if (name, addition) == ("dense", ways.NOTHING):
                    continue
                found = refused or ways.attempt(lambda: measure(how, addition))  # noqa: B023
                self.keep("rows", {"attention": name, "with": addition, **found})

    def decoder(self) -> None:
        """The rows of a decoder behind one step, which takes no compiler."""
        given, grid = self.given, self.given.grid
        size = large.Size(given.layers, given.heads, given.head_dim, given.mlp, given.text)
        calls = trajectory(grid, 1, size, self.device, self.dtype)
        model = large.build(size, self.device, self.dtype)
        threshold, _ = threshold_for(model, calls[0], grid, given.density)
        split = {"threshold": threshold, "grid": grid}
        latents = {
            name: self.row(model, calls, how, ways.EAGER)[0][0]
            for name, how in (("dense", None), ("split", split))
        }
        del model
        gc.collect()
        for row in decoding.rows(latents, given.decoder_width, self.meter, given.tile):
            self.keep("decoded", row)

    def zoo(self) -> None:
        """The rows of the zoo's model: whole clips. What is of steps only is left out."""
        given, (t, h, w) = self.given, self.given.zoo_grid
        size = {
            "frames": t,
            "height": 4 * h,
            "width": 4 * w,
            "steps": given.zoo_steps,
            "device": self.device,
            "dtype": self.dtype,
        }
        model = load_pretrained(device=self.device, dtype=self.dtype)
        truth = generations.generate(model, None, size)

        def measure(attend: generations.Attend | None, addition: str) -> dict[str, Any]:
            computed: list[bool] = []
            caching: AbstractContextManager[None] = nullcontext()
            if addition == ways.CACHE:
                ways.make_cacheable(model)
                caching = ways.cached(model, given.cache_threshold, computed)
            with caching, ways.anew(model):
                row = generations.compared(generations.generate(model, attend, size), truth)
            if computed:
                row["computed"] = sum(computed) / len(computed)
            return row

        for addition in self.additions:
            refused: dict[str, Any] = {}
            if addition in ways.OF_STEPS:
                continue
            if addition in ways.QUANTISED:
                model = load_pretrained(device=self.device, dtype=self.dtype)
                refused = ways.attempt(lambda: ways.quantise(model, addition) or {})  # noqa: B023
            split = generations.split(given.zoo_grid, given.density)
            for name, attend in (("dense", None), ("split", split)):
                if (name, addition) == ("dense", ways.NOTHING):
                    continue
                found = refused or ways.attempt(lambda: measure(attend, addition))  # noqa: B023
                self.keep("zoo", {"attention": name, "with": addition, **found})


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write composition.json."""
    size = large.Size(layers=8)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--grid", type=large.grid_of, default=large.GRIDS["480p"])
    parser.add_argument("--layers", type=int, default=size.layers, help="40 are the whole model")
    parser.add_argument("--heads", type=int, default=size.heads)
    parser.add_argument("--head-dim", type=int, default=size.head_dim)
    parser.add_argument("--mlp", type=int, default=size.mlp)
    parser.add_argument("--text", type=int, default=size.text, help="width of the text's tokens")
    parser.add_argument("--steps", type=int, default=5, help="of the trajectory")
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--cache-threshold", type=float, default=0.1)
    parser.add_argument("--additions", nargs="+", choices=ways.ADDITIONS, default=[*ways.ADDITIONS])
    parser.add_argument("--zoo-grid", type=large.grid_of, default=(21, 30, 52))
    parser.add_argument("--zoo-steps", type=int, default=25)
    parser.add_argument("--decoder-width", type=int, default=decoding.WIDTH)
    parser.add_argument("--tile", type=int, default=None, help="pixels; default: the library's")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--seconds", type=int, default=None, help="end after so many")
    parser.add_argument("--small", action="store_true", help="for a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=None, help="folder of the results")
    if parser.parse_known_args(arguments)[0].small:
        parser.set_defaults(**SMALL)
    given = parser.parse_args(arguments)
    bench = Bench(given)
    try:
        with large.at_most(given.seconds):
            for part in given.parts:
                getattr(bench, part)()
    except large.TimeUp:
        print(f"stopped after {given.seconds} s; the rows until then are written")


if __name__ == "__main__":
    main()
