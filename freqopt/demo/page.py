"""The demo's page, in words for who never heard of attention; the plan's own sections come last."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from freqopt.demo import video as demo_video
from freqopt.demo.closeup import CloseUp, curve_figure
from freqopt.demo.settings import Settings
from freqopt.demo.shares import Shares
from freqopt.files import write_atomically
from freqopt.plan.plan import Plan
from freqopt.reporting.report import (
    Card,
    Section,
    figure_html,
    plan_sections,
    table_html,
    write_page,
)

WORDS = (
    ("patch, or token", "a small piece of one frame; what the model works on instead of pixels"),
    ("attention", "the part of a model in which every patch looks at every other one"),
    ("head", "one of several attentions side by side in a layer, each looking for other things"),
    ("density", "the share of pairs of patches that is still looked at one by one"),
    ("error", "how far an output is from the exact one, relative to its size: 0.03 is 3 %"),
    ("PSNR", "how close two pictures are, in decibels: 30 is similar, 40 hard to tell apart"),
    ("plan", "a file that says, for each head, how much may be approximated"),
)

EXAMPLE = """\
import torch, freqopt

with freqopt.recording(pipe.transformer) as samples:      # inputs of your own runs
    pipe("a prompt", num_inference_steps=16)
plan = freqopt.calibrate(pipe.transformer, samples, target_error=0.03)
pipe.transformer.compile(backend="freqopt", options={"plan": plan})"""


@dataclass(frozen=True)
class Sampled:
    """A video (3, T, H, W), the time it took, and the first step's with compilation.

    steps: (inputs, output) of some of the steps.
    """

    video: Tensor
    seconds: float
    first_step_seconds: float
    steps: Sequence[tuple[dict[str, Tensor], Tensor]] = ()


@dataclass(frozen=True)
class Seen:
    """What the demo saw, beside its figures: both videos, one attention, where a step's time went.

    shares: of the dense and the rewritten model, where that can be told.
    """

    dense: Sampled
    split: Sampled
    closeup: CloseUp | None
    shares: tuple[Shares, Shares] | None


def write_demo_page(plan: Plan, result: dict[str, Any], settings: Settings, seen: Seen) -> Path:
    """The page, its animation beside it; returns the page's path."""
    moving = demo_video.animation(seen.dense.video, seen.split.video)
    write_atomically(settings.out / "videos.png", moving)
    sections = [
        _videos(result, settings, seen),
        _approximated(plan, result, seen),
        _time(result, settings, seen),
        _checked(plan, result, settings),
        *_closely(seen.closeup),
        *_foreign(result),
        _own(),
        _environment(result),
    ]
    notes = []
    if settings.random_weights:
        notes.append("Untrained weights: this shows that it runs, not what it can do.")
    return write_page(
        settings.out / "report.html",
        "One video, made twice",
        _lead(result, settings),
        _cards(plan, result),
        sections,
        notes=notes,
        details=plan_sections(plan),
    )


def _lead(result: dict[str, Any], settings: Settings) -> str:
    return (
        f"A small video model made a clip of {settings.frames} frames twice, from the same noise, "
        f"in {settings.steps} steps on this machine ({result['environment']['device']}). "
        "The second time, freqopt had rewritten the model so that most of its attention is "
        "approximated. Everything here was measured in this run."
    )


def _cards(plan: Plan, result: dict[str, Any]) -> list[Card]:
    dense, split = result["dense_seconds"], result["split_seconds"]
    faster, sites = result["speedup"], len(plan.sites)
    psnr = result["psnr_db"]
    return [
        Card(
            f"times as fast: {dense:.1f} s exact, {split:.1f} s rewritten",
            f"{faster:.2f}",
            faster > 1,
        ),
        Card("of all pairs are still looked at one by one", f"{result['density_here']:.0%}"),
        Card(
            "how close the videos are (PSNR; 30 is similar, 40 hard to tell apart)",
            f"{psnr:.1f} dB",
            psnr >= 25,
        ),
        Card(
            "attention layers rewritten",
            f"{result['sites_split']} of {sites}",
            result["sites_split"] > sites // 2,
        ),
    ]


def _videos(result: dict[str, Any], settings: Settings, seen: Seen) -> Section:
    dense, split = seen.dense.video, seen.split.video
    sheet = figure_html(
        demo_video.contact_sheet(dense, split), "Both videos, frame by frame.", photo=True
    )
    curve = figure_html(
        demo_video.frame_curve(result["psnr_db_per_frame"]), "How close each frame is, as PSNR."
    )
    return Section(
        "The videos",
        demo_video.player_html(dense, split)
        + f"<p>Over all frames the PSNR is <b>{result['psnr_db']:.1f} dB</b> and the structural "
        f"similarity (SSIM) <b>{result['ssim']:.4f}</b>, where 1 is equal. No step was left "
        "exact. The model is small and was trained for minutes, on moving shapes: look at how "
        "alike the two are, not at how pretty.</p>" + sheet + curve,
    )


def _approximated(plan: Plan, result: dict[str, Any], seen: Seen) -> Section:
    tokens = result["tokens"]
    heads = sum(site.heads for site in plan.sites.values())
    shares = {} if seen.closeup is None else seen.closeup.shares
    densities = [density for own in shares.values() for density in own]
    html = (
        f"<p>The model cuts the clip into {tokens:,} small patches. In each of {len(plan.sites)} "
        "layers every patch looks at every other one, to find what belongs together: the same "
        f"ball a few frames later, the rest of an edge. That is {tokens**2:,} "
        f"pairs for each of {heads} heads, at every step. It is called attention, and the longer "
        "the video the more of the work it is.</p>"
        "<p>Most pairs hardly matter. So the rewritten model first estimates, for every group of "
        "128 patches, which groups of 64 others would be missed. Those it looks at patch by patch: "
        f"{result['density_here']:.1%} of all pairs"
    )
    if densities:
        html += f", from {min(densities):.0%} to {max(densities):.0%} by head"
    html += (
        ". All the others it sees through averages of 64 patches, with a correction for what an "
        "average loses. Nothing is left out, and nothing was trained again.</p>"
    )
    if seen.closeup is not None:
        found = seen.closeup
        how = "alike in content" if found.chunk else "near each other"
        picture = demo_video.spotlight(seen.dense.video, found.tile, found.looked, found.patch)
        html += figure_html(
            picture,
            f"What one group of patches (framed) looks at one by one, in colour: {found.share:.0%} "
            f"of the video. All that is dark and grey it sees through averages. This is head "
            f"{found.head} of {found.site}, whose groups are patches that are {how}.",
            photo=True,
        )
    return Section("What was approximated", html)


def _time(result: dict[str, Any], settings: Settings, seen: Seen) -> Section:
    html = ""
    if seen.shares is not None:
        html += "<p>One step of each model, as PyTorch's profiler saw it:</p>"
        html += _bars(dict(zip(("exact", "rewritten"), seen.shares, strict=True)))
    rows = []
    for name, key in (("exact", "dense"), ("rewritten", "split")):
        seconds, first = result[f"{key}_seconds"], result[f"{key}_first_step_seconds"]
        rows.append(
            (name, f"{seconds:.2f}", f"{1000 * seconds / settings.steps:.1f}", f"{first:.1f}")
        )
    head = (
        "model",
        f"{settings.steps} steps (s)",
        "one step (ms)",
        "its first step, where it compiles (s)",
    )
    html += table_html(head, rows, numbers=range(1, 4))
    how = "neither is compiled otherwise" if settings.inner == "eager" else f"by {settings.inner}"
    if settings.mode is not None:
        how += f" in mode {settings.mode}"
    html += f"<p>Warmed up, the fastest of {settings.repeats}; {how}.</p>"
    stages = [(name, f"{seconds:.1f}") for name, seconds in result["stages"].items()]
    html += "<h3>This run</h3>" + table_html(("what", "seconds"), stages, numbers=[1])
    return Section("Where the time went", html)


def _bars(models: dict[str, Shares]) -> str:
    """Stacked bars of equal scale, with a key; each part's seconds are in words too."""
    kinds = (
        ("look", "looking at pairs and averages", "looking"),
        ("find", "finding out where to look", "finding"),
        ("rest", "the rest of the model", "rest"),
    )
    longest = max(sum(each) for each in models.values())
    bars, rows = [], []
    for name, each in models.items():
        parts = "".join(
            _bar(kind, words, getattr(each, field), longest) for kind, words, field in kinds
        )
        bars.append(f'<div>{name}, {sum(each):.2f} s<div class="bar">{parts}</div></div>')
        rows.append(
            [name, *(f"{getattr(each, field):.2f}" for _, _, field in kinds), f"{sum(each):.2f}"]
        )
    key = "".join(f'<span><i class="{kind}"></i>{words}</span>' for kind, words, _ in kinds)
    head = ["seconds of one step", *(words for _, words, _ in kinds), "together"]
    return f'<div class="bars">{"".join(bars)}</div><div class="key">{key}</div>' + table_html(
        head, rows, numbers=range(1, 5)
    )


def _bar(kind: str, words: str, seconds: float, longest: float) -> str:
    """One part of a bar; its seconds are written where there is room for them."""
    width = 100 * seconds / longest
    text = f"{seconds:.2f} s" if width >= 9 else ""
    padding = "" if text else "; padding: 0"
    return f'<i class="{kind}" style="width: {width:.2f}%{padding}" title="{words}">{text}</i>'


def _checked(plan: Plan, result: dict[str, Any], settings: Settings) -> Section:
    made = (
        "The plan was made in this run, from steps of other videos."
        if settings.calibrate
        else (
            "The plan that says how much each head may approximate ships with freqopt. It was made "
            "with <code>freqopt.calibrate</code>, from other videos, as making one takes longer "
            "than this demo. So it was checked here."
        )
    )
    errors = result["errors_here"]
    rows = [(f"{each['timestep']:.2f}", f"{100 * each['error']:.2f} %") for each in errors]
    html = (
        f"<p>{made}</p><p>The rewritten model was given the very inputs that the exact one had met "
        f"at {len(errors)} of its steps. Its outputs were off by "
        f"<b>{100 * result['error_here']:.2f} %</b> (root mean square). The plan had measured "
        f"{100 * plan.measured_error:.2f} %, on {plan.evidence.held_out} steps that it was not "
        f"fitted to, of {math.prod(plan.grids[0]):,} patches; here there are "
        f"{result['tokens']:,}.</p>"
    )
    return Section(
        "Was the plan right?",
        html
        + table_html(("noise in the input (1: all)", "error of the output"), rows, numbers=[1]),
    )


def _closely(found: CloseUp | None) -> list[Section]:
    if found is None:
        return []
    density, error = found.at
    html = (
        f"<p>How much may a head approximate? Calibration measures, for every head, what each "
        f"density would cost. Here that was done again for head {found.head} of {found.site}, at a "
        f"step of this video. With the plan's choice it looks at {density:.0%} of its pairs one by "
        f"one, and its output is off by {error:.1%}; the plan states {found.planned[0]:.0%} and "
        f"{found.planned[1]:.1%}, a mean over other videos and steps.</p>"
    )
    picture = curve_figure(found)
    return [
        Section("One head, closely", html + _narrow(figure_html(picture, "Lower left is better.")))
    ]


def _narrow(html: str) -> str:
    return f'<div style="max-width: 640px">{html}</div>'


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
    said = (
        "<p>The same was done with a model class of another library, with everything exact: there "
        "the rewritten model must give what the original gives.</p>"
    )
    return [Section("Another model, not ours", said + table)]


def _own() -> Section:
    words = "".join(f"<dt>{word}</dt><dd>{meaning}</dd>" for word, meaning in WORDS)
    return Section("With your own model", f"<pre>{EXAMPLE}</pre><h3>Words</h3><dl>{words}</dl>")


def _environment(result: dict[str, Any]) -> Section:
    rows = [*result["environment"].items(), ("command", result["command"])]
    return Section("Environment", table_html(("what", "value"), rows))
