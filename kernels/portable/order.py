"""Triton kernels of the content order: a head's directions, its tokens' coordinates, and the tree.

The definition is `freqopt.kernels.content_order`. A level of the tree is one launch: a program
takes one segment, finds its direction and moves the half that lies below the median to the front.
Who launches them is `freqopt.kernels.forward.order`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from freqopt.kernels.content_order import LEAST_VARIANCE as DEFINED_FLOOR
from freqopt.kernels.content_order import RANK as DEFINED_RANK
from freqopt.kernels.content_order import SQUARINGS as DEFINED_SQUARINGS
from freqopt.kernels.content_order import STEPS as DEFINED_STEPS

RANK = tl.constexpr(DEFINED_RANK)
STEPS = tl.constexpr(DEFINED_STEPS)
SQUARINGS = tl.constexpr(DEFINED_SQUARINGS)
WIDE = tl.constexpr(16)  # columns of the narrowest product
FLOOR = tl.constexpr(DEFINED_FLOOR)
LARGEST = tl.constexpr(60000.0)  # that a coordinate may be in float16
NONE = tl.constexpr(0x7FFFFFFF)  # rank of a row that is not there: below nothing


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
def _signs(row, column):
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
        start = _signs(col[:, None], axis[None, :]) / tl.maximum(variance, FLOOR)[:, None]
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


@triton.jit
def _unit(direction):
    """A direction whose largest component is 1, or zeros."""
    return direction / tl.maximum(tl.max(tl.abs(direction), 0), 1e-37)


@triton.jit
def _rows(coordinates, position, row, inside):
    """Coordinates (rows, RANK) of the tokens that stand at `row` of a segment."""
    token = tl.load(position + row, mask=inside, other=0)
    where = token[:, None] * RANK + tl.arange(0, RANK)[None, :]
    return tl.load(coordinates + where, mask=inside[:, None], other=0.0)


@triton.jit
def _add_rows(x, square, total, ROWS: tl.constexpr):
    """Second moments (RANK, RANK) and sums (WIDE, RANK; equal rows) with those of x added."""
    ones = tl.full((WIDE, ROWS), 1.0, tl.float16)
    return tl.dot(tl.trans(x), x, square), tl.dot(ones, x, total)


@triton.jit
def _eighth_power(square, total, count):
    """Eighth power of the covariance less its scale, and which coordinate varies most."""
    mean = tl.sum(total, 0) / (WIDE * count)
    covariance = square / count - mean[:, None] * mean[None, :]
    axis = tl.arange(0, RANK)
    diagonal = tl.sum(tl.where(axis[:, None] == axis[None, :], covariance, 0.0), 1)
    power = covariance / tl.maximum(tl.sum(diagonal, 0), 1e-30)
    for _ in tl.static_range(SQUARINGS):
        half = power.to(tl.bfloat16)
        power = tl.dot(half, tl.trans(half))
    return power, tl.argmax(diagonal, 0)


@triton.jit
def _main_direction(power, widest):
    """The power's column of the widest coordinate: near the principal direction."""
    return _unit(tl.sum(tl.where(tl.arange(0, RANK)[None, :] == widest, power, 0.0), 1))


@triton.jit
def _ranks(projection, row, inside, SIZE: tl.constexpr):
    """Projections as integers in their order, the row in their lowest bits: no two are equal."""
    bits = projection.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(inside, (bits & (-SIZE)) | row, NONE)


@triton.jit
def _projected(x, direction, row, inside, SIZE: tl.constexpr):
    """Ranks of rows x along a direction."""
    wide = tl.broadcast_to(direction.to(tl.float16)[:, None], (RANK, WIDE))
    return _ranks(tl.sum(tl.dot(x, wide), 1), row, inside, SIZE)


@triton.jit
def _bound_of(ranks, half, SIZE: tl.constexpr):
    """The largest number that at most `half` ranks are below, by bisection, two bits a step.

    Counts below three candidates are one number in the sum of a step, as sums cross lanes.
    """
    FIELD: tl.constexpr = 10 if SIZE <= 512 else 20  # bits of a count, which is SIZE at most
    below = tl.sum((ranks < 0).to(tl.int32), 0)
    bound = tl.where(below <= half, 0, -2147483648)
    for pair in range(15):
        step = 1 << (29 - 2 * pair)
        if SIZE <= 512:
            counts = (ranks < bound + step).to(tl.int32)
            counts += (ranks < bound + 2 * step).to(tl.int32) << FIELD
            counts += (ranks < bound + 3 * step).to(tl.int32) << (2 * FIELD)
        else:
            counts = (ranks < bound + step).to(tl.int64)
            counts += (ranks < bound + 2 * step).to(tl.int64) << FIELD
            counts += (ranks < bound + 3 * step).to(tl.int64) << (2 * FIELD)
        total = tl.sum(counts, 0)
        steps = ((total & ((1 << FIELD) - 1)) <= half).to(tl.int32)
        steps += (((total >> FIELD) & ((1 << FIELD) - 1)) <= half).to(tl.int32)
        steps += ((total >> (2 * FIELD)) <= half).to(tl.int32)
        bound += steps * step
    return tl.where(tl.sum((ranks < bound + 1).to(tl.int32), 0) <= half, bound + 1, bound)


@triton.jit
def halve_kernel(
    coordinates, position, ranks, chunks, heads, tokens,
    SIZE: tl.constexpr, STEP: tl.constexpr, PIECE: tl.constexpr, share=1,
):  # fmt: skip
    """One program: one segment of SIZE tokens has its lower half in front.

    Both halves keep the order that their tokens had. chunks: int32, one for `share` heads each;
    heads with smaller ones are left alone, as is a segment that has no second half. The direction
    is found on every STEP-th token. Coordinates are read PIECE tokens at a time, twice: registers
    hold no more. ranks: (pairs, T) int32, memory to work in.
    """
    pair = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * SIZE
    if (tl.load(chunks + pair % heads // share) >= SIZE) & (first + SIZE // 2 < tokens):
        position += pair * tokens + first
        coordinates += pair * tokens * RANK
        ranks += pair * tokens + first
        count = tl.minimum(tokens - first, SIZE)
        row = tl.arange(0, SIZE)
        inside = row < count
        square = tl.zeros((RANK, RANK), tl.float32)
        total = tl.zeros((WIDE, RANK), tl.float32)
        for start in range(0, SIZE, PIECE * STEP):
            sample = start + tl.arange(0, PIECE) * STEP
            x = _rows(coordinates, position, sample, sample < count)
            square, total = _add_rows(x, square, total, PIECE)
        power, widest = _eighth_power(square, total, tl.cdiv(count, STEP))
        direction = _main_direction(power, widest)
        if SIZE == PIECE:
            x = _rows(coordinates, position, row, inside)
            rank = _projected(x, direction, row, inside, SIZE)
        else:
            for start in range(0, SIZE, PIECE):
                piece = start + tl.arange(0, PIECE)
                there = piece < count
                x = _rows(coordinates, position, piece, there)
                tl.store(ranks + piece, _projected(x, direction, piece, there, SIZE), mask=there)
            tl.debug_barrier()
            rank = tl.load(ranks + row, mask=inside, other=NONE)
        token = tl.load(position + row, mask=inside, other=0)
        left = rank < _bound_of(rank, SIZE // 2, SIZE)
        before = tl.cumsum(left.to(tl.int32), 0)
        place = tl.where(left, before - 1, SIZE // 2 + row - before)
        tl.debug_barrier()
        tl.store(position + place, token, mask=inside)


@triton.jit
def segment_kernel(
    coordinates, position, along, chunks, heads, tokens, size, step,
    PIECE: tl.constexpr, PIECES: tl.constexpr, share=1,
):  # fmt: skip
    """One program: the direction of one segment of `size` tokens, of every step-th of them.

    along: (pairs, segments, RANK) float16.
    """
    pair = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(1)
    if tl.load(chunks + pair % heads // share) >= size:
        first = segment * size
        count = tl.minimum(tokens - first, size)
        square = tl.zeros((RANK, RANK), tl.float32)
        total = tl.zeros((WIDE, RANK), tl.float32)
        for piece in range(PIECES):
            row = (piece * PIECE + tl.arange(0, PIECE)) * step
            here = position + pair * tokens + first
            x = _rows(coordinates + pair * tokens * RANK, here, row, row < count)
            square, total = _add_rows(x, square, total, PIECE)
        power, widest = _eighth_power(square, total, tl.cdiv(count, step))
        at = (pair * tl.num_programs(1) + segment) * RANK + tl.arange(0, RANK)
        tl.store(along + at, _main_direction(power, widest).to(tl.float16))


@triton.jit
def rank_tokens_kernel(
    coordinates, position, along, ranks, chunks, heads, tokens, size, segments,
    ROWS: tl.constexpr, share=1,
):  # fmt: skip
    """One program: ranks (pairs, T) int32 of ROWS tokens along their segment's direction.

    Numbers in the order of the projections; those of a segment may be equal.
    """
    pair = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * ROWS
    if tl.load(chunks + pair % heads // share) >= size:
        row = first + tl.arange(0, ROWS)
        inside = row < tokens
        at = (pair * segments + first // size) * RANK + tl.arange(0, RANK)
        direction = tl.load(along + at)
        x = _rows(coordinates + pair * tokens * RANK, position + pair * tokens, row, inside)
        rank = _projected(x, direction, row * 0, inside, 1)
        tl.store(ranks + pair * tokens + row, rank, mask=inside)


@triton.jit
def _count_below(ranks, count, one, two, three, PIECE: tl.constexpr):
    """How many of `count` ranks are below each of three numbers."""
    lane = tl.arange(0, PIECE)
    below_one = tl.zeros((PIECE,), tl.int32)
    below_two = tl.zeros((PIECE,), tl.int32)
    below_three = tl.zeros((PIECE,), tl.int32)
    for start in range(0, count, PIECE):
        rank = tl.load(ranks + start + lane, mask=start + lane < count, other=NONE)
        below_one += (rank < one).to(tl.int32)
        below_two += (rank < two).to(tl.int32)
        below_three += (rank < three).to(tl.int32)
    return tl.sum(below_one, 0), tl.sum(below_two, 0), tl.sum(below_three, 0)


@triton.jit
def divide_kernel(
    position, target, ranks, chunks, heads, tokens, size, PIECE: tl.constexpr, share=1
):  # fmt: skip
    """One program: a segment's tokens go from `position` to `target`, the lower half in front.

    Finds the median rank by bisection, two bits a step, reading all ranks each time. Of those that
    are equal to it, the first ones go to the front.
    """
    pair = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * size
    count = tl.minimum(tokens - first, size)
    half = size // 2
    position += pair * tokens + first
    target += pair * tokens + first
    ranks += pair * tokens + first
    lane = tl.arange(0, PIECE)
    if (tl.load(chunks + pair % heads // share) >= size) & (half < count):
        negative, _, _ = _count_below(ranks, count, 0, 0, 0, PIECE)
        # The largest number that at most `half` ranks are below: the median rank.
        median = tl.where(negative <= half, 0, -2147483648)
        for pairs_of_bits in range(15):
            step = 1 << (29 - 2 * pairs_of_bits)
            one, two, three = _count_below(
                ranks, count, median + step, median + 2 * step, median + 3 * step, PIECE
            )
            enough = (one <= half).to(tl.int32) + (two <= half).to(tl.int32)
            median += step * (enough + (three <= half).to(tl.int32))
        odd, below, _ = _count_below(ranks, count, median + 1, median, median, PIECE)
        if odd <= half:
            median += 1
            below = odd
        left = half - below  # how many of those equal to it go to the front
        done, tied = 0, 0
        for start in range(0, count, PIECE):
            inside = start + lane < count
            rank = tl.load(ranks + start + lane, mask=inside, other=NONE)
            token = tl.load(position + start + lane, mask=inside, other=0)
            equal = ((rank == median) & inside).to(tl.int32)
            nth = tied + tl.cumsum(equal, 0)
            front = ((rank < median) | ((equal > 0) & (nth <= left))).to(tl.int32)
            before = done + tl.cumsum(front, 0)
            place = tl.where(front > 0, before - 1, half + start + lane - before)
            tl.store(target + place, token, mask=inside)
            done += tl.sum(front, 0)
            tied += tl.sum(equal, 0)
    else:
        for start in range(0, count, PIECE):
            inside = start + lane < count
            token = tl.load(position + start + lane, mask=inside, other=0)
            tl.store(target + start + lane, token, mask=inside)


@triton.jit
def _without(direction, other):
    """A direction less its part along another, scaled anew."""
    along = tl.sum(direction * other, 0) / tl.maximum(tl.sum(other * other, 0), 1e-30)
    return _unit(direction - along * other)


@triton.jit
def _column(x, column, at):
    """Column `at` of x (rows, WIDE)."""
    return tl.sum(tl.where(column == at, x, 0.0), 1)


@triton.jit
def _place_within(projection, part, row, inside, SIZE: tl.constexpr):
    """Places (SIZE,) of rows by their part, 0 to 3, and along a direction within each.

    Counts the rows before each, which needs fewer steps across lanes than a sort. Rows that are not
    there share the places behind all others.
    """
    bits = projection.to(tl.int32, bitcast=True)
    bits = (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> 2
    along = (bits & (-SIZE)) | row  # no two are equal
    key = tl.where(inside, ((part - 2) << 30) + (1 << 29) + along, NONE)
    return tl.sum((key[:, None] < key[None, :]).to(tl.int32), 0)


@triton.jit
def leaf_kernel(
    coordinates, position, base, order, chunks, heads, tokens, SIZE: tl.constexpr, share=1
):  # fmt: skip
    """One program: the last three levels of SIZE = 64 tokens, and the model's numbers of them.

    Three orthogonal directions of one covariance serve the three levels. order: (pairs, T) integers
    as wide as those of the base.
    """
    pair = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * SIZE
    row = tl.arange(0, SIZE)
    axis = tl.arange(0, RANK)
    count = tl.minimum(tokens - first, SIZE)
    inside = row < count
    position += pair * tokens + first
    token = tl.load(position + row, mask=inside, other=0)
    if tl.load(chunks + pair % heads // share) >= SIZE:
        x = _rows(coordinates + pair * tokens * RANK, position, row, inside)
        square = tl.zeros((RANK, RANK), tl.float32)
        total = tl.zeros((WIDE, RANK), tl.float32)
        square, total = _add_rows(x, square, total, SIZE)
        power, widest = _eighth_power(square, total, count)
        one = _main_direction(power, widest)
        two = _without(_unit(tl.sum(power * _signs(axis, 0)[None, :], 1)), one)
        three = _unit(tl.sum(power * _signs(axis, 1)[None, :], 1))
        three = _without(_without(three, one), two)
        column = tl.arange(0, WIDE)[None, :]
        wide = tl.where(column == 0, one[:, None], tl.where(column == 1, two[:, None], 0.0))
        wide = tl.where(column == 2, three[:, None], wide).to(tl.float16)
        at = tl.dot(x, wide)
        place = _place_within(_column(at, column, 0), row * 0, row, inside, SIZE)
        place = _place_within(_column(at, column, 1), place // (SIZE // 2), row, inside, SIZE)
        place = _place_within(_column(at, column, 2), place // (SIZE // 4), row, inside, SIZE)
        row = tl.where(inside, place, row)
    target = order + pair * tokens + first + row
    tl.store(target, tl.load(base + token, mask=inside, other=0), mask=inside)
