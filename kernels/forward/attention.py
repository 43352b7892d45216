"""Launches the attention itself: all bands and text in one softmax, and the text queries."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from freqopt.config import KEY_BLOCK, QUERY_TILE
from freqopt.kernels.forward.call import Call, Fitted, Route, Summaries, Target
from freqopt.kernels.hopper import launch as hopper
from freqopt.kernels.layout import repeat_heads
from freqopt.kernels.portable.attend import attend_kernel
from freqopt.kernels.tape import queued

TEXT_ROWS = 64
"""Text queries whose logits are held at a time, where their softmax sums are wanted."""


def attend(
    call: Call,
    summaries: Summaries,
    route: Route,
    fitted: Fitted,
    target: Target,
    tile_list: Tensor | None = None,
) -> None:
    """The fused attention of all queries but text, written into `target`.

    tile_list: (tiles,) int32, which tiles the rows of the route are; all of them without it.
    """
    out, log_sum = target
    query, key, value, mask = call.query, call.key, call.value, call.key_mask
    if hopper.applies(query):
        hopper.attend(call, summaries, route, fitted, target, tile_list)
        return
    tiles, blocks = route.mass_term.shape[2:]
    queries = call.queries
    optional = {**call.both_sides, **call.keys_in_place}
    if tile_list is not None:
        queries = tiles * QUERY_TILE
        optional["tile_list"] = tile_list
    if log_sum is not None:
        optional |= {"log_sum": log_sum, "log_sum_row": log_sum.shape[-1]}
    launch = call.launches["attend"]
    queued(attend_kernel, launch.grid(queries=queries, pairs=call.pairs))(
        query, call.query_order.index, summaries.key, summaries.value,
        key, value, mask if mask is not None else route.counts, summaries.key_shift,
        summaries.low_key, summaries.low_value, fitted.matrix,
        route.mass_term, fitted.coefficients, route.exact_list, route.counts, out,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        mask.stride(0) if mask is not None else 0, *out.stride()[:3],
        call.heads, call.group_size, call.tokens, tiles, blocks, call.layout.text,
        call.layout.text_before, call.scale,
        **launch.fixed, **optional, TEXT=call.layout.text > 0, HAS_MASK=mask is not None,
        RAGGED=call.tokens % KEY_BLOCK != 0, IN_PLACE=summaries.in_place,
    )  # fmt: skip


def attend_text(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Dense attention of text queries (B, H, X, D) over the whole sequence.

    mask: (B, Nk) bool.
    """
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=None if mask is None else mask[:, None, None, :],
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def text_log_sums(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Logarithms (B, H, X) float32 of the softmax sums of text queries (B, H, X, D)."""
    key = repeat_heads(key, query.shape[1]).float()
    parts = []
    for rows in query.float().split(TEXT_ROWS, 2):
        logit = rows @ key.mT * scale
        if mask is not None:
            logit = logit.masked_fill(~mask[:, None, None], -torch.inf)
        parts.append(logit.logsumexp(-1))
    return torch.cat(parts, 2)


def store_text(call: Call, target: Target) -> None:
    """Write the text queries' attention into `target`."""
    layout = call.query_layout
    if not layout.text:
        return
    query, mask = layout.text_of(call.query), call.layout.sequence_mask(call.key_mask)
    text = attend_text(query, call.key, call.value, mask, call.scale)
    layout.store_text(target.out, text)
    if target.log_sum is not None:
        sums = text_log_sums(query, call.key, mask, call.scale)
        layout.store_text(target.log_sum[..., None], sums[..., None])
