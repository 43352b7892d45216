"""Speed in the report: the cost model's lines through timed points, and sites against them."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from freqopt.calibration.measure.attention import AttentionShape
from freqopt.calibration.search.cost import cost_model
from freqopt.plan.plan import Plan
from freqopt.plan.records import SiteTiming
from freqopt.reporting.style import BLUE, GREEN, GREY, ORANGE, percent_axis, styled

COLOURS = (BLUE, GREEN, ORANGE, GREY)


def site_times(plan: Plan) -> dict[str, tuple[float, float, float]]:
    """Milliseconds of every timed site: dense, split, and split as the cost model has it."""
    if not plan.evidence.timings:
        return {}
    cost = cost_model(plan.evidence.timings)
    found = {}
    for name, evidence in plan.evidence.sites.items():
        site = plan.sites[name]
        if evidence.times_ms is None or site.decision == "dense":
            continue
        shape = AttentionShape(site.heads, site.tokens, site.head_dim)
        modelled = float(cost.split(shape, np.array(site.density)).sum())
        found[name] = (*evidence.times_ms, modelled)
    return found


def model_parts(plan: Plan) -> dict[str, tuple[float, float]] | None:
    """Milliseconds of a run of the model, dense and split: attention at split sites, and the rest.

    None where the model was not timed. Sites were timed one by one, so the parts are approximate;
    their sum is what was measured.
    """
    if plan.verified is None or plan.verified.model_ms is None:
        return None
    dense, split = plan.verified.model_ms
    if min(dense, split) <= 0.0:
        return None
    times = list(site_times(plan).values())
    found = {}
    for name, total, index in (("dense", dense, 0), ("split", split, 1)):
        attention = min(sum(each[index] for each in times), total)
        found[name] = attention, total - attention
    return found


@styled
def speed(plan: Plan) -> Figure:
    """Time against density by shape, and measured against modelled time by site."""
    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.3, 1))
    for timing, colour in zip(plan.evidence.timings, COLOURS, strict=False):
        label = f"{timing.heads} x {timing.tokens:,} x {timing.head_dim}"
        _draw_line(left, timing, colour, label)
        left.axhline(timing.dense_ms, color=colour, lw=1.2, ls=(0, (4, 3)))
    left.set(xlabel="density (share of pairs attended exactly)", ylabel="ms, all heads")
    left.set(xscale="log", yscale="log", title="Heads x tokens x head dim")
    percent_axis(left)
    left.legend(loc="center left")
    times = list(site_times(plan).values())
    if not times:
        right.set_visible(False)
        return figure
    dense, measured, modelled = np.array(times).T
    top = 1.08 * max(measured.max(), modelled.max())
    right.plot([0, top], [0, top], color=ORANGE, lw=1.2, ls=(0, (4, 3)))
    right.scatter(modelled, measured, s=22, color=BLUE, alpha=0.7)
    right.set(xlim=(0, top), ylim=(0, top), xlabel="ms by the model of costs")
    right.set(ylabel="ms measured", title=f"Sites ({dense.mean():.2f} ms dense, mean)")
    return figure


def _draw_line(ax: Axes, timing: SiteTiming, colour: str, label: str) -> None:
    density, ms = np.array(timing.points).T
    at = np.geomspace(max(density.min() / 2, 1e-3), min(density.max() * 2, 1.0), 50)
    ax.plot(at, timing.base_ms + timing.density_ms * at, color=colour, label=label)
    ax.scatter(density, ms, s=28, color=colour, zorder=3)
