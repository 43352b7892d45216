"""Triton kernels of the content order: a head's directions, and its tokens' coordinates in them.

The definition is `freqopt.kernels.content_order`; the levels of the tree are in `tree`. Who
launches them is `freqopt.kernels.forward.order`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from freqopt.kernels.content_order import LEAST_VARIANCE as DEFINED_FLOOR
from freqopt.kernels.content_order import RANK as DEFINED_RANK
from freqopt.kernels.content_order import STEPS as DEFINED_STEPS

RANK = tl.constexpr(DEFINED_RANK)
STEPS = tl.constexpr(DEFINED_STEPS)
FLOOR = tl.constexpr(DEFINED_FLOOR)
LARGEST = tl.constexpr(60000.0)  # that a coordinate may be in float16


@triton.jit
def moments_kernel(
    tokens_of, base, partial, stride_b, stride_h, stride_n,
    heads, text_before, step, samples, span,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: sums over a range of a head's sampled tokens, less its first: x x^T, then x.

    tokens_of: queries or keys (B, H, N, D), of which every step-th in base order is a sample;
    partial: (pairs, parts, D * D + D) float32.
    """
    part = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    tokens_of += pair // heads * stride_b + pair % heads * stride_h
    col = tl.arange(0, DP)
    in_dim = col < D
    first = tl.load(base).to(tl.int64) + text_before
    origin = tl.load(tokens_of + first * stride_n + col, mask=in_dim, other=0.0).to(tl.float32)
    square = tl.zeros((DP, DP), tl.float32)
    total = tl.zeros((DP,), tl.float32)
    stop = tl.minimum((part + 1) * span, samples)
    for start in range(part * span, stop, ROWS):
        sample = start + tl.arange(0, ROWS)
        inside = sample < stop
        source = tl.load(base + sample * step, mask=inside, other=0).to(tl.int64) + text_before
        mask = inside[:, None] & in_dim[None, :]
        x = tl.load(tokens_of + source[:, None] * stride_n + col[None, :], mask=mask, other=0.0)
        x = tl.where(mask, x.to(tl.float32) - origin[None, :], 0.0)
        square = tl.dot(tl.trans(x), x, square)
        total += tl.sum(x, 0)
    partial += (pair * tl.num_programs(0) + part) * (D * D + D)
    cell = col[:, None] * D + col[None, :]
    tl.store(partial + cell, square, mask=in_dim[:, None] & in_dim[None, :])
    tl.store(partial + D * D + col, total, mask=in_dim)


@triton.jit
def signs(row, column):
    """Fixed signs, those of content_order.signs: the parity of a few of the row's bits."""
    bits = (row + 1) & ((column + 1) * 37 % 1021)
    bits ^= bits >> 8
    bits ^= bits >> 4
    bits ^= bits >> 2
    bits ^= bits >> 1
    return 1.0 - 2.0 * (bits & 1).to(tl.float32)


@triton.jit
def _add_pairs(a, b, c, d):
    """Two sums at once: what crosses lanes and warps goes together."""
    return a + c, b + d


@triton.jit
def _orthonormal_factor(gram):
    """F (R, R) with F gram F^T = 1, by elimination: the rows of F y^T are orthonormal.

    The matrix and what becomes of the identity stand side by side, so that a step reads rows of
    both at once. A step eliminates two columns: reading rows and columns crosses lanes and warps,
    which takes its time, and two are read as fast as one.
    """
    row = tl.arange(0, RANK)
    column = tl.arange(0, 2 * RANK)
    unit = row[:, None] == row[None, :]
    least = tl.sum(tl.sum(tl.where(unit, gram, 0.0), 1), 0) * (1e-7 / RANK) + 1e-30
    both = tl.join(gram + tl.where(unit, least, 0.0), tl.where(unit, 1.0, 0.0))
    both = tl.reshape(tl.permute(both, (0, 2, 1)), (RANK, 2 * RANK))
    for k in range(0, RANK, 2):
        first_row, second_row = tl.reduce(
            (
                tl.where(row[:, None] == k, both, 0.0),
                tl.where(row[:, None] == k + 1, both, 0.0),
            ),
            0,
            _add_pairs,
        )
        first_column, second_column = tl.reduce(
            (
                tl.where(column[None, :] == k, both, 0.0),
                tl.where(column[None, :] == k + 1, both, 0.0),
            ),
            1,
            _add_pairs,
        )
        corner, beside = tl.reduce(
            (
                tl.where(column == k, first_row, 0.0),
                tl.where(column == k + 1, first_row, 0.0),
            ),
            0,
            _add_pairs,
        )
        below = tl.sum(tl.where(column == k + 1, second_row, 0.0), 0)
        pivot = tl.maximum(corner, least)
        ratio = beside / pivot
        second_row -= ratio * first_row
        second_column -= ratio * first_column
        factor = tl.where(row > k, first_column / pivot, 0.0)
        both -= factor[:, None] * first_row[None, :]
        pivot = tl.maximum(below - ratio * beside, least)
        factor = tl.where(row > k + 1, second_column / pivot, 0.0)
        both -= factor[:, None] * second_row[None, :]
    upper, left = tl.split(tl.permute(tl.reshape(both, (RANK, 2, RANK)), (0, 2, 1)))
    diagonal = tl.maximum(tl.sum(tl.where(unit, upper, 0.0), 1), least)
    return left * tl.rsqrt(diagonal)[:, None]


@triton.jit
def directions_kernel(
    tokens_of, base, partial, covariance, axes, directions, shift,
    stride_b, stride_h, stride_n, heads, text_before, parts, samples,
    D: tl.constexpr, DP: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """One program: the RANK directions in which a head's tokens vary most, by subspace iteration.

    covariance (pairs, DP, DP) and axes (pairs, DP, RANK) float32 are memory to work in. Writes
    directions (pairs, DP, RANK) in the tokens' type, scaled so that the coordinates' variances add
    up to about 1, and the mean token's coordinates, shift (pairs, RANK).
    """
    pair = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, DP)
    in_dim = col < D
    axis = tl.arange(0, RANK)
    partial += pair * parts * (D * D + D)
    covariance += pair * DP * DP
    axes += pair * DP * RANK
    mean = tl.zeros((DP,), tl.float32)
    for part in range(parts):
        mean += tl.load(partial + part * (D * D + D) + D * D + col, mask=in_dim, other=0.0)
    mean = mean / samples
    trace = 0.0
    for start in tl.static_range(0, DP, SLICE):
        row = start + tl.arange(0, SLICE)
        mask = (row < D)[:, None] & in_dim[None, :]
        cell = row[:, None] * D + col[None, :]
        square = tl.zeros((SLICE, DP), tl.float32)
        for part in range(parts):
            square += tl.load(partial + part * (D * D + D) + cell, mask=mask, other=0.0)
        own = row[:, None] == col[None, :]
        mean_here = tl.sum(tl.where(own, mean[None, :], 0.0), 1)
        square = square / samples - mean_here[:, None] * mean[None, :]
        tl.store(covariance + row[:, None] * DP + col[None, :], square)
        trace += tl.sum(tl.sum(tl.where(own, square, 0.0), 1), 0)
    scale = 1.0 / tl.maximum(trace, 1e-30)
    target = col[:, None] * RANK + axis[None, :]
    basis = tl.where((col[:, None] == axis[None, :]) & in_dim[:, None], 1.0, 0.0)
    if D > RANK:
        tl.debug_barrier()
        variance = tl.load(covariance + col * DP + col) * scale
        start = signs(col[:, None], axis[None, :]) / tl.maximum(variance, FLOOR)[:, None]
        tl.store(axes + target, tl.where(in_dim[:, None], start, 0.0))
        for _ in range(STEPS):
            tl.debug_barrier()
            moved = tl.zeros((DP, RANK), tl.float32)
            for piece in range(DP // SLICE):
                here = piece * SLICE + tl.arange(0, SLICE)
                c = tl.load(covariance + here[None, :] * DP + col[:, None]) * scale
                a = tl.load(axes + here[:, None] * RANK + axis[None, :])
                moved = tl.dot(c, a, moved, input_precision="tf32x3")
            gram = tl.dot(tl.trans(moved), moved, input_precision="tf32x3")
            factor = _orthonormal_factor(gram)
            basis = tl.dot(moved, tl.trans(factor), input_precision="tf32x3")
            tl.debug_barrier()
            tl.store(axes + target, basis)
    kept = tl.minimum(tl.maximum(basis * tl.sqrt(scale), -LARGEST), LARGEST)
    kept = kept.to(directions.dtype.element_ty)
    tl.store(directions + pair * DP * RANK + target, kept)
    first = tl.load(base).to(tl.int64) + text_before
    tokens_of += pair // heads * stride_b + pair % heads * stride_h + first * stride_n
    mean += tl.load(tokens_of + col, mask=in_dim, other=0.0).to(tl.float32)
    tl.store(shift + pair * RANK + axis, tl.sum(kept.to(tl.float32) * mean[:, None], 0))


@triton.jit
def project_kernel(
    tokens_of, base, directions, shift, coordinates, position,
    stride_b, stride_h, stride_n, heads, tokens, text_before,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: coordinates (pairs, T, RANK) float16 of ROWS tokens in base order.

    Writes into position (pairs, T) that the token at p stands at p. A coordinate that is no number
    becomes 0: its token goes anywhere, the others' places do not depend on it.
    """
    pair = tl.program_id(0).to(tl.int64)
    tokens_of += pair // heads * stride_b + pair % heads * stride_h
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = row < tokens
    col = tl.arange(0, DP)
    axis = tl.arange(0, RANK)
    source = tl.load(base + row, mask=inside, other=0).to(tl.int64) + text_before
    mask = inside[:, None] & (col < D)[None, :]
    x = tl.load(tokens_of + source[:, None] * stride_n + col[None, :], mask=mask, other=0.0)
    d = tl.load(directions + pair * DP * RANK + col[:, None] * RANK + axis[None, :])
    at = tl.dot(x, d, input_precision="tf32x3") - tl.load(shift + pair * RANK + axis)[None, :]
    at = tl.where(at == at, tl.minimum(tl.maximum(at, -LARGEST), LARGEST), 0.0).to(tl.float16)
    where = (pair * tokens + row)[:, None] * RANK + axis[None, :]
    tl.store(coordinates + where, at, mask=inside[:, None])
    tl.store(position + pair * tokens + row, row, mask=inside)
