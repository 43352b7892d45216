"""The main job, end to end: a plan for the zoo's video transformer, compiled, and a video sampled.

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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import freqopt
from freqopt.calibration.outputs import relative_error
from freqopt.demo import foreign as demo_foreign
from freqopt.demo import video as demo_video
from freqopt.demo.closeup import look_closely
from freqopt.demo.page import Sampled, Seen, write_demo_page
from freqopt.demo.settings import DTYPES, Settings, load_model
from freqopt.demo.shares import shares
from freqopt.demo.shipped import shipped_plan
from freqopt.doctor import environment
from freqopt.files import write_atomically
from freqopt.models_zoo.sampling import denoising_samples, sample, trajectories
from freqopt.models_zoo.video_dit import VideoDiT, VideoDiTConfig
from freqopt.plan.plan import Plan
from freqopt.progress import Progress, open_progress
from freqopt.shown import shown_arguments
from freqopt.telling.counting import counters

CHECKED = 4
"""Steps of the exact video on which the rewritten model's error is measured."""


def run_demo(settings: Settings, console: Console | None = None) -> dict[str, Any]:
    """Run the whole demo; returns what result.json holds, and writes into `settings.out`.

    Raises:
        InputError: the trained weights are not there.
        CalibrationError: the target cannot be met.
        PlanError: the plan that ships is damaged or for other weights.
    """
    say = (console or Console(quiet=not settings.progress)).print
    settings.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(settings.device)
    clock = Clock()
    say(f"[bold]1  load[/]  {environment()['device']}, {_size(settings)}")
    with clock.stage("load the model"):
        model = load_model(settings)

    say("[bold]2  plan[/]")
    with clock.stage("make the plan" if settings.calibrate else "read the plan"):
        plan = _plan(model, settings, say)
    plan.save(settings.out / "plan.json")
    say(str(plan), highlight=False, markup=False, soft_wrap=True)

    say("[bold]3  the exact video[/]")
    with clock.stage("the exact video"), open_progress(settings.progress) as bars:
        dense_model: Callable[..., Tensor] = model
        if settings.inner != "eager":
            dense_model = compiled(model, settings.inner, mode=settings.mode)
        dense = sampled(dense_model, settings, bars, "exact video", keep=CHECKED)
        floor = None
        if settings.inner != "eager":
            floor = sampled(model, settings, bars, "exact, uncompiled").video

    say("[bold]4  compile, and the rewritten video[/]")
    options = {"plan": plan, "min_tokens": 1, "strict": True, "inner": settings.inner}
    if settings.mode is not None:
        options["mode"] = settings.mode
    with clock.stage("the rewritten video"), open_progress(settings.progress) as bars:
        torch._dynamo.reset()
        rewritten = compiled(model, "freqopt", options=options)
        split = sampled(rewritten, settings, bars, "rewritten video")

    say("[bold]5  check[/]")
    with clock.stage("check the plan on this video"):
        # Replays of CUDA graphs run no operator that a profiler could count.
        before = counters().split
        errors = checked(rewritten, dense.steps)
        calls = (counters().split - before) // len(errors)
        say(f"off by {_mean(errors):.4f} on {len(errors)} steps of this video")
        spent = None
        if device.type == "cpu":
            spent = shares(model, dense.steps[0][0]), shares(rewritten, dense.steps[0][0])
    torch._dynamo.reset()
    with clock.stage("one head, closely"):
        half = len(dense.steps) // 2
        middle = [*dense.steps[half:], *dense.steps[:half]]
        closeup = look_closely(model, [each for each, _ in middle], plan, seed=settings.seed)

    foreign = None
    say("[bold]6  another model class[/]")
    if demo_foreign.diffusers_installed():
        with clock.stage("another model class"):
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
        "command": shlex.join(["freqopt", *shown_arguments(sys.argv[1:])]),
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(settings).items()},
        "tokens": math.prod(_grid(settings)),
        "grid": list(_grid(settings)),
        "calibration_seconds": round(clock.stages["make the plan"], 2)
        if settings.calibrate
        else None,
        "target_error": plan.target_error,
        "measured_error": plan.measured_error,
        "error_here": _mean(errors),
        "errors_here": errors,
        "mean_density": plan.mean_density,
        "density_here": 1.0 if closeup is None else closeup.mean_density,
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
        "step_seconds": None
        if spent is None
        else {"dense": spent[0]._asdict(), "split": spent[1]._asdict()},
        "foreign": None if foreign is None else dataclasses.asdict(foreign),
        "stages": clock.stages,
    }
    started = time.perf_counter()
    page = write_demo_page(plan, result, settings, Seen(dense, split, closeup, spent))
    clock.stages["this page"] = round(time.perf_counter() - started, 2)
    result["total_seconds"] = round(sum(clock.stages.values()), 1)
    write_atomically(settings.out / "result.json", json.dumps(_finite(result), indent=1) + "\n")
    say(
        f"[bold]{result['speedup']:.2f} times as fast[/]: {settings.steps} steps took "
        f"{split.seconds:.2f} s rewritten, {dense.seconds:.2f} s dense; [bold]PSNR "
        f"{result['psnr_db']:.1f} dB[/], SSIM {result['ssim']:.4f} against the dense video at "
        f"{result['density_here']:.1%} density"
    )
    say(f"wrote {page} in {result['total_seconds']:.0f} s")
    return result


class Clock:
    """Seconds that stages of the demo took, by name."""

    def __init__(self) -> None:
        self.stages: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A stage, from here to the end of the block."""
        started = time.perf_counter()
        yield
        self.stages[name] = round(time.perf_counter() - started, 2)


def _plan(model: VideoDiT, settings: Settings, say: Callable[..., None]) -> Plan:
    """A plan made here, or the one that ships."""
    if not settings.calibrate:
        say("a plan ships for this model; --calibrate makes one")
        return shipped_plan(model)
    with open_progress(settings.progress) as bars:
        inputs = denoising_inputs(model, settings, bars)
    with torch.no_grad():
        inspection = freqopt.inspect(model, min_tokens=1, **inputs[0])
    say(str(inspection), highlight=False, markup=False, soft_wrap=True)
    return calibrate(model, inputs, settings)


def checked(
    model: Callable[..., Tensor], steps: Sequence[tuple[dict[str, Tensor], Tensor]]
) -> list[dict[str, float]]:
    """Relative L2 error of a model's outputs at steps whose exact outputs are known."""
    found = []
    for inputs, exact in steps:
        with torch.no_grad():
            output = model(**inputs)
        error = relative_error([output], [exact])
        found.append({"timestep": float(inputs["timestep"][0]), "error": error})
    return found


def _mean(errors: Sequence[dict[str, float]]) -> float:
    """Root mean square."""
    return math.sqrt(sum(each["error"] ** 2 for each in errors) / len(errors))


def denoising_inputs(
    model: VideoDiT, settings: Settings, bars: Progress
) -> list[dict[str, Tensor]]:
    """Inputs that the model meets while sampling, of other seeds than the demo's own."""
    with bars.phase("sampling inputs", trajectories(settings.samples) * settings.steps) as step:
        return denoising_samples(
            model,
            settings.samples,
            frames=settings.frames,
            height=settings.height,
            width=settings.width,
            steps=settings.steps,
            seed=settings.seed + 1000,
            device=settings.device,
            dtype=DTYPES[settings.dtype],
            callback=lambda done, total: step(),
        )


def calibrate(model: VideoDiT, inputs: list[dict[str, Tensor]], settings: Settings) -> Plan:
    """A plan for the target error, or for the density if one is set."""
    return freqopt.calibrate(
        model,
        inputs,
        target_error=settings.target_error,
        target_density=settings.density,
        progress=settings.progress,
        seed=settings.seed,
    )


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


def sampled(
    model: Callable[..., Any], settings: Settings, bars: Progress, title: str, *, keep: int = 0
) -> Sampled:
    """Sample the demo's seed: one step to warm up (and to compile), then `repeats` timed runs.

    keep: steps of the first run whose inputs and outputs are kept, evenly spaced.
    """
    at = {round((i + 0.5) * settings.steps / keep - 0.5) for i in range(keep)}
    kept: list[tuple[dict[str, Tensor], Tensor]] = []

    def keeping(video: Tensor, timestep: Tensor) -> Tensor:
        output: Tensor = model(video, timestep)
        if len(calls) in at:
            # Replays of CUDA graphs write their outputs where the last ones were.
            kept.append(({"video": video.clone(), "timestep": timestep}, output.clone()))
        calls.append(None)
        return output

    calls: list[None] = []

    def run(
        model: Callable[..., Any], steps: int, callback: Callable[[int, int], None] | None
    ) -> tuple[Tensor, float]:
        _synchronise(settings.device)
        start = time.perf_counter()
        video = sample(
            model,  # type: ignore[arg-type]
            frames=settings.frames,
            height=settings.height,
            width=settings.width,
            steps=steps,
            seed=settings.seed,
            device=settings.device,
            dtype=DTYPES[settings.dtype],
            callback=callback,
        )
        _synchronise(settings.device)
        return video[0].float().cpu(), time.perf_counter() - start

    with bars.phase(title, 1 + settings.steps * settings.repeats) as step:
        _, first = run(model, 1, lambda done, total: step())
        runs = [
            run(model if i or not keep else keeping, settings.steps, lambda d, t: step())
            for i in range(settings.repeats)
        ]
    return Sampled(runs[0][0], min(seconds for _, seconds in runs), first, kept)


def _grid(settings: Settings) -> tuple[int, int, int]:
    """Extents of the video in the model's patches."""
    size = settings.frames, settings.height, settings.width
    t, h, w = (n // patch for n, patch in zip(size, VideoDiTConfig().patch, strict=True))
    return t, h, w


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
