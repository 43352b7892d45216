"""Readings and times of a site whose heads several processes share: of all heads together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from freqopt.calibration.measure.attention import AttentionShape
from freqopt.calibration.measure.readings import Reading
from freqopt.calibration.team import Heads
from freqopt.plan.records import SiteTiming

OF_SITE = {"site": 1, "site_bias": 1, "variance": 2}
"""Curves relative to the energy of the whole site, and to which power of it."""


def joined_readings(
    heads: Heads, readings: Sequence[Reading], energies: Sequence[float]
) -> Reading:
    """What a site's call shows, from what it shows to each process.

    readings: of the heads of every process. energies: squared norms of what these heads put out.
    """
    first = readings[0]
    if heads.share is None:
        return first
    total = max(sum(energies), 1e-30)
    shares = [energy / total for energy in energies]
    curves = {}
    for name in first.curves:
        power = OF_SITE.get(name, 0)
        parts = [
            reading.curves[name] * share**power
            for reading, share in zip(readings, shares, strict=True)
        ]
        curves[name] = heads.joined(parts, -1)
    own_energies = [r.energy * share for r, share in zip(readings, shares, strict=True)]
    power_of_keys, low = zip(*(reading.spectrum for reading in readings), strict=True)
    _, tokens, head_dim = first.shape
    return replace(
        first,
        shape=AttentionShape(heads.share.heads, tokens, head_dim),
        energy=heads.joined(own_energies),
        curves=curves,
        spectrum=(heads.by_key(power_of_keys), heads.by_key(low)),
        key_heads=heads.key_heads(first.key_heads),
    )


def joined_timing(
    heads: Heads, timing: SiteTiming, orders: Sequence[tuple[int, float]]
) -> SiteTiming:
    """Times of all heads of a model one process, from those of the heads of one of several."""
    factor = heads.times
    return timing.model_copy(
        update={
            "heads": heads.total(timing.heads),
            "base_ms": factor * timing.base_ms,
            "density_ms": factor * timing.density_ms,
            "points": [(density, factor * ms) for density, ms in timing.points],
            "dense_ms": factor * timing.dense_ms,
            "orders": [(chunk, factor * ms) for chunk, ms in orders],
        }
    )
