"""What is generated inside pages for users: what errors look like, and why a site stays dense."""

from __future__ import annotations

import re

from benchmarks import ways
from benchmarks.pages import RESULTS, load, origin, table
from freqopt.passes.reasons import Reason

SPLIT = {"FITS", "BY_MODULE", "BY_PLAN", "BY_THRESHOLD", "BY_DENSITY", "MEASURED"}
"""Reasons of what is split, or could be."""

WORDS = {"problem": "a type, head dim or device that has no kernel", "how_many": "how many"}
"""What stands for a detail whose name does not say it."""


def looks() -> str:
    """Errors of calls beside the video that a sampler made with them, of the zoo's model."""
    result, demo = load("calibration"), load("demo_h200")
    plan = result["plan"]
    rows = [
        (row["error"], row["density"], row["psnr"], origin(result))
        for row in result["variants"]
        if row["variant"] == "calibrated"
    ]
    psnrs = plan["psnrs"]
    rows.append(
        (plan["unseen_error"], plan["unseen_density"], sum(psnrs) / len(psnrs), origin(result))
    )
    rows.append((demo["measured_error"], demo["mean_density"], demo["psnr_db"], origin(demo)))
    cells = [
        [f"{error:.4f}", f"{density:.1%}", f"{psnr:.1f} dB", where.rstrip(".")]
        for error, density, psnr, where in sorted(rows)
    ]
    settings = result["settings"]
    head = ["error of calls", "mean density", "PSNR of the video to the dense one", "measured on"]
    return "\n".join(
        [
            f"The zoo's video transformer, {settings['steps']} steps, 32,760 tokens.",
            "",
            *table(head, cells),
        ]
    )


def ways_of_running() -> str:
    """Classes of the model table in the ways that they are run."""
    if not (RESULTS / "ways.json").exists():
        return "`python -m benchmarks.ways` has not been run for this checkout."
    return "\n".join(ways.page(load("ways")))


def reasons() -> str:
    """Why a site stays dense, as `inspect` says it: first what something can be done about."""
    advised, others = [], []
    for reason in Reason:
        if reason.name in SPLIT:
            continue
        text = reason.value
        seen = re.sub(r"\{(\w+)\}", lambda m: f"*{WORDS.get(m[1], m[1])}*", text.seen)
        if text.advice:
            advised.append([seen, text.advice])
        else:
            others.append(f"- {seen}" if len(seen) < 100 else f"- {split_line(seen)}")
    lines = [*table(["it says", "what to do"], advised), "", "The others:", "", *others]
    return "\n".join(lines)


def split_line(text: str) -> str:
    """A long item of a list on two lines."""
    at = text.rindex(" ", 0, 100)
    return f"{text[:at]}\n  {text[at + 1 :]}"
