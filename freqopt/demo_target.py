"""From a mean density to the error target that calibration would spend it on."""

from __future__ import annotations

import math
from collections.abc import Sequence

from freqopt.calibration_allocation import solve
from freqopt.calibration_cost import cost_model
from freqopt.calibration_evidence import choices_of_plan
from freqopt.errors import OptionError
from freqopt.plan import Plan

BISECTIONS = 40

AIM = 0.93
"""Part of the wanted density that interpolation aims at: plans above it do not count."""

SLACK = 1.1
"""Calibration stays somewhat below its target, so it is asked for somewhat more."""


def next_target(plans: Sequence[Plan], density: float) -> float:
    """The target error to calibrate to next, on the way to a mean density.

    Between two plans, one too cheap and one too dear, errors and densities are taken to follow a
    power law; with plans on one side only, the last one's own curves predict it.

    Raises:
        OptionError: even the loosest budgets need more.
    """
    cheap = [plan for plan in plans if plan.mean_density <= density]
    dear = [plan for plan in plans if plan.mean_density > density]
    if not cheap or not dear:
        return error_for_density(plans[-1], density)
    below = max(cheap, key=lambda plan: plan.mean_density)
    above = min(dear, key=lambda plan: plan.mean_density)
    span = math.log(above.mean_density / below.mean_density)
    share = math.log(AIM * density / below.mean_density) / span
    share = min(max(share, 0.1), 0.9)
    fall = math.log(above.target_error / below.target_error)
    return below.target_error * math.exp(share * fall)


def error_for_density(plan: Plan, density: float) -> float:
    """Target error whose plan is expected to have a mean density, from the curves of another plan.

    Predicted errors are scaled by what the plan's own verification found.

    Raises:
        OptionError: even the loosest budgets need more.
    """
    sites, cost = choices_of_plan(plan), cost_model(plan.evidence.timings)
    loosest = solve(sites, math.inf, cost)
    if loosest.density > density:
        raise OptionError(
            f"density {density:g} cannot be reached: with the loosest budgets it is "
            f"{loosest.density:.3f} at this size; ask for more, or for a larger video"
        )
    low, high = math.log(1e-6), math.log(max(loosest.error, 1e-5))
    for _ in range(BISECTIONS):
        middle = 0.5 * (low + high)
        if solve(sites, math.exp(middle), cost).density > density:
            low = middle
        else:
            high = middle
    predicted = solve(sites, math.exp(high), cost).error
    return min(max(SLACK * predicted * _measured_per_predicted(plan), 1e-4), 0.9)


def _measured_per_predicted(plan: Plan) -> float:
    trials = [t for t in plan.evidence.trials if t.predicted_error > 0]
    if not trials:
        return 1.0
    last = min(trials, key=lambda t: abs(t.measured_error - plan.measured_error))
    return last.measured_error / last.predicted_error
