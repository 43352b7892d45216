"""Triton kernels that come before attention: block summaries and block lists.

Shapes as in `freqopt.kernels.reference`; every kernel addresses (batch, head) pairs as one flat
index, in int64, and masks nothing it need not. Written once for all dtypes and head dims: what
varies is a constexpr.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = tl.constexpr(64)  # freqopt.config.KEY_BLOCK
SUB = tl.constexpr(8)  # freqopt.config.SUB_TILE, and rows that summaries add up at a time
LOW = tl.constexpr(0)  # freqopt.kernels.reference.LOW
EXACT = tl.constexpr(2)  # freqopt.kernels.reference.EXACT


@triton.jit
def _saturated(x, dtype: tl.constexpr):
    """Float32 `x` in another type; float16 saturates, as in reference.rounded."""
    if dtype == tl.float16:
        x = tl.minimum(tl.maximum(x, -65504.0), 65504.0)
    return x.to(dtype)


@triton.jit
def summarise_kernel(
    key, value, order,
    key_out, value_out, key_mean, low_value, key_var, spread, sums,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    heads, tokens, blocks, text_before,
    D: tl.constexpr, DP: tl.constexpr, GROUP: tl.constexpr, COPY: tl.constexpr = True, order_row=0,
):  # fmt: skip
    """One program: GROUP consecutive key blocks of one key head.

    order: (T,) entries from pair * order_row on.

    Writes the keys and values in token order (with COPY), each block's means, key variance (in the
    keys' type: routing needs no more) and squared value spread, and the group's sums of k, v and
    v * v (three rows).

    Meant for one warp: rows are added up in registers, 8 at a time, and only lanes exchange sums.
    Exchanging them between warps, through shared memory, took twice the time of the copies.
    """
    # Rows that one load of a warp spans in half precision: those below add up within a thread.
    ROWS: tl.constexpr = min(max(256 // DP, 1), SUB)
    # Heads run fastest: rows of different heads lie side by side in the model's memory.
    group = tl.program_id(1)
    pair = tl.program_id(0).to(tl.int64)
    batch, head = pair // heads, pair % heads
    key += batch * stride_kb + head * stride_kh
    value += batch * stride_vb + head * stride_vh
    order += pair * order_row
    row = tl.arange(0, SUB)
    col = tl.arange(0, DP)
    in_dim = col < D
    k_total = tl.zeros((DP,), tl.float32)
    v_total = tl.zeros((DP,), tl.float32)
    square_total = tl.zeros((DP,), tl.float32)
    for i in range(GROUP):
        # A block past the end reads and writes nothing.
        block = group * GROUP + i
        base = pair * blocks + block
        there = in_dim & (block < blocks)
        k_sums = tl.zeros((ROWS, DP), tl.float32)
        k_squares = tl.zeros((ROWS, DP), tl.float32)
        v_sums = tl.zeros((ROWS, DP), tl.float32)
        v_squares = tl.zeros((ROWS, DP), tl.float32)
        for part in range(BLOCK // SUB):
            position = block * BLOCK + part * SUB + row
            valid = position < tokens
            source = tl.load(order + position, mask=valid, other=0).to(tl.int64) + text_before
            mask = valid[:, None] & in_dim[None, :]
            k_raw = tl.load(key + source[:, None] * stride_kn + col[None, :], mask=mask, other=0.0)
            v_raw = tl.load(
                value + source[:, None] * stride_vn + col[None, :], mask=mask, other=0.0
            )
            if COPY:
                ordered = (base * BLOCK + part * SUB + row)[:, None] * D + col[None, :]
                tl.store(key_out + ordered, k_raw, mask=there[None, :])
                tl.store(value_out + ordered, v_raw, mask=there[None, :])
            k, v = k_raw.to(tl.float32), v_raw.to(tl.float32)
            k_sums += tl.sum(tl.reshape(k, (SUB // ROWS, ROWS, DP)), 0)
            k_squares += tl.sum(tl.reshape(k * k, (SUB // ROWS, ROWS, DP)), 0)
            v_sums += tl.sum(tl.reshape(v, (SUB // ROWS, ROWS, DP)), 0)
            v_squares += tl.sum(tl.reshape(v * v, (SUB // ROWS, ROWS, DP)), 0)

        count = tl.minimum(tl.maximum(tokens - block * BLOCK, 1), BLOCK).to(tl.float32)
        k_sum, v_sum, v_square = tl.sum(k_sums, 0), tl.sum(v_sums, 0), tl.sum(v_squares, 0)
        k_mean = k_sum / count
        v_mean = v_sum / count
        # float32 leaves room for the subtraction.
        k_var = tl.maximum(tl.sum(k_squares, 0) / count - k_mean * k_mean, 0.0)
        v_var = tl.maximum(v_square / count - v_mean * v_mean, 0.0)
        k_total += k_sum
        v_total += v_sum
        square_total += v_square
        tl.store(key_mean + base * D + col, k_mean, mask=there)
        tl.store(low_value + base * D + col, v_mean.to(low_value.dtype.element_ty), mask=there)
        tl.store(key_var + base * D + col, _saturated(k_var, key_var.dtype.element_ty), mask=there)
        tl.store(spread + base, tl.sum(v_var, 0), mask=block < blocks)
    groups = tl.num_programs(1)
    at = (pair * groups + group) * 3 * D + col
    tl.store(sums + at, k_total, mask=in_dim)
    tl.store(sums + at + D, v_total, mask=in_dim)
    tl.store(sums + at + 2 * D, square_total, mask=in_dim)


@triton.jit
def first_order_kernel(
    key, value, key_mean, first_order, tokens, blocks,
    D: tl.constexpr, DP: tl.constexpr, GROUP: tl.constexpr,
    order=None, stride_kb=0, stride_kh=0, stride_kn=0, stride_vb=0, stride_vh=0, stride_vn=0,
    heads=1, text_before=0, order_row=0,
):  # fmt: skip
    """One program: sum of v (k - block mean)^T over GROUP consecutive key blocks of one key head.

    key, value: in token order, (pairs, blocks * 64, D); with an order, as the model gave them, and
    the arguments after it are theirs.
    """
    group = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    row = tl.arange(0, BLOCK)
    col = tl.arange(0, DP)
    in_dim = col < D
    acc = tl.zeros((DP, DP), tl.float32)
    for i in range(GROUP):
        block = group * GROUP + i
        mask = (block * BLOCK + row < tokens)[:, None] & in_dim[None, :]
        base = pair * blocks + block
        if order is None:
            where = (base * BLOCK + row)[:, None] * D + col[None, :]
            k = tl.load(key + where, mask=mask, other=0.0).to(tl.float32)
            v = tl.load(value + where, mask=mask, other=0.0)
        else:
            position = block * BLOCK + row
            own_order = order + pair * order_row
            source = tl.load(own_order + position, mask=position < tokens, other=0).to(tl.int64)
            source = (source + text_before)[:, None]
            k_head = key + pair // heads * stride_kb + pair % heads * stride_kh
            v_head = value + pair // heads * stride_vb + pair % heads * stride_vh
            k = tl.load(k_head + source * stride_kn + col[None, :], mask=mask, other=0.0)
            k = k.to(tl.float32)
            v = tl.load(v_head + source * stride_vn + col[None, :], mask=mask, other=0.0)
        there = in_dim & (block < blocks)
        mean = tl.load(key_mean + base * D + col, mask=there, other=0.0)[None, :]
        k = tl.where(mask, k - mean, 0.0)
        acc = tl.dot(tl.trans(v), k.to(v.dtype), acc)
    cell = tl.arange(0, DP)[:, None] * D + col[None, :]
    inside = (tl.arange(0, DP) < D)[:, None] & in_dim[None, :]
    groups = tl.num_programs(0)
    tl.store(first_order + (pair * groups + group) * D * D + cell, acc, mask=inside)


@triton.jit
def best_block(score, blocks, BJ: tl.constexpr):
    """The block of the highest of a tile's scores, the first of several."""
    best = tl.zeros((), tl.int32)
    top = tl.full((), -1.0, tl.float32)
    for start in range(0, blocks, BJ):
        block = start + tl.arange(0, BJ)
        s = tl.load(score + block, mask=block < blocks, other=-1.0)
        highest = tl.max(s, 0)
        at = start + tl.argmax(s, 0)
        best = tl.where(highest > top, at, best)
        top = tl.maximum(top, highest)
    return best


@triton.jit
def route_kernel(
    score, threshold, mass_term, route, exact_list, counts,
    tiles, blocks, BJ: tl.constexpr, LISTS: tl.constexpr = True, tile_list=None,
    OWN: tl.constexpr = True,
):  # fmt: skip
    """One program: the route of one query tile.

    threshold: (pairs,). OWN: the queries are the keys' tokens, and a tile's own blocks are exact;
    else the block of its highest score is. Writes the route, the ascending list of exact blocks
    with its length, and marks in `mass_term` (by -1) the pairs that left the low band. Without
    LISTS it writes neither list nor length. tile_list: as in score_kernel.
    """
    tile = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    row = pair * tiles + tile
    if tile_list is not None:
        tile = tl.load(tile_list + tile)
    exact_from = tl.load(threshold + pair)
    exact_count = tl.zeros((), tl.int32)
    best = tl.zeros((), tl.int32)
    if not OWN:
        best = best_block(score + row * blocks, blocks, BJ)
    for start in range(0, blocks, BJ):
        block = start + tl.arange(0, BJ)
        inside = block < blocks
        s = tl.load(score + row * blocks + block, mask=inside, other=-1.0)
        always = (block * BLOCK // 128 == tile) if OWN else (block == best)
        # Not s >= exact_from: what is no number, score or threshold, is attended exactly.
        exact = tl.where(s < exact_from, always & inside, inside)
        if LISTS:
            place = tl.cumsum(exact.to(tl.int32), 0) - 1 + exact_count
            tl.store(exact_list + row * blocks + place, block, mask=exact)
            exact_count += tl.sum(exact.to(tl.int32), 0)
        band = tl.where(exact, EXACT, LOW)
        tl.store(route + row * blocks + block, band.to(tl.int8), mask=inside)
        minus = tl.full((BJ,), -1.0, mass_term.dtype.element_ty)
        tl.store(mass_term + row * blocks + block, minus, mask=exact)
    if LISTS:
        tl.store(counts + row, exact_count)
