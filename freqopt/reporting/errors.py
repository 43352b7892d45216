"""Errors of the whole model's output: against density, trial by trial, and sample by sample.

What was predicted and what was measured stand in panels of their own, as the two differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from freqopt.calibration.evidence import choices_of_plan
from freqopt.calibration.search.allocate import Allocation, allocate, solve
from freqopt.calibration.search.choices import SiteChoices
from freqopt.calibration.search.cost import CostModel, cost_model
from freqopt.calibration.search.refine import TIED
from freqopt.calibration.search.strategies import uniform
from freqopt.calibration.search.video import decibels_of
from freqopt.plan.plan import Plan
from freqopt.plan.records import Comparison, Verified
from freqopt.reporting.style import (
    BLUE,
    GREY,
    INK,
    MAX_MARKS,
    ORANGE,
    percent_axis,
    short,
    single,
    styled,
    thin,
)

DENSITY = "mean density (pairs attended exactly)"

ONE_THRESHOLD = "one threshold for all heads"

DASHES: Any = (0, (4, 3))


def comparable(plan: Plan) -> list[Comparison]:
    """Ways to choose budgets that were judged by the error of the model's output."""
    return plan.evidence.compared if plan.target_psnr is None else []


@styled
def frontier(plan: Plan) -> Figure:
    """Output error against density: left as predicted from the heads' curves, right as measured.

    Points of one shape were measured on the same samples. Each panel has its own axes.
    """
    figure = Figure(figsize=(11.4, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    lines = predicted_lines(plan)
    for label, points in lines.items():
        colour = GREY if label == ONE_THRESHOLD else BLUE
        left.plot(*np.array(points).T, color=colour, lw=2.2, label=label)
    if not lines:
        words = "not known: what heads' errors do\nto the output was not measured"
        left.text(0.5, 0.5, words, transform=left.transAxes, ha="center", color=ORANGE)
    within = ""
    if plan.target_quantile is not None:
        within = f": {plan.target_quantile:.0%} of samples within"
    left.set(title="Predicted from the heads' curves", ylabel="relative L2 error of the output")
    right.set(title=f"Measured, the whole model{within}")
    _measured(right, plan)
    left.set(xlabel=DENSITY, xscale="log", yscale="log")
    left.set_ylim(bottom=plan.target_error / 30)
    right.set(xlabel=DENSITY)
    right.margins(0.25)
    right.xaxis.set_major_locator(MaxNLocator(5))
    right.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=None, symbol=" %"))
    for ax in (left, right):
        if plan.target_density is not None:
            ax.axvline(plan.target_density, color=ORANGE, lw=1.2, ls=DASHES, label="target")
        elif plan.target_psnr is None:
            ax.axhline(plan.target_error, color=ORANGE, lw=1.2, ls=DASHES, label="target")
    percent_axis(left)
    left.legend(loc="lower left")
    right.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def predicted_lines(plan: Plan) -> dict[str, list[tuple[float, float]]]:
    """(density, error) along the two ways that heads' curves alone tell of; none if they do not."""
    buckets = len(plan.timestep_edges) + 1
    if any(len(plan.sites[name].gains) != buckets for name in plan.evidence.sites):
        return {}
    timed = all(timing.dense_ms > 0.0 for timing in plan.evidence.timings)
    sites, cost = choices_of_plan(plan), cost_model(plan.evidence.timings if timed else ())
    ways = {
        ONE_THRESHOLD: _uniform(sites, cost),
        "by head and timestep": _along(sites, plan.target_error, cost),
    }
    found = {
        label: sorted({(each.density, each.error) for each in way if each.error > 0.0})
        for label, way in ways.items()
    }
    return {label: points for label, points in found.items() if points}


def _along(sites: Sequence[SiteChoices], target: float, cost: CostModel) -> list[Allocation]:
    """Allocations from the loosest to well within a target.

    Their multipliers are spread between those of both ends: to look for the multiplier of each
    error would take dozens of allocations for every point.
    """
    loosest = solve(sites, np.inf, cost)
    highest = max(loosest.error, 1e-5)
    ends = [solve(sites, error, cost) for error in (0.999 * highest, min(highest, target) / 20)]
    low, high = (max(end.multiplier, 1e-300) for end in ends)
    between = [allocate(sites, float(each), cost) for each in np.geomspace(low, high, 120)]
    return [loosest, *ends, *between]


def judged_error(plan: Plan) -> float:
    """The error that a plan was judged by: a quantile over samples, or their root mean square."""
    within = None if plan.verified is None else plan.verified.quantile_error
    return plan.measured_error if within is None or plan.target_quantile is None else within


def _measured(ax: Axes, plan: Plan) -> None:
    """Marks of what was measured: squares on the fitted samples, rounds on those held out."""
    every = thin(comparable(plan), MAX_MARKS)
    small: dict[str, Any] = {"marker": "s", "s": 52, "zorder": 3}
    ring: dict[str, Any] = {"facecolors": "none", "edgecolors": ORANGE, "lw": 2.0, "zorder": 5}
    for label, group, style in (
        ("one threshold, fitted samples", [c for c in every if c.name == TIED], {"color": GREY}),
        ("by head, fitted samples", [c for c in every if c.name != TIED], {"color": BLUE}),
        ("the way that was taken", [c for c in every if c.taken], {**ring, "s": 130}),
    ):
        points = [(each.mean_density, each.measured_error) for each in group]
        _scatter(ax, points, label, **{**small, **style})
    if plan.target_psnr is None and not plan.predicted:
        trials = thin(plan.evidence.trials, MAX_MARKS)
        points = [(trial.mean_density, trial.measured_error) for trial in trials]
        _scatter(ax, points, "trials, held-out samples", s=26, color=INK, zorder=3)
    at = [(plan.mean_density, judged_error(plan))]
    if plan.predicted:
        _scatter(ax, at, "this plan, predicted", s=110, **ring)
    else:
        _scatter(ax, at, "this plan, held-out samples", s=110, color=ORANGE, zorder=5)


def _scatter(ax: Axes, points: Sequence[tuple[float, float]], label: str, **style: Any) -> None:
    """Marks, with a label where there are any."""
    if points:
        ax.scatter([x for x, _ in points], [y for _, y in points], label=label, **style)


def _uniform(sites: Sequence[SiteChoices], cost: CostModel) -> list[Allocation]:
    """One threshold for every head of every site, in the grid's order, from strict to loose."""
    if not sites or any(a.ladder != b.ladder for a, b in pairwise(sites)):
        return []
    return [uniform(sites, column, cost) for column in range(1, sites[0].ladder)]


@styled
def verification(plan: Plan) -> Figure | None:
    """What every verification trial was predicted and found to be, with the accepted band."""
    trials = thin(plan.evidence.trials, MAX_MARKS)
    if not trials:
        return None
    figure, ax = single(7.4, 3.2)
    at = np.arange(1, len(trials) + 1)
    ax.set(xlabel="trial", xticks=thin(at.tolist()), xlim=(0.5, len(trials) + 0.5))
    if plan.target_psnr is not None:
        _band(ax, plan.target_psnr, plan.target_psnr, plan.target_psnr + 1.94)
        found = [min(decibels_of(t.measured_error), 100.0) for t in trials]
        ax.plot(at, found, "o-", color=BLUE, label="measured")
        ax.set_ylabel("PSNR of the video (dB)")
        return figure
    if plan.target_density is not None:
        _band(ax, 100 * plan.target_density, 95 * plan.target_density, 100 * plan.target_density)
        ax.plot(at, [100 * t.mean_density for t in trials], "o-", color=BLUE, label="measured")
        ax.set_ylabel("mean density (%)")
        return figure
    _band(ax, plan.target_error, 0.8 * plan.target_error, plan.target_error)
    ax.plot(at, [t.predicted_error for t in trials], "o--", color=GREY, label="predicted")
    ax.plot(at, [t.measured_error for t in trials], "o-", color=BLUE, label="measured")
    for i, trial in zip(at, trials, strict=True):
        errors = thin(trial.sample_errors, MAX_MARKS)
        ax.scatter([i] * len(errors), errors, s=10, color=BLUE, alpha=0.4)
    ax.set_ylabel("relative L2 error")
    ax.set_ylim(bottom=0)
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _band(ax: Axes, target: float, low: float, high: float) -> None:
    """What verification accepts, and the target."""
    ax.axhspan(low, high, color="#fcebdd", lw=0)
    ax.axhline(target, color=ORANGE, lw=1.2, ls=DASHES)


@styled
def sample_errors(plan: Plan) -> Figure | None:
    """The error of every sample that the plan was verified on, by its timestep where that is known.

    None where they were not kept.
    """
    verified = plan.verified
    if verified is None or not verified.sample_errors:
        return None
    figure, ax = single(7.4, 3.2)
    at, label = _places(plan, verified)
    pairs = thin(sorted(zip(at, verified.sample_errors, strict=True)), MAX_MARKS)
    places, errors = np.array(pairs).T
    lines = [(plan.measured_error, "root mean square", BLUE, "-")]
    if plan.target_quantile is not None and verified.quantile_error is not None:
        words = f"{plan.target_quantile:.0%} are within"
        lines.append((verified.quantile_error, words, INK, "-"))
    if plan.target_psnr is None and plan.target_density is None:
        lines.append((plan.target_error, "target", ORANGE, DASHES))
    for value, words, colour, style in lines:
        ax.axhline(value, color=colour, lw=1.4, ls=style, label=f"{words}: {value:.4f}", zorder=1)
    held = plan.target_error if plan.target_psnr is plan.target_density is None else np.inf
    colours = [ORANGE if error > held else BLUE for error in errors]
    ax.vlines(places, 0, errors, color=colours, lw=1.0, alpha=0.4)
    ax.scatter(places, errors, s=34, color=colours, zorder=3)
    ax.set(
        xlabel=label, ylabel="relative L2 error", ylim=(0, 1.12 * max(*errors, plan.measured_error))
    )
    if not verified.sample_timesteps:
        ax.set_xticks(thin(places.tolist(), 16))
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _places(plan: Plan, verified: Verified) -> tuple[list[float], str]:
    """Where samples stand on the axis, and what it is called."""
    if verified.sample_timesteps:
        return verified.sample_timesteps, short(plan.timestep_name or "timestep")
    return [float(i + 1) for i in range(len(verified.sample_errors))], "sample"
