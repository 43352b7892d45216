"""From measurements and an allocation to a plan with its evidence.

Numbers are rounded to five significant digits, so that a plan stays readable and its size bounded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

import freqopt
from freqopt.calibration.measure.attention import AttentionShape
from freqopt.calibration.measure.ladder import ORDERS, THRESHOLDS, Array
from freqopt.calibration.measure.readings import MeasuredSite, SpectrumSums, Sums
from freqopt.calibration.samples import Sample
from freqopt.calibration.search.allocate import SiteChoice
from freqopt.calibration.search.choices import HeadCurves, SiteChoices, join_curves, make_choices
from freqopt.calibration.search.cost import CostModel, MeasuredCost
from freqopt.calibration.search.verify import (
    Goal,
    Outcome,
    chunks_of,
    quantile_of,
    root_mean_square,
)
from freqopt.calibration.search.video import decibels_of
from freqopt.calibration.search.workbench import Workbench
from freqopt.calibration.whole import ModelTimes
from freqopt.capture.conditions import adapters_of, dtype_of
from freqopt.passes.site import Known
from freqopt.plan.identity import class_name_of
from freqopt.plan.plan import Plan, model_fingerprint
from freqopt.plan.records import (
    BucketCurves,
    Budget,
    Comparison,
    ContentCurve,
    Curve,
    Evidence,
    ModelIdentity,
    Record,
    SiteEvidence,
    SiteLayout,
    SitePlan,
    SiteTiming,
    Spectrum,
    Trial,
    Verified,
    Versions,
)

Kind = TypeVar("Kind", bound=Record)

DIGITS = 5
MAX_PSNR = 200.0
"""In dB; stands for equal outputs too, as JSON has no infinity."""


@dataclass(frozen=True)
class PlanFacts:
    """What a finished calibration came to.

    sites: what there was to choose from. sensitivities, marginals: by site (buckets, H). rounding:
    output error at threshold 0. outcome: what the search ended with, after its trials. error: the
    trial of it on the held-out samples. times: (dense, split) of a call in ms, by site. whole:
    times of the whole model, where there is a clock. reasons: why sites stay dense that allocation
    would split.
    """

    sites: Sequence[SiteChoices]
    sensitivities: Mapping[str, Array]
    marginals: Mapping[str, Array]
    rounding: float
    outcome: Outcome
    trials: Sequence[Trial]
    compared: Sequence[Comparison]
    error: Trial
    goal: Goal
    times: Mapping[str, tuple[float, float]]
    whole: ModelTimes | None
    reasons: Mapping[str, str]
    notes: list[str]


def build_plan(bench: Workbench, facts: PlanFacts) -> Plan:
    """The plan of a finished calibration."""
    survey, samples, model = bench.survey, bench.samples, bench.runner.model
    goal, outcome, errors = facts.goal, facts.outcome, facts.error.sample_errors
    error = _round(root_mean_square(errors))
    measured = survey.measurable()
    sites = _site_plans(bench, facts)
    psnr = None
    if goal.psnr is not None:
        psnr = _round(min(decibels_of(outcome.trial.measured_error), MAX_PSNR))
    return Plan(
        model=ModelIdentity(class_name=class_name_of(model), fingerprint=model_fingerprint(model)),
        grids=sorted({grid for site in measured.values() for grid in site.grids}),
        device=_device_name(model),
        versions=_versions(),
        seed=bench.runner.seed,
        target_error=goal.error or max(error, 1e-9),
        measured_error=error,
        worst_error=_round(max(errors)),
        target_quantile=goal.quantile,
        verified=verified_on(
            model, errors, samples.held_out, quantile=goal.quantile, whole=facts.whole
        ),
        target_psnr=goal.psnr,
        target_density=goal.density,
        measured_psnr=psnr,
        mean_density=_round(outcome.trial.mean_density),
        timestep_name=samples.timestep_name,
        timestep_edges=samples.timestep_edges,
        timestep_range=samples.timestep_range,
        sites=sites,
        evidence=Evidence(
            samples=len(samples.fit),
            held_out=len(samples.held_out),
            notes=facts.notes,
            rounding_error=_round(facts.rounding),
            bucket_samples=samples.bucket_samples,
            timings=[_rounded_timing(timing) for timing in survey.timings.values()],
            trials=[_rounded(trial) for trial in facts.trials],
            compared=[_rounded(each) for each in facts.compared],
            dense_sites=dict(survey.dense_sites),
            sites={
                name: _site_evidence(site, facts.times.get(name)) for name, site in measured.items()
            },
        ),
    )


def verified_on(
    model: nn.Module,
    errors: Sequence[float],
    samples: Sequence[Sample],
    *,
    quantile: float | None = None,
    whole: ModelTimes | None = None,
) -> Verified:
    """What is kept of a verification. errors: of the model's output, of each of the samples."""
    times = [sample.timestep for sample in samples]
    known = [_round(time) for time in times if time is not None]
    return Verified(
        sample_errors=[_round(x) for x in errors],
        sample_timesteps=known if len(known) == len(errors) else [],
        spread=_round(float(np.std(errors))),
        quantile_error=None if quantile is None else _round(quantile_of(errors, quantile)),
        dtype=dtype_of(model),
        adapters=adapters_of(model),
        model_ms=None if whole is None else (_round(whole.dense), _round(whole.split)),
        model_clock=None if whole is None else whole.clock,
    )


def _site_plans(bench: Workbench, facts: PlanFacts) -> dict[str, SitePlan]:
    """What the plan says about every site, those among them that could not be measured."""
    measured, plans = bench.survey.measurable(), {}
    for site, choice in zip(facts.sites, facts.outcome.allocation.choices, strict=True):
        if choice.dense:
            reason = facts.reasons.get(site.name) or dense_reason(site, choice, bench.cost)
            plans[site.name] = _dense_site(measured[site.name], reason, facts.sensitivities)
        else:
            plans[site.name] = _split_site(site, choice, measured[site.name], facts)
    for name, unmeasured in bench.survey.sites.items():
        if unmeasured.failure:
            plans[name] = _dense_site(unmeasured, unmeasured.failure, facts.sensitivities)
    for name, layouts in bench.survey.layouts.items():
        if name in plans:
            plans[name] = _with_layouts(plans[name], layouts)
    return plans


def _with_layouts(plan: SitePlan, layouts: Iterable[Known]) -> SitePlan:
    found = [
        SiteLayout(
            grid=each.grid,
            before=each.before,
            after=each.after,
            mask=each.mask,
            sources=[(source.name, source.dim, source.step) for source in each.sources],
        )
        for each in layouts
    ]
    return plan.model_copy(update={"layouts": found})


def dense_reason(site: SiteChoices, choice: SiteChoice, cost: CostModel) -> str:
    """Why allocation left a site dense."""
    density = site.mean_density(choice.index)
    least = site.density[:, : site.ladder].min(1)
    cheapest = float((site.weight * cost.split(site.shape, least)).sum())
    dense = cost.dense(site.shape) * site.heads
    if cheapest < dense:
        return f"splitting it would save nothing: its heads need a density of {density:.0%} here"
    if isinstance(cost, MeasuredCost):
        return slower_reason(dense, cheapest, "at the least density")
    return (
        f"too short to gain: at {site.tokens} tokens the local blocks alone are "
        f"{least.min():.0%} of all pairs"
    )


def slower_reason(dense_ms: float, split_ms: float, when: str) -> str:
    """Why a site stays dense whose split takes as long as dense attention, or longer."""
    return (
        f"the split is no faster here: as timed, it takes {split_ms:.3g} ms {when} "
        f"and dense attention {dense_ms:.3g} ms"
    )


def _dense_site(site: MeasuredSite, reason: str, sensitivities: Mapping[str, Array]) -> SitePlan:
    rows = _by_bucket(sensitivities, site.name)
    return SitePlan(**site.shape._asdict(), decision="dense", reason=reason, gains=rows)


def _split_site(
    site: SiteChoices, choice: SiteChoice, measured: MeasuredSite, facts: PlanFacts
) -> SitePlan:
    row, buckets = np.arange(len(choice.index)), len(site.shares)
    own = _own_errors(site, measured, facts.sensitivities[site.name])
    error = np.sqrt((site.weight * own[row, choice.index]).reshape(buckets, -1).sum(0))
    density = facts.outcome.densities.get(site.name)
    if density is None:
        expected = (site.weight * site.density[row, choice.index]).reshape(buckets, -1).sum(0)
        density = torch.tensor(expected, dtype=torch.float32, device="cpu")
    threshold = site.threshold[choice.index].reshape(buckets, -1)
    return SitePlan(
        **site.shape._asdict(),
        decision="split",
        reason="",
        budgets=[
            Budget(threshold=_row(torch.tensor(row, dtype=torch.float32, device="cpu")))
            for row in threshold
        ],
        chunks=list(chunks_of(site, choice)),
        density=_row(density),
        error=_row(torch.tensor(error, dtype=torch.float32, device="cpu")),
        gains=_by_bucket(facts.sensitivities, site.name),
        marginals=_by_bucket(facts.marginals, site.name),
    )


def _own_errors(site: SiteChoices, measured: MeasuredSite, sensitivity: Array) -> Array:
    """Squared errors of a site's choices relative to each head's own output, (R, C)."""
    total = measured.total()
    energies = []
    for bucket in range(len(site.shares)):
        sums = measured.buckets.get(bucket, total)
        energies.append((sums.energy / sums.calls).clamp(min=1e-30).numpy())
    scale = site.weight * np.square(sensitivity).ravel() * np.concatenate(energies)
    own: Array = site.error / np.maximum(scale, 1e-300)[:, None]
    return own


def _by_bucket(values: Mapping[str, Array], name: str) -> list[list[float]]:
    return (
        _rows(torch.tensor(values[name], dtype=torch.float32, device="cpu"))
        if name in values
        else []
    )


def _site_evidence(site: MeasuredSite, times: tuple[float, float] | None) -> SiteEvidence:
    total = site.total()
    buckets = []
    if len(site.buckets) > 1:
        buckets = [
            BucketCurves(
                bucket=bucket,
                samples=sums.calls,
                energy=_row(sums.energy / sums.calls),
                curve=_curve(sums),
                content=_content(sums),
            )
            for bucket, sums in sorted(site.buckets.items())
        ]
    return SiteEvidence(
        thresholds=[_round(x) for x in THRESHOLDS],
        energy=_row(total.energy / total.calls),
        curve=_curve(total),
        buckets=buckets,
        spectrum=None if site.spectrum is None else _spectrum(site.spectrum),
        times_ms=None if times is None else (_round(times[0]), _round(times[1])),
        content=_content(total),
        key_heads=site.key_heads,
    )


def _content(sums: Sums) -> list[ContentCurve]:
    return [
        ContentCurve(
            chunk=ORDERS[order],
            density=_rows(sums.mean("density", order)),
            error=_rows(sums.mean("own", order).sqrt()),
        )
        for order in range(1, sums.orders)
    ]


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
            "orders": [(chunk, _round(ms)) for chunk, ms in timing.orders],
        }
    )


def _rounded(record: Kind) -> Kind:
    """A record whose numbers are rounded."""
    changed: dict[str, Any] = {}
    for name, value in record:
        if isinstance(value, list):
            changed[name] = [_round(x) for x in value]
        elif isinstance(value, float):
            changed[name] = _round(value)
    return record.model_copy(update=changed)


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
    choices = []
    samples = plan.evidence.bucket_samples or [1]
    shares = [count / sum(samples) for count in samples]
    for name, evidence in plan.evidence.sites.items():
        site = plan.sites[name]
        by_bucket = {bucket.bucket: bucket for bucket in evidence.buckets}
        rows: list[list[HeadCurves]] = [[] for _ in range(1 + len(evidence.content))]
        for bucket, share in enumerate(shares):
            source = by_bucket.get(bucket, evidence)
            scale = share * np.square(site.gains[bucket]) * np.array(source.energy)
            curves: list[Curve | ContentCurve] = [source.curve, *source.content]
            for of_order, curve in zip(rows, curves, strict=True):
                of_order.append(_head_curves(curve, scale[:, None]))
        ladder = np.array(evidence.thresholds)
        shape = AttentionShape(site.heads, site.tokens, site.head_dim)
        by_order = [join_curves(of_order) for of_order in rows]
        chunks = (0, *(curve.chunk for curve in evidence.content))
        of_site = make_choices(
            name, shape, ladder, by_order, shares, evidence.key_heads or 0, chunks
        )
        choices.append(replace(of_site, forced=plan.target_density is not None))
    return choices


def _head_curves(curve: Curve | ContentCurve, scale: Array) -> HeadCurves:
    error = scale * np.square(np.array(curve.error).T)
    return HeadCurves(np.array(curve.density).T, error, error)
