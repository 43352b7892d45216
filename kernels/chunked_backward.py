"""Gradients of split attention on a CPU: recomputed chunk of tiles by chunk of tiles.

Memory is that of one chunk beside float32 copies of the inputs. Nothing here is fused: what is
differentiated has to be written out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from freqopt.config import KEY_BLOCK, QUERY_TILE
from freqopt.kernels import reference as ref
from freqopt.kernels.chunked import Orders, Tokens, take_apart
from freqopt.kernels.layout import Inputs, text_bias

CHUNK_BYTES = 192 * 2**20
"""Target size of one chunk's temporaries: small against a model, large enough to hide Python."""


class Context(NamedTuple):
    """What a chunk of tiles attends to: key and value blocks, text, summaries.

    key_blocks, value_blocks (B, H, J, 64, D); text_key, text_value (B, H, X, D); the rest as in
    reference.Summary.
    """

    key_blocks: Tensor
    value_blocks: Tensor
    text_key: Tensor
    text_value: Tensor
    key_mean: Tensor
    value_mean: Tensor
    key_var: Tensor
    h_bar: Tensor


def _gather(blocks: Tensor, index: Tensor) -> Tensor:
    """(B, H, J, R, D) at (B, H, C, L) -> (B, H, C, L * R, D)."""
    rows, dim = blocks.shape[3:]
    flat = index.flatten(2)[..., None, None].expand(-1, -1, -1, rows, dim)
    gathered: Tensor = blocks.gather(2, flat)
    return torch.unflatten(gathered, 2, index.shape[2:]).flatten(3, 4)


def _selected(route: Tensor) -> tuple[Tensor, Tensor]:
    """Exact blocks of each tile: indices (B, H, C, L) and which of them are real."""
    chosen = route == ref.EXACT
    longest = int(chosen.sum(-1).max())
    listed = torch.argsort(chosen.to(torch.int8), dim=-1, descending=True, stable=True)
    listed = listed[..., :longest]
    return listed, chosen.gather(-1, listed)


def attend_tiles(
    query: Tensor, count: Tensor, context: Context, tokens: int, bias: Tensor, route: Tensor,
    coefficients: Tensor, update: Tensor, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Split attention of some query tiles; differentiable in `query` and `context`.

    Args:
        query: (B, H, C, 128, D), the last tile zero-padded.
        count: (C,) true queries of each tile.
        tokens: keys without text.
        bias: (B, 1, 1, X) of the text keys.
        route: (B, H, C, J) int8.
        coefficients: (B, H, 2), the probe's c and g.
        update: (B, H, D, D), what the first-order matrix has beside g H-bar.

    Returns:
        out (B, H, C, 128, D) and the softmax sums' logarithms (B, H, C, 128); rows past a tile's
        true queries are meaningless.
    """
    c, g = (x[..., None, None, None] for x in coefficients.unbind(-1))
    mean_square = query.square().sum(3) / count[:, None]
    counts = ref.block_counts(tokens, KEY_BLOCK, query.device)
    capacity = counts.log()
    index, real = _selected(route)
    lane = torch.arange(KEY_BLOCK, device=query.device)
    there = real[..., None] & (lane < counts[index][..., None])
    hidden = torch.zeros_like(there, dtype=torch.float32).masked_fill(~there, -torch.inf)
    hidden = hidden.flatten(3).unsqueeze(3)
    term = torch.minimum(0.5 * scale**2 * (mean_square @ context.key_var.mT), capacity)
    used = torch.where(route == ref.LOW, capacity + c.squeeze(-1) * term, -torch.inf)
    logits = [
        query @ context.key_mean.unsqueeze(2).mT * scale + used.unsqueeze(3),
        query @ _gather(context.key_blocks, index).mT * scale + hidden,
        query @ context.text_key.unsqueeze(2).mT * scale + bias.unsqueeze(2),
    ]
    values = [
        context.value_mean.unsqueeze(2),
        _gather(context.value_blocks, index),
        context.text_value.unsqueeze(2),
    ]
    log_sum = torch.cat(logits, -1).logsumexp(-1)
    weights = [(x - log_sum[..., None]).exp() for x in logits]
    low = weights[0].sum(-1, keepdim=True)
    matrix = g.squeeze(-1) * context.h_bar + update
    out = low * (query @ matrix.unsqueeze(2).mT * scale)
    for weight, value in zip(weights, values, strict=True):
        out = out + weight @ value
    return out, log_sum


def chunks_of(query: Tensor, route: Tensor, columns: int) -> Iterator[slice]:
    """Ranges of tiles whose temporaries stay near CHUNK_BYTES."""
    batch, heads, tiles, _ = route.shape
    densest = int((route == ref.EXACT).sum(-1).max()) * KEY_BLOCK
    per_tile = batch * heads * 4 * (densest * 2 * query.shape[-1])
    per_tile += batch * heads * 4 * 3 * QUERY_TILE * (densest + columns)
    step = max(CHUNK_BYTES // max(per_tile, 1), 1)
    for start in range(0, tiles, step):
        yield slice(start, min(start + step, tiles))


class Gradients(NamedTuple):
    """Of a forward pass's results: out (B, H, Nq, D), and log_sum (B, H, Nq) if it was wanted."""

    out: Tensor
    log_sum: Tensor | None


def split_backward(
    grads: Gradients,
    inputs: Inputs,
    orders: Orders,
    route: Tensor,
    coefficients: Tensor,
    matrix: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key, value; orders, route and what the probes gave are held fixed.

    route (B, H, I, J) int8, coefficients (B, H, 2), matrix (B, H, D, D): of the forward pass.
    """
    layout, queries = inputs.layout, inputs.query_layout or inputs.layout
    text_count, tokens = queries.text, layout.tokens
    count = ref.block_counts(queries.tokens, QUERY_TILE, route.device)
    bias = text_bias(layout.text_mask(inputs.key_mask), layout.text_of(inputs.key).float())

    def tiles_of(x: Tensor) -> Tensor:
        return ref.split_blocks(queries.video_of(x, orders.query).float(), QUERY_TILE)

    out_grad = tiles_of(grads.out)
    sum_grad = out_grad.new_zeros(out_grad.shape[:-1])
    if grads.log_sum is not None:
        sum_grad = tiles_of(grads.log_sum[..., None])[..., 0]

    def prepare(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        parts = take_apart(inputs._replace(query=query, key=key, value=value), orders)
        low = ref.summarise(parts.key, parts.value, KEY_BLOCK)
        text = _attend_text(parts, scale) if text_count else ()
        blocks = (ref.split_blocks(x, KEY_BLOCK) for x in (parts.key, parts.value))
        return (
            ref.split_blocks(parts.query, QUERY_TILE), *text, *blocks, parts.text_key,
            parts.text_value, low.key_mean, low.value_mean, low.key_var, low.h_bar,
        )  # fmt: skip

    # torch.func, not torch.autograd: inside an op's kernel the autograd keys are switched off.
    prepared, prepare_vjp, *_ = torch.func.vjp(prepare, inputs.query, inputs.key, inputs.value)
    tiles, leaves = prepared[0], prepared[-len(Context._fields) :]
    sums = [torch.zeros_like(x) for x in leaves]
    update = matrix.float() - coefficients[..., 1, None, None] * Context(*leaves).h_bar
    query_grad = torch.zeros_like(tiles)
    columns = -(-tokens // KEY_BLOCK) + layout.text
    for part in chunks_of(tiles, route, columns):

        def attend(chunk: Tensor, *context: Tensor, part: slice = part) -> tuple[Tensor, Tensor]:
            return attend_tiles(
                chunk, count[part], Context(*context), tokens, bias, route[:, :, part],
                coefficients, update, scale,
            )  # fmt: skip

        _, attend_vjp, *_ = torch.func.vjp(attend, tiles[:, :, part], *leaves)
        found = attend_vjp((out_grad[:, :, part], sum_grad[:, :, part]))
        query_grad[:, :, part] = found[0]
        for total, part_grad in zip(sums, found[1:], strict=True):
            total += part_grad
    text_grads: tuple[Tensor, ...] = ()
    if text_count:
        of_out = queries.text_of(grads.out).float()
        of_sums = of_out.new_zeros(of_out.shape[:-1])
        if grads.log_sum is not None:
            of_sums = queries.text_of(grads.log_sum[..., None])[..., 0]
        text_grads = (of_out, of_sums)
    results = prepare_vjp((query_grad, *text_grads, *sums))
    return results[0], results[1], results[2]


def _attend_text(parts: Tokens, scale: float) -> tuple[Tensor, Tensor]:
    """Dense attention of the text queries over every key, written out, and its log sums."""
    keys = torch.cat([parts.key, parts.text_key], 2)
    values = torch.cat([parts.value, parts.text_value], 2)
    logit = parts.text_query @ keys.mT * scale
    logit = logit + F.pad(parts.text_bias, (parts.key.shape[2], 0))
    return logit.softmax(-1) @ values, logit.logsumexp(-1)
