"""From measurements and an allocation to a plan with its evidence.

Numbers are rounded to five significant digits, so that a plan stays readable and its size bounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import freqopt
from freqopt.calibration.measure.readings import Measured, SpectrumSums, Sums
from freqopt.calibration.measure.recorder import THRESHOLDS, Session
from freqopt.calibration.samples import SampleSet
from freqopt.calibration.search.allocate import (
    CostModel,
    HeadCurves,
    SiteChoice,
    SiteChoices,
    join_curves,
    make_choices,
)
from freqopt.calibration.search.cost import MeasuredCost
from freqopt.calibration.search.sensitivity import Array
from freqopt.calibration.search.verify import Found, Goal
from freqopt.plan.plan import Plan, model_fingerprint
from freqopt.plan.records import (
    BucketCurves,
    Budget,
    Curve,
    Evidence,
    ModelIdentity,
    SiteEvidence,
    SitePlan,
    SiteTiming,
    Spectrum,
    Trial,
    Versions,
)

DIGITS = 5
MAX_PSNR = 200.0
"""In dB; stands for equal outputs too, as JSON has no infinity."""


def build_plan(
    model: nn.Module,
    session: Session,
    samples: SampleSet,
    sites: list[SiteChoices],
    gains: Mapping[str, Array],
    marginals: Mapping[str, Array],
    found: Found,
    trials: list[Trial],
    *,
    cost: CostModel,
    reasons: Mapping[str, str],
    error: Trial,
    goal: Goal,
    measured_psnr: float | None,
    seed: int,
    notes: list[str],
    rounding: float,
) -> Plan:
    """The plan of a finished calibration.

    found: what the search ended with. reasons: why sites stay dense that allocation would split.
    error: the trial of it on the held-out samples. rounding: output error at threshold 0.
    """
    measured = session.measurable()
    plans: dict[str, SitePlan] = {}
    for site, choice in zip(sites, found.allocation.choices, strict=True):
        known = measured[site.name]
        if choice.dense:
            reason = reasons.get(site.name) or dense_reason(site, choice, cost)
            plans[site.name] = _dense_site(known, reason, gains)
        else:
            density = found.densities.get(site.name)
            plans[site.name] = _split_site(site, choice, known, gains, marginals, density)
    for name, known in session.sites.items():
        if known.failure:
            plans[name] = _dense_site(known, known.failure, gains)
    return Plan(
        model=ModelIdentity(class_name=type(model).__name__, fingerprint=model_fingerprint(model)),
        grids=sorted({grid for known in measured.values() for grid in known.grids}),
        device=_device_name(model),
        versions=_versions(),
        seed=seed,
        target_error=goal.error or max(_round(error.measured_error), 1e-9),
        measured_error=_round(error.measured_error),
        worst_error=_round(error.worst_error),
        target_psnr=goal.psnr,
        target_density=goal.density,
        measured_psnr=None if measured_psnr is None else _round(min(measured_psnr, MAX_PSNR)),
        mean_density=_round(found.trial.mean_density),
        timestep_name=samples.timestep_name,
        timestep_edges=samples.timestep_edges,
        sites=plans,
        evidence=Evidence(
            samples=len(samples.fit),
            held_out=len(samples.held_out),
            notes=notes,
            rounding_error=_round(rounding),
            bucket_samples=samples.bucket_samples,
            timings=[_rounded_timing(timing) for timing in session.timings.values()],
            trials=[_rounded_trial(trial) for trial in trials],
            dense_sites=dict(session.dense_sites),
            sites={
                name: _site_evidence(known, session.times.get(name))
                for name, known in measured.items()
            },
        ),
    )


def dense_reason(site: SiteChoices, choice: SiteChoice, cost: CostModel) -> str:
    """Why allocation left a site dense."""
    density = site.mean_density(choice.index)
    cheapest = float((site.weight * cost.split(site.shape, site.density.min(1))).sum())
    dense = cost.dense(site.shape) * site.heads
    if cheapest < dense:
        return f"splitting it would save nothing: its heads need a density of {density:.0%} here"
    if isinstance(cost, MeasuredCost):
        return slower_reason(dense, cheapest, "at the least density")
    return (
        f"too short to gain: at {site.tokens} tokens the local blocks alone are "
        f"{site.density.min():.0%} of all pairs"
    )


def slower_reason(dense_ms: float, split_ms: float, when: str) -> str:
    """Why a site stays dense whose split takes as long as dense attention, or longer."""
    return (
        f"the split is no faster here: as timed, it takes {split_ms:.3g} ms {when} "
        f"and dense attention {dense_ms:.3g} ms"
    )


def _dense_site(found: Measured, reason: str, gains: Mapping[str, Array]) -> SitePlan:
    return SitePlan(
        heads=found.heads, head_dim=found.head_dim, tokens=found.tokens, decision="dense",
        reason=reason, gains=_gains(gains, found.name),
    )  # fmt: skip


def _split_site(
    site: SiteChoices,
    choice: SiteChoice,
    found: Measured,
    gains: Mapping[str, Array],
    marginals: Mapping[str, Array],
    density: Tensor | None,
) -> SitePlan:
    row = np.arange(len(choice.index))
    own, buckets = _own_errors(site, found, gains[site.name]), len(site.shares)
    error = np.sqrt((site.weight * own[row, choice.index]).reshape(buckets, -1).sum(0))
    expected = (site.weight * site.density[row, choice.index]).reshape(buckets, -1).sum(0)
    threshold = site.threshold[choice.index].reshape(buckets, -1)
    return SitePlan(
        heads=site.heads,
        head_dim=site.head_dim,
        tokens=site.tokens,
        decision="split",
        reason="",
        budgets=[
            Budget(threshold=_row(torch.tensor(row)), mid=[False] * site.heads) for row in threshold
        ],
        density=_row(torch.tensor(expected) if density is None else density),
        error=_row(torch.tensor(error)),
        gains=_gains(gains, site.name),
        marginals=_gains(marginals, site.name),
    )


def _own_errors(site: SiteChoices, found: Measured, gains: Array) -> Array:
    """Squared errors of a site's choices relative to each head's own output, (R, C)."""
    total = found.total()
    energies = []
    for bucket in range(len(site.shares)):
        sums = found.buckets.get(bucket, total)
        energies.append((sums.energy / sums.calls).clamp(min=1e-30).numpy())
    scale = site.weight * np.square(gains).ravel() * np.concatenate(energies)
    own: Array = site.error / np.maximum(scale, 1e-300)[:, None]
    return own


def _gains(gains: Mapping[str, Array], name: str) -> list[list[float]]:
    return _rows(torch.tensor(gains[name])) if name in gains else []


def _site_evidence(found: Measured, times: tuple[float, float] | None) -> SiteEvidence:
    total = found.total()
    buckets = []
    if len(found.buckets) > 1:
        buckets = [
            BucketCurves(
                bucket=bucket,
                samples=sums.calls,
                energy=_row(sums.energy / sums.calls),
                curve=_curve(sums),
            )
            for bucket, sums in sorted(found.buckets.items())
        ]
    return SiteEvidence(
        thresholds=[_round(x) for x in THRESHOLDS],
        energy=_row(total.energy / total.calls),
        curve=_curve(total),
        buckets=buckets,
        spectrum=None if found.spectrum is None else _spectrum(found.spectrum),
        times_ms=None if times is None else (_round(times[0]), _round(times[1])),
    )


def _curve(sums: Sums) -> Curve:
    return Curve(
        density=_rows(sums.mean("density")),
        error=_rows(sums.mean("own").sqrt()),
        bias=_rows(sums.mean("bias")),
        probe_error=_rows(sums.mean("probe").sqrt()),
    )


def _spectrum(sums: SpectrumSums) -> Spectrum:
    return Spectrum(
        edges=[_round(x) for x in sums.edges],
        power=_rows(sums.power / sums.calls),
        cutoff=sums.cutoff,
        low=_row(sums.low / sums.calls),
    )


def _rounded_timing(timing: SiteTiming) -> SiteTiming:
    return timing.model_copy(
        update={
            "base_ms": _round(timing.base_ms),
            "density_ms": _round(timing.density_ms),
            "points": [(_round(density), _round(ms)) for density, ms in timing.points],
            "dense_ms": _round(timing.dense_ms),
        }
    )


def _rounded_trial(trial: Trial) -> Trial:
    rounded: dict[str, Any] = {
        name: [_round(x) for x in value] if isinstance(value, list) else _round(value)
        for name, value in trial.model_dump().items()
    }
    return Trial(**rounded)


def _round(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _row(values: Tensor) -> list[float]:
    return [_round(x) for x in values.double().tolist()]


def _rows(values: Tensor) -> list[list[float]]:
    return [_row(row) for row in values]


def _device_name(model: nn.Module) -> str:
    parameter = next(model.parameters(), None)
    if parameter is None or parameter.device.type != "cuda":
        return "cpu" if parameter is None else parameter.device.type
    return torch.cuda.get_device_name(parameter.device)


def _versions() -> Versions:
    from importlib import metadata

    try:
        triton: str | None = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = None
    return Versions(freqopt=freqopt.__version__, torch=str(torch.__version__), triton=triton)


def choices_of_plan(plan: Plan) -> list[SiteChoices]:
    """The choices a plan was allocated from, rebuilt from its evidence (bias left out)."""
    found = []
    samples = plan.evidence.bucket_samples or [1]
    shares = [count / sum(samples) for count in samples]
    for name, evidence in plan.evidence.sites.items():
        site = plan.sites[name]
        known = {bucket.bucket: bucket for bucket in evidence.buckets}
        rows = []
        for bucket, share in enumerate(shares):
            source = known.get(bucket, evidence)
            scale = share * np.square(site.gains[bucket]) * np.array(source.energy)
            rows.append(_head_curves(source.curve, scale[:, None]))
        ladder = np.array(evidence.thresholds)
        choices = make_choices(name, site.tokens, site.head_dim, ladder, join_curves(rows), shares)
        found.append(replace(choices, forced=plan.target_density is not None))
    return found


def _head_curves(curve: Curve, scale: Array) -> HeadCurves:
    error = scale * np.square(np.array(curve.error).T)
    return HeadCurves(np.array(curve.density).T, error, error)
