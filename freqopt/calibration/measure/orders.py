"""Orders by content of a call's keys, made as the op makes them."""

from __future__ import annotations

import torch
from torch import Tensor

from freqopt.calibration.measure.attention import AttentionCall
from freqopt.config import SMALLEST_CHUNK
from freqopt.kernels.chunked_order import order_by_content
from freqopt.kernels.content_order import enclosing


def key_order(call: AttentionCall, chunk: int) -> Tensor:
    """The order (B, Hkv, T) int32 of all key heads by content in chunks of so many tokens."""
    layout, key = call.layout, call.key
    base = layout.base_order(key.device)
    chunks = torch.full((key.shape[1],), chunk, device=key.device, dtype=torch.int32)
    if not key.is_cuda:
        tokens = key[:, :, layout.text_before : layout.text_before + layout.tokens]
        return order_by_content(tokens, base, chunks)
    from freqopt.kernels.forward import order as launched

    if key.stride(-1) != 1:
        key = key.contiguous()
    order = torch.empty(*key.shape[:2], layout.tokens, device=key.device, dtype=torch.int32)
    with torch.cuda.device(key.device):
        launched.order_by_content(key, base, chunks, chunk, layout.text_before, order)
    return order


def distinct(chunk: int, tokens: int) -> int:
    """A chunk as it acts on so many tokens: all that hold every token are alike."""
    return min(chunk, max(enclosing(tokens), SMALLEST_CHUNK))
