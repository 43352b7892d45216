"""The content order, as PyTorch computes it: tokens that are alike stand side by side.

Attention of real models follows content, not geometry: what a block's mean leaves out is the spread
of its keys, and a tree of median splits along their principal directions leaves less of it than a
curve through the picture. This is the definition; kernels may part from it on near ties, so an
order is judged by the spread that it leaves inside blocks (`spread`), and everything else is
compared given one order. Source: docs/design/mathematics.md §1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from freqopt.config import KEY_BLOCK

RANK = 32
"""Directions of a head that its tokens are told apart by."""

STEPS = 2
"""Steps of the subspace iteration that finds them."""

LEAST_VARIANCE = 1e-6
"""Of a channel, relative to the sum of all, in what the iteration starts from."""

SAMPLES = 512
"""Tokens at most, evenly spaced in base order, that they are found on."""

SQUARINGS = 3
"""Times that a segment's covariance is squared: eight steps of power iteration."""

LEAF = KEY_BLOCK
"""Tokens of a segment whose last levels share one covariance."""

SEGMENT_SAMPLES = 2048
"""Tokens at most, evenly spaced, that a segment's direction is found on."""


def signs(rows: int, columns: int, device: torch.device | None = None) -> Tensor:
    """(rows, columns) float32 of fixed signs: parities of the bits of row and column numbers.

    What an iteration starts from. Close to orthogonal, and far from any axis.
    """
    row = torch.arange(rows, device=device)[:, None] + 1
    bits = row & ((torch.arange(columns, device=device)[None] + 1) * 37 % 1021)
    for shift in (8, 4, 2, 1):
        bits = bits ^ (bits >> shift)
    return 1.0 - 2.0 * (bits & 1).float()


def trace_of(x: Tensor) -> Tensor:
    """Sum (.., 1, 1) of the diagonals of square matrices, at least a very small number."""
    return x.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None].clamp(min=1e-30)


def directions_of(tokens: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """The directions in which a head's tokens vary most, and its mean token.

    tokens: (B, H, T, D) of any floating type; base (T,). Returns (B, H, D, R) with R = min(RANK, D)
    columns, orthogonal and scaled so that the coordinates' variances add up to about 1, and
    (B, H, 1, D).
    """
    length, dim = tokens.shape[2:]
    sample = tokens[:, :, base[:: -(-length // SAMPLES)].long()].float()
    mean = sample.mean(2, keepdim=True)
    off = sample - mean
    covariance = off.mT @ off / sample.shape[2]
    scale = trace_of(covariance)
    if dim <= RANK:
        axes = torch.eye(dim, device=tokens.device, dtype=torch.float32).expand_as(covariance)
        return axes / scale.sqrt(), mean
    covariance = covariance / scale
    # Every channel weighs alike at first: a few of large variance, which real models have, would
    # leave of the others what float32 keeps beside them.
    variance = covariance.diagonal(dim1=-2, dim2=-1).clamp(min=LEAST_VARIANCE)
    axes = signs(dim, RANK, tokens.device) / variance[..., None]
    for _ in range(STEPS):
        axes = orthonormal(covariance @ axes)
    return axes / scale.sqrt(), mean


def orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis (.., D, R) of the columns' span, by elimination; NaN where there is."""
    gram = columns.mT @ columns
    size = gram.shape[-1]
    unit = torch.eye(size, device=gram.device, dtype=torch.float32)
    least = trace_of(gram) * (1e-7 / size)
    factor, _ = torch.linalg.cholesky_ex(gram + least * unit)
    rows: Tensor = torch.linalg.solve_triangular(factor, columns.mT, upper=False)
    return rows.mT


def coordinates_of(tokens: Tensor, base: Tensor) -> Tensor:
    """Tokens (B, H, T, D) in the head's directions and in base order, (B, H, T, R).

    0 where that is no number.
    """
    directions, mean = directions_of(tokens, base)
    at = (tokens[:, :, base.long()].float() - mean) @ directions
    return at.nan_to_num(0.0, 6e4, -6e4).clamp(-6e4, 6e4)


def eighth_power(covariance: Tensor) -> Tensor:
    """Covariances (.., R, R) to the eighth power, less their scale."""
    power = covariance / trace_of(covariance)
    for _ in range(SQUARINGS):
        power = power @ power
    return power


def main_directions(covariance: Tensor, count: int) -> list[Tensor]:
    """The first `count` principal directions (.., R) of covariances, nearly: orthogonal to another.

    The first is the power's column of the widest coordinate; the others start from fixed signs.
    """
    power = eighth_power(covariance)
    widest = covariance.diagonal(dim1=-2, dim2=-1).argmax(-1)[..., None, None]
    found = [_unit(power.take_along_dim(widest, -1).squeeze(-1))]
    if count == 1:
        return found
    starts = power @ signs(power.shape[-1], count - 1, power.device)
    for i in range(count - 1):
        direction = _unit(starts[..., i])
        for other in found:
            length = other.square().sum(-1, keepdim=True).clamp(min=1e-30)
            direction = direction - (direction * other).sum(-1, keepdim=True) / length * other
        found.append(_unit(direction))
    return found


def _unit(direction: Tensor) -> Tensor:
    """A direction whose largest component is 1, or zeros."""
    return direction / direction.abs().amax(-1, keepdim=True).clamp(min=1e-37)


def content_order(tokens: Tensor, base: Tensor, chunks: Tensor) -> Tensor:
    """Each head's order of its tokens: by content within chunks of the base order.

    Recursive median splits along the principal direction of a segment's tokens, from chunks down to
    sub-tiles of 8. Blocks are aligned: of a segment with too few tokens the first half is full.

    Args:
        tokens: (B, H, T, D), queries or keys as the model numbers them, any floating type.
        base: (T,) integers, the base order: entry p is the number of the token at p.
        chunks: (H,) integers: tokens of a head's chunks, a power of two from SMALLEST_CHUNK up; 0
            for the base order itself. One that covers all tokens orders them all.

    Returns:
        (B, H, T) int32; entry p is the number of the token that stands at p.
    """
    batch, heads, length, _ = tokens.shape
    chunks = chunks.to(tokens.device)
    place = torch.arange(length, device=tokens.device).expand(batch, heads, length)
    largest = min(int(chunks.max()), enclosing(length)) if heads else 0
    if largest:
        place = tree(coordinates_of(tokens, base), chunks, largest)
    return base.to(torch.int32)[place]


def enclosing(length: int) -> int:
    """The smallest chunk that holds so many tokens."""
    return max(1 << (length - 1).bit_length(), LEAF)


def tree(coordinates: Tensor, chunks: Tensor, largest: int) -> Tensor:
    """Positions (B, H, T) in base order, by median splits of coordinates (B, H, T, R).

    largest: tokens of the segments that the splits begin with, a power of two from LEAF up.
    """
    batch, heads, length, rank = coordinates.shape
    padded = -(-length // largest) * largest
    at = F.pad(coordinates, (0, 0, 0, padded - length))
    place = torch.arange(padded, device=at.device).expand(batch, heads, padded)
    size = largest
    while size >= LEAF:
        segments = place.unflatten(2, (-1, size))
        rows = at.gather(2, place[..., None].expand(-1, -1, -1, rank)).unflatten(2, (-1, size))
        moved = segments.gather(3, split(rows, segments < length, levels=3 if size == LEAF else 1))
        place = torch.where((chunks >= size)[:, None, None], moved, segments).flatten(2)
        size //= 2
    return place[..., :length]


def split(rows: Tensor, real: Tensor, *, levels: int) -> Tensor:
    """Order (.., S, size) of segments' rows (.., S, size, R), halved `levels` times by the median.

    Rows of a half keep the order that they had. real: (.., S, size) bool; rows that are not stay
    behind all that are.
    """
    step = max(rows.shape[-2] // SEGMENT_SAMPLES, 1)
    sample, there = rows[..., ::step, :], real[..., ::step, None]
    count = there.sum(-2, keepdim=True).clamp(min=1)
    mean = (sample * there).sum(-2, keepdim=True) / count
    off = (sample - mean) * there
    order = torch.arange(rows.shape[-2], device=rows.device).expand(real.shape)
    for level, direction in enumerate(main_directions(off.mT @ off / count, levels)):
        along = ((rows - mean) * direction.unsqueeze(-2)).sum(-1).masked_fill(~real, torch.inf)
        parts = along.gather(-1, order).unflatten(-1, (1 << level, -1))
        halves = parts.sort(dim=-1, stable=True).indices.unflatten(-1, (2, -1))
        halves = halves.sort(-1).values.flatten(-2)
        order = order.unflatten(-1, (1 << level, -1)).gather(-1, halves).flatten(-2)
    return order


def spread(tokens: Tensor, order: Tensor, size: int = KEY_BLOCK) -> Tensor:
    """Mean squared distance of tokens from their blocks' means, relative to the head's: (B, H).

    What an order is judged by: 1 where blocks are as mixed as the whole, 0 where all that stand
    together are equal. tokens: (B, H, N, D); order: (B, H, T).
    """
    placed = tokens.float().gather(2, order.long()[..., None].expand(-1, -1, -1, tokens.shape[-1]))
    whole = placed[:, :, : order.shape[-1] // size * size]
    blocks = whole.unflatten(2, (-1, size))
    within = (blocks - blocks.mean(3, keepdim=True)).square().sum((2, 3, 4))
    share: Tensor = within / (whole - whole.mean(2, keepdim=True)).square().sum((2, 3)).clamp(
        min=1e-30
    )
    return share
