"""The curves of one call: what every choice costs and how far it is off, head by head.

Densities are those of all pairs; errors are of an even sample of query tiles, expanded to all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from freqopt.calibration.measure.attention import AttentionCall, count_lifted, head_energy
from freqopt.calibration.measure.ladder import CHOICES, GRID_ALONE, LEAST_TOKENS, THRESHOLDS
from freqopt.calibration.measure.orders import distinct, key_order
from freqopt.calibration.measure.readings import CURVES, FINE, Reading
from freqopt.calibration.measure.spectrum import key_spectrum
from freqopt.calibration.measure.tiles import (
    SAMPLED_TILES,
    HeadTokens,
    even_sample,
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
    as many. orders: the first of ORDERS. Where one of them acts as another does, it has the other's
    curves, and where there are fewer than LEAST_TOKENS the grid's.
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
            known: dict[int, dict[str, Tensor]] = {}
            for chunk in acting:
                if chunk not in known:
                    tokens = head_tokens(call, head, by_content.get(chunk))
                    tiles = max(sampled // 2, 1) if chunk else sampled
                    known[chunk] = _head_curves(tokens, energy[head], total, offset, tiles, probes)
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


def _head_curves(
    head: HeadTokens, energy: Tensor, total: Tensor, offset: float, sampled: int, probes: int
) -> dict[str, Tensor]:
    """The curves of a head over the ladder, (rungs,) each, and densities at all CHOICES.

    energy, total: squared norms of the head's exact output and of the site's.
    """
    tiles = head.score.shape[2]
    ordered = head.score.flatten(2).sort(-1).values
    chosen = even_sample(tiles, sampled, offset, ordered.device)
    thresholds = torch.tensor(THRESHOLDS, device=ordered.device, dtype=torch.float32)
    errors = tile_errors(head, thresholds, chosen, probes)
    expansion = tiles / len(chosen)
    energy = energy.clamp(min=_TINY)
    error, along = (expansion * x.double().sum(-1) for x in (errors.error, errors.along))
    error = error.clamp(min=ROUNDING * energy)
    return {
        "density": densities(ordered, THRESHOLDS),
        "own": error / energy,
        "site": error / total,
        "bias": along / energy,
        "site_bias": along.square() / energy / total,
        "probe": errors.probe_error.double().square().mean(1),
        "variance": variance_of_sum(errors.error.double(), tiles) / total.square(),
        FINE: densities(ordered, CHOICES),
    }


def densities(ordered: Tensor, thresholds: tuple[float, ...]) -> Tensor:
    """(T,) share of a head's pairs lifted by each threshold, mean over the batch.

    ordered: (B, 1, pairs) scores, ascending.
    """
    return count_lifted(ordered, thresholds).double().mean((1, 2)) / ordered.shape[-1]
