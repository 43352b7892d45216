"""The demo's page: the videos, times and environment, before the plan's own sections."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from freqopt.demo import video as demo_video
from freqopt.demo.settings import Settings
from freqopt.files import write_atomically
from freqopt.plan.plan import Plan
from freqopt.reporting.report import Section, figure_html, report, table_html


@dataclass(frozen=True)
class Sampled:
    """A video (3, T, H, W), the time it took, and the first step's with compilation."""

    video: Tensor
    seconds: float
    first_step_seconds: float


def write_page(
    plan: Plan, result: dict[str, Any], settings: Settings, dense: Sampled, split: Sampled
) -> Path:
    """The page, its animation beside it; returns the page's path."""
    moving = demo_video.animation(dense.video, split.video)
    write_atomically(settings.out / "videos.png", moving)
    videos = Section(
        "The video, dense and rewritten",
        (
            "<p><b>Untrained weights: this shows that it runs, not what it can do.</b></p>"
            if settings.random_weights
            else ""
        )
        + f"<p>The same seed, {settings.steps} steps, no dense warm-up steps. PSNR "
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
    how = "neither is compiled" if settings.inner == "eager" else f"both by {settings.inner}"
    if settings.mode is not None:
        how += f" in mode {settings.mode}"
    note = f"Warmed up, the fastest of {settings.repeats}, {how}."
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
