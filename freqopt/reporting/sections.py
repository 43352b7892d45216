"""The sections of a plan's report, those left out that the plan has no evidence for."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from html import escape

import numpy as np
from matplotlib.figure import Figure

from freqopt.plan.plan import Plan
from freqopt.reporting import figures, maps, orders
from freqopt.reporting.model_sections import (
    error_and_cost_section,
    how_section,
    samples_section,
    sites_section,
    speed_section,
)
from freqopt.reporting.page import Section
from freqopt.reporting.style import figure_html, thin
from freqopt.shown import shown

logger = logging.getLogger(__name__)


def plan_sections(plan: Plan) -> list[Section]:
    """The report's own sections, those without evidence left out."""
    drawn: list[Callable[[Plan], Section | None]] = [samples_section, speed_section]
    if plan.evidence.sites:
        of_heads = (_spectra, _probes, _gains)
        drawn = [error_and_cost_section, drawn[0], _maps, _orders, _curves, drawn[1], *of_heads]
    found = [_drawn(draw, plan) for draw in drawn]
    return [*(section for section in found if section), sites_section(plan), how_section(plan)]


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


def _maps(plan: Plan) -> Section:
    html = "<p>Where the plan spends, and where the error that is left sits.</p>" + figure_html(
        maps.heat_maps(plan),
        "Density as measured in verification, and relative L2 error of each head's output. "
        "Sites left dense show as 100 % and 0.",
    )
    by_timestep = maps.timestep_maps(plan)
    if by_timestep is not None:
        html += figure_html(
            by_timestep,
            "The same by denoising timestep, each range with its own budgets, read off the curves "
            "measured in it.",
        )
    return Section("Density and error per layer and head", html)


def _orders(plan: Plan) -> Section | None:
    if not orders.has_orders(plan):
        return None
    heads = [each for rows in orders.bought(plan).values() for each in rows]
    html = (
        "<p>Each key head has the order of its tokens that pays: along a curve through the grid, "
        "or by content, in chunks or all together. A better order leaves a smaller error at the "
        "same density; making it takes time.</p>"
    )
    for words, of_order in (
        ("are ordered by content: their error is", [each for each in heads if each.chunk]),
        (
            "keep the grid: the best order by content would make it",
            [h for h in heads if not h.chunk],
        ),
    ):
        ratios = [each.ratio for each in of_order if each.ratio]
        if ratios:
            mean = math.exp(math.fsum(map(math.log, ratios)) / len(ratios))
            html += (
                f"<p>{len(of_order)} of {len(heads)} heads {words} {mean:.2f} times that of the "
                f"grid's order at the same density ({min(ratios):.2f} to {max(ratios):.2f}).</p>"
            )
    return Section(
        "Order per head",
        html
        + figure_html(
            orders.order_maps(plan),
            "Left: the order of each head. Right: what an order by content does to its error at "
            "its own density, the one that it has (dots) or else the best; blue is better. "
            "Hatched: dense, or not measured.",
        ),
    )


def _curves(plan: Plan) -> Section:
    shown, total = len(thin(list(plan.evidence.sites))), len(plan.evidence.sites)
    some = "" if shown == total else f" {shown} of {total} sites are shown."
    return Section(
        "Error-cost curves",
        "<p>Every line is a head: its error if it were given more or less density. Allocation "
        "stops where another unit of output error costs the same everywhere, so flat curves and "
        "heads that the output hardly sees get little.</p>"
        + figure_html(figures.error_cost_curves(plan), "Measured on the fitted samples." + some),
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


def _narrow(figure: Figure, caption: str) -> str:
    return f'<div style="max-width: 560px">{figure_html(figure, caption)}</div>'
