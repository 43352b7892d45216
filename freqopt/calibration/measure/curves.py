"""The curves of one call: what every choice costs and how far it is off, head by head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from freqopt.calibration.measure.attention import (
    AttentionCall,
    count_lifted,
    head_energy,
    head_error,
)
from freqopt.calibration.measure.ladder import CHOICES, THRESHOLDS
from freqopt.calibration.measure.readings import CURVES, FINE, Reading
from freqopt.calibration.measure.spectrum import key_spectrum


def measure_curves(site: str, call: AttentionCall, dense: Tensor, probes: int) -> Reading:
    """What a site's call shows. dense: (B, H, N, D), its exact attention."""
    heads = dense.shape[1]
    energy = head_energy(dense)
    total = energy.sum().clamp(min=1e-30)
    rows: dict[str, list[Tensor]] = {name: [] for name in CURVES}
    ordered = call.ordered_scores()
    counts = {}
    if dense.device.type == "cpu":  # equal counts give one and the same route, and one run does
        lifted = count_lifted(ordered, THRESHOLDS).flatten(1).tolist()
        counts = dict(zip(THRESHOLDS, lifted, strict=True))
    measured: dict[Any, dict[str, Tensor]] = {}
    for threshold in THRESHOLDS:
        route = tuple(counts.get(threshold, (threshold,)))
        if route not in measured:
            out, density, probe = call.split(torch.full((heads,), threshold), probes)
            error, along = head_error(out, dense)
            bias = along / energy.clamp(min=1e-30)
            measured[route] = {
                "density": density.mean(0),
                "own": error / energy.clamp(min=1e-30),
                "site": error / total,
                "bias": bias,
                "site_bias": bias * along / total,
                "probe": probe.square().mean(0),
            }
        for name, value in measured[route].items():
            rows[name].append(value)
    curves = {name: torch.stack(row).cpu().double() for name, row in rows.items()}
    curves[FINE] = fine_densities(ordered).cpu().double()
    share = (energy / total).cpu().double()
    spectrum = key_spectrum(call.key, call.grid, call.text_before)
    return Reading(site, call.shape, call.grid, share, curves, spectrum)


def fine_densities(ordered: Tensor) -> Tensor:
    """(choices, H) density at each of CHOICES, from `ordered_scores`, mean over the batch."""
    return count_lifted(ordered, CHOICES).double().mean(1) / ordered.shape[-1]
