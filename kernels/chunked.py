"""Split attention on a CPU: PyTorch's fused attention over the blocks that a route made exact.

Tiles with as many exact blocks go together, each with its own keys gathered; the low band is one
more fused call over all tiles. Their softmax sums join them. Summaries, scores, route and probe
are those of `freqopt.kernels.reference`, orders those of `freqopt.kernels.content_order`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from freqopt.config import KEY_BLOCK, QUERY_TILE
from freqopt.kernels import reference as ref
from freqopt.kernels.content_order import content_order
from freqopt.kernels.layout import Inputs, Settings, TokenLayout, repeat_heads, text_bias

CHUNK_BYTES = 48 * 2**20
"""Target size of the keys and values that are gathered at a time: they should stay in a cache."""


class Tokens(NamedTuple):
    """One call's tensors in float32, heads repeated, all but text in their orders."""

    query: Tensor
    key: Tensor
    value: Tensor
    text_query: Tensor
    text_key: Tensor
    text_value: Tensor
    text_bias: Tensor


class Orders(NamedTuple):
    """Orders (B, Hkv, T) of the keys and (B, H, Tq) of the queries; None for the base order."""

    key: Tensor | None
    query: Tensor | None


def orders_of(inputs: Inputs, settings: Settings) -> Orders:
    """The orders of a call: given ones, or made by content where chunks ask for it."""
    share = inputs.query.shape[1] // inputs.key.shape[1]
    of_keys = _order(inputs.key, inputs.layout, inputs.key_order, inputs.chunks, settings)
    if inputs.query_layout is None:
        return Orders(of_keys, None if of_keys is None else of_keys.repeat_interleave(share, 1))
    chunks = None if inputs.chunks is None else inputs.chunks.repeat_interleave(share)
    layout = inputs.query_layout
    return Orders(of_keys, _order(inputs.query, layout, inputs.query_order, chunks, settings))


def _order(
    x: Tensor, layout: TokenLayout, given: Tensor | None, chunks: Tensor | None, settings: Settings
) -> Tensor | None:
    if given is not None or chunks is None or not settings.largest_chunk:
        return given
    tokens = x[:, :, layout.text_before : layout.text_before + layout.tokens]
    return content_order(tokens, layout.base_order(x.device), chunks)


def take_apart(inputs: Inputs, orders: Orders) -> Tokens:
    """Split the (B, H, N, D) tensors, of any floating dtype, into the parts of `Tokens`."""
    heads = inputs.query.shape[1]
    query = inputs.query.float()
    key, value = (repeat_heads(x, heads).float() for x in (inputs.key, inputs.value))
    layout, of_keys = inputs.layout, orders.key
    if of_keys is not None:
        of_keys = of_keys.repeat_interleave(heads // of_keys.shape[1], 1)
    queries = inputs.query_layout or layout
    text_key = layout.text_of(key)
    return Tokens(
        query=queries.video_of(query, orders.query),
        key=layout.video_of(key, of_keys),
        value=layout.video_of(value, of_keys),
        text_query=queries.text_of(query),
        text_key=text_key,
        text_value=layout.text_of(value),
        text_bias=text_bias(layout.text_mask(inputs.key_mask), text_key),
    )


class Part(NamedTuple):
    """Attention of queries over some of the keys, to be joined with the rest.

    out (.., Q, D): normalised over these keys alone; log_sum (.., Q): of their softmax sum.
    """

    out: Tensor
    log_sum: Tensor


def fused(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Part:
    """Attention of (A, C, Q, D) queries over (A, C, K, D) keys with a bias (A, C, 1, K) or wider.

    A row whose keys are all hidden has weight zero: log_sum -inf.
    """
    if not key.shape[2]:
        return Part(torch.zeros_like(query), query.new_full(query.shape[:3], -torch.inf))
    wide = None if bias is None else bias.expand(*query.shape[:3], key.shape[2])
    out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, False, attn_mask=wide, scale=scale
    )
    if bias is None:
        return Part(out, log_sum)
    hidden = (bias.amax(-1) == -torch.inf).expand(query.shape[:3])
    return Part(out.masked_fill(hidden[..., None], 0.0), log_sum.masked_fill(hidden, -torch.inf))


def equal_lists(route: Tensor, block_bytes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of a flat route (R, J) with as many exact blocks: (n,), and those blocks (n, L).

    So none has to be filled up and masked. block_bytes: of a block's keys and values.
    """
    exact = route == ref.EXACT
    counts = exact.sum(-1)
    for length in counts.unique().tolist():
        if not length:
            continue
        alike = (counts == length).nonzero().squeeze(1)
        for rows in alike.split(max(CHUNK_BYTES // (length * block_bytes), 1)):
            yield rows, exact[rows].nonzero()[:, 1].view(-1, length)


def attend_exact(tokens: Tokens, tiles: Tensor, route: Tensor, scale: float) -> Part:
    """All query tiles (B, H, I, 128, D) over the blocks that the route (B, H, I, J) made exact."""
    batch, heads, count, rows, dim = tiles.shape
    blocks = route.shape[-1]
    keys, values = (
        ref.split_blocks(x, KEY_BLOCK).reshape(-1, KEY_BLOCK * dim)
        for x in (tokens.key, tokens.value)
    )
    flat = tiles.reshape(-1, rows, dim)
    out = torch.zeros_like(flat)
    log_sum = flat.new_full(flat.shape[:2], -torch.inf)
    lane = torch.arange(KEY_BLOCK, device=route.device)
    ragged = tokens.key.shape[2] % KEY_BLOCK
    for chosen, listed in equal_lists(route.reshape(-1, blocks), 8 * KEY_BLOCK * dim):
        where = (listed + (chosen // count * blocks)[:, None]).flatten()
        key, value = (
            x.index_select(0, where).view(len(chosen), 1, -1, dim) for x in (keys, values)
        )
        bias = None
        if ragged:
            past = (listed == blocks - 1)[..., None] & (lane >= ragged)
            bias = flat.new_zeros(past.shape).masked_fill(past, -torch.inf)
            bias = bias.view(len(chosen), 1, 1, -1)
        part = fused(flat[chosen][:, None], key, value, bias, scale)
        out[chosen], log_sum[chosen] = part.out[:, 0], part.log_sum[:, 0]
    return Part(out.view_as(tiles), log_sum.view(batch, heads, count, rows))


def attend_low(
    low: ref.Summary, mass_term: Tensor, tiles: Tensor, route: Tensor, c: Tensor, scale: float
) -> Part:
    """All query tiles (B, H, I, 128, D) over the means of the blocks that the route left low."""
    batch, heads, count, rows = tiles.shape[:4]
    bias = low.counts.log() + c[..., None, None] * mass_term
    bias = bias.masked_fill(route != ref.LOW, -torch.inf)
    # Of a block with what is no number all pairs are exact; its mean must not reach the others.
    means = (low.key_mean.nan_to_num(0.0, 0.0, 0.0), low.value_mean)
    key, value = (x.flatten(0, 1)[:, None].expand(-1, count, -1, -1) for x in means)
    part = fused(tiles.flatten(0, 1), key, value, bias.flatten(0, 1)[:, :, None], scale)
    return Part(part.out.view_as(tiles), part.log_sum.view(batch, heads, count, rows))


def attend_tiles(
    tokens: Tokens,
    low: ref.Summary,
    scores: ref.Scores,
    route: Tensor,
    c: Tensor,
    matrix: Tensor,
    scale: float,
) -> Part:
    """Split attention of all queries (B, H, Tq, D), in their order, in one softmax.

    c (B, H) and the first-order matrix (B, H, D, D): what the probes gave.
    """
    tiles = ref.split_blocks(tokens.query, QUERY_TILE)
    parts = [
        attend_exact(tokens, tiles, route, scale),
        attend_low(low, scores.mass_term, tiles, route, c, scale),
    ]
    if tokens.text_key.shape[2]:
        text = fused(tokens.query, tokens.text_key, tokens.text_value, tokens.text_bias, scale)
        parts.append(
            Part(
                ref.split_blocks(text.out, QUERY_TILE),
                ref.split_blocks(text.log_sum[..., None], QUERY_TILE)[..., 0],
            )
        )
    log_sum = torch.stack([part.log_sum for part in parts]).logsumexp(0)
    out = torch.zeros_like(tiles)
    for part in parts:
        out.addcmul_(part.out, (part.log_sum - log_sum).exp_()[..., None])
    low_share = (parts[1].log_sum - log_sum).exp_()[..., None]
    turned = (tiles @ (scale * matrix).mT.unsqueeze(2)).mul_(low_share)
    out += turned.masked_fill_(low_share == 0, 0.0)  # not 0 times infinity
    queries = tokens.query.shape[2]
    return Part(out.flatten(2, 3)[:, :, :queries], log_sum.flatten(2)[..., :queries])


def fit_probe(
    tokens: Tokens, low: ref.Summary, scores: ref.Scores, route: Tensor, probes: int, scale: float
) -> ref.Probe:
    """Fit on some queries (see reference.fit_probe); nothing is fitted without probes."""
    if not probes:
        return ref.Probe.unfitted(scores.score[..., 0, 0], tokens.query.shape[-1])
    positions = ref.probe_positions(tokens.query.shape[2], probes, tokens.query.device)
    chosen = tokens.query[:, :, positions]
    bands = ref.make_bands(
        chosen,
        positions // QUERY_TILE,
        tokens.key,
        tokens.value,
        tokens.text_key,
        tokens.text_value,
        tokens.text_bias,
        route,
        low,
        None,
        scores,
        ref.tile_mean_square(tokens.query),
        scale,
    )
    text = chosen @ tokens.text_key.mT * scale + tokens.text_bias
    full = torch.cat([chosen @ tokens.key.mT * scale, text], -1)
    return ref.fit_probe(ref.observe(bands, full), bands.estimate)


def attend_text(tokens: Tokens, scale: float) -> Part:
    """Dense attention of the text queries (B, H, X, D) over every key."""
    keys = torch.cat([tokens.key, tokens.text_key], 2)
    values = torch.cat([tokens.value, tokens.text_value], 2)
    bias = F.pad(tokens.text_bias, (tokens.key.shape[2], 0))
    return fused(tokens.text_query, keys, values, bias, scale)


class Forward(NamedTuple):
    """What a forward pass returns.

    out (B, H, Nq, D) and log_sum (B, H, Nq) float32 as the model numbers its queries; split: the
    findings, in the queries' order; matrix (B, H, D, D): the first-order matrix in the queries'
    type; orders: those used.
    """

    out: Tensor
    log_sum: Tensor
    split: ref.Split
    matrix: Tensor
    orders: Orders


def split_forward(inputs: Inputs, settings: Settings) -> Forward:
    """Forward pass of a call on a CPU."""
    query, scale = inputs.query, settings.scale
    orders = orders_of(inputs, settings)
    tokens = take_apart(inputs, orders)
    own = inputs.query_layout is None
    low = ref.summarise(tokens.key, tokens.value, KEY_BLOCK)
    scores = ref.score_pairs(tokens.query, low, scale, query.dtype)
    thresholds = ref.resolve_thresholds(scores.score, inputs.threshold, settings.density, own=own)
    route = ref.route_pairs(scores.score, *thresholds, own=own)
    probe = fit_probe(tokens, low, scores, route, settings.probes, scale)
    matrix = probe.matrix(low.h_bar)
    video = attend_tiles(tokens, low, scores, route, probe.c, matrix, scale)

    batch, heads, length, dim = query.shape
    out = query.new_empty(batch, length, heads, dim).transpose(1, 2)
    log_sum = query.new_empty(batch, heads, length, 1, dtype=torch.float32)
    layout = inputs.query_layout or inputs.layout
    text = attend_text(tokens, scale) if layout.text else None
    layout.store(out, video.out, None if text is None else text.out, orders.query)
    layout.store(
        log_sum,
        video.log_sum[..., None],
        None if text is None else text.log_sum[..., None],
        orders.query,
    )
    split = ref.Split(video.out, route, ref.route_density(route), probe, video.log_sum)
    matrix = ref.rounded(matrix, query.dtype).to(query.dtype)
    return Forward(out, log_sum[..., 0], split, matrix, orders)
