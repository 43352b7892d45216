"""Errors of split attention on an even sample of query tiles, at every threshold of a ladder.

Exact attention of a tile needs all its logits. Summed up by key block, they give the exact part of
any route too, so all thresholds together cost little more than the exact attention of those tiles.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from freqopt.config import KEY_BLOCK, QUERY_TILE
from freqopt.kernels import reference

SAMPLED_TILES = 32
"""Query tiles of a call that errors are measured on. That many tell a mean square to a tenth or so,
whatever the length; of a sequence with no more tiles all are taken."""

TRIAL_TILES = 4
"""Query tiles that tell whether an order is worth the rest of its tiles."""

CHUNK_BYTES = 256 * 2**20
"""Bound on float32 temporaries."""

GOLDEN = 0.6180339887498949
"""Step of the sample's offset from call to call, so that calls see different tiles."""


class HeadTokens(NamedTuple):
    """One head's float32 tensors (B, 1, tokens, D), video in its order, with its routing.

    text_bias: (B, 1, 1, X), 0 or -inf. score: (B, 1, I, J), infinite for own blocks. dtype: of the
    tensors that the model has.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    text_key: Tensor
    text_value: Tensor
    text_bias: Tensor
    summary: reference.Summary
    score: Tensor
    mass_term: Tensor
    scale: float


class TileErrors(NamedTuple):
    """Errors of sampled query tiles, at every rung of a ladder.

    error, along (rungs, ..., n): squared error of each tile, and the product of the error with the
    exact output; of heads, where there is more than one.
    """

    error: Tensor
    along: Tensor

    def joined(self, other: TileErrors, places: Tensor) -> TileErrors:
        """Of these tiles and others; places: (n,) of all of them, in the order wanted."""
        return TileErrors(*(torch.cat(x, -1)[..., places] for x in zip(self, other, strict=True)))


class BlockSums(NamedTuple):
    """Exact softmax numerators of queries (..., Q, D), kept apart by key block, over exp(peak).

    peak (..., Q, 1): largest logit. mass (..., Q, J), out (..., Q, J, D): of the blocks. text_mass
    (..., Q, 1), text_out (..., Q, D): of the text.
    """

    peak: Tensor
    mass: Tensor
    out: Tensor
    text_mass: Tensor
    text_out: Tensor


def even_sample(tiles: int, count: int, offset: float, device: torch.device) -> Tensor:
    """`count` of so many tiles, evenly spaced from an offset in [0, 1); all where there are fewer.

    Every tile is as likely as any other if the offset is uniform, so expanded sums are unbiased.
    """
    count = min(count, tiles)
    at = (torch.arange(count, dtype=torch.float64, device="cpu") + offset) * (tiles / count)
    return at.long().clamp(max=tiles - 1).to(device)


def offset_of(site: str, call: int) -> float:
    """Offset of the sample of a site's tiles in a call, by its number; the same in every run."""
    return (zlib.crc32(site.encode()) / 2**32 + call * GOLDEN) % 1.0


def variance_of_sum(values: Tensor, tiles: int) -> Tensor:
    """Variance of the expanded sum over `tiles` tiles of an even sample (..., n), by differences.

    Neighbours in the sample are compared, as it is spread evenly; 0 where all tiles were taken.
    """
    count = values.shape[-1]
    if count == tiles or count < 2:
        return torch.zeros_like(values[..., 0])
    squares = values.diff(dim=-1).square().sum(-1)
    return squares * ((1.0 - count / tiles) * tiles**2 / (2 * count * (count - 1)))


def block_sums(query: Tensor, head: HeadTokens) -> BlockSums:
    """Exact attention of queries (B, 1, Q, D) by key block."""
    count = head.summary.counts
    keys, values = (reference.split_blocks(x, KEY_BLOCK) for x in (head.key, head.value))
    padding = torch.arange(KEY_BLOCK, device=count.device) >= count[:, None]
    logit = (query @ keys.flatten(2, 3).mT * head.scale).unflatten(-1, padding.shape)
    logit.masked_fill_(padding, -torch.inf)
    text = query @ head.text_key.mT * head.scale + head.text_bias
    peak = logit.amax((-2, -1)).unsqueeze(-1)
    if text.shape[-1]:
        peak = torch.maximum(peak, text.amax(-1, keepdim=True))
    weight = logit.sub_(peak.unsqueeze(-1)).exp_()
    text_weight = (text - peak).exp()
    return BlockSums(
        peak=peak,
        mass=weight.sum(-1),
        out=(weight.movedim(-3, -2) @ values).movedim(-2, -3),
        text_mass=text_weight.sum(-1, keepdim=True),
        text_out=text_weight @ head.text_value,
    )


def fit_probes(head: HeadTokens, thresholds: Tensor, probes: int) -> reference.Probe:
    """What the op's probes give at every threshold (rungs,), which takes the place of heads."""
    tokens, rungs = head.query.shape[2], thresholds.numel()
    if not probes:
        per_rung = head.query.new_empty(head.query.shape[0], rungs)
        return reference.Probe.unfitted(per_rung, head.query.shape[3])
    position = reference.probe_positions(tokens, probes, head.query.device)
    query, tile = head.query[:, :, position], position // QUERY_TILE
    sums = block_sums(query, head)
    lifted = head.score[:, :, tile] >= thresholds[:, None, None]  # (B, rungs, P, J)
    total = sums.mass.sum(-1, keepdim=True) + sums.text_mass
    share, out = sums.mass / total, sums.out / total.unsqueeze(-1)
    exact = _added(lifted, share, out)
    missing = _added(~lifted, share, out)
    log_total = (sums.peak + total.log()).expand(-1, rungs, -1, -1)
    observed = reference.Observed(
        log_total,
        exact[0] + sums.text_mass / total,
        exact[1] + sums.text_out / total,
        *missing,
    )
    low = head.summary
    logit = query @ low.key_mean.mT * head.scale + low.counts.log()
    estimate = reference.Estimate(
        logit.masked_fill(lifted, -torch.inf),
        head.mass_term[:, :, tile].expand(-1, rungs, -1, -1),
        low.value_mean.expand(-1, rungs, -1, -1),
        (query * head.scale).expand(-1, rungs, -1, -1),
        low.h_bar.expand(-1, rungs, -1, -1),
        0.0,
        low.counts.numel(),
    )
    return reference.fit_probe(observed, estimate)


def _added(chosen: Tensor, mass: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Mass (B, rungs, Q, 1) and out (B, rungs, Q, D) of the chosen blocks (B, rungs, Q, J)."""
    pick = chosen.to(mass.dtype)
    added = (pick.movedim(1, 2) @ out.squeeze(1)).movedim(2, 1)
    return (pick * mass).sum(-1, keepdim=True), added


def tile_errors(
    head: HeadTokens, thresholds: Tensor, tiles: Tensor, probe: reference.Probe
) -> TileErrors:
    """Errors of the split at every threshold (rungs,) on some query tiles (n,) of a head.

    probe: of `fit_probes`, at the same thresholds.
    """
    batch, _, tokens, dim = head.query.shape
    rungs, blocks = thresholds.numel(), head.summary.counts.numel()
    per_tile = 4 * batch * QUERY_TILE * (blocks * (dim + 2 * KEY_BLOCK) + 3 * rungs * blocks)
    errors, alongs = [], []
    for part in tiles.split(max(1, CHUNK_BYTES // per_tile)):
        error, along = _chunk_errors(head, thresholds, part, probe, tokens)
        errors.append(error)
        alongs.append(along)
    return TileErrors(torch.cat(errors, 1), torch.cat(alongs, 1))


def _chunk_errors(
    head: HeadTokens, thresholds: Tensor, tiles: Tensor, probe: reference.Probe, tokens: int
) -> tuple[Tensor, Tensor]:
    """(rungs, n) squared error of the tiles and its product with the exact output."""
    low = head.summary
    position = tiles[:, None] * QUERY_TILE + torch.arange(QUERY_TILE, device=tiles.device)
    real = (position < tokens).flatten()
    query = head.query[:, :, position.clamp(max=tokens - 1).flatten()]
    tile = tiles.repeat_interleave(QUERY_TILE)
    sums = block_sums(query, head)
    lifted = head.score[:, :, tile] >= thresholds[:, None, None]
    mass, out = _added(lifted, sums.mass, sums.out)
    c = probe.c[..., None, None]
    logit = query @ low.key_mean.mT * head.scale + low.counts.log() - sums.peak
    weight = (logit + c * head.mass_term[:, :, tile]).masked_fill_(lifted, -torch.inf).exp_()
    low_mass = weight.sum(-1, keepdim=True)
    out = out + weight @ low.value_mean
    out = out + low_mass * (query @ probe.matrix(low.h_bar).mT * head.scale)
    out = (out + sums.text_out) / (mass + sums.text_mass + low_mass).clamp(min=1e-30)
    total = sums.mass.sum(-1, keepdim=True) + sums.text_mass
    truth = (sums.out.sum(-2) + sums.text_out) / total
    wrong = (out - truth) * real[:, None]
    rows = (len(tiles), QUERY_TILE)
    error = wrong.square().sum((0, -1)).unflatten(-1, rows).sum(-1)
    along = (wrong * truth).sum((0, -1)).unflatten(-1, rows).sum(-1)
    return error, along


@contextmanager
def tensor_cores(dtype: torch.dtype) -> Iterator[None]:
    """Float32 products of what was of half width use tensor cores, which hold that exactly."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    if dtype != torch.float32:
        matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before
