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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import freqopt
from freqopt import demo_foreign, demo_video
from freqopt.calibration_progress import Progress, open_progress
from freqopt.demo_target import error_for_density
from freqopt.doctor import environment
from freqopt.errors import InputError, OptionError
from freqopt.models_zoo.sampling import denoising_samples, sample
from freqopt.models_zoo.video_dit import VideoDiT, VideoDiTConfig, load_pretrained
from freqopt.plan import Plan
from freqopt.reporting import Section, figure_html, report, table_html

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Settings:
    """What the demo runs. frames, height, width in pixels; see `default_settings`.

    density: mean density to calibrate to instead of `target_error` (relative L2 of the model's
    output). samples: model inputs to calibrate on. repeats: timed runs; the fastest counts.
    """

    device: str
    dtype: str
    frames: int
    height: int
    width: int
    steps: int
    target_error: float
    density: float | None
    seed: int
    samples: int
    repeats: int
    inner: str
    out: Path
    random_weights: bool = False
    progress: bool = True


@dataclass(frozen=True)
class Sampled:
    """A video (3, T, H, W), the time it took, and the first step's with compilation."""

    video: Tensor
    seconds: float
    first_step_seconds: float


def default_settings(device: str | None = None, **given: Any) -> Settings:
    """Settings for a device ("cuda" where there is one), with what is `given` and not None instead.

    On a GPU 21 x 30 x 52 = 32,760 tokens and 25 steps in bfloat16; on a CPU a size that finishes in
    minutes, uncompiled ("eager").

    Raises:
        OptionError: CUDA where there is none, a dtype or size that the model cannot work on.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = torch.device(device).type
    if kind == "cuda" and not torch.cuda.is_available():
        raise OptionError("there is no CUDA device here; `freqopt doctor` says why. Use the cpu")
    defaults: dict[str, Any] = {
        "device": device, "target_error": 0.03, "density": None, "seed": 0, "out": Path("demo"),
    }  # fmt: skip
    if kind == "cuda":
        defaults |= {
            "dtype": "bfloat16", "frames": 21, "height": 120, "width": 208, "steps": 25,
            "samples": 8, "repeats": 3, "inner": "inductor",
        }  # fmt: skip
    else:
        defaults |= {
            "dtype": "float32", "frames": 5, "height": 48, "width": 80, "steps": 8,
            "samples": 4, "repeats": 1, "inner": "eager",
        }  # fmt: skip
    settings = Settings(**defaults | {k: v for k, v in given.items() if v is not None})
    _check(settings)
    return settings


def _check(settings: Settings) -> None:
    if settings.dtype not in DTYPES:
        raise OptionError(f"dtype {settings.dtype!r}; supported: {', '.join(DTYPES)}")
    for name in ("frames", "height", "width", "steps", "samples", "repeats"):
        if getattr(settings, name) < 1:
            raise OptionError(f"{name} {getattr(settings, name)} must be 1 or more")
    _, patch_height, patch_width = VideoDiTConfig().patch
    if settings.height % patch_height or settings.width % patch_width:
        raise OptionError(
            f"a video of {settings.height} x {settings.width} pixels; height must be a multiple of "
            f"{patch_height} and width of {patch_width}"
        )
    if settings.density is not None and not 0 < settings.density <= 1:
        raise OptionError(f"density {settings.density} is outside (0, 1]; 0.1 is typical")


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
        inspection = freqopt.inspect(model, **inputs[0])
    say(str(inspection), highlight=False, markup=False)

    say("[bold]3  calibrate[/]")
    calibration_started = time.perf_counter()
    plan = calibrate(model, inputs, settings)
    calibration_seconds = time.perf_counter() - calibration_started
    plan.save(settings.out / "plan.json")
    say(str(plan), highlight=False, markup=False)

    say("[bold]4  compile and sample[/]")
    options = {"plan": plan, "min_tokens": 1, "strict": True, "inner": settings.inner}
    with open_progress(settings.progress) as bars:
        dense_model: Callable[..., Tensor] = model
        if settings.inner != "eager":
            dense_model = compiled(model, settings.inner)
        dense = sampled(dense_model, settings, bars, "dense video")
        floor = None
        if settings.inner != "eager":
            floor = sampled(model, settings, bars, "dense, uncompiled").video
        torch._dynamo.reset()
        rewritten = compiled(model, "freqopt", options)
        split = sampled(rewritten, settings, bars, "rewritten video")
    with torch.no_grad():
        _, calls = demo_foreign.counted(rewritten, dict(inputs[0]))
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
    page = write_report(plan, result, settings, dense, split)
    result["total_seconds"] = round(time.perf_counter() - started, 1)
    (settings.out / "result.json").write_text(json.dumps(_finite(result), indent=1) + "\n")
    say(
        f"[bold]PSNR {result['psnr_db']:.1f} dB[/], SSIM {result['ssim']:.4f} against the dense "
        f"video at {plan.mean_density:.1%} mean density; {settings.steps} steps took "
        f"{split.seconds:.2f} s rewritten, {dense.seconds:.2f} s dense"
    )
    say(f"wrote {page} in {result['total_seconds']:.0f} s")
    return result


def load_model(settings: Settings) -> VideoDiT:
    """The trained model, or with `random_weights` one that only has its shape."""
    device, dtype = torch.device(settings.device), DTYPES[settings.dtype]
    if not settings.random_weights:
        try:
            return load_pretrained(device=device, dtype=dtype)
        except FileNotFoundError as error:
            raise InputError(f"{error}; or try the commands out with --random-weights") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VideoDiT(
            VideoDiTConfig(width=64, layers=2, heads=2, mlp_width=64, rope_axes=(8, 12, 12))
        )
        # A head of zeros would hide every difference.
        nn.init.normal_(model.head.weight, std=0.1)
    return model.to(device=device, dtype=dtype).eval()


def denoising_inputs(
    model: VideoDiT, settings: Settings, bars: Progress
) -> list[dict[str, Tensor]]:
    """Inputs that the model meets while sampling, of other seeds than the demo's own."""
    with bars.phase("sampling inputs", 2 * settings.steps) as step:
        return denoising_samples(
            model, settings.samples, frames=settings.frames, height=settings.height,
            width=settings.width, steps=settings.steps, seed=settings.seed + 1000,
            device=settings.device, dtype=DTYPES[settings.dtype],
            callback=lambda done, total: step(),
        )  # fmt: skip


def calibrate(model: VideoDiT, inputs: list[dict[str, Tensor]], settings: Settings) -> Plan:
    """A plan for the target error, or for the density if one is set."""

    def plan_for(target: float) -> Plan:
        return freqopt.calibrate(
            model, inputs, target_error=target, progress=settings.progress, seed=settings.seed
        )

    plan = plan_for(settings.target_error)
    if settings.density is None:
        return plan
    return plan_for(error_for_density(plan, settings.density))


def compiled(
    model: nn.Module, backend: str, options: dict[str, Any] | None = None
) -> Callable[..., Tensor]:
    """The model compiled for one fixed shape."""
    result: Callable[..., Tensor] = torch.compile(
        model, backend=backend, options=options, dynamic=False
    )
    return result


def sampled(
    model: Callable[..., Any], settings: Settings, bars: Progress, title: str
) -> Sampled:
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


def write_report(
    plan: Plan, result: dict[str, Any], settings: Settings, dense: Sampled, split: Sampled
) -> Path:
    """The page, its animation beside it; returns the page's path."""
    moving = demo_video.animation(dense.video, split.video)
    (settings.out / "videos.png").write_bytes(moving)
    videos = Section(
        "The video, dense and rewritten",
        f"<p>The same seed, {settings.steps} steps, no dense warm-up steps. PSNR "
        f"<b>{result['psnr_db']:.1f} dB</b>, SSIM <b>{result['ssim']:.4f}</b>.</p>"
        + demo_video.image_html(moving, "Dense on the left, rewritten on the right.", width=900)
        + figure_html(demo_video.contact_sheet(dense.video, split.video), "Both, frame by frame.")
        + figure_html(demo_video.frame_curve(result["psnr_db_per_frame"]), "PSNR of each frame."),
    )
    return report(
        plan,
        settings.out / "report.html",
        extra_sections=[videos, _times(result, settings), *_foreign(result), _environment(result)],
    )


def _times(result: dict[str, Any], settings: Settings) -> Section:
    def row(name: str, key: str) -> tuple[str, ...]:
        seconds = result[f"{key}_seconds"]
        first = result[f"{key}_first_step_seconds"]
        return name, f"{seconds:.2f}", f"{1000 * seconds / settings.steps:.1f}", f"{first:.1f}"

    table = table_html(
        ("model", f"{settings.steps} steps (s)", "one step (ms)", "first step, compiling (s)"),
        [row("dense", "dense"), row("rewritten", "split")],
        numbers=range(1, 4),
    )
    note = f"Warmed up; the fastest of {settings.repeats}. Both compiled with {settings.inner}."
    if torch.device(settings.device).type == "cpu":
        note += " On a CPU the split is there to be correct, not fast: speed needs an NVIDIA GPU."
    return Section("Times", f"<p>{note}</p>{table}")


def _foreign(result: dict[str, Any]) -> list[Section]:
    found = result["foreign"]
    if found is None:
        return []
    table = table_html(
        ("what", "value"),
        [
            ("class", f"{found['model']} (diffusers), small, random weights"),
            ("grid", "x".join(map(str, found["grid"]))),
            ("sites rewritten", f"{found['split']} of {found['sites']} (the others are cross)"),
            ("calls of the op in one forward pass", found["calls"]),
            ("largest difference from eager at threshold 0", f"{found['max_error']:.2e}"),
            ("largest output", f"{found['max_output']:.2f}"),
            ("relative L2 difference", f"{found['relative_error']:.2e}"),
        ],
    )
    return [Section("Another model class, rewritten", table)]


def _environment(result: dict[str, Any]) -> Section:
    rows = [*result["environment"].items(), ("command", result["command"])]
    return Section("Environment", table_html(("what", "value"), rows))


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
