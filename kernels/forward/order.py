"""Launches the kernels of the content order: directions, coordinates, and the levels of the tree.

Nothing waits for the device. Beside the tokens an order takes 76 bytes a token and head.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from freqopt.kernels.content_order import LEAF, RANK, SAMPLES, SEGMENT_SAMPLES, enclosing
from freqopt.kernels.portable.order import (
    directions_kernel,
    divide_kernel,
    halve_kernel,
    leaf_kernel,
    moments_kernel,
    project_kernel,
    rank_tokens_kernel,
    segment_kernel,
)
from freqopt.kernels.tiles import padded_dim

PARTS, SAMPLE_ROWS = 4, 64
"""Programs that a head's sampled tokens are spread over, and tokens a step."""

PROJECT_ROWS, PROJECT_WARPS = 128, 8

DIRECTION_SLICE = 32
"""Rows of the covariance that a product takes at a time."""

LEVELS = {
    8192: (8, 256), 4096: (4, 256), 2048: (4, 256), 1024: (2, 128), 512: (1, 128),
    256: (1, 128), 128: (1, 64),
}  # fmt: skip
"""Warps of a segment that one program halves, and tokens that it reads at a time, by the segment's
tokens: the fastest of those tried on an H200. Larger segments take three launches, so that more
than one program reads their coordinates."""

SEGMENT_PIECE, SEGMENT_WARPS = 128, 4
DIVIDE_PIECE, DIVIDE_WARPS = 8192, 32


def order_by_content(
    tokens_of: Tensor,
    base: Tensor,
    chunks: Tensor,
    largest_chunk: int,
    text_before: int,
    order: Tensor,
) -> None:
    """Write each head's content order (B, H, T) int32 into `order`; see `content_order`.

    Args:
        tokens_of: (B, H, N, D), of which the T tokens after text_before are ordered.
        base: (T,) int32.
        chunks: (H,) int32, on the device.
        largest_chunk: at least the largest of them.
    """
    batch, heads, _, dim = tokens_of.shape
    pairs, tokens, device = batch * heads, base.shape[0], tokens_of.device
    strides = tokens_of.stride()[:3]
    padded = max(padded_dim(dim), RANK)
    size: dict[str, Any] = {"D": dim, "DP": padded}

    def single(*shape: int) -> Tensor:
        return torch.empty(pairs, *shape, device=device, dtype=torch.float32)

    step = triton.cdiv(tokens, SAMPLES)
    samples = triton.cdiv(tokens, step)
    partial = single(PARTS, dim * dim + dim)
    moments_kernel[(PARTS, pairs)](
        tokens_of, base, partial, *strides,
        heads, text_before, step, samples, triton.cdiv(samples, PARTS),
        **size, ROWS=SAMPLE_ROWS, num_warps=8,
    )  # fmt: skip
    directions = torch.empty(pairs, padded, RANK, device=device, dtype=tokens_of.dtype)
    shift = single(RANK)
    directions_kernel[(pairs,)](
        tokens_of, base, partial, single(padded, padded), single(padded, RANK), directions, shift,
        *strides, heads, text_before, PARTS, samples,
        **size, SLICE=DIRECTION_SLICE, num_warps=8,
    )  # fmt: skip
    coordinates = torch.empty(pairs, tokens, RANK, device=device, dtype=torch.float16)
    position = torch.empty(pairs, tokens, device=device, dtype=torch.int32)
    project_kernel[(pairs, triton.cdiv(tokens, PROJECT_ROWS))](
        tokens_of, base, directions, shift, coordinates, position, *strides,
        heads, tokens, text_before, **size, ROWS=PROJECT_ROWS, num_warps=PROJECT_WARPS,
    )  # fmt: skip
    segment = min(largest_chunk, enclosing(tokens))
    ranks = torch.empty_like(position)
    if segment > max(LEVELS):
        position = _far_levels(coordinates, position, ranks, chunks, heads, tokens, segment)
        segment = max(LEVELS)
    while segment > LEAF:
        warps, piece = LEVELS[segment]
        halve_kernel[(pairs, triton.cdiv(tokens, segment))](
            coordinates, position, ranks, chunks, heads, tokens,
            SIZE=segment, STEP=max(segment // SEGMENT_SAMPLES, 1), PIECE=piece, num_warps=warps,
        )  # fmt: skip
        segment //= 2
    leaf_kernel[(pairs, triton.cdiv(tokens, LEAF))](
        coordinates, position, base, order, chunks, heads, tokens, SIZE=LEAF, num_warps=1
    )


def _far_levels(
    coordinates: Tensor, position: Tensor, ranks: Tensor, chunks: Tensor, heads: int, tokens: int,
    size: int,
) -> Tensor:  # fmt: skip
    """Positions after the levels whose segments are too large for one program."""
    pairs = position.shape[0]
    target = torch.empty_like(position)
    while size > max(LEVELS):
        segments = triton.cdiv(tokens, size)
        directions = torch.empty(pairs, segments, RANK, device=position.device, dtype=torch.float16)
        segment_kernel[(pairs, segments)](
            coordinates, position, directions, chunks, heads, tokens, size,
            size // SEGMENT_SAMPLES,
            PIECE=SEGMENT_PIECE, PIECES=SEGMENT_SAMPLES // SEGMENT_PIECE, num_warps=SEGMENT_WARPS,
        )  # fmt: skip
        rank_tokens_kernel[(pairs, triton.cdiv(tokens, PROJECT_ROWS))](
            coordinates, position, directions, ranks, chunks, heads, tokens, size, segments,
            ROWS=PROJECT_ROWS, num_warps=PROJECT_WARPS // 2,
        )  # fmt: skip
        divide_kernel[(pairs, segments)](
            position, target, ranks, chunks, heads, tokens, size,
            PIECE=min(DIVIDE_PIECE, size), num_warps=DIVIDE_WARPS,
        )  # fmt: skip
        position, target = target, position
        size //= 2
    return position
