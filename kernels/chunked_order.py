"""The content order on a CPU: that of `freqopt.kernels.content_order`, in a fraction of its time.

Halves are told apart by the value at their border, not by sorting; only segments with tokens in
them are looked at, of only those heads that split them; rows are moved whole. Sums are taken in
another order, so that tokens on a border within rounding may change sides.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from freqopt.kernels.content_order import (
    LEAF,
    SEGMENT_SAMPLES,
    directions_of,
    enclosing,
    main_directions,
)

PROJECTED_BYTES = 2 * 2**20
"""Of the tokens whose coordinates are found at a time: what is in between stays in a cache."""

LEAF_LEVELS = 3
"""Halvings of a segment of LEAF tokens by one covariance: down to sub-tiles of 8."""


def order_by_content(tokens: Tensor, base: Tensor, chunks: Tensor) -> Tensor:
    """Each head's order (B, H, T) int32 of its tokens; arguments as of `content_order`."""
    batch, heads, length, _ = tokens.shape
    sizes = [min(chunk, enclosing(length)) for chunk in chunks.tolist()]
    if not any(sizes):
        return base.to(torch.int32).expand(batch, heads, length).contiguous()
    split = [head for head, size in enumerate(sizes) if size]
    largest = max(sizes)
    coordinates = coordinates_of(tokens if len(split) == heads else tokens[:, split], base)
    padded = F.pad(coordinates, (0, 0, 0, -length % largest))
    pairs = [sizes[head] for head in split] * batch
    place = tree(padded.flatten(0, 1), pairs, length)
    order = base.to(torch.int32).index_select(0, place.flatten()).view(batch, len(split), length)
    if len(split) == heads:
        return order
    every = base.to(torch.int32).expand(batch, heads, length).contiguous()
    every[:, split] = order
    return every


def coordinates_of(tokens: Tensor, base: Tensor) -> Tensor:
    """Tokens (B, H, T, D) in their heads' directions, (B, H, T, R) in base order."""
    batch, heads, _, dim = tokens.shape
    directions, mean = directions_of(tokens, base)
    rows = max(PROJECTED_BYTES // (4 * batch * heads * dim), 1)
    parts = [(part.float() - mean) @ directions for part in tokens.split(rows, 2)]
    at = torch.cat(parts, 2).index_select(2, base)
    return at.nan_to_num_(0.0, 6e4, -6e4).clamp_(-6e4, 6e4)


def tree(coordinates: Tensor, sizes: list[int], length: int) -> Tensor:
    """Positions (P, T) in base order, by median splits of coordinates (P, padded, R).

    sizes: of the segments that each of the P heads begins with, powers of two from LEAF up. The
    coordinates are padded to a multiple of the largest; those past T are zero.
    """
    pairs, padded, rank = coordinates.shape
    place = torch.arange(padded, device=coordinates.device).expand(pairs, padded).contiguous()
    first = torch.arange(pairs, device=coordinates.device)[:, None] * padded
    flat = coordinates.view(-1, rank)
    size = max(sizes)
    while size >= LEAF:
        count = -(-length // size)
        chosen = [pair for pair, own in enumerate(sizes) if own >= size]
        every = len(chosen) == pairs
        # What is past T stays behind all tokens, so the segments behind these have none.
        own, start = (place, first) if every else (place[chosen], first[chosen])
        own = own[:, : count * size]
        rows = flat.index_select(0, (own + start).flatten()).view(len(chosen), count, size, rank)
        levels = LEAF_LEVELS if size == LEAF else 1
        moved = split(rows, length - (count - 1) * size, levels)
        moved = own.flatten().index_select(0, moved).view(len(chosen), -1)
        if every:
            place[:, : count * size] = moved
        else:
            place[chosen, : count * size] = moved
        size //= 2
    return place[:, :length]


def split(rows: Tensor, last: int, levels: int) -> Tensor:
    """Where the rows (P, S, size, R) of segments go: indices of rows, (P * S * size,).

    last: rows of each P's last segment that are real; they come first, and the others are zero.
    """
    size = rows.shape[2]
    step = max(size // SEGMENT_SAMPLES, 1)
    count = rows.new_full((rows.shape[1], 1, 1), size // step)
    count[-1] = -(-last // step)
    mean = rows[:, :, ::step].sum(2, keepdim=True) / count
    off = rows - mean
    off[:, -1, last:] = 0.0
    sample = off[:, :, ::step]
    directions = torch.stack(main_directions(sample.mT @ sample / count, levels), -1)
    along = off @ directions
    along[:, -1, last:] = torch.inf
    along = along.view(-1, levels)
    order = torch.arange(len(along), device=rows.device)
    for level in range(levels):
        values = along[:, level]
        values = (values.index_select(0, order) if level else values).view(-1, size >> level)
        order = order.index_select(0, halved(values))
    return order


def halved(values: Tensor) -> Tensor:
    """Indices of the values (S, size): of each row the lower half first, the first of equals lower.

    Within a half they keep the order that they had.
    """
    half = values.shape[1] // 2
    border = values.kthvalue(half, 1, keepdim=True).values
    lower = values <= border
    if int(lower.sum()) > lower.numel() // 2:
        below, on = values < border, values == border
        left = half - below.sum(1, keepdim=True)
        lower = below | (on & (on.cumsum(1) <= left))
    lower = lower.flatten()
    parts = [mask.nonzero().view(-1, half) for mask in (lower, ~lower)]
    return torch.cat(parts, 1).flatten()
