"""A transformer of Wan 2.1 14B's size, whole: `python -m benchmarks.large` writes large.json.

The class is diffusers' own; weights are random, made on the device, and so are the samples: fields
with the statistics of natural video, with the noise of their timestep. For each grid: the dense
model (time of a step, compile time, peak memory), a calibration (wall time by phase, peak memory),
and the model split by that plan, blocks compiled and in eager mode (time of a step and of the
attention in it, compile time, error).

The file is written after each part. `--seconds` ends a run: what a calibration has measured by then
is kept in a checkpoint, in the folder work beside the results, and the next run goes on from there.
Parts that the file has are not run again.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import freqopt
from benchmarks.common import environment, write
from benchmarks.natural import natural_field
from benchmarks.pages import RESULTS
from benchmarks.profiles import profiled
from freqopt.front.state import Route

GRIDS = {"480p": (21, 30, 52), "720p": (21, 45, 80)}
"""Tokens of 81 frames of 480 x 832 and 720 x 1280."""

HEAD_DIM, CHANNELS, TEXT_TOKENS = 128, 16, 512

PARTS = ("dense", "calibration", "split")

TIMED_STEPS, LONG_ENOUGH = 3, 20.0
"""Steps that are timed, of which the fastest counts, and the seconds that suffice."""

GIB = 2**30


class Size(NamedTuple):
    """What a transformer's size is: layers, heads and head dim; width of its MLP and its text."""

    layers: int = 40
    heads: int = 40
    head_dim: int = HEAD_DIM
    mlp: int = 13_824
    text: int = 4_096


class TimeUp(BaseException):
    """The run's time is over. No plain error, which a calibration would note at a site."""


def build(size: Size, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The transformer with random weights, made where it will be."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    with torch.device(device):
        model = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=size.heads,
            attention_head_dim=size.head_dim,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            text_dim=size.text,
            freq_dim=256,
            ffn_dim=size.mlp,
            num_layers=size.layers,
            cross_attn_norm=True,
        )
    for parameter in model.parameters():  # tables of rotary angles keep their precision
        parameter.data = parameter.data.to(dtype)
    found: nn.Module = model.eval()
    return found


def samples(
    grid: tuple[int, int, int], count: int, size: Size, device: torch.device, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """Calls of the model at evenly spaced timesteps, each on a video and a text of its own."""
    t, h, w = grid
    found = []
    for index in range(count):
        generator = torch.Generator(device).manual_seed(index)
        noise_level = (index + 0.5) / count
        video = natural_field((t, 2 * h, 2 * w), CHANNELS, generator)
        noise = torch.randn(video.shape, device=device, generator=generator)
        text = torch.randn(1, TEXT_TOKENS, size.text, device=device, generator=generator)
        found.append(call_of(grid, video, noise, text, noise_level, dtype))
    return found


def call_of(
    grid: tuple[int, int, int],
    video: torch.Tensor,
    noise: torch.Tensor,
    text: torch.Tensor,
    noise_level: float,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """The model's arguments for a video and a noise (tokens, channels), mixed at a level."""
    t, h, w = grid
    mixed = (1.0 - noise_level) * video + noise_level * noise
    return {
        "hidden_states": mixed.T.reshape(1, CHANNELS, t, 2 * h, 2 * w).to(dtype),
        "timestep": torch.tensor([1000.0 * noise_level], device=video.device),
        "encoder_hidden_states": text.to(dtype),
        "return_dict": False,
    }


class Meter:
    """Times of calls and peaks of memory on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wait(self) -> None:
        """Until the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def forget(self) -> None:
        """Give back cached memory; peaks count from here."""
        self.wait()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> float | None:
        """GiB allocated at most since `forget`; None on a CPU."""
        if self.device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated() / GIB

    def seconds(self, call: Callable[[], object]) -> float:
        """Of one call."""
        self.wait()
        start = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - start

    def steps(self, call: Callable[[], object]) -> dict[str, float]:
        """Seconds of the first call, and of the fastest of some more."""
        first, times = self.seconds(call), [math.inf]
        spent = 0.0
        while len(times) <= TIMED_STEPS and spent < LONG_ENOUGH:
            times.append(self.seconds(call))
            spent += times[-1]
        return {"first_s": first, "step_s": min(times)}


class Bench:
    """One model on one device. out: the folder of results; work: of checkpoints and plans."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.device, self.count = torch.device(given.device), given.samples
        self.out, self.density = given.out or RESULTS, given.density
        self.work = self.out / "work"
        self.work.mkdir(parents=True, exist_ok=True)
        self.passes, self.order = given.passes, given.order
        self.size = Size(given.layers, given.heads, given.head_dim, given.mlp, given.text)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.meter = Meter(self.device)
        self._model: nn.Module | None = None

    @property
    def model(self) -> nn.Module:
        """The model, made when it is first needed."""
        if self._model is None:
            self._model = build(self.size, self.device, self.dtype)
        return self._model

    def plan_of(self, name: str) -> Path:
        """The plan for a grid."""
        return self.work / f"large_{name}.plan.json"

    def run(self, name: str, call: dict[str, Any]) -> dict[str, Any]:
        """Time, compile time and peak memory of calls of the model as it is now."""
        output: list[Tensor] = []

        def step() -> None:
            output[:] = [self.model(**call)[0]]

        self.meter.forget()
        with torch.no_grad():
            row: dict[str, Any] = self.meter.steps(step)
        row |= {"compile_s": row["first_s"] - row["step_s"], "peak_gib": self.meter.peak()}
        print(f"  {name}: {row['step_s']:.3f} s a step, {row['compile_s']:.1f} s more at first")
        return {**row, "output": output[0]}

    def dense(self, grid: tuple[int, int, int], _: str) -> dict[str, Any]:
        """The dense model, as it is and with compiled blocks."""
        call = samples(grid, 1, self.size, self.device, self.dtype)[0]
        eager = self.run("eager", call)
        with compiled_blocks(self.model):
            compiled = self.run("blocks compiled", call)
        for row in (eager, compiled):
            del row["output"]
        return {"eager": eager, "compiled": compiled}

    def calibration(self, grid: tuple[int, int, int], name: str) -> dict[str, Any]:
        """A calibration for a density; its plan is saved beside the results."""
        calls = samples(grid, self.count, self.size, self.device, self.dtype)
        self.meter.forget()
        with phases() as spent:
            start = time.perf_counter()
            try:
                plan = freqopt.calibrate(
                    self.model,
                    calls,
                    target_density=self.density,
                    passes=self.passes,
                    order=self.order,
                    checkpoint=self.work / f"large_{name}.checkpoint",
                    output=self.plan_of(name),
                )
            except TimeUp:
                stopped = {"stopped_s": time.perf_counter() - start, "phases": spent}
                return {**stopped, "peak_gib": self.meter.peak()}
        chunks = [chunk for site in plan.sites.values() for chunk in site.chunks]
        return {
            "seconds": time.perf_counter() - start,
            "phases": spent,
            "peak_gib": self.meter.peak(),
            "samples": self.count,
            "density": plan.mean_density,
            "error": plan.measured_error,
            "split": sum(site.decision == "split" for site in plan.sites.values()),
            "heads_by_chunk": {str(c): chunks.count(c) for c in sorted(set(chunks))},
            "notes": plan.evidence.notes,
        }

    def split(self, grid: tuple[int, int, int], name: str) -> dict[str, Any]:
        """The model split by its plan, blocks compiled, and how far it is off the dense model."""
        plan = freqopt.Plan.load(self.plan_of(name))
        call = samples(grid, 1, self.size, self.device, self.dtype)[0]
        with torch.no_grad():
            truth = self.model(**call)[0].double()
        return {
            **self._split(plan, "regional", "split, blocks compiled", call, truth),
            "eager": self._split(plan, "eager", "split, eager", call, truth),
        }

    def _split(
        self, plan: freqopt.Plan, route: Route, name: str, call: dict[str, Any], truth: Tensor
    ) -> dict[str, Any]:
        handle = freqopt.optimize(self.model, plan, route=route)
        try:
            row = self.run(name, call)
            with torch.no_grad():
                parts = profiled(lambda: self.model(**call), self.device, self.meter.wait)
        finally:
            handle.disable()
        difference = row.pop("output").double() - truth
        error = float(difference.norm() / truth.norm())
        return {**row, "attention_s": parts.attention, "error": error}


@contextmanager
def compiled_blocks(model: nn.Module) -> Iterator[None]:
    """A model whose blocks are compiled, one graph for all of them."""
    blocks: list[nn.Module] = list(model.blocks)  # type: ignore[arg-type]
    for block in blocks:
        block.compile(fullgraph=True)
    try:
        yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None
        torch._dynamo.reset()


@contextmanager
def phases() -> Iterator[dict[str, float]]:
    """Seconds of calibration's phases, as they end."""
    spent: dict[str, float] = {}

    class Reader(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if isinstance(record.args, tuple) and len(record.args) == 2:
                title, seconds = map(str, record.args)
                spent[title] = spent.get(title, 0.0) + float(seconds)

    logger, reader = logging.getLogger("freqopt.progress"), Reader()
    before = logger.level
    logger.addHandler(reader)
    logger.setLevel(logging.INFO)
    try:
        yield spent
    finally:
        logger.removeHandler(reader)
        logger.setLevel(before)


@contextmanager
def at_most(seconds: int | None) -> Iterator[None]:
    """Raise TimeUp in the body after so many seconds."""

    def stop(*_: object) -> None:
        raise TimeUp

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds or 0)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def joined(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """A calibration that went on where one was stopped: times of both, and the higher peak."""
    stopped = before.get("stopped_s", 0.0)
    if not stopped:
        return after
    key = "seconds" if "seconds" in after else "stopped_s"
    every = dict(before["phases"])
    for title, seconds in after["phases"].items():
        every[title] = every.get(title, 0.0) + seconds
    peaks = [row["peak_gib"] for row in (before, after) if row["peak_gib"] is not None]
    pieces = before.get("pieces", 1) + 1
    return {
        **after,
        key: after[key] + stopped,
        "phases": every,
        "peak_gib": max(peaks, default=None),
        "pieces": pieces,
    }


def is_done(part: dict[str, Any] | None) -> bool:
    """Whether a part of an earlier run is complete."""
    return part is not None and "stopped_s" not in part


def measure(bench: Bench, given: argparse.Namespace) -> None:
    """All parts of all grids that are not there yet, written one by one."""
    path = bench.out / "large.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    rows: dict[str, Any] = result.get("rows", {})
    for name in given.grid:
        grid = GRIDS.get(name) or grid_of(name)
        row = rows.setdefault(name, {"grid": grid, "tokens": math.prod(grid)})
        for part in given.parts:
            if is_done(row.get(part)) and not given.again:
                continue
            if part == "split" and not bench.plan_of(name).exists():
                print(f"{name}, split: left out, it needs the plan that calibration writes")
                continue
            print(f"{name}, {part}:", flush=True)
            found = getattr(bench, part)(grid, name)
            row[part] = joined(row.get(part) or {}, found)
            shown = {"environment": environment(), "model": bench.size._asdict()}
            by_length = dict(sorted(rows.items(), key=lambda item: int(item[1]["tokens"])))
            write("large", {**shown, "density": bench.density, "rows": by_length}, bench.out)
            print(f"  {json.dumps(row[part])}", flush=True)
            if "stopped_s" in row[part]:
                raise TimeUp


def grid_of(text: str) -> tuple[int, int, int]:
    """Extents such as 21x30x52."""
    t, h, w = (int(extent) for extent in text.split("x"))
    return t, h, w


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write large.json."""
    size = Size()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--grid", nargs="+", default=list(GRIDS), help=f"{', '.join(GRIDS)} or such as 5x9x10"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--layers", type=int, default=size.layers)
    parser.add_argument("--heads", type=int, default=size.heads)
    parser.add_argument("--head-dim", type=int, default=size.head_dim)
    parser.add_argument("--mlp", type=int, default=size.mlp)
    parser.add_argument("--text", type=int, default=size.text, help="width of the text's tokens")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--passes", type=int, default=None, help="see freqopt.calibrate")
    parser.add_argument("--order", choices=("auto", "grid"), default="auto")
    parser.add_argument("--seconds", type=int, default=None, help="end after so many")
    parser.add_argument("--again", action="store_true", help="run parts that the file has")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=None, help="folder of the results")
    given = parser.parse_args(arguments)
    try:
        with at_most(given.seconds):
            measure(Bench(given), given)
    except TimeUp:
        print(f"stopped after {given.seconds} s; run it again to go on")


if __name__ == "__main__":
    main()
