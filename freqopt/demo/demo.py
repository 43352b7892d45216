"""The main job, end to end: calibrate the zoo's video transformer, compile it, sample a video.

The same seed is sampled dense and rewritten, and everything that tells the two apart goes into one
page (report.html) and one file of figures (result.json).
"""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import freqopt
from freqopt.demo import foreign as demo_foreign
from freqopt.demo import video as demo_video
from freqopt.demo.page import Sampled, write_page
from freqopt.demo.settings import DTYPES, Settings, load_model
from freqopt.doctor import environment
from freqopt.files import write_atomically
from freqopt.models_zoo.sampling import denoising_samples, sample, trajectories
from freqopt.models_zoo.video_dit import VideoDiT
from freqopt.plan.plan import Plan
from freqopt.progress import Progress, open_progress
from freqopt.telling.counting import counters


def run_demo(settings: Settings, console: Console | None = None) -> dict[str, Any]:
    """Run the whole demo; returns what result.json holds, and writes into `settings.out`.

    Raises:
        InputError: the trained weights are not there.
        CalibrationError: the target cannot be met.
    """
    say = (console or Console(quiet=not settings.progress)).print
    settings.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(settings.device)
    started = time.perf_counter()
    say(f"[bold]1  load[/]  {environment()['device']}, {_size(settings)}")
    model = load_model(settings)
    with open_progress(settings.progress) as bars:
        inputs = denoising_inputs(model, settings, bars)

    say("[bold]2  inspect[/]")
    with torch.no_grad():
        inspection = freqopt.inspect(model, min_tokens=1, **inputs[0])
    say(str(inspection), highlight=False, markup=False, soft_wrap=True)

    say("[bold]3  calibrate[/]")
    calibration_started = time.perf_counter()
    plan = calibrate(model, inputs, settings)
    calibration_seconds = time.perf_counter() - calibration_started
    plan.save(settings.out / "plan.json")
    say(str(plan), highlight=False, markup=False, soft_wrap=True)

    say("[bold]4  compile and sample[/]")
    options = {"plan": plan, "min_tokens": 1, "strict": True, "inner": settings.inner}
    if settings.mode is not None:
        options["mode"] = settings.mode
    with open_progress(settings.progress) as bars:
        dense_model: Callable[..., Tensor] = model
        if settings.inner != "eager":
            dense_model = compiled(model, settings.inner, mode=settings.mode)
        dense = sampled(dense_model, settings, bars, "dense video")
        floor = None
        if settings.inner != "eager":
            floor = sampled(model, settings, bars, "dense, uncompiled").video
        torch._dynamo.reset()
        rewritten = compiled(model, "freqopt", options=options)
        split = sampled(rewritten, settings, bars, "rewritten video")
    # Replays of CUDA graphs run no operator that a profiler could count.
    before = counters().split
    with torch.no_grad():
        rewritten(**inputs[0])
    calls = counters().split - before
    torch._dynamo.reset()

    foreign = None
    say("[bold]5  another model class[/]")
    if demo_foreign.diffusers_installed():
        foreign = demo_foreign.compare_foreign(device, settings.inner, seed=settings.seed)
        say(
            f"{foreign.model}: {foreign.split} of {foreign.sites} attention sites rewritten, "
            f"{foreign.calls} calls of the op; at threshold 0 the output differs from eager by at "
            f"most {foreign.max_error:.1e} (largest output {foreign.max_output:.1f})"
        )
    else:
        say("skipped: diffusers is not installed (pip install 'freqopt\\[diffusers]')")

    result = {
        "environment": environment(),
        "command": shlex.join(["freqopt", *sys.argv[1:]]),
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(settings).items()},
        "tokens": math.prod(plan.grids[0]),
        "grid": list(plan.grids[0]),
        "calibration_seconds": round(calibration_seconds, 2),
        "target_error": plan.target_error,
        "measured_error": plan.measured_error,
        "mean_density": plan.mean_density,
        "sites_split": sum(site.decision == "split" for site in plan.sites.values()),
        "op_calls_per_step": calls,
        "psnr_db": demo_video.psnr(split.video, dense.video),
        "psnr_db_per_frame": demo_video.psnr_per_frame(split.video, dense.video),
        "psnr_db_two_dense": None if floor is None else demo_video.psnr(floor, dense.video),
        "ssim": demo_video.ssim(split.video, dense.video),
        "dense_seconds": dense.seconds,
        "split_seconds": split.seconds,
        "speedup": dense.seconds / split.seconds,
        "dense_first_step_seconds": dense.first_step_seconds,
        "split_first_step_seconds": split.first_step_seconds,
        "foreign": None if foreign is None else dataclasses.asdict(foreign),
    }
    page = write_page(plan, result, settings, dense, split)
    result["total_seconds"] = round(time.perf_counter() - started, 1)
    write_atomically(settings.out / "result.json", json.dumps(_finite(result), indent=1) + "\n")
    say(
        f"[bold]PSNR {result['psnr_db']:.1f} dB[/], SSIM {result['ssim']:.4f} against the dense "
        f"video at {plan.mean_density:.1%} mean density; {settings.steps} steps took "
        f"{split.seconds:.2f} s rewritten, {dense.seconds:.2f} s dense"
    )
    say(f"wrote {page} in {result['total_seconds']:.0f} s")
    return result


def denoising_inputs(
    model: VideoDiT, settings: Settings, bars: Progress
) -> list[dict[str, Tensor]]:
    """Inputs that the model meets while sampling, of other seeds than the demo's own."""
    with bars.phase("sampling inputs", trajectories(settings.samples) * settings.steps) as step:
        return denoising_samples(
            model, settings.samples, frames=settings.frames, height=settings.height,
            width=settings.width, steps=settings.steps, seed=settings.seed + 1000,
            device=settings.device, dtype=DTYPES[settings.dtype],
            callback=lambda done, total: step(),
        )  # fmt: skip


def calibrate(model: VideoDiT, inputs: list[dict[str, Tensor]], settings: Settings) -> Plan:
    """A plan for the target error, or for the density if one is set."""
    return freqopt.calibrate(
        model, inputs, target_error=settings.target_error, target_density=settings.density,
        progress=settings.progress, seed=settings.seed,
    )  # fmt: skip


def compiled(
    model: nn.Module,
    backend: str,
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Tensor]:
    """The model compiled for one fixed shape."""
    result: Callable[..., Tensor] = torch.compile(
        model, backend=backend, options=options, mode=mode, dynamic=False
    )
    return result


def sampled(model: Callable[..., Any], settings: Settings, bars: Progress, title: str) -> Sampled:
    """Sample the demo's seed: one step to warm up (and to compile), then `repeats` timed runs."""

    def run(steps: int, callback: Callable[[int, int], None] | None) -> tuple[Tensor, float]:
        _synchronise(settings.device)
        start = time.perf_counter()
        video = sample(
            model, frames=settings.frames, height=settings.height, width=settings.width,  # type: ignore[arg-type]
            steps=steps, seed=settings.seed, device=settings.device, dtype=DTYPES[settings.dtype],
            callback=callback,
        )  # fmt: skip
        _synchronise(settings.device)
        return video[0].float().cpu(), time.perf_counter() - start

    with bars.phase(title, 1 + settings.steps * settings.repeats) as step:
        _, first = run(1, lambda done, total: step())
        runs = [run(settings.steps, lambda d, t: step()) for _ in range(settings.repeats)]
    return Sampled(runs[0][0], min(seconds for _, seconds in runs), first)


def _size(settings: Settings) -> str:
    return (
        f"{settings.frames} frames of {settings.height} x {settings.width} pixels, "
        f"{settings.steps} steps, {settings.dtype}"
    )


def _synchronise(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def _finite(value: Any) -> Any:
    """The value with infinities (equal videos) as text, which JSON can hold."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
