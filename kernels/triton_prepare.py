"""Triton kernels that come before attention: block summaries, routing scores, block lists.

Shapes as in `freqopt.kernels.reference`; every kernel addresses (batch, head) pairs as one flat
index, in int64, and masks nothing it need not. Written once for all dtypes and head dims: what
varies is a constexpr.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = tl.constexpr(64)  # freqopt.config.KEY_BLOCK
SUB = tl.constexpr(8)  # freqopt.config.SUB_BLOCK and SUB_TILE


@triton.jit
def summarise_kernel(
    key, value, order,
    key_out, value_out, key_mean, value_mean, key_var, spread, first_order,
    fine_key, fine_value, fine_var, fine_first_order,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    heads, tokens, blocks, text_before,
    D: tl.constexpr, DP: tl.constexpr, GROUP: tl.constexpr, MID: tl.constexpr,
):  # fmt: skip
    """One program: GROUP consecutive key blocks of one key head.

    Writes the keys and values in token order, each block's means, key variance and squared value
    spread, and the group's sum of v (k - block mean)^T; with MID the same for sub-blocks of 8.
    """
    group = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // heads, pair % heads
    key += batch * stride_kb + head * stride_kh
    value += batch * stride_vb + head * stride_vh
    row = tl.arange(0, BLOCK)
    col = tl.arange(0, DP)
    in_dim = col < D
    acc = tl.zeros((DP, DP), tl.float32)
    fine_acc = tl.zeros((DP, DP), tl.float32)
    for i in range(GROUP):
        block = group * GROUP + i
        if block < blocks:
            position = block * BLOCK + row
            valid = position < tokens
            source = tl.load(order + position, mask=valid, other=0).to(tl.int64) + text_before
            mask = valid[:, None] & in_dim[None, :]
            k_raw = tl.load(key + source[:, None] * stride_kn + col[None, :], mask=mask, other=0.0)
            v_raw = tl.load(
                value + source[:, None] * stride_vn + col[None, :], mask=mask, other=0.0
            )
            base = pair * blocks + block
            ordered = (base * BLOCK + row)[:, None] * D + col[None, :]
            tl.store(key_out + ordered, k_raw, mask=in_dim[None, :])
            tl.store(value_out + ordered, v_raw, mask=in_dim[None, :])

            k, v = k_raw.to(tl.float32), v_raw.to(tl.float32)
            count = tl.minimum(tokens - block * BLOCK, BLOCK).to(tl.float32)
            k_mean = tl.sum(k, 0) / count
            v_mean = tl.sum(v, 0) / count
            k_off = tl.where(mask, k - k_mean[None, :], 0.0)
            v_off = tl.where(mask, v - v_mean[None, :], 0.0)
            tl.store(key_mean + base * D + col, k_mean, mask=in_dim)
            tl.store(value_mean + base * D + col, v_mean, mask=in_dim)
            tl.store(key_var + base * D + col, tl.sum(k_off * k_off, 0) / count, mask=in_dim)
            tl.store(spread + base, tl.sum(tl.sum(v_off * v_off, 1), 0) / count)
            acc += tl.dot(tl.trans(v_raw), k_off.to(v_raw.dtype))
            if MID:
                fine = tl.arange(0, BLOCK // SUB)
                fine_count = tl.minimum(tl.maximum(tokens - block * BLOCK - fine * SUB, 0), SUB).to(
                    tl.float32
                )
                divisor = tl.maximum(fine_count, 1.0)[:, None]
                k_sub = tl.reshape(k, (BLOCK // SUB, SUB, DP))
                v_sub = tl.reshape(v, (BLOCK // SUB, SUB, DP))
                k_fine = tl.sum(k_sub, 1) / divisor
                v_fine = tl.sum(v_sub, 1) / divisor
                spread_out = tl.broadcast_to(k_fine[:, None, :], (BLOCK // SUB, SUB, DP))
                k_fine_off = tl.where(mask, k - tl.reshape(spread_out, (BLOCK, DP)), 0.0)
                square = tl.reshape(k_fine_off * k_fine_off, (BLOCK // SUB, SUB, DP))
                target = (base * (BLOCK // SUB) + fine)[:, None] * D + col[None, :]
                tl.store(
                    fine_key + target, k_fine.to(fine_key.dtype.element_ty), mask=in_dim[None, :]
                )
                tl.store(
                    fine_value + target,
                    v_fine.to(fine_value.dtype.element_ty),
                    mask=in_dim[None, :],
                )
                tl.store(
                    fine_var + target,
                    (tl.sum(square, 1) / divisor).to(fine_var.dtype.element_ty),
                    mask=in_dim[None, :],
                )
                fine_acc += tl.dot(tl.trans(v_raw), k_fine_off.to(v_raw.dtype))
    cell = tl.arange(0, DP)[:, None] * D + col[None, :]
    inside = (tl.arange(0, DP) < D)[:, None] & in_dim[None, :]
    groups = tl.num_programs(0)
    tl.store(first_order + (pair * groups + group) * D * D + cell, acc, mask=inside)
    if MID:
        tl.store(fine_first_order + (pair * groups + group) * D * D + cell, fine_acc, mask=inside)


@triton.jit
def _pair_terms(
    mean, square, key_mean, key_var, block, blocks, tokens, col, scale,
    D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Pooled logit and dispersion of sub-tiles (rows) against blocks (columns), and log counts."""
    mask = (block < blocks)[:, None] & (col < D)[None, :]
    offset = block[:, None] * D + col[None, :]
    k = tl.load(key_mean + offset, mask=mask, other=0.0)
    var = tl.load(key_var + offset, mask=mask, other=0.0)
    capacity = tl.log(tl.minimum(tl.maximum(tokens - block * BLOCK, 1), BLOCK).to(tl.float32))
    logit = tl.dot(mean, tl.trans(k), input_precision=PRECISION) * scale + capacity[None, :]
    dispersion = tl.dot(square, tl.trans(var), input_precision=PRECISION) * (scale * scale)
    logit += tl.minimum(0.5 * dispersion, capacity[None, :])
    logit = tl.where((block < blocks)[None, :], logit, -float("inf"))
    return logit, dispersion, capacity


@triton.jit
def score_kernel(
    query, order, key_mean, key_var, spread, score, mass_term,
    stride_qb, stride_qh, stride_qn,
    heads, group_size, tokens, tiles, blocks, text_before, scale,
    D: tl.constexpr, DP: tl.constexpr, TILES: tl.constexpr, BJ: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: TILES query tiles of one head against every key block, in two passes.

    The first pass finds the softmax normaliser of each sub-tile, the second writes the routing
    score (float32) and the second-order mass term (float16) of each (tile, block) pair.
    """
    SUBS: tl.constexpr = 128 // SUB
    ROWS: tl.constexpr = TILES * SUBS
    first = tl.program_id(0) * TILES
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // heads, pair % heads
    query += batch * stride_qb + head * stride_qh
    key_pair = batch * (heads // group_size) + head // group_size
    key_mean += key_pair * blocks * D
    key_var += key_pair * blocks * D
    spread += key_pair * blocks

    sub = first * SUBS + tl.arange(0, ROWS)
    col = tl.arange(0, DP)
    count = tl.minimum(tl.maximum(tokens - sub * SUB, 0), SUB).to(tl.float32)
    mean = tl.zeros((ROWS, DP), tl.float32)
    square = tl.zeros((ROWS, DP), tl.float32)
    for r in range(SUB):
        position = sub * SUB + r
        valid = position < tokens
        source = tl.load(order + position, mask=valid, other=0).to(tl.int64) + text_before
        q = tl.load(
            query + source[:, None] * stride_qn + col[None, :],
            mask=valid[:, None] & (col < D)[None, :],
            other=0.0,
        ).to(tl.float32)
        mean += q
        square += q * q
    divisor = tl.maximum(count, 1.0)[:, None]
    mean = mean / divisor
    square = square / divisor

    peak = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, blocks, BJ):
        block = start + tl.arange(0, BJ)
        logit, dispersion, capacity = _pair_terms(
            mean, square, key_mean, key_var, block, blocks, tokens, col, scale, D, PRECISION
        )
        new_peak = tl.maximum(peak, tl.max(logit, 1))
        total = total * tl.exp(peak - new_peak) + tl.sum(tl.exp(logit - new_peak[:, None]), 1)
        peak = new_peak
    normaliser = peak + tl.log(total)

    present = (count > 0).to(tl.float32)
    present_per_tile = tl.sum(tl.reshape(present, (TILES, SUBS)), 1)
    count_per_tile = tl.sum(tl.reshape(count, (TILES, SUBS)), 1)
    tile = first + tl.arange(0, TILES)
    for start in range(0, blocks, BJ):
        block = start + tl.arange(0, BJ)
        logit, dispersion, capacity = _pair_terms(
            mean, square, key_mean, key_var, block, blocks, tokens, col, scale, D, PRECISION
        )
        mass = tl.exp(logit - normaliser[:, None])
        error = mass * mass * dispersion * present[:, None]
        error = tl.sum(tl.reshape(error, (TILES, SUBS, BJ)), 1)
        error = error / tl.maximum(present_per_tile, 1.0)[:, None]
        inside = block < blocks
        value_spread = tl.load(spread + block, mask=inside, other=0.0)
        pooled = tl.sum(tl.reshape(dispersion * count[:, None], (TILES, SUBS, BJ)), 1)
        pooled = pooled / tl.maximum(count_per_tile, 1.0)[:, None]
        term = tl.minimum(0.5 * pooled, capacity[None, :])
        where = (pair * tiles + tile)[:, None] * blocks + block[None, :]
        mask = (tile < tiles)[:, None] & inside[None, :]
        tl.store(score + where, tl.sqrt(error) * value_spread[None, :] * blocks, mask=mask)
        tl.store(mass_term + where, term.to(mass_term.dtype.element_ty), mask=mask)


@triton.jit
def route_kernel(
    score, threshold, mass_term, route, exact_list, mid_list, counts,
    tiles, blocks, BJ: tl.constexpr, MID: tl.constexpr,
):  # fmt: skip
    """One program: the route of one query tile.

    threshold: (pairs, 2), exact and mid. Writes the route, the ascending lists of exact and mid
    blocks with their lengths, and marks in `mass_term` (by -1) the pairs that left the low band.
    """
    tile = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    row = pair * tiles + tile
    exact_from = tl.load(threshold + pair * 2)
    mid_from = tl.load(threshold + pair * 2 + 1)
    exact_count = tl.zeros((), tl.int32)
    mid_count = tl.zeros((), tl.int32)
    for start in range(0, blocks, BJ):
        block = start + tl.arange(0, BJ)
        inside = block < blocks
        s = tl.load(score + row * blocks + block, mask=inside, other=-1.0)
        exact = ((s >= exact_from) | (block * BLOCK // 128 == tile)) & inside
        place = tl.cumsum(exact.to(tl.int32), 0) - 1 + exact_count
        tl.store(exact_list + row * blocks + place, block, mask=exact)
        exact_count += tl.sum(exact.to(tl.int32), 0)
        band = tl.where(exact, 2, 0)
        if MID:
            mid = (s >= mid_from) & inside & (band == 0)
            place = tl.cumsum(mid.to(tl.int32), 0) - 1 + mid_count
            tl.store(mid_list + row * blocks + place, block, mask=mid)
            mid_count += tl.sum(mid.to(tl.int32), 0)
            band = tl.where(mid, 1, band)
        tl.store(route + row * blocks + block, band.to(tl.int8), mask=inside)
        left = inside & (band > 0)
        minus = tl.full((BJ,), -1.0, mass_term.dtype.element_ty)
        tl.store(mass_term + row * blocks + block, minus, mask=left)
    tl.store(counts + row * 2, exact_count)
    tl.store(counts + row * 2 + 1, mid_count)
