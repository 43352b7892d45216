"""Triton kernels of the backward pass that walk exact blocks: softmax sums, then gradients.

Weights are computed again from the softmax's sums, as in FlashAttention's backward
(arXiv 2205.14135), along the route's lists of blocks. Each result has one program that adds it up
in a fixed order: no atomics, so the same input gives the same bits. Logits are in base 2.

Queries and output gradients are copies in token order, (pairs, R, D) with R = tiles * 128 and rows
of zeros past the last token; keys and values (key pairs, all_blocks * 64, D), text blocks behind
those of the video. Most of the time is spent here; `triton_backward_bands` holds the rest.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = tl.constexpr(64)  # freqopt.config.KEY_BLOCK
TILE = tl.constexpr(128)  # freqopt.config.QUERY_TILE
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_rows(x, rows, col, D: tl.constexpr, DP: tl.constexpr):
    """Whole rows of x (.., D) as (rows, DP); masked only where D is padded."""
    if D == DP:
        return tl.load(x + rows[:, None] * D + col[None, :])
    return tl.load(x + rows[:, None] * D + col[None, :], mask=(col < D)[None, :], other=0.0)


@triton.jit
def _grown(logit, peak, mass):
    """The online softmax's peak and mass after some more logits."""
    new_peak = tl.maximum(peak, tl.max(logit, 1))
    weight = tl.exp2(logit - new_peak[:, None])
    return new_peak, mass * tl.exp2(peak - new_peak) + tl.sum(weight, 1)


@triton.jit
def _grown_by_means(
    q, key, bias, blocks, scale_log2, peak, mass, col,
    D: tl.constexpr, DP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same over all means of the low band; bias: base 2, -inf where unused."""
    lane = tl.arange(0, BLOCK)
    for start in range(0, blocks, BLOCK):
        block = start + lane
        inside = block < blocks
        k = tl.load(
            key + block[:, None] * D + col[None, :],
            mask=inside[:, None] & (col < D)[None, :],
            other=0.0,
        )
        b = tl.load(bias + block, mask=inside, other=-float("inf"))
        logit = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        peak, mass = _grown(logit + b[None, :], peak, mass)
    return peak, mass


@triton.jit
def _full_blocks(exact_list, n_exact, blocks, tokens):
    """How many of a tile's listed blocks need no mask: a ragged one comes last in the list."""
    last = tl.load(exact_list + n_exact - 1)
    return n_exact - ((last == blocks - 1) & (tokens % BLOCK != 0)).to(tl.int32)


@triton.jit
def _masked_block(exact_list, i, n_exact, blocks):
    """The ragged block at the end of a tile's list, then the text's blocks."""
    listed = tl.load(exact_list + i, mask=i < n_exact, other=0)
    return tl.where(i < n_exact, listed, blocks + i - n_exact)


@triton.jit
def sum_kernel(
    query, offset, key, valid, low_key, low_bias, exact_list, counts, centred_sum, log_sum,
    heads, group_size, tokens, queries, tiles, blocks, all_blocks, scale,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BM queries of one tile of one head, over everything they attend to.

    BN: exact keys per step, 64 or 128. Writes the logarithm of the softmax's sum in the frame of
    centred keys and in that of the keys themselves, `offset` apart; inf past the last token, which
    makes every weight there zero.
    """
    part = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // heads, pair % heads
    key_pair = batch * (heads // group_size) + head // group_size
    row = pair * tiles + part * BM // TILE
    col = tl.arange(0, DP)
    position = part * BM + tl.arange(0, BM)
    at = pair * tiles * TILE + position
    q = _load_rows(query + pair * tiles * TILE * D, position, col, D, DP)
    shift = tl.load(offset + at)
    scale_log2 = scale * LOG2E
    peak = tl.full((BM,), -1e30, tl.float32)
    mass = tl.zeros((BM,), tl.float32)
    peak, mass = _grown_by_means(
        q, low_key + key_pair * blocks * D, low_bias + row * blocks, blocks, scale_log2,
        peak, mass, col, D, DP, PRECISION,
    )  # fmt: skip
    exact_list += row * blocks
    key += key_pair * all_blocks * BLOCK * D
    valid += batch * all_blocks * BLOCK
    n_exact = tl.load(counts + row)
    WIDE: tl.constexpr = BN // 64
    n_wide = _full_blocks(exact_list, n_exact, blocks, tokens) // WIDE * WIDE
    lane = tl.arange(0, BN)
    for i in range(0, n_wide, WIDE):
        if WIDE == 1:
            rows = tl.load(exact_list + i) * BLOCK + lane
        else:
            rows = tl.load(exact_list + i + lane // BLOCK) * BLOCK + lane % BLOCK
        k = _load_rows(key, rows, col, D, DP)
        logit = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        new_peak = tl.maximum(peak, tl.max(logit, 1) * scale_log2 - shift)
        weight = tl.exp2(logit * scale_log2 - (new_peak + shift)[:, None])
        mass = mass * tl.exp2(peak - new_peak) + tl.sum(weight, 1)
        peak = new_peak
    for i in range(n_wide, n_exact + all_blocks - blocks):
        rows = _masked_block(exact_list, i, n_exact, blocks) * BLOCK + tl.arange(0, BLOCK)
        k = _load_rows(key, rows, col, D, DP)
        b = tl.where(tl.load(valid + rows) != 0, 0.0, -float("inf"))
        logit = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        peak, mass = _grown(logit + b[None, :] - shift[:, None], peak, mass)
    total = tl.where(position < queries, peak + tl.log2(mass), float("inf"))
    tl.store(centred_sum + at, total)
    tl.store(log_sum + at, total + shift)


@triton.jit
def query_gradient_kernel(
    query, grad, key, value, valid, log_sum, delta, exact_list, counts, banded, pooled_grad, order,
    query_grad,
    stride_gb, stride_gh, stride_gn,
    heads, group_size, tokens, queries, tiles, blocks, all_blocks, text_before, scale,
    order_row, order_share,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of BM queries of one tile of one head, in the model's order.

    Adds the exact blocks' share to `banded` (pairs, R, D), what came through the low band, and to
    that of the tile's mean squared query, `pooled_grad` (pairs, tiles, D).
    """
    part = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // heads, pair % heads
    key_pair = batch * (heads // group_size) + head // group_size
    tile = part * BM // TILE
    row = pair * tiles + tile
    col = tl.arange(0, DP)
    position = part * BM + tl.arange(0, BM)
    first_row = pair * tiles * TILE
    q = _load_rows(query + first_row * D, position, col, D, DP)
    d_out = _load_rows(grad + first_row * D, position, col, D, DP)
    log_total = tl.load(log_sum + first_row + position)
    d_sum = tl.load(delta + first_row + position)
    scale_log2 = scale * LOG2E
    lane = tl.arange(0, BLOCK)
    exact_list += row * blocks
    key += key_pair * all_blocks * BLOCK * D
    value += key_pair * all_blocks * BLOCK * D
    valid += batch * all_blocks * BLOCK
    n_exact = tl.load(counts + row)
    n_full = _full_blocks(exact_list, n_exact, blocks, tokens)
    acc = tl.zeros((BM, DP), tl.float32)
    for i in range(0, n_full):
        rows = tl.load(exact_list + i) * BLOCK + lane
        k = _load_rows(key, rows, col, D, DP)
        v = _load_rows(value, rows, col, D, DP)
        logit = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        slope = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
        weight = tl.exp2(logit * scale_log2 - log_total[:, None])
        d_logit = weight * (slope - d_sum[:, None])
        acc = tl.dot(d_logit.to(k.dtype), k, acc, input_precision=PRECISION)
    for i in range(n_full, n_exact + all_blocks - blocks):
        rows = _masked_block(exact_list, i, n_exact, blocks) * BLOCK + lane
        k = _load_rows(key, rows, col, D, DP)
        v = _load_rows(value, rows, col, D, DP)
        logit = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        slope = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
        weight = tl.exp2(logit * scale_log2 - log_total[:, None])
        weight = tl.where((tl.load(valid + rows) != 0)[None, :], weight, 0.0)
        d_logit = weight * (slope - d_sum[:, None])
        acc = tl.dot(d_logit.to(k.dtype), k, acc, input_precision=PRECISION)
    real = position < queries
    inside = real[:, None] & (col < D)[None, :]
    order += pair // order_share * order_row
    source = tl.load(order + position, mask=real, other=0).to(tl.int64) + text_before
    pooled = tl.load(pooled_grad + row * D + col, mask=col < D, other=0.0)
    count = tl.minimum(queries - tile * TILE, TILE).to(tl.float32)
    before = _load_rows(banded + first_row * D, position, col, D, DP)
    q = _load_rows(query + first_row * D, position, col, D, DP)
    total = acc * scale + before + q.to(tl.float32) * (pooled * (2.0 / count))[None, :]
    query_grad += batch * stride_gb + head * stride_gh
    out = query_grad + source[:, None] * stride_gn + col[None, :]
    tl.store(out, total.to(query_grad.dtype.element_ty), mask=inside)


@triton.jit
def key_gradient_kernel(
    query, grad, key, value, log_sum, delta, tile_list, counts, key_grad, value_grad,
    heads, group_size, tiles, all_blocks, scale,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BN keys of one block, over the tiles that list it, of all heads that share it.

    BM: queries per step, up to 128; BN: up to 64. Writes float32 sums in token order. Rows of keys
    that are not there, or masked, hold anything.
    """
    part = tl.program_id(0)
    block = part * BN // BLOCK
    key_pair = tl.program_id(1).to(tl.int64)
    kv_heads = heads // group_size
    col = tl.arange(0, DP)
    rows = part * BN + tl.arange(0, BN)
    first_key = key_pair * all_blocks * BLOCK * D
    k = _load_rows(key + first_key, rows, col, D, DP)
    v = _load_rows(value + first_key, rows, col, D, DP)
    scale_log2 = scale * LOG2E
    k_acc = tl.zeros((BN, DP), tl.float32)
    v_acc = tl.zeros((BN, DP), tl.float32)
    PARTS: tl.constexpr = 128 // BM
    lane = tl.arange(0, BM)
    first_pair = key_pair // kv_heads * heads + key_pair % kv_heads * group_size
    for pair in range(first_pair, first_pair + group_size):
        first_row = pair * tiles * TILE
        listed = tile_list + (pair * all_blocks + block) * tiles
        n_tiles = tl.load(counts + pair * all_blocks + block)
        for i in range(0, n_tiles * PARTS):
            at = tl.load(listed + i // PARTS) * TILE + i % PARTS * BM + lane
            q = _load_rows(query + first_row * D, at, col, D, DP)
            d_out = _load_rows(grad + first_row * D, at, col, D, DP)
            log_total = tl.load(log_sum + first_row + at)
            d_sum = tl.load(delta + first_row + at)
            logit = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            slope = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)
            weight = tl.exp2(logit * scale_log2 - log_total[None, :])
            v_acc = tl.dot(weight.to(q.dtype), d_out, v_acc, input_precision=PRECISION)
            d_logit = weight * (slope - d_sum[None, :])
            k_acc = tl.dot(d_logit.to(q.dtype), q, k_acc, input_precision=PRECISION)
    cells = rows[:, None] * D + col[None, :]
    tl.store(key_grad + first_key + cells, k_acc * scale, mask=(col < D)[None, :])
    tl.store(value_grad + first_key + cells, v_acc, mask=(col < D)[None, :])
