"""The report: one HTML file that shows what a plan does and why, and needs no network.

`report` is the public function; a caller with more to show (contact sheets, times) passes its own
`Section`s, built with `figure_html` and `table_html` so that they look the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from freqopt.options import load_plan
from freqopt.plan.folder import check_file_part
from freqopt.plan.plan import Plan
from freqopt.reporting.page import Card, Section, table_html, write_page
from freqopt.reporting.sections import plan_sections
from freqopt.reporting.style import figure_html

__all__ = [
    "Card",
    "Section",
    "figure_html",
    "plan_sections",
    "report",
    "report_each",
    "table_html",
    "write_page",
]


def report(
    plan: Plan | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    extra_sections: Iterable[Section] = (),
) -> Path:
    """Write a plan's report as one self-contained HTML file.

    Args:
        plan: a plan, or the path of one.
        path: the file to write; folders are made as needed.
        extra_sections: the caller's own sections, shown before those of the plan.

    Returns:
        The path written.

    Raises:
        PlanError: a plan file that cannot be read.
        OptionError: neither a plan nor a path.
        FileError: the page cannot be written.
    """
    shown = load_plan(plan)
    return write_page(
        path,
        f"Frequency-split attention for {shown.model.class_name}",
        _lead(shown),
        _cards(shown),
        [*extra_sections, *plan_sections(shown)],
        notes=shown.evidence.notes,
    )


def report_each(plans: Mapping[str, Plan], path: str | os.PathLike[str]) -> list[Path]:
    """Write a page about each of several plans, as `report`; returns the files.

    Of several, each has the name of its model behind that of the file.

    Raises:
        FileError: a page cannot be written.
        InputError: a model's name cannot be part of a file's; no page is written.
    """
    target = Path(path)
    if len(plans) == 1:
        return [report(plan, target) for plan in plans.values()]
    for name in plans:
        check_file_part(name)
    return [report(plan, target.with_stem(f"{target.stem}-{name}")) for name, plan in plans.items()]


def _lead(plan: Plan) -> str:
    grids = ", ".join("x".join(map(str, grid)) for grid in plan.grids)
    evidence = plan.evidence
    return (
        f"Calibrated on {plan.device} for token grids {grids} (t x h x w), with "
        f"{evidence.samples} samples to fit and {evidence.held_out} held out; freqopt "
        f"{plan.versions.freqopt}, torch {plan.versions.torch}."
    )


def _cards(plan: Plan) -> list[Card]:
    split = sum(site.decision == "split" for site in plan.sites.values())
    met = plan.measured_error <= plan.target_error
    target = ("target", f"{100 * plan.target_error:.3g} %", True)
    if plan.target_psnr is not None and plan.measured_psnr is not None:
        label = f"PSNR of the generated video, target {plan.target_psnr:g} dB"
        target = (label, f"{plan.measured_psnr:.1f} dB", plan.measured_psnr >= plan.target_psnr)
    if plan.target_density is not None:
        target = ("target: mean density", f"{100 * plan.target_density:.3g} %", True)
    verified = plan.verified
    within = None if verified is None else verified.quantile_error
    if within is not None and plan.target_quantile is not None:
        label = f"{plan.target_quantile:.0%} of held-out samples are within, target "
        met = within <= plan.target_error
        target = (f"{label}{100 * plan.target_error:.3g} %", f"{100 * within:.2f} %", met)
    low = [share for e in plan.evidence.sites.values() if e.spectrum for share in e.spectrum.low]
    cards = [
        ("output error (relative L2), held out", f"{100 * plan.measured_error:.2f} %", met),
        target,
        ("mean density: pairs attended exactly", f"{100 * plan.mean_density:.1f} %", True),
        ("attention sites split", f"{split} of {len(plan.sites)}", split > 0),
    ]
    if verified is not None:
        worst, spread = 100 * plan.worst_error, 100 * verified.spread
        label = f"error of the worst held-out sample; standard deviation {spread:.2f} %"
        cards.append((label, f"{worst:.2f} %", True))
    if verified is not None and verified.model_ms is not None:
        dense, split_ms = verified.model_ms
        label = f"whole model, {dense:.4g} ms dense, {split_ms:.4g} ms split: times faster"
        faster = f"{dense / split_ms:.2f}" if split_ms > 0.0 else "not timed"
        cards.append((label, faster, split_ms < dense))
    if low:
        cards.append(
            ("of the keys' power is in the low band", f"{100 * sum(low) / len(low):.0f} %", True)
        )
    return [Card(*card) for card in cards]
