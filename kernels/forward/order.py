"""Launches the kernels of the content order: directions, coordinates, and the levels of the tree.

Nothing waits for the device. Beside the tokens an order takes 76 bytes a token and head.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from freqopt.kernels.content_order import LEAF, RANK, SAMPLES, SEGMENT_SAMPLES, enclosing
from freqopt.kernels.launches import Bound
from freqopt.kernels.order_launches import LEVELS, MOMENT_PARTS, order_launches
from freqopt.kernels.portable.order import directions_kernel, moments_kernel, project_kernel
from freqopt.kernels.portable.tree import (
    divide_kernel,
    halve_kernel,
    leaf_kernel,
    rank_tokens_kernel,
    segment_kernel,
)
from freqopt.kernels.tape import queued
from freqopt.kernels.tiles import padded_dim


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
    launches = order_launches(dim)

    def single(*shape: int) -> Tensor:
        return torch.empty(pairs, *shape, device=device, dtype=torch.float32)

    step = triton.cdiv(tokens, SAMPLES)
    samples = triton.cdiv(tokens, step)
    parts, moments = MOMENT_PARTS, launches["moments"]
    partial = single(parts, dim * dim + dim)
    queued(moments_kernel, moments.grid(parts=parts, pairs=pairs))(
        tokens_of, base, partial, *strides,
        heads, text_before, step, samples, triton.cdiv(samples, parts), **moments.fixed,
    )  # fmt: skip
    directions = torch.empty(pairs, padded, RANK, device=device, dtype=tokens_of.dtype)
    shift = single(RANK)
    directing, project = launches["directions"], launches["project"]
    queued(directions_kernel, directing.grid(pairs=pairs))(
        tokens_of, base, partial, single(padded, padded), single(padded, RANK), directions, shift,
        *strides, heads, text_before, parts, samples, **directing.fixed,
    )  # fmt: skip
    coordinates = torch.empty(pairs, tokens, RANK, device=device, dtype=torch.float16)
    position = torch.empty(pairs, tokens, device=device, dtype=torch.int32)
    queued(project_kernel, project.grid(pairs=pairs, tokens=tokens))(
        tokens_of, base, directions, shift, coordinates, position, *strides,
        heads, tokens, text_before, **project.fixed,
    )  # fmt: skip
    segment = min(largest_chunk, enclosing(tokens))
    ranks = torch.empty_like(position)
    if segment > max(LEVELS):
        position = _far_levels(
            launches, coordinates, position, ranks, chunks, heads, tokens, segment
        )
        segment = max(LEVELS)
    while segment > LEAF:
        halve = launches[f"halve_{segment}"]
        queued(halve_kernel, halve.grid(pairs=pairs, tokens=tokens))(
            coordinates, position, ranks, chunks, heads, tokens, **halve.fixed
        )
        segment //= 2
    leaf = launches["leaf"]
    queued(leaf_kernel, leaf.grid(pairs=pairs, tokens=tokens))(
        coordinates, position, base, order, chunks, heads, tokens, **leaf.fixed
    )


def _far_levels(
    launches: dict[str, Bound], coordinates: Tensor, position: Tensor, ranks: Tensor,
    chunks: Tensor, heads: int, tokens: int, size: int,
) -> Tensor:  # fmt: skip
    """Positions after the levels whose segments are too large for one program."""
    pairs = position.shape[0]
    divide, rank_tokens, segment = (launches[n] for n in ("divide", "rank_tokens", "segment"))
    target = torch.empty_like(position)
    while size > max(LEVELS):
        segments = triton.cdiv(tokens, size)
        directions = torch.empty(pairs, segments, RANK, device=position.device, dtype=torch.float16)
        queued(segment_kernel, segment.grid(pairs=pairs, segments=segments))(
            coordinates, position, directions, chunks, heads, tokens, size,
            size // SEGMENT_SAMPLES, **segment.fixed,
        )  # fmt: skip
        queued(rank_tokens_kernel, rank_tokens.grid(pairs=pairs, tokens=tokens))(
            coordinates, position, directions, ranks, chunks, heads, tokens, size, segments,
            **rank_tokens.fixed,
        )  # fmt: skip
        queued(divide_kernel, divide.grid(pairs=pairs, segments=segments))(
            position, target, ranks, chunks, heads, tokens, size, **divide.fixed
        )
        position, target = target, position
        size //= 2
    return position
