"""The report: one HTML file that shows what a plan does and why, and needs no network.

`report` is the public function; a caller with more to show (contact sheets, times) passes its own
`Section`s, built with `figure_html` and `table_html` so that they look the same.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from freqopt.files import write_atomically
from freqopt.plan.plan import Plan
from freqopt.plan.records import SitePlan
from freqopt.plan.text import slow_notes
from freqopt.reporting import figures
from freqopt.reporting import maps as reporting_maps
from freqopt.reporting import speed as reporting_speed
from freqopt.reporting.figures import figure_html
from freqopt.shown import shown

logger = logging.getLogger(__name__)

__all__ = ["Card", "Section", "figure_html", "report", "table_html", "write_page"]


@dataclass(frozen=True)
class Section:
    """A section of the report. title: plain text. html: trusted HTML, put in as it is."""

    title: str
    html: str


class Card(NamedTuple):
    """A figure at the head of a page. good: whether it is what was hoped for."""

    label: str
    value: str
    good: bool = True


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
        FileError: the page cannot be written.
    """
    shown = plan if isinstance(plan, Plan) else Plan.load(plan)
    return write_page(
        path,
        f"Frequency-split attention for {shown.model.class_name}",
        _lead(shown),
        _cards(shown),
        [*extra_sections, *plan_sections(shown)],
        notes=shown.evidence.notes,
    )


def write_page(
    path: str | os.PathLike[str],
    title: str,
    lead: str,
    cards: Sequence[Card],
    sections: Sequence[Section],
    *,
    notes: Sequence[str] = (),
    details: Sequence[Section] = (),
) -> Path:
    """Write a page of sections; returns its path.

    title, lead, notes: plain text. details: sections that are folded away at the end.
    """
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = resources.files("freqopt.reporting").joinpath("templates/report.html")
    html = environment.from_string(template.read_text("utf-8")).render(
        title=title, lead=lead, cards=cards, notes=notes, sections=sections, details=details
    )
    write_atomically(path, html)
    return Path(path)


def plan_sections(plan: Plan) -> list[Section]:
    """The report's own sections, those without evidence left out."""
    drawn = (_error_and_cost, _maps, _curves, _speed, _spectra, _probes, _gains)
    found = [_drawn(draw, plan) for draw in drawn] if plan.evidence.sites else []
    return [*(section for section in found if section), _sites(plan), _how(plan)]


def _drawn(draw: Callable[[Plan], Section | None], plan: Plan) -> Section | None:
    """A section, or one that says why it is not there.

    A plan may be as it should be and have figures that no axis takes: all zero, or of 200 decades.
    """
    try:
        with np.errstate(all="ignore"):
            return draw(plan)
    except (ArithmeticError, ValueError, LookupError, TypeError, RuntimeError) as error:
        logger.warning("a part of the report is left out: %s", shown(error), exc_info=True)
        why = escape(shown(error))
        return Section(
            "Left out", f"<p>A section could not be drawn from what the plan holds ({why}).</p>"
        )


def table_html(
    header: Sequence[str], rows: Iterable[Sequence[Any]], *, numbers: Sequence[int] = ()
) -> str:
    """A table; cells are escaped, and the columns listed in `numbers` are aligned right."""

    def row(cells: Sequence[Any], tag: str) -> str:
        parts = []
        for i, cell in enumerate(cells):
            style = ' class="number"' if i in numbers else ""
            parts.append(f"<{tag}{style}>{escape(str(cell))}</{tag}>")
        return f"<tr>{''.join(parts)}</tr>"

    body = "".join(row(cells, "td") for cells in rows)
    return (
        f'<div class="scroll"><table><thead>{row(header, "th")}</thead><tbody>{body}</tbody>'
        "</table></div>"
    )


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
        cards.append((label, f"{dense / split_ms:.2f}", split_ms < dense))
    if low:
        cards.append(
            ("of the keys' power is in the low band", f"{100 * sum(low) / len(low):.0f} %", True)
        )
    return [Card(*card) for card in cards]


def _error_and_cost(plan: Plan) -> Section:
    return Section(
        "Error against cost",
        "<p>What the whole model pays for an error of its output. The lines are predicted from the "
        "curves measured at each head; the points are runs of the whole model on held-out "
        "samples.</p>"
        + figure_html(
            figures.frontier(plan),
            "Both axes are logarithmic; lower left is better. Budgets per head and timestep "
            "against one threshold for all.",
        )
        + figure_html(
            figures.verification(plan),
            "Verification: trials until one was in the shaded band, on the safe side of the "
            "target. Small points are single samples.",
        ),
    )


def _maps(plan: Plan) -> Section:
    html = "<p>Where the plan spends, and where the error that is left sits.</p>" + figure_html(
        reporting_maps.heat_maps(plan),
        "Density as measured in verification, and relative L2 error of each head's output. "
        "Sites left dense show as 100 % and 0.",
    )
    by_timestep = reporting_maps.timestep_maps(plan)
    if by_timestep is not None:
        html += figure_html(
            by_timestep,
            "The same by denoising timestep, each range with its own budgets, read off the curves "
            "measured in it.",
        )
    return Section("Density and error per layer and head", html)


def _curves(plan: Plan) -> Section:
    shown, total = len(figures.thin(list(plan.evidence.sites))), len(plan.evidence.sites)
    some = "" if shown == total else f" {shown} of {total} sites are shown."
    return Section(
        "Error-cost curves",
        "<p>Every line is a head: its error if it were given more or less density. Allocation "
        "stops where another unit of output error costs the same everywhere, so flat curves and "
        "heads that the output hardly sees get little.</p>"
        + figure_html(figures.error_cost_curves(plan), "Measured on the fitted samples." + some),
    )


def _speed(plan: Plan) -> Section | None:
    if not plan.evidence.timings:
        return None
    html = (
        "<p>Attention was timed on this device at a few densities, and the line through the times "
        "is what allocation takes for the cost of a choice.</p>"
    )
    found = reporting_speed.site_times(plan)
    if found:
        dense, split, modelled = (sum(t[i] for t in found.values()) for i in range(3))
        html += (
            f"<p>One call's attention at the {len(found)} sites that are split: {dense:.1f} ms "
            f"dense, {split:.1f} ms with this plan ({dense / split:.1f} times faster); the model "
            f"of costs says {modelled:.1f} ms.</p>"
        )
    for note in slow_notes(plan):
        html += f"<p><strong>Note: {escape(note)}.</strong></p>"
    return Section(
        "Speed",
        html
        + figure_html(
            reporting_speed.speed(plan),
            "Left: times by shape, the model's lines and dense attention (dashed). Right: every "
            "site at its own budgets, as timed in one call of the model.",
        ),
    )


def _spectra(plan: Plan) -> Section | None:
    figure = figures.spectra(plan)
    if figure is None:
        return None
    cutoff = next(e.spectrum.cutoff for e in plan.evidence.sites.values() if e.spectrum)
    return Section(
        "Spectra of the keys",
        "<p>Power of each head's keys over the token lattice. Content below the cut-off "
        f"({cutoff:.3g} cycles per token) survives in the means of 64 tokens; the rest needs exact "
        "tokens where it matters.</p>"
        + figure_html(
            figure,
            "One line per head; the constant part is left out, as it cancels in the softmax. "
            "Titles give the mean share of the low band.",
        ),
    )


def _probes(plan: Plan) -> Section | None:
    found = figures.probe_scatter(plan)
    if found is None:
        return None
    figure, correlation, ratio = found
    return Section(
        "Probe error against true error",
        "<p>Every call reports its own error from a few exactly attended queries. Against the "
        f"error over all queries: rank correlation {correlation:.3f}, mean ratio {ratio:.2f}.</p>"
        + _narrow(figure, "One point per head and threshold, over the fitted samples."),
    )


def _gains(plan: Plan) -> Section | None:
    figure = figures.gains(plan)
    if figure is None:
        return None
    return Section(
        "What reaches the output",
        "<p>An error was injected at one place at a time, and the model's output compared.</p>"
        + figure_html(
            figure,
            "Points are heads at each range of the timestep, bars their mean. Orange: the same "
            "among the errors of all other heads, at the working point, as the plan weighs them; 0 "
            "where a head's error undoes a part of the others'.",
        ),
    )


def _sites(plan: Plan) -> Section:
    rows = [_site_row(name, site) for name, site in plan.sites.items()]
    html = table_html(
        (
            "site",
            "decision",
            "heads",
            "head dim",
            "tokens",
            "density",
            "lowest",
            "highest",
            "error",
            "reason",
        ),
        rows,
        numbers=range(2, 9),
    )
    left = plan.evidence.dense_sites
    if left:
        html += "<p>Attention that cannot be split, and why:</p>"
        html += table_html(("site", "reason"), left.items())
    return Section("Sites", html)


def _site_row(name: str, site: SitePlan) -> tuple[str, ...]:
    shape = (str(site.heads), str(site.head_dim), f"{site.tokens:,}")
    if site.decision == "dense":
        return (name, "dense", *shape, "100 %", "", "", "0", site.reason)
    density, error = [100 * d for d in site.density], site.error
    cells = [""] * 3
    if density:
        found = (math.fsum(density) / len(density), min(density), max(density))
        cells = [f"{each:.1f} %" for each in found]
    mean = f"{math.fsum(error) / len(error):.3f}" if error else ""
    return (name, "split", *shape, *cells, mean, site.reason)


def _how(plan: Plan) -> Section:
    trials = table_html(
        ("trial", "predicted error", "measured error", "worst sample", "mean density"),
        [
            (
                i + 1,
                f"{t.predicted_error:.4f}",
                f"{t.measured_error:.4f}",
                f"{t.worst_error:.4f}",
                f"{100 * t.mean_density:.1f} %",
            )
            for i, t in enumerate(plan.evidence.trials)
        ],
        numbers=range(5),
    )
    return Section(
        "Verification and identity",
        trials
        + table_html(
            ("what", "value"),
            [
                ("model", f"{plan.model.class_name}, fingerprint {plan.model.fingerprint}"),
                ("plan format, split definition", f"{plan.version}, {plan.split_version}"),
                ("device", plan.device),
                ("output error with everything exact (rounding)", _floor(plan)),
                (
                    "versions",
                    f"freqopt {plan.versions.freqopt}, torch {plan.versions.torch}, "
                    f"triton {plan.versions.triton or 'none'}",
                ),
                ("seed", plan.seed),
            ],
        ),
    )


def _floor(plan: Plan) -> str:
    floor = plan.evidence.rounding_error
    return "not measured" if floor is None else f"{floor:.1e}"


def _narrow(figure: Figure, caption: str) -> str:
    return f'<div style="max-width: 560px">{figure_html(figure, caption)}</div>'
