"""Triton kernels of the backward pass: queries' gradients by rows, keys' and values' by columns.

Weights are computed again from the softmax's sums, as in FlashAttention's backward
(arXiv 2205.14135), along the forward's own lists of blocks. Each result has one program that adds
it up in a fixed order: no atomics, so the same input gives the same bits. Text keys are further
blocks, exact for every tile. Logits are in base 2 and in the frame of centred keys, as forward.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = tl.constexpr(64)  # freqopt.config.KEY_BLOCK
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _logits(q, k, offset, bias, scale_log2, PRECISION: tl.constexpr):
    """q k^T * scale - offset + bias, in base 2: (rows of q, rows of k)."""
    return tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2 + (bias - offset[:, None])


@triton.jit
def _grown(logit, peak, mass):
    """The online softmax's peak and mass after some more logits, and what the old mass fades by."""
    new_peak = tl.maximum(peak, tl.max(logit, 1))
    fade = tl.exp2(peak - new_peak)
    return new_peak, mass * fade + tl.sum(tl.exp2(logit - new_peak[:, None]), 1), fade


@triton.jit
def query_gradient_kernel(
    query, grad, key, value, valid, low_key, low_value, bias, key_shift, delta, turned,
    exact_list, counts, log_sum, offset_out, low_share, query_grad, bias_grad,
    heads, group_size, tokens, tiles, blocks, all_blocks, scale,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BM queries of one tile of one head, twice over everything they attend to.

    The first walk finds the softmax's sum, the second the gradients of the queries, and of each low
    block's bias (one row per program). Video in token order; `all_blocks` counts text blocks too.
    """
    part = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // heads, pair % heads
    key_pair = batch * (heads // group_size) + head // group_size
    row = pair * tiles + part * BM // 128
    col = tl.arange(0, DP)
    in_dim = (col < D)[None, :]
    position = part * BM + tl.arange(0, BM)
    real = position < tokens
    at = pair * tokens + position
    cells = at[:, None] * D + col[None, :]
    q = tl.load(query + cells, mask=real[:, None] & in_dim, other=0.0)
    d_out = tl.load(grad + cells, mask=real[:, None] & in_dim, other=0.0)
    d_sum = tl.load(delta + at, mask=real, other=0.0)
    d_order = tl.load(turned + at, mask=real, other=0.0)
    scale_log2 = scale * LOG2E
    shift = tl.load(key_shift + key_pair * D + col, mask=col < D, other=0.0)
    offset = tl.sum(q.to(tl.float32) * shift[None, :], 1) * scale_log2
    none = tl.zeros((BM,), tl.float32)
    lane = tl.arange(0, BLOCK)
    low_key += key_pair * blocks * D
    low_value += key_pair * blocks * D
    bias += row * blocks
    exact_list += row * all_blocks
    valid += batch * all_blocks * BLOCK
    key += key_pair * all_blocks * BLOCK * D
    value += key_pair * all_blocks * BLOCK * D
    n_exact = tl.load(counts + row)

    peak = tl.full((BM,), -1e30, tl.float32)
    mass = tl.zeros((BM,), tl.float32)
    for start in range(0, blocks, BLOCK):
        block = start + lane
        inside = block < blocks
        k = tl.load(
            low_key + block[:, None] * D + col[None, :], mask=inside[:, None] & in_dim, other=0.0
        )
        b = tl.load(bias + block, mask=inside, other=-float("inf")) * LOG2E
        logit = _logits(q, k, none, b[None, :], scale_log2, PRECISION)
        peak, mass, fade = _grown(logit, peak, mass)
    low = mass
    for i in range(0, n_exact):
        rows = tl.load(exact_list + i).to(tl.int64) * BLOCK + lane
        k = tl.load(key + rows[:, None] * D + col[None, :], mask=in_dim, other=0.0)
        b = tl.where(tl.load(valid + rows) != 0, 0.0, -float("inf"))
        logit = _logits(q, k, offset, b[None, :], scale_log2, PRECISION)
        peak, mass, fade = _grown(logit, peak, mass)
        low = low * fade
    log_total = peak + tl.log2(mass)
    tl.store(log_sum + at, log_total, mask=real)
    tl.store(offset_out + at, offset, mask=real)
    tl.store(low_share + at, low / mass, mask=real)

    acc = tl.zeros((BM, DP), tl.float32)
    exact_sum = tl.zeros((BM,), tl.float32)
    bias_grad += (pair * tl.num_programs(0) + part) * blocks
    for start in range(0, blocks, BLOCK):
        block = start + lane
        inside = block < blocks
        where = block[:, None] * D + col[None, :]
        k = tl.load(low_key + where, mask=inside[:, None] & in_dim, other=0.0)
        v = tl.load(low_value + where, mask=inside[:, None] & in_dim, other=0.0)
        b = tl.load(bias + block, mask=inside, other=-float("inf")) * LOG2E
        weight = tl.exp2(
            _logits(q, k, none, b[None, :], scale_log2, PRECISION) - log_total[:, None]
        )
        slope = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
        d_logit = weight * (slope + (d_order - d_sum)[:, None])
        # Rows past the end have weights too, of zero queries.
        d_logit = tl.where(real[:, None], d_logit, 0.0)
        tl.store(bias_grad + block, tl.sum(d_logit, 0), mask=inside)
        acc = tl.dot(d_logit.to(k.dtype), k, acc, input_precision=PRECISION)
    for i in range(0, n_exact):
        rows = tl.load(exact_list + i).to(tl.int64) * BLOCK + lane
        where = rows[:, None] * D + col[None, :]
        k = tl.load(key + where, mask=in_dim, other=0.0)
        v = tl.load(value + where, mask=in_dim, other=0.0)
        b = tl.where(tl.load(valid + rows) != 0, 0.0, -float("inf"))
        weight = tl.exp2(
            _logits(q, k, offset, b[None, :], scale_log2, PRECISION) - log_total[:, None]
        )
        slope = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
        d_logit = weight * (slope - d_sum[:, None])
        exact_sum += tl.sum(d_logit, 1)
        acc = tl.dot(d_logit.to(k.dtype), k, acc, input_precision=PRECISION)
    acc = (acc - exact_sum[:, None] * shift[None, :]) * scale
    tl.store(query_grad + cells, acc, mask=real[:, None] & in_dim)


@triton.jit
def key_gradient_kernel(
    query, grad, key, value, valid, bias, log_sum, offset, delta, turned, tile_list, counts,
    key_grad, value_grad,
    heads, group_size, tokens, tiles, columns, scale,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, LOW: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BN columns of one key head, over the tiles of all query heads that share it.

    Columns are tokens of one exact block, over the tiles listed for it, or with LOW the means of
    BN key blocks, over all tiles. `columns`: keys (a multiple of 64) or low blocks per head.
    """
    group = tl.program_id(0)
    key_pair = tl.program_id(1).to(tl.int64)
    kv_heads = heads // group_size
    batch, key_head = key_pair // kv_heads, key_pair % kv_heads
    col = tl.arange(0, DP)
    in_dim = (col < D)[None, :]
    column = group * BN + tl.arange(0, BN)
    inside = column < columns
    cells = (key_pair * columns + column)[:, None] * D + col[None, :]
    k = tl.load(key + cells, mask=inside[:, None] & in_dim, other=0.0)
    v = tl.load(value + cells, mask=inside[:, None] & in_dim, other=0.0)
    scale_log2 = scale * LOG2E
    if not LOW:
        there = tl.load(valid + batch * columns + column) != 0
    k_acc = tl.zeros((BN, DP), tl.float32)
    v_acc = tl.zeros((BN, DP), tl.float32)
    PARTS: tl.constexpr = 128 // BM
    for member in range(0, group_size):
        pair = batch * heads + key_head * group_size + member
        n_tiles = tiles
        if not LOW:
            n_tiles = tl.load(counts + pair * (columns // BLOCK) + group * BN // BLOCK)
        listed = tile_list + (pair * (columns // BLOCK) + group * BN // BLOCK) * tiles
        for i in range(0, n_tiles * PARTS):
            tile = i // PARTS
            if not LOW:
                tile = tl.load(listed + i // PARTS)
            position = tile * 128 + i % PARTS * BM + tl.arange(0, BM)
            real = position < tokens
            at = pair * tokens + position
            rows = at[:, None] * D + col[None, :]
            q = tl.load(query + rows, mask=real[:, None] & in_dim, other=0.0)
            d_out = tl.load(grad + rows, mask=real[:, None] & in_dim, other=0.0)
            # No weight remains of a row past the end.
            log_total = tl.load(log_sum + at, mask=real, other=float("inf"))
            d_sum = tl.load(delta + at, mask=real, other=0.0)
            logit = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2
            if LOW:
                d_sum -= tl.load(turned + at, mask=real, other=0.0)
                own = bias + (pair * tiles + tile) * columns + column
                b = tl.load(own, mask=inside, other=-float("inf")) * LOG2E
                logit += b[:, None]
            else:
                logit -= tl.load(offset + at, mask=real, other=0.0)[None, :]
                logit = tl.where(there[:, None], logit, -float("inf"))
            weight = tl.exp2(logit - log_total[None, :])
            v_acc = tl.dot(weight.to(d_out.dtype), d_out, v_acc, input_precision=PRECISION)
            slope = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)
            d_logit = weight * (slope - d_sum[None, :])
            k_acc = tl.dot(d_logit.to(q.dtype), q, k_acc, input_precision=PRECISION)
    tl.store(key_grad + cells, k_acc * scale, mask=inside[:, None] & in_dim)
    tl.store(value_grad + cells, v_acc, mask=inside[:, None] & in_dim)
