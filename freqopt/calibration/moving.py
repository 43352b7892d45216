"""Another target from the curves of a plan, without measuring, and the verification of any plan.

A plan keeps what was measured at every site. Allocating anew from it gives the budgets of another
error in milliseconds; how far off they are only a run of the model tells.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from freqopt.calibration.asked import number_of
from freqopt.calibration.evidence import choices_of_plan, dense_reason, verified_on
from freqopt.calibration.measure.attention import AttentionShape
from freqopt.calibration.measure.ladder import Array
from freqopt.calibration.measure.requests import SiteThresholds, Split
from freqopt.calibration.outputs import relative_error
from freqopt.calibration.runner import opened
from freqopt.calibration.samples import Samples, collect_samples
from freqopt.calibration.search.allocate import SiteChoice, solve
from freqopt.calibration.search.choices import SiteChoices
from freqopt.calibration.search.cost import cost_model
from freqopt.calibration.search.verify import chunks_of, mean_over_runs, root_mean_square
from freqopt.calibration.search.workbench import Reference
from freqopt.capture.modules import module_of
from freqopt.errors import OptionError, PlanError
from freqopt.plan.plan import Plan
from freqopt.plan.records import Budget, SitePlan

UNVERIFIED = "predicted, not verified"
"""What notes about a moved plan end in, until it is verified."""

FURTHEST = 4.0
"""Times the measured error, either way, that a prediction goes to."""


def moved(plan: Plan, target_error: float) -> Plan:
    """A plan for another error, predicted from the curves of one; see `Plan.at`."""
    target_error = number_of("target_error", target_error)
    if not 0.0 < target_error < 1.0:
        raise OptionError(f"target_error {target_error} is outside (0, 1); 0.03 is the default")
    sites = choices_of_plan(plan)
    if not sites or not plan.measured_error:
        raise PlanError(
            "the plan has no curves to move along (it splits nothing, or its evidence was left "
            "out): calibrate with freqopt.calibrate(model, samples, target_error=...)"
        )
    here = _predicted(plan, sites)
    ratio = plan.measured_error / here if here else 1.0
    if not 1 / FURTHEST <= target_error / plan.measured_error <= FURTHEST:
        raise OptionError(
            f"target_error {target_error:g} is more than {FURTHEST:g} times off the error that "
            f"the plan was verified at ({plan.measured_error:g}): calibrate for it"
        )
    cost = cost_model(plan.evidence.timings)
    found = solve(sites, target_error / ratio, cost)
    updated = dict(plan.sites)
    for site, choice in zip(sites, found.choices, strict=True):
        before = plan.sites[site.name]
        if choice.dense:
            none: dict[str, Any] = {"budgets": [], "chunks": [], "density": [], "error": []}
            reason = dense_reason(site, choice, cost)
            none |= {"decision": "dense", "reason": reason}
            updated[site.name] = before.model_copy(update=none)
        else:
            updated[site.name] = _split(plan, site, choice)
    error = found.error * ratio
    note = (
        f"moved from output error {plan.measured_error:.3g} to {error:.3g} along the measured "
        f"curves: {UNVERIFIED}"
    )
    evidence = plan.evidence.model_copy(update={"notes": [*plan.evidence.notes, note]})
    return plan.model_copy(
        update={
            "target_error": target_error,
            "measured_error": error,
            "predicted": True,
            "worst_error": plan.worst_error * error / plan.measured_error,
            "verified": None,
            "target_psnr": None,
            "measured_psnr": None,
            "target_density": None,
            "target_quantile": None,
            "mean_density": found.density,
            "sites": updated,
            "evidence": evidence,
        }
    )


def verified(plan: Plan, model: nn.Module, samples: Samples) -> Plan:
    """The plan with the error that a model has with it on samples; see `Plan.verify`."""
    inner = module_of(model, "verify")
    plan.check_model(inner)
    found = collect_samples(inner, samples, timestep=plan.timestep_name)
    both = list({id(sample): sample for sample in (*found.fit, *found.held_out)}.values())
    asked = replace(found, timestep_name=plan.timestep_name, timestep_edges=plan.timestep_edges)
    thresholds = {
        name: SiteThresholds(plan.budgets(name)[:, 0], tuple(site.chunks))
        for name, site in plan.sites.items()
        if site.decision == "split"
    }
    errors, runs = [], []
    with opened(inner, asked, None, plan.seed) as runner:
        for sample in both:
            dense = Reference(runner, sample).compute()
            result = runner.run(sample, Split(thresholds))
            errors.append(relative_error(result.output, dense))
            runs.append(result.densities)
        layouts = runner.layouts.values()
    grids = {(t, h, w) for known in layouts for (t, h, w, *_), _ in known}
    densities = {name: _row(rows.numpy()) for name, rows in mean_over_runs(runs).items()}
    sites = {
        name: site.model_copy(update={"density": densities[name]}) if name in densities else site
        for name, site in plan.sites.items()
    }
    notes = [note for note in plan.evidence.notes if not note.endswith(UNVERIFIED)]
    return plan.model_copy(
        update={
            "measured_error": root_mean_square(errors),
            "worst_error": max(errors),
            "verified": verified_on(inner, errors, both, quantile=plan.target_quantile),
            "predicted": False,
            "grids": sorted({*plan.grids, *grids}),
            "timestep_range": _joined(plan.timestep_range, found.timestep_range),
            "mean_density": _mean_density(plan, densities),
            "sites": sites,
            "evidence": plan.evidence.model_copy(update={"notes": notes}),
        }
    )


def _joined(
    first: tuple[float, float] | None, second: tuple[float, float] | None
) -> tuple[float, float] | None:
    """The range over two of them."""
    if first is None or second is None:
        return first or second
    return min(first[0], second[0]), max(first[1], second[1])


def _mean_density(plan: Plan, densities: Mapping[str, Sequence[float]]) -> float:
    """Density over the sites that a plan knows the cost of. densities: by head, of those split."""
    measured = plan.evidence.sites
    cost, weights = cost_model(plan.evidence.timings if measured else ()), {}
    for name in measured or plan.sites:
        site = plan.sites[name]
        shape = AttentionShape(site.heads, site.tokens, site.head_dim)
        weights[name] = cost.dense(shape) * site.heads
    shares = {name: math.fsum(rows) / len(rows) for name, rows in densities.items()}
    spent = math.fsum(weight * shares.get(name, 1.0) for name, weight in weights.items())
    return spent / math.fsum(weights.values())


def _predicted(plan: Plan, sites: list[SiteChoices]) -> float:
    """The output error that the curves give for the budgets that a plan has."""
    total = 0.0
    for site in sites:
        planned = plan.sites[site.name]
        if planned.decision == "split":
            index = _index_of(planned, site)
            total += float(site.error[np.arange(len(index)), index].sum())
    return math.sqrt(total)


def _index_of(planned: SitePlan, site: SiteChoices) -> Array:
    """The choice nearest to a plan's budget, for every row."""
    chunks = planned.chunks or [0]
    share = site.heads // len(chunks) if len(planned.chunks) else site.heads
    order = np.broadcast_to(site.order, site.threshold.shape)
    found = []
    for budget in planned.budgets:
        for head, threshold in enumerate(budget.threshold):
            own = site.chunks.index(chunks[head // share])
            away = np.abs(np.log(np.maximum(site.threshold, 1e-9) / max(threshold, 1e-9)))
            found.append(
                int(np.where((order == own) | (site.threshold == 0), away, np.inf).argmin())
            )
    return np.array(found)


def _split(plan: Plan, site: SiteChoices, choice: SiteChoice) -> SitePlan:
    before, evidence = plan.sites[site.name], plan.evidence.sites[site.name]
    buckets, index = len(site.shares), choice.index
    row = np.arange(len(index))
    by_bucket = {each.bucket: each.energy for each in evidence.buckets}
    energy = [by_bucket.get(bucket, evidence.energy) for bucket in range(buckets)]
    scale = site.weight * np.square(np.array(before.gains)).ravel() * np.array(energy).ravel()
    own = site.error[row, index] / np.maximum(scale, 1e-300)
    density = (site.weight * site.density[row, index]).reshape(buckets, -1).sum(0)
    threshold = site.threshold[index].reshape(buckets, -1)
    return before.model_copy(
        update={
            "decision": "split",
            "reason": "",
            "budgets": [Budget(threshold=_row(each)) for each in threshold],
            "chunks": list(chunks_of(site, choice)),
            "density": [min(x, 1.0) for x in _row(density)],
            "error": _row(np.sqrt((site.weight * own).reshape(buckets, -1).sum(0))),
        }
    )


def _row(values: Array) -> list[float]:
    return [float(f"{x:.5g}") for x in torch.as_tensor(values).double().tolist()]
