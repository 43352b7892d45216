"""A plan as text, for people: what it holds, at what density, and how every site is served."""

from __future__ import annotations

import math
from collections.abc import Sequence

from freqopt.plan.content import PlanContent, some_of
from freqopt.shown import shown


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
        f"grids {', '.join('x'.join(map(str, grid)) for grid in plan.grids)}; "
        f"{shown(plan.device)}; torch {shown(plan.versions.torch)}; "
        f"{plan.evidence.samples} samples + {plan.evidence.held_out} held out; "
        f"{_costs(plan)}",
        *_verified(plan),
        *(f"note: {shown(note)}" for note in [*plan.evidence.notes, *slow_notes(plan)]),
        "",
    ]
    rows = [("site", "heads", "tokens", "decision", "density", "error", "reason")]
    for name, site in plan.sites.items():
        rows.append(
            (
                shown(name),
                str(site.heads),
                str(site.tokens),
                site.decision,
                _spread(site.density, 100, "%"),
                _spread(site.error, 1, ""),
                shown(site.reason),
            )
        )
    return "\n".join(lines + _table(rows, right=(1, 2, 4, 5)))


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


def _verified(plan: PlanContent) -> list[str]:
    """What was verified, in a line; none in plans of earlier versions."""
    verified = plan.verified
    if verified is None:
        return []
    line = (
        f"verified in {verified.dtype}: error of a held-out sample {plan.worst_error:.4f} at "
        f"worst, standard deviation {verified.spread:.4f}"
    )
    if verified.quantile_error is not None and plan.target_quantile is not None:
        line += f"; {plan.target_quantile:.0%} of them within {verified.quantile_error:.4f}"
    if verified.model_ms is not None:
        dense, split = verified.model_ms
        line += f"; whole model {dense:.4g} ms dense, {split:.4g} ms split"
    return [line]


def _costs(plan: PlanContent) -> str:
    if not plan.evidence.timings:
        return f"costs counted in multiply-adds, not measured on this {plan.device}"
    return f"costs measured at {len(plan.evidence.timings)} shapes"


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
