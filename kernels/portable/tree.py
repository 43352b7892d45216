"""Triton kernels of the content order's tree: median splits of segments, down to the last levels.

The definition is `freqopt.kernels.content_order`. A level is one launch: a program takes one
segment, finds its direction and moves the half that lies below the median to the front. Segments
too large for a program take three launches. Who launches them is `freqopt.kernels.forward.order`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from freqopt.kernels.content_order import SQUARINGS as DEFINED_SQUARINGS
from freqopt.kernels.portable.order import RANK, signs

SQUARINGS = tl.constexpr(DEFINED_SQUARINGS)
WIDE = tl.constexpr(16)  # columns of the narrowest product
NONE = tl.constexpr(0x7FFFFFFF)  # rank of a row that is not there: below nothing


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
        two = _without(_unit(tl.sum(power * signs(axis, 0)[None, :], 1)), one)
        three = _unit(tl.sum(power * signs(axis, 1)[None, :], 1))
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
