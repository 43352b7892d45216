"""Split attention in plain PyTorch that never builds a (tokens x keys) tensor.

Serves CPU tensors: each chunk of query tiles gathers only the key blocks its route made exact, so
time and memory follow the density. Summaries, scores, route and probe are those of
`freqopt.kernels.reference`.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Parts
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from freqopt.config import KEY_BLOCK, QUERY_TILE, SUB_BLOCK
from freqopt.kernels import reference as ref
from freqopt.kernels.layout import Sequence, Settings, repeat_heads, text_bias

CHUNK_BYTES = 192 * 2**20
"""Target size of one chunk's temporaries: small against a model, large enough to hide Python."""


class Tokens(NamedTuple):
    """One call's tensors in float32, heads repeated, video in token order (see reference.py)."""

    query: Tensor
    key: Tensor
    value: Tensor
    text_query: Tensor
    text_key: Tensor
    text_value: Tensor
    text_bias: Tensor


def take_apart(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, sequence: Sequence
) -> Tokens:
    """Split (B, H, N, D) tensors of any floating dtype into the parts of `Tokens`."""
    heads = query.shape[1]
    q, k, v = (repeat_heads(x, heads).float() for x in (query, key, value))
    text_key = sequence.text_of(k)
    return Tokens(
        query=sequence.video_of(q),
        key=sequence.video_of(k),
        value=sequence.video_of(v),
        text_query=sequence.text_of(q),
        text_key=text_key,
        text_value=sequence.text_of(v),
        text_bias=text_bias(sequence.text_mask(key_mask), text_key),
    )


class Context(NamedTuple):
    """What a chunk of tiles attends to: key and value blocks, summaries, text."""

    key_blocks: Tensor
    value_blocks: Tensor
    text_key: Tensor
    text_value: Tensor
    low: ref.Summary
    mid: ref.Summary | None


def make_context(tokens: Tokens, mid_band: bool) -> Context:
    """Summaries and padded blocks of one call."""
    return Context(
        key_blocks=ref.split_blocks(tokens.key, KEY_BLOCK),
        value_blocks=ref.split_blocks(tokens.value, KEY_BLOCK),
        text_key=tokens.text_key,
        text_value=tokens.text_value,
        low=ref.summarise(tokens.key, tokens.value, KEY_BLOCK),
        mid=ref.summarise(tokens.key, tokens.value, SUB_BLOCK) if mid_band else None,
    )


def _selected(route: Tensor, band: int) -> tuple[Tensor, Tensor]:
    """Blocks of one band, per tile: indices (B, H, C, L) and which of them are real."""
    chosen = route == band
    longest = int(chosen.sum(-1).max())
    order = torch.argsort(chosen.to(torch.int8), dim=-1, descending=True, stable=True)
    order = order[..., :longest]
    return order, chosen.gather(-1, order)


def _gather(blocks: Tensor, index: Tensor) -> Tensor:
    """(B, H, J, R, D) at (B, H, C, L) -> (B, H, C, L * R, D)."""
    rows, dim = blocks.shape[3:]
    flat = index.flatten(2)[..., None, None].expand(-1, -1, -1, rows, dim)
    gathered: Tensor = blocks.gather(2, flat)
    return torch.unflatten(gathered, 2, index.shape[2:]).flatten(3, 4)


def _bias(index: Tensor, real: Tensor, weight: Tensor) -> Tensor:
    """Additive logit (B, H, C, 1, L * R) of gathered columns: log of `weight` (J, R), or -inf."""
    bias = torch.where(real[..., None], weight.log()[index], -torch.inf)
    return bias.flatten(3).unsqueeze(3)


def _column_weights(count: Tensor, size: int, rows: int) -> Tensor:
    """(J, rows) tokens behind each column of each block, when a column stands for `size` tokens."""
    starts = torch.arange(rows, device=count.device) * size
    return (count[:, None] - starts).clamp(0, size)


def attend_tiles(
    query: Tensor,
    count: Tensor,
    context: Context,
    bias: Tensor,
    route: Tensor,
    c: Tensor,
    g: Tensor,
    scale: float,
) -> Tensor:
    """Split attention of some query tiles; differentiable in `query` and `context`.

    Args:
        query: (B, H, C, 128, D), the last tile zero-padded.
        count: (C,) true queries of each tile.
        bias: (B, 1, 1, X) of the text keys.
        route: (B, H, C, J) int8.
        c, g: (B, H), the probe's scalars.

    Returns:
        (B, H, C, 128, D); rows past a tile's true queries are meaningless.
    """
    low, mid = context.low, context.mid
    c, g = c[..., None, None, None], g[..., None, None, None]
    mean_square = query.square().sum(3) / count[:, None]
    capacity = low.counts.log()

    index, real = _selected(route, ref.EXACT)
    weights = _column_weights(low.counts, 1, KEY_BLOCK)
    logits = [query @ _gather(context.key_blocks, index).mT * scale + _bias(index, real, weights)]
    values = [_gather(context.value_blocks, index)]

    logits.append(query @ context.text_key.unsqueeze(2).mT * scale + bias.unsqueeze(2))
    values.append(context.text_value.unsqueeze(2))

    term = torch.minimum(0.5 * scale**2 * (mean_square @ low.key_var.mT), capacity)
    used = torch.where(route == ref.LOW, capacity + c.squeeze(-1) * term, -torch.inf)
    logits.append(query @ low.key_mean.unsqueeze(2).mT * scale + used.unsqueeze(3))
    values.append(low.value_mean.unsqueeze(2))
    orders = [(len(logits) - 1, low.first_order)]

    if mid is not None:
        rows = KEY_BLOCK // SUB_BLOCK
        index, real = _selected(route, ref.MID)
        mean, value, var = (
            _gather(ref.split_blocks(x, rows), index)
            for x in (mid.key_mean, mid.value_mean, mid.key_var)
        )
        fine = _bias(index, real, _column_weights(low.counts, SUB_BLOCK, rows))
        spread = 0.5 * scale**2 * (mean_square.unsqueeze(3) @ var.mT)
        logits.append(query @ mean.mT * scale + fine + c * torch.minimum(spread, fine.clamp(min=0)))
        values.append(value)
        orders.append((len(logits) - 1, mid.first_order))

    peak = torch.stack([x.amax(-1) for x in logits if x.shape[-1]]).amax(0)[..., None].detach()
    weights_of = [(x - peak).exp() for x in logits]
    mass = [x.sum(-1, keepdim=True) for x in weights_of]
    out = weights_of[0] @ values[0]
    for w, v in zip(weights_of[1:], values[1:], strict=True):
        out = out + w @ v
    for band, matrix in orders:
        out = out + g * mass[band] * (query @ matrix.unsqueeze(2).mT * scale)
    return out / torch.stack(mass).sum(0)


def chunks_of(query: Tensor, route: Tensor, columns: int) -> Iterator[slice]:
    """Ranges of tiles whose temporaries stay near CHUNK_BYTES."""
    batch, heads, tiles, _ = route.shape
    densest = int((route == ref.EXACT).sum(-1).max()) * KEY_BLOCK
    per_tile = batch * heads * 4 * (densest * 2 * query.shape[-1])
    per_tile += batch * heads * 4 * 3 * QUERY_TILE * (densest + columns)
    step = max(CHUNK_BYTES // max(per_tile, 1), 1)
    for start in range(0, tiles, step):
        yield slice(start, min(start + step, tiles))


def probe_bands(
    tokens: Tokens,
    context: Context,
    scores: ref.Scores,
    route: Tensor,
    positions: Tensor,
    scale: float,
) -> ref.Probe:
    """Fit the probe's scalars on the queries at `positions` (see reference.fit_probe)."""
    chosen = tokens.query[:, :, positions]
    bands = ref.make_bands(
        chosen, positions // QUERY_TILE, tokens.key, tokens.value, tokens.text_key,
        tokens.text_value, tokens.text_bias, route, context.low, context.mid, scores,
        ref.tile_mean_square(tokens.query), scale,
    )  # fmt: skip
    text = chosen @ tokens.text_key.mT * scale + tokens.text_bias
    full = torch.cat([chosen @ tokens.key.mT * scale, text], -1)
    return ref.fit_probe(ref.observe(bands, full), bands.estimate)


def attend_text(tokens: Tokens, scale: float) -> Tensor:
    """Dense attention of the text queries over every key, (B, H, X, D) float32."""
    keys = torch.cat([tokens.key, tokens.text_key], 2)
    values = torch.cat([tokens.value, tokens.text_value], 2)
    video_bias = tokens.text_bias.new_zeros(keys.shape[0], 1, 1, tokens.key.shape[2])
    bias = torch.cat([video_bias, tokens.text_bias], -1)
    return F.scaled_dot_product_attention(
        tokens.text_query, keys, values, attn_mask=bias, scale=scale
    )


def split_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    budget: Tensor,
    key_mask: Tensor | None,
    sequence: Sequence,
    settings: Settings,
) -> tuple[Tensor, ref.Split]:
    """Forward pass: out (B, H, N, D) in the model's order, and the split's findings."""
    scale, density, mid_band, probes = settings
    tokens = take_apart(query, key, value, key_mask, sequence)
    context = make_context(tokens, mid_band)
    scores = ref.score_pairs(tokens.query, context.low, scale, query.dtype)
    thresholds = ref.resolve_thresholds(scores.score, budget, density, mid_band)
    route = ref.route_pairs(scores.score, *thresholds)
    ones = torch.ones_like(scores.score[..., 0, 0])
    probe = ref.Probe(ones, ones, ones * torch.nan)
    if probes:
        positions = ref.probe_positions(sequence.tokens, probes, query.device)
        probe = probe_bands(tokens, context, scores, route, positions, scale)

    tiles = ref.split_blocks(tokens.query, QUERY_TILE)
    count = ref.block_counts(sequence.tokens, QUERY_TILE, query.device)
    video = torch.empty_like(tiles)
    columns = context.low.counts.numel() + sequence.text
    for part in chunks_of(tiles, route, columns):
        video[:, :, part] = attend_tiles(
            tiles[:, :, part], count[part], context, tokens.text_bias, route[:, :, part],
            probe.c, probe.g, scale,
        )  # fmt: skip
    batch, heads, length, dim = query.shape
    out = query.new_empty(batch, length, heads, dim).transpose(1, 2)
    text = attend_text(tokens, scale) if sequence.text else None
    sequence.store(out, video.flatten(2, 3)[:, :, : sequence.tokens], text)
    return out, ref.Split(out, route, ref.route_density(route), probe)


def split_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    route: Tensor,
    coefficients: Tensor,
    sequence: Sequence,
    *,
    scale: float,
    mid_band: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key, value with the route and the probe's scalars held fixed.

    Recomputes chunk by chunk, so memory is that of one chunk beside float32 copies of the inputs.
    """
    c, g = coefficients.unbind(-1)
    count = ref.block_counts(sequence.tokens, QUERY_TILE, query.device)
    bias = text_bias(sequence.text_mask(key_mask), sequence.text_of(key).float())
    grad_tiles = ref.split_blocks(sequence.video_of(grad).float(), QUERY_TILE)

    def prepare(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        tokens = take_apart(query, key, value, key_mask, sequence)
        context = make_context(tokens, mid_band)
        text = (attend_text(tokens, scale),) if sequence.text else ()
        tiles = ref.split_blocks(tokens.query, QUERY_TILE)
        return (tiles, *text, *_differentiable(context))

    # torch.func, not torch.autograd: inside an op's kernel the autograd keys are switched off.
    prepared, prepare_vjp, *_ = torch.func.vjp(prepare, query, key, value)
    fixed = 2 if sequence.text else 1
    tiles, leaves = prepared[0], prepared[fixed:]
    sums = [torch.zeros_like(x) for x in leaves]
    grad_query = torch.zeros_like(tiles)
    columns = -(-sequence.tokens // KEY_BLOCK) + sequence.text
    for part in chunks_of(tiles, route, columns):

        def attend(chunk: Tensor, *parts: Tensor, part: slice = part) -> Tensor:
            context = _context_of(parts, sequence.tokens)
            return attend_tiles(chunk, count[part], context, bias, route[:, :, part], c, g, scale)

        _, attend_vjp, *_ = torch.func.vjp(attend, tiles[:, :, part], *leaves)
        grads = attend_vjp(grad_tiles[:, :, part])
        grad_query[:, :, part] = grads[0]
        for total, part_grad in zip(sums, grads[1:], strict=True):
            total += part_grad
    text_grad = (sequence.text_of(grad).float(),) if sequence.text else ()
    results = prepare_vjp((grad_query, *text_grad, *sums))
    return results[0], results[1], results[2]


def _differentiable(context: Context) -> list[Tensor]:
    """The tensors of a context that gradients flow through, in the order `_context_of` takes."""
    summaries = [context.low] if context.mid is None else [context.low, context.mid]
    each = [(s.key_mean, s.value_mean, s.key_var, s.first_order) for s in summaries]
    return [*context[:4], *(x for parts in each for x in parts)]


def _context_of(parts: Parts[Tensor], tokens: int) -> Context:
    """A context from its differentiable tensors; routing is done, so no value spread."""

    def summary(values: Parts[Tensor], size: int) -> ref.Summary:
        mean, value, var, first = values
        count = ref.block_counts(tokens, size, mean.device)
        return ref.Summary(count, mean, value, var, torch.empty(0), first)

    low = summary(parts[4:8], KEY_BLOCK)
    mid = summary(parts[8:12], SUB_BLOCK) if len(parts) > 8 else None
    return Context(parts[0], parts[1], parts[2], parts[3], low, mid)
