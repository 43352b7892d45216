"""`freqopt demo`, mounted by `freqopt.cli.app`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from freqopt.cli.arguments import parse_grid
from freqopt.cli.options import Device, Quiet
from freqopt.errors import OptionError


def demo(
    device: Device = None,
    grid: Annotated[
        str | None,
        typer.Option(help="Token grid t,h,w; instead of --frames, --height and --width."),
    ] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of the video.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels, a multiple of 4.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels, a multiple of 4.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    target_error: Annotated[
        float | None, typer.Option(help="Relative L2 error of the model's output (0.03).")
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(help="Calibrate to this share of pairs attended exactly instead."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the video.")] = None,
    samples: Annotated[int | None, typer.Option(help="Inputs to calibrate on.")] = None,
    repeats: Annotated[int | None, typer.Option(help="Timed runs; the fastest counts.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    inner: Annotated[
        str | None, typer.Option(help="Backend that compiles the rewritten graph.")
    ] = None,
    mode: Annotated[
        str | None, typer.Option(help="Its mode (on a GPU reduce-overhead: CUDA graphs).")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write into (demo).")] = None,
    calibrate: Annotated[
        bool | None,
        typer.Option(
            "--calibrate/--shipped-plan",
            help="Make the plan here (default on a GPU), or check the one that ships (on a CPU).",
        ),
    ] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="A tiny untrained model, to try things out.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Sample a video of the zoo's model, dense and rewritten, and show on one page what differs."""
    from freqopt.demo.demo import run_demo
    from freqopt.demo.settings import default_settings

    if grid is not None:
        if (frames, height, width) != (None, None, None):
            raise OptionError("--grid was given with --frames, --height or --width; pass either")
        from freqopt.models_zoo.video_dit import VideoDiTConfig

        patch = VideoDiTConfig().patch
        frames, height, width = (n * p for n, p in zip(parse_grid(grid), patch, strict=True))
    settings = default_settings(
        device,
        frames=frames,
        height=height,
        width=width,
        steps=steps,
        target_error=target_error,
        density=density,
        seed=seed,
        samples=samples,
        repeats=repeats,
        dtype=dtype,
        inner=inner,
        mode=mode,
        out=out,
        calibrate=calibrate,
        random_weights=random_weights,
        progress=not quiet,
    )
    run_demo(settings, Console(quiet=quiet))
