"""Sections of a report about the whole model: its error, its samples, its speed, its sites."""

from __future__ import annotations

import math
from html import escape

from freqopt.plan.plan import Plan
from freqopt.plan.records import SitePlan
from freqopt.plan.text import CLOCK_WORDS, order_words, scope_of, slow_notes, verification
from freqopt.reporting import errors, speed
from freqopt.reporting.page import Section, table_html
from freqopt.reporting.style import figure_html

SPLIT_SITES, REST = "attention at the sites that are split", "the rest of the model"


def error_and_cost_section(plan: Plan) -> Section:
    """What the whole model pays for an error: as predicted, and as measured."""
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
            within = ""
            if plan.target_quantile is not None:
                within = f" (what {plan.target_quantile:.0%} of the samples are within)"
            html += (
                f"<p>The plan's own error was predicted to be {last.predicted_error:.4f} and "
                f"measured as {last.measured_error:.4f}{within}, {ratio:.2f} times that; so a mark "
                "on the right says nothing about a line on the left.</p>"
            )
    html += figure_html(
        errors.frontier(plan),
        "Lower left is better. Left: as predicted, on logarithmic axes. Right: as measured, near "
        "the target, on axes of its own.",
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


def samples_section(plan: Plan) -> Section | None:
    """The error of every sample that the plan was verified on; None where they were not kept."""
    figure = errors.sample_errors(plan)
    if figure is None:
        return None
    told = (f"{line[:1].upper()}{line[1:]}." for line in verification(plan)[:2])
    lines = "".join(f"<p>{escape(line)}</p>" for line in told)
    over = "" if plan.target_psnr or plan.target_density else " Orange: beyond the target."
    return Section(
        "Error per sample",
        lines + figure_html(figure, f"Every sample that the plan was verified on.{over}"),
    )


def speed_section(plan: Plan) -> Section | None:
    """Times of the whole model and of attention; None where nothing was timed."""
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
        f"<p>One run of the whole model, launches included{_ran(plan)}, "
        f'as timed before the plan was given out:</p><div class="bars">{"".join(bars)}</div>'
        f'<div class="key">{key}</div>'
    )


def _ran(plan: Plan) -> str:
    """How the model ran when it was timed, as far as the plan says."""
    clock = None if plan.verified is None else plan.verified.model_clock
    if clock is None:
        return ""
    return ", compiled nowhere but at attention" if clock == "eager" else f", {CLOCK_WORDS[clock]}"


def sites_section(plan: Plan) -> Section:
    """Every site, and what is decided about it."""
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


def how_section(plan: Plan) -> Section:
    """The trials, and what the plan belongs to."""
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
