"""Launches what comes first: keys and values put in order and summarised, block by block."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from freqopt.config import KEY_BLOCK
from freqopt.kernels.forward.call import Call, Summaries
from freqopt.kernels.hopper import launch as hopper
from freqopt.kernels.portable.glue import centre_kernel, order_kernel, total_kernel
from freqopt.kernels.portable.prepare import first_order_kernel, summarise_kernel
from freqopt.kernels.tiles import padded_dim

GROUP = 4
"""Key blocks per program of the summaries."""

SUMMARY_WARPS = 1
"""A block's sums then stay inside a warp: between warps they go through shared memory, and waiting
for that took more time than the reading."""

TOTAL_COLS = 32
TOTAL_ROWS = 128
"""Channels per program of a head's sums, which so spread over more of the GPU, and groups per
step."""

CENTRE_BLOCKS = 32
"""Key blocks per program of the centring."""

ORDER_GROUP = 32
"""Key blocks per program of the first-order products: amortises their (D, D) sum."""

ORDER_CELLS = 1024


def summarise(call: Call, *, ordered: bool = True) -> Summaries:
    """Put keys and values in order and summarise them, in one pass over memory.

    ordered: without it nothing is copied, and who needs keys and values reads them in place.
    """
    key, value, order = call.key, call.value, call.order.index
    batch, heads, _, dim = key.shape
    tokens, text_before = call.tokens, call.layout.text_before
    blocks = triton.cdiv(tokens, KEY_BLOCK)
    per_head = (batch, heads)

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
        sums = single(triton.cdiv(blocks, GROUP), 3, dim)
        summarise_kernel[(batch * heads, sums.shape[2])](
            key, value, order, key_out, value_out, key_mean, low_value, key_var, spread, sums,
            *key.stride()[:3], *value.stride()[:3], heads, tokens, blocks, text_before,
            **call.size, **call.key_side, GROUP=GROUP, COPY=ordered,
            num_warps=SUMMARY_WARPS, num_stages=1,
        )  # fmt: skip
        first_order = single(triton.cdiv(blocks, ORDER_GROUP), dim, dim)
        first_order_kernel[(first_order.shape[2], batch * heads)](
            key_out, value_out, key_mean, first_order, tokens, blocks,
            **call.size, **in_place, GROUP=ORDER_GROUP,
            num_warps=call.launch.order_warps, num_stages=call.launch.order_stages,
        )  # fmt: skip
    cols = min(TOTAL_COLS, padded_dim(dim))
    parts = padded_dim(dim) // cols
    key_shift, head_spread = single(dim), single(parts)
    total_kernel[(parts, batch * heads)](
        sums, key_shift, head_spread, tokens, sums.shape[2],
        **call.size, COLS=cols, ROWS=TOTAL_ROWS, num_warps=4,
    )  # fmt: skip
    centre_kernel[(triton.cdiv(blocks, CENTRE_BLOCKS), batch * heads)](
        key_mean, spread, key_shift, head_spread, low_key, blocks,
        **call.size, COLS=cols, BJ=CENTRE_BLOCKS, num_warps=4,
    )  # fmt: skip
    low_order = native(dim, dim)
    order_kernel[(triton.cdiv(dim * dim, ORDER_CELLS), batch * heads)](
        first_order, low_order, first_order.shape[2], tokens, dim * dim, CELLS=ORDER_CELLS
    )
    return Summaries(
        in_place=not ordered, key=key_out, value=value_out,
        key_shift=key_shift, key_var=key_var, spread=spread,
        low_key=low_key, low_value=low_value, low_order=low_order,
    )  # fmt: skip
