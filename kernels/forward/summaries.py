"""Launches what comes first: keys and values put in order and summarised, block by block."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from freqopt.config import KEY_BLOCK
from freqopt.kernels.forward.call import Call, Summaries
from freqopt.kernels.hopper import launch as hopper
from freqopt.kernels.portable.glue import centre_kernel, h_bar_kernel, total_kernel
from freqopt.kernels.portable.prepare import first_order_kernel, summarise_kernel
from freqopt.kernels.split_launches import GROUP, H_BAR_GROUP
from freqopt.kernels.tape import queued
from freqopt.kernels.tiles import padded_dim


def summarise(call: Call, *, ordered: bool = True) -> Summaries:
    """Put keys and values in order and summarise them, in one pass over memory.

    ordered: without it nothing is copied, and who needs keys and values reads them in place.
    """
    key, value, order = call.key, call.value, call.order.index
    batch, heads, _, dim = key.shape
    tokens, text_before = call.tokens, call.layout.text_before
    blocks = triton.cdiv(tokens, KEY_BLOCK)
    per_head, kv_pairs, launches = (batch, heads), batch * heads, call.launches

    def single(*shape: int) -> Tensor:
        return torch.empty(*per_head, *shape, device=key.device, dtype=torch.float32)

    def native(*shape: int) -> Tensor:
        return torch.empty(*per_head, *shape, device=key.device, dtype=key.dtype)

    key_out, value_out = key, value
    in_place: dict[str, Any] = {}
    if ordered:
        key_out, value_out = native(blocks * KEY_BLOCK, dim), native(blocks * KEY_BLOCK, dim)
    else:
        in_place = {"order": order, "heads": heads, "text_before": text_before, **call.key_side}
        for name, x in (("k", key), ("v", value)):
            in_place |= {f"stride_{name}{at}": x.stride(i) for i, at in enumerate("bhn")}
    key_mean, key_var = single(blocks, dim), native(blocks, dim)
    low_key, low_value = native(blocks, dim), native(blocks, dim)
    spread = single(blocks)
    if hopper.prepares(key, value):
        copies = (key_out, value_out) if ordered else None
        sums, first_order = hopper.prepare(call, copies, key_mean, low_value, key_var, spread)
    else:
        sums, summaries = single(triton.cdiv(blocks, GROUP), 3, dim), launches["summarise"]
        queued(summarise_kernel, summaries.grid(kv_pairs=kv_pairs, blocks=blocks))(
            key, value, order, key_out, value_out, key_mean, low_value, key_var, spread, sums,
            *key.stride()[:3], *value.stride()[:3], heads, tokens, blocks, text_before,
            **summaries.fixed, **call.key_side, COPY=ordered,
        )  # fmt: skip
        first_order, first = single(triton.cdiv(blocks, H_BAR_GROUP), dim, dim), launches["first"]
        queued(first_order_kernel, first.grid(blocks=blocks, kv_pairs=kv_pairs))(
            key_out, value_out, key_mean, first_order, tokens, blocks, **first.fixed, **in_place
        )
    total, centre, mean = launches["total"], launches["centre"], launches["h_bar"]
    padded = padded_dim(dim)
    programs = total.grid(padded=padded, kv_pairs=kv_pairs)
    key_shift, head_spread = single(dim), single(programs[0])
    queued(total_kernel, programs)(
        sums, key_shift, head_spread, tokens, sums.shape[2], **total.fixed
    )
    queued(centre_kernel, centre.grid(blocks=blocks, kv_pairs=kv_pairs))(
        key_mean, spread, key_shift, head_spread, low_key, blocks, **centre.fixed
    )
    h_bar, cells = native(dim, dim), dim * dim
    queued(h_bar_kernel, mean.grid(cells=cells, kv_pairs=kv_pairs))(
        first_order, h_bar, first_order.shape[2], tokens, cells, **mean.fixed
    )
    return Summaries(
        in_place=not ordered, key=key_out, value=value_out,
        key_shift=key_shift, key_var=key_var, spread=spread,
        low_key=low_key, low_value=low_value, h_bar=h_bar,
    )  # fmt: skip


def summarise_in_place(call: Call) -> tuple[Call, Summaries]:
    """Summaries without copies in order, and the call with keys and values that can be read so."""
    if hopper.applies(call.query):
        call = call._replace(key=hopper.gatherable(call.key), value=hopper.gatherable(call.value))
    return call, summarise(call, ordered=False)
