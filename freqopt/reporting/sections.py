"""The sections of a plan's report, those left out that the plan has no evidence for."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from html import escape

import numpy as np
from matplotlib.figure import Figure

from freqopt.plan.plan import Plan
from freqopt.plan.records import SitePlan
from freqopt.plan.text import order_words, scope_of, slow_notes, verification
from freqopt.reporting import errors, figures, maps, orders, speed
from freqopt.reporting.page import Section, table_html
from freqopt.reporting.style import figure_html, thin
from freqopt.shown import shown

logger = logging.getLogger(__name__)

SPLIT_SITES, REST = "attention at the sites that are split", "the rest of the model"


def plan_sections(plan: Plan) -> list[Section]:
    """The report's own sections, those without evidence left out."""
    by_curves = (_error_and_cost, _maps, _orders, _curves)
    measured = (_speed, _spectra, _probes, _gains)
    drawn: list[Callable[[Plan], Section | None]] = [_samples, *measured]
    if plan.evidence.sites:
        drawn = [by_curves[0], _samples, *by_curves[1:], *measured]
    found = [_drawn(draw, plan) for draw in drawn]
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


def _error_and_cost(plan: Plan) -> Section:
    html = (
        "<p>What the whole model pays for an error of its output. The lines on the left are "
        "predicted: errors of single heads, measured one at a time, added up. The marks on the "
        "right are runs of the whole model. Compare marks of one shape: squares were measured on "
        "the same samples, those that were fitted to, and rounds on the same held-out ones.</p>"
    )
    compared = errors.comparable(plan)
    if plan.evidence.trials and plan.target_psnr is None and not plan.predicted:
        last = plan.evidence.trials[-1]
        if last.predicted_error > 0.0:
            ratio = last.measured_error / last.predicted_error
            html += (
                f"<p>The plan's own error was predicted to be {last.predicted_error:.4f} and "
                f"measured as {last.measured_error:.4f}, {ratio:.2f} times that; so a mark on the "
                "right says nothing about a line on the left.</p>"
            )
    html += figure_html(
        errors.frontier(plan),
        "All axes are logarithmic; lower left is better. Left: as predicted. Right: as measured.",
    )
    if compared:
        html += (
            "<p>Ways to choose budgets, run on the same fitted samples near the target; the plan "
            "is along the one that cost least there.</p>"
        ) + _comparison(plan)
    figure = errors.verification(plan)
    if figure is not None:
        html += figure_html(
            figure,
            "Verification: trials until one was in the shaded band, on the safe side of the "
            "target. Small points are single samples.",
        )
    return Section("Error against cost", html)


def _comparison(plan: Plan) -> str:
    rows = [
        (
            each.name + (" (taken)" if each.taken else ""),
            f"{each.measured_error:.4f}",
            f"{each.predicted_error:.4f}",
            f"{100 * each.mean_density:.1f} %",
            f"{100 * each.cost:.1f} %",
        )
        for each in errors.comparable(plan)
    ]
    head = ("way", "measured error", "predicted", "mean density", "cost over dense attention's")
    return table_html(head, rows, numbers=range(1, 5))


def _samples(plan: Plan) -> Section | None:
    figure = errors.sample_errors(plan)
    if figure is None:
        return None
    lines = "".join(f"<p>{escape(line)}.</p>" for line in verification(plan)[:2])
    over = "" if plan.target_psnr or plan.target_density else " Orange: beyond the target."
    return Section(
        "Error per sample",
        lines + figure_html(figure, f"Every sample that the plan was verified on.{over}"),
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


def _speed(plan: Plan) -> Section | None:
    html = _whole_model(plan)
    if not plan.evidence.timings:
        return Section("Speed", html) if html else None
    html += (
        "<p>Attention was timed on this device at a few densities, and the line through the times "
        "is what allocation takes for the cost of a choice.</p>"
    )
    found = speed.site_times(plan)
    if found:
        dense, split, modelled = (sum(t[i] for t in found.values()) for i in range(3))
        faster = f" ({dense / split:.1f} times faster)" if split > 0.0 else ""
        html += (
            f"<p>One call's attention at the {len(found)} sites that are split: {dense:.1f} ms "
            f"dense, {split:.1f} ms with this plan{faster}; the model "
            f"of costs says {modelled:.1f} ms.</p>"
        )
    for note in slow_notes(plan):
        html += f"<p><strong>Note: {escape(note)}.</strong></p>"
    return Section(
        "Speed",
        html
        + figure_html(
            speed.speed(plan),
            "Left: times by shape, the model's lines and dense attention (dashed). Right: every "
            "site at its own budgets, as timed in one call of the model.",
        ),
    )


def _whole_model(plan: Plan) -> str:
    """Bars of a whole run of the model, dense and split, as timed before the plan was given out."""
    parts = speed.model_parts(plan)
    if parts is None:
        return ""
    longest = max(sum(each) for each in parts.values())
    bars = []
    for name, (attention, rest) in parts.items():
        cells = "".join(
            f'<i class="{kind}" style="width: {100 * ms / longest:.2f}%" '
            f'title="{words}">{f"{ms:.4g} ms" if ms > 0.12 * longest else ""}</i>'
            for kind, words, ms in (("look", SPLIT_SITES, attention), ("rest", REST, rest))
            if ms > 0.0
        )
        total = f"{attention + rest:.4g} ms"
        bars.append(f'<div>{name}, {total}<div class="bar">{cells}</div></div>')
    key = "".join(
        f'<span><i class="{kind}"></i>{words}</span>'
        for kind, words in (("look", SPLIT_SITES), ("rest", REST))
        if kind == "rest" or any(attention > 0.0 for attention, _ in parts.values())
    )
    return (
        "<p>One run of the whole model, launches included and compiled nowhere but at attention, "
        f'as timed before the plan was given out:</p><div class="bars">{"".join(bars)}</div>'
        f'<div class="key">{key}</div>'
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
            "order",
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
        numbers=range(3, 10),
    )
    left = plan.evidence.dense_sites
    if left:
        html += "<p>Attention that cannot be split, and why:</p>"
        html += table_html(("site", "reason"), left.items())
    return Section("Sites", html)


def _site_row(name: str, site: SitePlan) -> tuple[str, ...]:
    shape = (str(site.heads), str(site.head_dim), f"{site.tokens:,}")
    if site.decision == "dense":
        return (name, "dense", "", *shape, "100 %", "", "", "0", site.reason)
    density, error = [100 * d for d in site.density], site.error
    cells = [""] * 3
    if density:
        found = (math.fsum(density) / len(density), min(density), max(density))
        cells = [f"{each:.1f} %" for each in found]
    mean = f"{math.fsum(error) / len(error):.3f}" if error else ""
    return (name, "split", order_words(site), *shape, *cells, mean, site.reason)


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
                ("verified for", scope_of(plan)),
                ("seed", plan.seed),
            ],
        ),
    )


def _floor(plan: Plan) -> str:
    floor = plan.evidence.rounding_error
    return "not measured" if floor is None else f"{floor:.1e}"


def _narrow(figure: Figure, caption: str) -> str:
    return f'<div style="max-width: 560px">{figure_html(figure, caption)}</div>'
