"""From measurements and an allocation to a plan with its evidence.

Numbers are rounded to five significant digits, so that a plan stays readable and its size bounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import freqopt
from freqopt.calibration_allocation import (
    Allocation,
    CostModel,
    HeadCurves,
    SiteChoice,
    SiteChoices,
    make_choices,
)
from freqopt.calibration_gains import Array
from freqopt.calibration_measure import THRESHOLDS, Measured, Session, SpectrumSums, Sums
from freqopt.calibration_samples import SampleSet
from freqopt.plan import (
    BucketCurves,
    Budget,
    Curve,
    Evidence,
    ModelIdentity,
    Plan,
    SiteEvidence,
    SitePlan,
    Spectrum,
    Trial,
    Versions,
    model_fingerprint,
)

DIGITS = 5


def build_plan(
    model: nn.Module,
    session: Session,
    samples: SampleSet,
    sites: list[SiteChoices],
    gains: Mapping[str, Array],
    allocation: Allocation,
    trials: list[Trial],
    *,
    target: float,
    seed: int,
    notes: list[str],
    cost: CostModel,
    chosen: Trial | None,
    densities: Mapping[str, Tensor],
    rounding: float,
) -> Plan:
    """The plan of a finished calibration.

    chosen: the trial of the allocation. densities: (H,) per site, those of verification.
    rounding: output error at threshold 0.
    """
    measured = session.measurable()
    assert chosen is not None
    plans: dict[str, SitePlan] = {}
    for site, choice in zip(sites, allocation.choices, strict=True):
        found = measured[site.name]
        if choice.dense:
            plans[site.name] = _dense_site(found, dense_reason(site, choice, cost), gains)
        else:
            plans[site.name] = _split_site(site, choice, found, gains, densities.get(site.name))
    for name, found in session.sites.items():
        if found.failure:
            plans[name] = _dense_site(found, found.failure, gains)
    return Plan(
        model=ModelIdentity(class_name=type(model).__name__, fingerprint=model_fingerprint(model)),
        grids=sorted({grid for found in measured.values() for grid in found.grids}),
        device=_device_name(model),
        versions=_versions(),
        seed=seed,
        target_error=target,
        measured_error=_round(chosen.measured_error),
        worst_error=_round(chosen.worst_error),
        mean_density=_round(chosen.mean_density),
        sites=plans,
        evidence=Evidence(
            samples=len(samples.fit),
            held_out=len(samples.held_out),
            notes=notes,
            rounding_error=_round(rounding),
            timestep_name=samples.timestep_name,
            timestep_edges=samples.timestep_edges,
            trials=[_rounded_trial(trial) for trial in trials],
            dense_sites=dict(session.dense_sites),
            sites={name: _site_evidence(found) for name, found in measured.items()},
        ),
    )


def dense_reason(site: SiteChoices, choice: SiteChoice, cost: CostModel) -> str:
    """Why allocation left a site dense."""
    heads = range(site.heads)
    density = float(site.density[heads, choice.index].mean())
    cheapest = float(cost.split(site.tokens, site.head_dim, site.density.min(1)).sum())
    if cheapest >= cost.dense(site.tokens, site.head_dim) * site.heads:
        return (
            f"too short to gain: at {site.tokens} tokens the local blocks alone are "
            f"{site.density.min():.0%} of all pairs"
        )
    return f"splitting it would save nothing: its heads need a density of {density:.0%} here"


def _dense_site(found: Measured, reason: str, gains: Mapping[str, Array]) -> SitePlan:
    return SitePlan(
        heads=found.heads, head_dim=found.head_dim, tokens=found.tokens, decision="dense",
        reason=reason, gains=[_round(x) for x in gains.get(found.name, ())],
    )  # fmt: skip


def _split_site(
    site: SiteChoices,
    choice: SiteChoice,
    found: Measured,
    gains: Mapping[str, Array],
    density: Tensor | None,
) -> SitePlan:
    heads = range(site.heads)
    energy = found.total().energy / found.total().calls
    share = torch.tensor(site.error[heads, choice.index] / np.square(gains[site.name]))
    error = (share / energy.clamp(min=1e-30)).sqrt()
    expected = torch.tensor(site.density[heads, choice.index])
    return SitePlan(
        heads=site.heads,
        head_dim=site.head_dim,
        tokens=site.tokens,
        decision="split",
        reason="",
        budgets=[
            Budget(
                threshold=_row(torch.tensor(site.threshold[choice.index])),
                mid=[bool(mid) for mid in site.mid[choice.index]],
            )
        ],
        density=_row(expected if density is None else density),
        error=_row(error),
        gains=[_round(x) for x in gains[site.name]],
    )


def _site_evidence(found: Measured) -> SiteEvidence:
    total = found.total()
    buckets = []
    if len(found.buckets) > 1:
        buckets = [
            BucketCurves(bucket=bucket, samples=sums.calls, curves=_curves(sums))
            for bucket, sums in sorted(found.buckets.items())
        ]
    return SiteEvidence(
        thresholds=[_round(x) for x in THRESHOLDS],
        energy=_row(total.energy / total.calls),
        curves=_curves(total),
        buckets=buckets,
        spectrum=None if found.spectrum is None else _spectrum(found.spectrum),
    )


def _curves(sums: Sums) -> list[Curve]:
    density, bias = sums.mean("density"), sums.mean("bias")
    error, probe = sums.mean("own").sqrt(), sums.mean("probe").sqrt()
    return [
        Curve(
            mid_band=bool(mid),
            density=_rows(density[mid]),
            error=_rows(error[mid]),
            bias=_rows(bias[mid]),
            probe_error=_rows(probe[mid]),
        )
        for mid in range(density.shape[0])
    ]


def _spectrum(sums: SpectrumSums) -> Spectrum:
    return Spectrum(
        edges=[_round(x) for x in sums.edges],
        power=_rows(sums.power / sums.calls),
        cutoffs=sums.cutoffs,
        low=_row(sums.low / sums.calls),
        mid=_row(sums.mid / sums.calls),
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
    for name, evidence in plan.evidence.sites.items():
        site = plan.sites[name]
        scale = (np.square(site.gains) * np.array(evidence.energy))[:, None]
        curves = []
        for curve in evidence.curves:
            error = scale * np.square(np.array(curve.error).T)
            curves.append(HeadCurves(curve.mid_band, np.array(curve.density).T, error, error))
        ladder = np.array(evidence.thresholds)
        found.append(make_choices(name, site.tokens, site.head_dim, ladder, curves))
    return found
