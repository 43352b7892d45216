"""Launches the Gluon attention kernel where it applies: NVIDIA GPUs of compute capability 9.0."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

STAGES = 3
"""Buffers of 128 keys and of 128 values in shared memory; three fill it."""


@functools.lru_cache(maxsize=16)
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def applies(query: Tensor, *, mid_band: bool, text: int) -> bool:
    """Whether `attend` serves this call."""
    half = query.dtype in (torch.bfloat16, torch.float16)
    return (
        half and query.shape[-1] == 128 and not mid_band and text == 0 and _is_hopper(query.device)
    )


def _descriptor(x: Tensor) -> Any:
    """Rows of 128 channels, loaded in boxes of 64 by 64."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from freqopt.kernels.gluon_attend import OPERAND

    return TensorDescriptor.from_tensor(x.view(-1, x.shape[-1]), [64, 64], OPERAND.value)


def attend(
    query: Tensor, order: Tensor, key: Tensor, value: Tensor, low_key: Tensor, low_value: Tensor,
    low_order: Tensor, key_shift: Tensor, mass_term: Tensor, coefficients: Tensor,
    exact_list: Tensor, counts: Tensor, out: Tensor, *, text_before: int, tokens: int, scale: float,
) -> None:  # fmt: skip
    """The fused low-band and exact attention of the video queries, into `out` (B, H, N, D)."""
    from freqopt.kernels.gluon_attend import attend_hopper_kernel

    batch, heads = query.shape[:2]
    kv_heads, blocks = low_key.shape[1:3]
    tiles = mass_term.shape[2]
    attend_hopper_kernel[(tiles, batch * heads)](
        query, order, _descriptor(key), _descriptor(value), _descriptor(low_key),
        _descriptor(low_value), _descriptor(low_order), key_shift,
        mass_term, coefficients, exact_list, counts, out,
        *query.stride()[:3], *out.stride()[:3],
        heads, heads // kv_heads, tokens, tiles, blocks, text_before, scale,
        STAGES=STAGES, num_warps=4,
    )  # fmt: skip
