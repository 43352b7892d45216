"""The curves of one call: what every choice costs and how far it is off, head by head.

Densities are those of all pairs; errors are of an even sample of query tiles, expanded to all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from freqopt.calibration.measure.attention import AttentionCall, count_lifted, head_energy
from freqopt.calibration.measure.heads import HeadsInOrder, groups
from freqopt.calibration.measure.ladder import (
    CHOICES,
    EVERY_RUNG,
    GRID_ALONE,
    LEAST_TOKENS,
    REFINEMENT,
    THRESHOLDS,
    Array,
    on_every_rung,
)
from freqopt.calibration.measure.orders import distinct, key_order
from freqopt.calibration.measure.readings import CURVES, FINE, Reading
from freqopt.calibration.measure.spectrum import key_spectrum
from freqopt.calibration.measure.tiles import (
    SAMPLED_TILES,
    TRIAL_TILES,
    even_sample,
    offset_of,
    tensor_cores,
    variance_of_sum,
)

_TINY = 1e-30

ROUNDING = 1e-12
"""Least squared error of a head that is believed, relative to its output: float32 tells no less,
and between rungs errors are interpolated on logarithmic axes."""

TRIED_DENSITIES = (0.03, 0.1, 0.25)
"""Densities at which orders are compared on the first of their tiles."""

FAR_WORSE, MOST_WORTH = 2.0, 2
"""Orders by content whose squared errors, on TRIAL_TILES tiles, are within this ratio of the best
order's get the rest of their tiles, and the best of those at most."""


def measure_curves(
    site: str,
    call: AttentionCall,
    dense: Tensor,
    probes: int,
    number: int = 0,
    sampled: int = SAMPLED_TILES,
    orders: Sequence[int] = GRID_ALONE,
    rungs: Sequence[int] = EVERY_RUNG,
) -> Reading:
    """What a site's call shows.

    dense: (B, H, N, D), its exact attention. number: of the call among those of the site, which
    measure different tiles. sampled: query tiles to measure errors on; in orders by content half
    as many, and TRIAL_TILES where others are better for a head. orders: the first of ORDERS. Where
    one of them acts as another does, it has the other's curves, and where there are fewer than
    LEAST_TOKENS the grid's. rungs: of the ladder, that errors are measured on; see `rungs_of`.
    """
    energy = head_energy(dense).double()
    total = energy.sum().clamp(min=_TINY)
    offset = offset_of(site, number)
    rows: dict[str, list[Tensor]] = {name: [] for name in (*CURVES, FINE)}
    acting = acting_orders(call, orders)
    chunks = list(dict.fromkeys(acting))
    by_content = {chunk: key_order(call, chunk) for chunk in chunks if chunk}
    with tensor_cores(dense.dtype):
        thresholds = [THRESHOLDS[rung] for rung in rungs]
        for heads, made in groups(call, len(chunks), thresholds, probes):
            measured = {
                chunk: Sampled(made(by_content.get(chunk)), chunk, sampled, offset, rungs)
                for chunk in chunks
            }
            measure_worth(list(measured.values()))
            known = {chunk: each.curves(energy[heads], total) for chunk, each in measured.items()}
            for name, row in rows.items():
                row.append(torch.stack([known[chunk][name] for chunk in acting]))
    curves = {name: torch.cat(row, -1).cpu() for name, row in rows.items()}
    share = (energy / total).cpu()
    spectrum = key_spectrum(call.key, call.grid, call.text_before)
    key_heads = call.key.shape[1]
    return Reading(site, call.shape, call.grid, share, curves, spectrum, key_heads)


def acting_orders(call: AttentionCall, orders: Sequence[int]) -> list[int]:
    """What each of some orders acts as on a call's tokens: equal ones are measured once."""
    video = call.layout.tokens
    return [distinct(chunk, video) if video >= LEAST_TOKENS else 0 for chunk in orders]


class Sampled:
    """Heads in one order, measured on a sample of their query tiles.

    chunk: of the order, 0 by the grid. rungs: that the heads are made for. first, rest: places in
    the sample that are measured, and that are not yet. An order by content is tried on TRIAL_TILES
    of them, evenly spaced, where that saves much; `measure_rest` measures the others. Errors of few
    tiles are unbiased too, and their deviation is larger. fine, density: shares (.., H) of pairs
    that CHOICES lift, and of those all of the ladder's.
    """

    def __init__(
        self, heads: HeadsInOrder, chunk: int, sampled: int, offset: float, rungs: Sequence[int]
    ) -> None:
        """sampled: of the grid's order; see `measure_curves`."""
        self.heads, self.tiles, self.rungs = heads, heads.score.shape[2], list(rungs)
        self.fine = densities(heads.score, CHOICES)
        self.density = self.fine[::REFINEMENT]
        own = max(sampled // 2, 1) if chunk else sampled
        self.chosen = even_sample(self.tiles, own, offset, heads.score.device)
        count = len(self.chosen)
        step = count // TRIAL_TILES if chunk and count >= 4 * TRIAL_TILES else 1
        self.first = list(range(count))[step // 2 :: step]
        self.rest = sorted(set(range(count)) - set(self.first))
        self.errors = heads.errors(self.chosen[step // 2 :: step])

    def measure_rest(self) -> None:
        """Measure the tiles of the sample that were left out."""
        places = torch.tensor(self.first + self.rest, device=self.chosen.device, dtype=torch.int64)
        rest = self.heads.errors(self.chosen[places[len(self.first) :]])
        self.errors, self.rest = self.errors.joined(rest, places.argsort()), []

    def curves(self, energy: Tensor, total: Tensor) -> dict[str, Tensor]:
        """Over the ladder, (rungs, H) each, and densities at all CHOICES.

        energy (H,), total: squared norms of the heads' exact outputs and of the site's.
        """
        errors = self.errors
        expansion = self.tiles / errors.error.shape[-1]
        energy = energy.clamp(min=_TINY)
        error, along = (expansion * x.double().sum(-1) for x in errors)
        error = self._smooth(error.clamp(min=ROUNDING * energy))
        along = on_every_rung(along, self.rungs, self.density)
        variance = variance_of_sum(errors.error.double(), self.tiles) / total.square()
        return {
            "density": self.density,
            "own": error / energy,
            "site": error / total,
            "bias": along / energy,
            "site_bias": along.square() / energy / total,
            "probe": self._smooth(self.heads.probe_error),
            "variance": on_every_rung(variance, self.rungs, self.density),
            FINE: self.fine,
        }

    def _smooth(self, values: Tensor) -> Tensor:
        """Positive values on every rung; between those measured they go as powers of density."""
        if tuple(self.rungs) == EVERY_RUNG:
            return values
        return on_every_rung(values.clamp(min=_TINY).log(), self.rungs, self.density).exp()

    def log_errors(self) -> Array:
        """Logarithms of squared errors (H, densities) at TRIED_DENSITIES, up to a constant each."""
        error = self.errors.error.double().mean(-1).clamp(min=_TINY).log()
        density, logs = torch.stack([self.density[self.rungs], error]).flip(1).cpu().numpy()
        heads = range(density.shape[1])
        return np.stack([np.interp(TRIED_DENSITIES, density[:, h], logs[:, h]) for h in heads])


def measure_worth(orders: Sequence[Sampled]) -> None:
    """Measure the rest of the orders that are best for some head by their first tiles."""
    if not any(each.rest for each in orders):
        return
    logs = np.stack([each.log_errors() for each in orders])
    behind = (logs - logs.min(0)).mean(-1)
    worth: set[int] = set()
    for head in range(behind.shape[1]):
        ranked = sorted(zip(behind[:, head].tolist(), range(len(orders)), strict=True))
        better = [at for away, at in ranked if away < math.log(FAR_WORSE)]
        worth.update(
            [at for at in better if len(orders[at].chosen) > len(orders[at].first)][:MOST_WORTH]
        )
    for at in sorted(worth):
        orders[at].measure_rest()


def densities(score: Tensor, thresholds: tuple[float, ...]) -> Tensor:
    """(T, H) share of each head's pairs lifted by each threshold, mean over the batch.

    score: (B, H, tiles, blocks). It is sorted here and not kept so: that would be as large again.
    """
    ordered = score.flatten(2).sort(-1).values
    return count_lifted(ordered, thresholds).double().mean(1) / ordered.shape[-1]
