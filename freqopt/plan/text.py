"""A plan as text, for people: what it holds, at what density, and how every site is served."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from freqopt.plan.content import PlanContent, some_of
from freqopt.plan.curves import chunks_by_head
from freqopt.plan.records import SitePlan, Verified
from freqopt.shown import shown

MOST_ERRORS = 24
"""Samples whose errors a text lists."""

FAR = 1.1
"""Error over the target from which a sample is told of apart."""

CLOCK_WORDS = {"eager": "as it is", "compiled": "compiled", "graphs": "compiled, in CUDA graphs"}
"""How a model ran when it was timed."""


def describe(plan: PlanContent) -> str:
    """Several lines: the plan's errors and identity, notes, and a table of its sites."""
    target = f"target {plan.target_error:g}"
    if plan.target_quantile is not None:
        target += f" for {plan.target_quantile:.0%} of inputs"
    if plan.target_psnr is not None and plan.measured_psnr is not None:
        target = f"PSNR {plan.measured_psnr:.1f} dB, target {plan.target_psnr:g} dB"
    if plan.target_density is not None:
        target = f"density {plan.target_density:.3g} was asked for"
    target = f"predicted, {target}" if plan.predicted else target
    lines = [
        f"plan for {shown(plan.model.class_name)}: output error {plan.measured_error:.4f} "
        f"({target}) at {plan.mean_density:.1%} mean density",
        f"{'' if plan.verified else f'{scope_of(plan)}; '}"
        f"{shown(plan.device)}; torch {shown(plan.versions.torch)}; "
        f"{plan.evidence.samples} samples + {plan.evidence.held_out} held out; "
        f"{_costs(plan)}",
        *verification(plan),
        *(f"note: {shown(note)}" for note in [*plan.evidence.notes, *slow_notes(plan)]),
        "",
    ]
    rows = [("site", "heads", "tokens", "decision", "order", "density", "error", "reason")]
    for name, site in plan.sites.items():
        rows.append(
            (
                shown(name),
                str(site.heads),
                str(site.tokens),
                site.decision,
                order_words(site),
                _spread(site.density, 100, "%"),
                _spread(site.error, 1, ""),
                shown(site.reason),
            )
        )
    return "\n".join(lines + _table(rows, right=(1, 2, 5, 6)))


def describe_all(plans: Mapping[str, PlanContent]) -> str:
    """A table of several models' plans, and each of them."""
    head = ("model", "class", "timesteps", "samples", "error", "worst", "density", "split")
    rows: list[tuple[str, ...]] = [head]
    for name, plan in plans.items():
        times = "-"
        if plan.timestep_range is not None:
            times = "{:g} to {:g}".format(*plan.timestep_range)
        split = sum(site.decision == "split" for site in plan.sites.values())
        rows.append(
            (
                shown(name),
                shown(plan.model.class_name),
                times,
                f"{plan.evidence.samples} + {plan.evidence.held_out} held out",
                f"{plan.measured_error:.4f}" + (" predicted" if plan.predicted else ""),
                f"{plan.worst_error:.4f}",
                f"{plan.mean_density:.1%}",
                f"{split} of {len(plan.sites)} sites",
            )
        )
    parts = [f"{shown(name)}\n{'-' * len(shown(name))}\n{plan}" for name, plan in plans.items()]
    return "\n\n".join(["\n".join(_table(rows, right=(4, 5, 6))), *parts])


def slow_sites(plan: PlanContent) -> dict[str, tuple[float, float]]:
    """Split sites that were no faster than dense as timed: {name: (dense, split) in ms}."""
    times = {name: evidence.times_ms for name, evidence in plan.evidence.sites.items()}
    return {
        name: found
        for name, found in times.items()
        if found and found[1] >= found[0] and plan.sites[name].decision == "split"
    }


def slow_notes(plan: PlanContent) -> list[str]:
    """What to say about `slow_sites`, nothing if there are none."""
    slow = slow_sites(plan)
    if not slow:
        return []
    dense, split = (sum(times[i] for times in slow.values()) for i in range(2))
    return [
        f"{len(slow)} split sites ({some_of(slow)}) are no faster than dense attention as timed: "
        f"{split:.3g} ms against {dense:.3g} ms in a call of the model"
    ]


def scope_of(plan: PlanContent) -> str:
    """What a plan was verified for: grids, timesteps, dtype and adapters."""
    parts = [f"grids {', '.join('x'.join(map(str, grid)) for grid in plan.grids)}"]
    if plan.timestep_range is not None:
        low, high = plan.timestep_range
        parts.append(f"{shown(plan.timestep_name or 'timestep')} {low:g} to {high:g}")
    if plan.verified is not None:
        parts.append(shown(plan.verified.dtype))
        adapters = plan.verified.adapters
        if adapters is not None:
            parts.append(
                f"adapters {', '.join(map(shown, adapters))}" if adapters else "no adapter"
            )
    return "; ".join(parts)


def verification(plan: PlanContent) -> list[str]:
    """What was verified, in lines; none in plans of earlier versions and those that moved."""
    verified = plan.verified
    if verified is None:
        return []
    errors = verified.sample_errors
    line = (
        f"verified on {len(errors)} samples: error {plan.measured_error:.4f} root mean square, "
        f"{plan.worst_error:.4f} worst, {min(errors, default=0.0):.4f} best, standard deviation "
        f"{verified.spread:.4f}"
    )
    if verified.quantile_error is not None and plan.target_quantile is not None:
        line += f"; {plan.target_quantile:.0%} of them within {verified.quantile_error:.4f}"
    lines = [line, f"verified for: {scope_of(plan)}", _sample_errors(plan, verified)]
    if plan.target_psnr is None and plan.target_density is None:
        lines.append(_beyond(plan.target_error, errors))
    if verified.model_ms is not None:
        dense, split = verified.model_ms
        how = "" if verified.model_clock is None else f", {CLOCK_WORDS[verified.model_clock]},"
        lines.append(f"whole model{how} {dense:.4g} ms dense, {split:.4g} ms split")
    return lines


def _beyond(target: float, errors: Sequence[float]) -> str:
    """How many samples are further off than the target, in words."""
    above, far = (sum(error > most for error in errors) for most in (target, FAR * target))
    return f"beyond the target: {above} of {len(errors)} samples, {far} by more than a tenth"


def _sample_errors(plan: PlanContent, verified: Verified) -> str:
    """The errors one by one, the worst of them where they are many; with timesteps where known."""
    errors, times = verified.sample_errors, verified.sample_timesteps
    places = list(range(len(errors)))
    head = "errors by sample"
    if len(errors) > MOST_ERRORS:
        places = sorted(sorted(places, key=lambda at: -errors[at])[:MOST_ERRORS])
        head = f"errors of the {MOST_ERRORS} worst samples"
    if times:
        head += f" (at {shown(plan.timestep_name or 'timestep')})"
    cells = [f"{errors[at]:.4f}" + (f" ({times[at]:g})" if times else "") for at in places]
    return f"{head}: {', '.join(cells)}"


def _costs(plan: PlanContent) -> str:
    if not plan.evidence.timings:
        return f"costs counted in multiply-adds, not measured on this {shown(plan.device)}"
    return f"costs measured at {len(plan.evidence.timings)} shapes"


def order_words(site: SitePlan) -> str:
    """How the heads of a site order their tokens."""
    if site.decision == "dense":
        return "-"
    by_content = sum(chunk > 0 for chunk in chunks_by_head(site))
    if by_content in (0, site.heads):
        return "content" if by_content else "grid"
    return f"content {by_content} of {site.heads}"


def _spread(values: Sequence[float], factor: float, unit: str) -> str:
    if not values:
        return "-"
    digits = 1 if unit else 3
    low, high, mean = min(values), max(values), math.fsum(values) / len(values)
    cells = [f"{factor * x:.{digits}f}" for x in (mean, low, high)]
    return f"{cells[0]}{unit} ({cells[1]}-{cells[2]})"


def _table(rows: Sequence[Sequence[str]], right: Sequence[int]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(widths[i]) if i in right else cell.ljust(widths[i])
            for i, cell in enumerate(row)
        ).rstrip()
        for row in rows
    ]
