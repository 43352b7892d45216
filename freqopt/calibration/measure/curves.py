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
from freqopt.calibration.measure.ladder import (
    CHOICES,
    GRID_ALONE,
    LEAST_TOKENS,
    THRESHOLDS,
    Array,
)
from freqopt.calibration.measure.orders import distinct, key_order
from freqopt.calibration.measure.readings import CURVES, FINE, Reading
from freqopt.calibration.measure.spectrum import key_spectrum
from freqopt.calibration.measure.tiles import (
    SAMPLED_TILES,
    TRIAL_TILES,
    HeadTokens,
    even_sample,
    fit_probes,
    offset_of,
    tensor_cores,
    tile_errors,
    variance_of_sum,
)
from freqopt.config import KEY_BLOCK
from freqopt.kernels import reference
from freqopt.kernels.layout import text_bias

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
) -> Reading:
    """What a site's call shows.

    dense: (B, H, N, D), its exact attention. number: of the call among those of the site, which
    measure different tiles. sampled: query tiles to measure errors on; in orders by content half
    as many, and TRIAL_TILES where others are better for a head. orders: the first of ORDERS. Where
    one of them acts as another does, it has the other's curves, and where there are fewer than
    LEAST_TOKENS the grid's.
    """
    energy = head_energy(dense).double()
    total = energy.sum().clamp(min=_TINY)
    offset, heads = offset_of(site, number), dense.shape[1]
    rows: dict[str, list[Tensor]] = {name: [] for name in (*CURVES, FINE)}
    video = call.layout.tokens
    acting = [distinct(chunk, video) if video >= LEAST_TOKENS else 0 for chunk in orders]
    by_content = {chunk: key_order(call, chunk) for chunk in set(acting) if chunk}
    with tensor_cores(dense.dtype):
        for head in range(heads):
            measured = {
                chunk: HeadInOrder(
                    head_tokens(call, head, by_content.get(chunk)),
                    max(sampled // 2, 1) if chunk else sampled,
                    offset,
                    probes,
                    tried=chunk > 0,
                )
                for chunk in dict.fromkeys(acting)
            }
            measure_worth(list(measured.values()))
            known = {chunk: each.curves(energy[head], total) for chunk, each in measured.items()}
            for chunk in acting:
                for name, curve in known[chunk].items():
                    rows[name].append(curve)
    curves = {
        name: torch.stack(row, -1).unflatten(-1, (heads, len(acting))).movedim(-1, 0).cpu()
        for name, row in rows.items()
    }
    share = (energy / total).cpu()
    spectrum = key_spectrum(call.key, call.grid, call.text_before)
    key_heads = call.key.shape[1]
    return Reading(site, call.shape, call.grid, share, curves, spectrum, key_heads)


def head_tokens(call: AttentionCall, head: int, order: Tensor | None = None) -> HeadTokens:
    """A head's tokens in an order (B, Hkv, T) or by the grid, and how its router scores them."""
    layout = call.layout
    at = head // (call.query.shape[1] // call.key.shape[1])
    query, key, value = (
        x[:, i : i + 1].float() for x, i in ((call.query, head), (call.key, at), (call.value, at))
    )
    of_head = None if order is None else order[:, at : at + 1]
    video = [layout.video_of(x, of_head) for x in (query, key, value)]
    text_key = layout.text_of(key)
    summary = reference.summarise(video[1], video[2], KEY_BLOCK)
    scores = reference.score_pairs(video[0], summary, call.scale, call.query.dtype)
    tiles, blocks = scores.score.shape[2:]
    own = reference.own_blocks(tiles, blocks, scores.score.device)
    return HeadTokens(
        query=video[0],
        key=video[1],
        value=video[2],
        text_key=text_key,
        text_value=layout.text_of(value),
        text_bias=text_bias(layout.text_mask(call.key_mask), text_key),
        summary=summary,
        score=scores.score.masked_fill(own, torch.inf),
        mass_term=scores.mass_term,
        scale=call.scale,
    )


class HeadInOrder:
    """A head in one order, measured on a sample of its query tiles.

    first, rest: places in the sample that are measured, and that are not yet. tried: on TRIAL_TILES
    of them first, evenly spaced, where that saves much. `measure_rest` measures the others. Errors
    of few tiles are unbiased too, and their deviation is larger.
    """

    def __init__(
        self, head: HeadTokens, sampled: int, offset: float, probes: int, *, tried: bool
    ) -> None:
        self.head, self.tiles = head, head.score.shape[2]
        self.ordered = head.score.flatten(2).sort(-1).values
        device = self.ordered.device
        self.thresholds = torch.tensor(THRESHOLDS, device=device, dtype=torch.float32)
        self.density = densities(self.ordered, THRESHOLDS)
        self.probe = fit_probes(head, self.thresholds, probes)
        self.chosen = even_sample(self.tiles, sampled, offset, device)
        count = len(self.chosen)
        step = count // TRIAL_TILES if tried and count >= 4 * TRIAL_TILES else 1
        self.first = list(range(count))[step // 2 :: step]
        self.rest = sorted(set(range(count)) - set(self.first))
        chosen = self.chosen[step // 2 :: step]
        self.errors = tile_errors(head, self.thresholds, chosen, self.probe)

    def measure_rest(self) -> None:
        """Measure the tiles of the sample that were left out."""
        places = torch.tensor(self.first + self.rest, device=self.chosen.device, dtype=torch.int64)
        chosen = self.chosen[places[len(self.first) :]]
        rest = tile_errors(self.head, self.thresholds, chosen, self.probe)
        self.errors, self.rest = self.errors.joined(rest, places.argsort()), []

    def curves(self, energy: Tensor, total: Tensor) -> dict[str, Tensor]:
        """Over the ladder, (rungs,) each, and densities at all CHOICES.

        energy, total: squared norms of the head's exact output and of the site's.
        """
        errors = self.errors
        expansion = self.tiles / errors.error.shape[1]
        energy = energy.clamp(min=_TINY)
        error, along = (expansion * x.double().sum(-1) for x in (errors.error, errors.along))
        error = error.clamp(min=ROUNDING * energy)
        return {
            "density": self.density,
            "own": error / energy,
            "site": error / total,
            "bias": along / energy,
            "site_bias": along.square() / energy / total,
            "probe": errors.probe_error.double().square().mean(1),
            "variance": variance_of_sum(errors.error.double(), self.tiles) / total.square(),
            FINE: densities(self.ordered, CHOICES),
        }

    def log_errors(self) -> Array:
        """Logarithms of squared errors at TRIED_DENSITIES, up to a constant of the head."""
        error = self.errors.error.double().mean(1).clamp(min=_TINY).log()
        density, logs = torch.stack([self.density, error]).flip(1).cpu().numpy()
        found: Array = np.interp(TRIED_DENSITIES, density, logs)
        return found


def measure_worth(orders: Sequence[HeadInOrder]) -> None:
    """Measure the rest of the orders that are best by their first tiles, at some density."""
    if not any(each.rest for each in orders):
        return
    logs = np.stack([each.log_errors() for each in orders])
    behind = (logs - logs.min(0)).mean(1)
    ranked = sorted(zip(behind.tolist(), range(len(orders)), strict=True))
    better = [orders[at] for away, at in ranked if away < math.log(FAR_WORSE)]
    for each in [each for each in better if each.rest][:MOST_WORTH]:
        each.measure_rest()


def densities(ordered: Tensor, thresholds: tuple[float, ...]) -> Tensor:
    """(T,) share of a head's pairs lifted by each threshold, mean over the batch.

    ordered: (B, 1, pairs) scores, ascending.
    """
    return count_lifted(ordered, thresholds).double().mean((1, 2)) / ordered.shape[-1]
