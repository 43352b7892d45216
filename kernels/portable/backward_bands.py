"""Triton kernels of the backward pass around the exact blocks: rows, lists, and the low band.

The band's means are few, so its kernels walk all of them and leave the mass terms' own gradients to
small matrix products on the host. Shapes and frames are those of `triton_backward`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from freqopt.kernels.portable.attend import EXACT, _turned
from freqopt.kernels.portable.backward import BLOCK, LOG2E, TILE, _load_rows


@triton.jit
def list_kernel(
    route, listed, counts, rows, all_rows, columns, stride_row, stride_column,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One program: BR rows of one head's route (or, by its strides, of its transpose).

    Writes for each row the ascending columns that are exact, and how many; rows from `rows` to
    `all_rows`, the text's blocks, list all columns.
    """
    pair = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    route += pair * rows * columns
    listed += pair * all_rows * columns
    count = tl.zeros((BR,), tl.int32)
    for start in range(0, columns, BC):
        column = start + tl.arange(0, BC)
        inside = (row < all_rows)[:, None] & (column < columns)[None, :]
        band = tl.load(
            route + row[:, None] * stride_row + column[None, :] * stride_column,
            mask=inside & (row < rows)[:, None],
            other=EXACT,
        )
        chosen = inside & (band == EXACT)
        place = tl.cumsum(chosen.to(tl.int32), 1) - 1 + count[:, None]
        tl.store(
            listed + row[:, None] * columns + place,
            tl.broadcast_to(column[None, :], (BR, BC)),
            mask=chosen,
        )
        count += tl.sum(chosen.to(tl.int32), 1)
    tl.store(counts + pair * all_rows + row, count, mask=row < all_rows)


@triton.jit
def rows_kernel(
    query, grad, out, order, key_shift, matrix,
    query_rows, grad_rows, offset, delta, low_delta, squares,
    stride_qb, stride_qh, stride_qn, stride_gb, stride_gh, stride_gn, stride_ob, stride_oh,
    stride_on,
    heads, group_size, queries, tiles, text_before, scale, order_row, order_share,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr,
    log_sum_grad=None, log_sum_row=0,
):  # fmt: skip
    """One program: BM queries of one head and their output gradients, copied in token order.

    order, text_before: the queries', (T,) entries from pair // order_share * order_row on.
    log_sum_grad: (pairs, log_sum_row) float32 gradients of the softmax sums' logarithms, if any:
    what an output's dot product takes from every logit's gradient, they give.

    Writes the dot product of each output with its gradient, `delta`, and the same less what the
    first-order term adds to each block of the low band; the mean key's logit; and the sum of the
    squared queries, (pairs, tiles * 128 / BM, D).
    """
    part = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // heads, pair % heads
    key_pair = batch * (heads // group_size) + head // group_size
    col = tl.arange(0, DP)
    in_dim = col < D
    position = part * BM + tl.arange(0, BM)
    real = position < queries
    mask = real[:, None] & in_dim[None, :]
    order += pair // order_share * order_row
    source = (tl.load(order + position, mask=real, other=0).to(tl.int64) + text_before)[:, None]
    q_rows = query + batch * stride_qb + head * stride_qh + source * stride_qn
    q = tl.load(q_rows + col[None, :], mask=mask, other=0.0)
    d_rows = grad + batch * stride_gb + head * stride_gh + source * stride_gn
    d_out = tl.load(d_rows + col[None, :], mask=mask, other=0.0)
    o_rows = out + batch * stride_ob + head * stride_oh + source * stride_on
    o = tl.load(o_rows + col[None, :], mask=mask, other=0.0)
    at = pair * tiles * TILE + position
    cells = at[:, None] * D + col[None, :]
    tl.store(query_rows + cells, q, mask=in_dim[None, :])
    tl.store(grad_rows + cells, d_out, mask=in_dim[None, :])
    q32, d32 = q.to(tl.float32), d_out.to(tl.float32)
    shift = tl.load(key_shift + key_pair * D + col, mask=in_dim, other=0.0)
    tl.store(offset + at, tl.sum(q32 * shift[None, :], 1) * (scale * LOG2E))
    square = tl.sum(q32 * q32, 0)
    tl.store(squares + (pair * tl.num_programs(0) + part) * D + col, square, mask=in_dim)
    d_sum = tl.sum(d32 * o.to(tl.float32), 1)
    if log_sum_grad is not None:
        here = log_sum_grad + pair * log_sum_row + tl.sum(source, 1)
        d_sum -= tl.load(here, mask=real, other=0.0)
    tl.store(delta + at, d_sum)
    turned = _turned(q_rows, matrix + pair * D * D, real[:, None], D, DP, BM, PRECISION)
    tl.store(low_delta + at, d_sum - scale * tl.sum(turned * d32, 1))


@triton.jit
def _turned_back(
    rows, matrix, position, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """x M of rows x (.., D), (BM, DP), in slices of x's columns to bound shared memory."""
    SLICE: tl.constexpr = 64 if DP > 64 else DP
    col = tl.arange(0, DP)
    acc = tl.zeros((BM, DP), tl.float32)
    for start in tl.static_range(0, DP, SLICE):
        part = start + tl.arange(0, SLICE)
        x = tl.load(
            rows + position[:, None] * D + part[None, :], mask=(part < D)[None, :], other=0.0
        )
        inside = (part < D)[:, None] & (col < D)[None, :]
        h = tl.load(matrix + part[:, None] * D + col[None, :], mask=inside, other=0.0)
        acc = tl.dot(x, h, acc, input_precision=PRECISION)
    return acc


@triton.jit
def band_gradient_kernel(
    query, grad, log_sum, delta, key, value, bias, key_shift, matrix, banded, bias_grad, share_out,
    heads, group_size, tiles, blocks, scale,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: what reaches BM queries of one tile of one head through the low band.

    log_sum: in the frame of centred keys. Writes the queries' gradient `banded` (pairs, R, D), the
    gradient of each block's logit summed over the queries (pairs, tiles * 128 / BM, blocks), and
    the band's share of each query's mass.
    """
    part = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // heads, pair % heads
    key_pair = batch * (heads // group_size) + head // group_size
    row = pair * tiles + part * BM // TILE
    col = tl.arange(0, DP)
    in_dim = col < D
    position = part * BM + tl.arange(0, BM)
    at = pair * tiles * TILE + position
    query += pair * tiles * TILE * D
    grad += pair * tiles * TILE * D
    q = _load_rows(query, position, col, D, DP)
    d_out = _load_rows(grad, position, col, D, DP)
    log_total = tl.load(log_sum + at)
    d_sum = tl.load(delta + at)
    scale_log2 = scale * LOG2E
    lane = tl.arange(0, BLOCK)
    key += key_pair * blocks * D
    value += key_pair * blocks * D
    bias += row * blocks
    bias_grad += (pair * tl.num_programs(0) + part) * blocks
    acc = tl.zeros((BM, DP), tl.float32)
    share = tl.zeros((BM,), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for start in range(0, blocks, BLOCK):
        block = start + lane
        inside = block < blocks
        where = block[:, None] * D + col[None, :]
        k = tl.load(key + where, mask=inside[:, None] & in_dim[None, :], other=0.0)
        v = tl.load(value + where, mask=inside[:, None] & in_dim[None, :], other=0.0)
        b = tl.load(bias + block, mask=inside, other=-float("inf"))
        logit = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        slope = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
        weight = tl.exp2(logit * scale_log2 + b[None, :] - log_total[:, None])
        d_logit = weight * (slope - d_sum[:, None])
        tl.store(bias_grad + block, tl.sum(d_logit, 0), mask=inside)
        share += tl.sum(weight, 1)
        total += tl.sum(d_logit, 1)
        acc = tl.dot(d_logit.to(k.dtype), k, acc, input_precision=PRECISION)
    tl.store(share_out + at, share)
    turned = _turned_back(grad, matrix + pair * D * D, position, D, DP, BM, PRECISION)
    acc += share[:, None] * turned
    cells = at[:, None] * D + col[None, :]
    # The gradients of a row's logits add up to zero: what the mean key takes from the exact keys'
    # products it gives to the low band's.
    shift = tl.load(key_shift + key_pair * D + col, mask=in_dim, other=0.0)
    acc = (acc + total[:, None] * shift[None, :]) * scale
    tl.store(banded + cells, acc, mask=in_dim[None, :])


@triton.jit
def h_bar_gradient_kernel(
    query, grad, share, h_bar_grad, tiles,
    D: tl.constexpr, DP: tl.constexpr, BV: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: sum of share * grad query^T over GROUP tiles of one head, BV value channels."""
    group = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    value_col = tl.program_id(2) * BV + tl.arange(0, BV)
    col = tl.arange(0, DP)
    first = pair * tiles * TILE
    acc = tl.zeros((BV, DP), tl.float32)
    for row in range(group * GROUP * 128, tl.minimum((group + 1) * GROUP, tiles) * 128, 64):
        at = row + tl.arange(0, 64)
        q = _load_rows(query + first * D, at, col, D, DP)
        d_out = tl.load(
            grad + first * D + at[:, None] * D + value_col[None, :],
            mask=(value_col < D)[None, :],
            other=0.0,
        )
        weighted = d_out.to(tl.float32) * tl.load(share + first + at)[:, None]
        acc = tl.dot(tl.trans(weighted.to(q.dtype)), q, acc, input_precision=PRECISION)
    cells = value_col[:, None] * D + col[None, :]
    h_bar_grad += (pair * tl.num_programs(0) + group) * D * D
    tl.store(h_bar_grad + cells, acc, mask=(value_col < D)[:, None] & (col < D)[None, :])


@triton.jit
def mean_gradient_kernel(
    query, grad, log_sum, delta, key, value, bias, key_grad, value_grad,
    heads, group_size, tiles, blocks, span, scale,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: means of BN blocks of one key head, over `span` tiles of all heads sharing it.

    log_sum: in the frame of centred keys. Writes float32 sums (parts, key pairs, blocks, D).
    """
    key_pair = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    kv_heads = heads // group_size
    col = tl.arange(0, DP)
    in_dim = col < D
    block = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = block < blocks
    cells = block[:, None] * D + col[None, :]
    mask = inside[:, None] & in_dim[None, :]
    k = tl.load(key + key_pair * blocks * D + cells, mask=mask, other=0.0)
    v = tl.load(value + key_pair * blocks * D + cells, mask=mask, other=0.0)
    scale_log2 = scale * LOG2E
    k_acc = tl.zeros((BN, DP), tl.float32)
    v_acc = tl.zeros((BN, DP), tl.float32)
    lane = tl.arange(0, BM)
    first_pair = key_pair // kv_heads * heads + key_pair % kv_heads * group_size
    for pair in range(first_pair, first_pair + group_size):
        first_row = pair * tiles * TILE
        end = tl.minimum((part + 1) * span, tiles) * TILE
        for start in range(part * span * 128, end, BM):
            at = start + lane
            q = _load_rows(query + first_row * D, at, col, D, DP)
            d_out = _load_rows(grad + first_row * D, at, col, D, DP)
            log_total = tl.load(log_sum + first_row + at)
            d_sum = tl.load(delta + first_row + at)
            own = bias + (pair * tiles + start // 128) * blocks + block
            b = tl.load(own, mask=inside, other=-float("inf"))
            logit = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            slope = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)
            weight = tl.exp2(logit * scale_log2 + b[:, None] - log_total[None, :])
            v_acc = tl.dot(weight.to(q.dtype), d_out, v_acc, input_precision=PRECISION)
            d_logit = weight * (slope - d_sum[None, :])
            k_acc = tl.dot(d_logit.to(q.dtype), q, k_acc, input_precision=PRECISION)
    to = (part * tl.num_programs(1) + key_pair) * blocks * D + cells
    tl.store(key_grad + to, k_acc * scale, mask=mask)
    tl.store(value_grad + to, v_acc, mask=mask)


@triton.jit
def _centred(x, valid, size):
    """Rows of x (64, C), zero where there is no token, less their mean; size: true rows."""
    return tl.where(valid[:, None], x - (tl.sum(x, 0) / size)[None, :], 0.0)


@triton.jit
def _through_means(
    own, other, rows, block, tokens, mean_grad, var_grad, h_bar_grad, h_bar_factor,
    D: tl.constexpr, DP: tl.constexpr, SLICE: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What the low band gives to one block's keys, or to its values.

    own: whose gradient it is, other: the values, or the keys. h_bar_grad: H-bar's (D, D) in the
    keys' type, to be multiplied by the number at h_bar_factor.
    """
    col = tl.arange(0, DP)
    in_dim = col < D
    size = tl.minimum(tokens - block * BLOCK, BLOCK).to(tl.float32)
    valid = rows < tokens
    acc = tl.zeros((BLOCK, DP), tl.float32)
    for start in range(0, DP, SLICE):
        part = start + tl.arange(0, SLICE)
        x = tl.load(
            other + rows[:, None] * D + part[None, :],
            mask=valid[:, None] & (part < D)[None, :],
            other=0.0,
        )
        inside = (part < D)[:, None] & in_dim[None, :]
        if KEYS:
            cells = part[:, None] * D + col[None, :]
        else:
            cells = col[None, :] * D + part[:, None]
        h = tl.load(h_bar_grad + cells, mask=inside, other=0.0)
        x = _centred(x.to(tl.float32), valid, size).to(h.dtype)
        acc = tl.dot(x, h, acc, input_precision=PRECISION)
    shared = tl.load(mean_grad + block * D + col, mask=in_dim, other=0.0)[None, :]
    if KEYS:
        mask = valid[:, None] & in_dim[None, :]
        k = tl.load(own + rows[:, None] * D + col[None, :], mask=mask, other=0.0).to(tl.float32)
        spread = tl.load(var_grad + block * D + col, mask=in_dim, other=0.0)
        shared = shared + 2.0 * spread[None, :] * _centred(k, valid, size)
    return acc * tl.load(h_bar_factor) + shared / size


@triton.jit
def finish_kernel(
    own, other, valid, exact_grad, order, out, mean_grad, var_grad, h_bar_grad, h_bar_factor,
    stride_ob, stride_oh, stride_on,
    kv_heads, tokens, blocks, all_blocks, text, text_before, order_row,
    D: tl.constexpr, DP: tl.constexpr, SLICE: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of one block's keys, or of its values, in the model's order.

    Adds to that of the exact pairs what came through the block's means, variance and first-order
    products; arguments as of `_through_means`.
    """
    block = tl.program_id(0)
    key_pair = tl.program_id(1).to(tl.int64)
    batch, head = key_pair // kv_heads, key_pair % kv_heads
    lane = tl.arange(0, BLOCK)
    col = tl.arange(0, DP)
    rows = block * BLOCK + lane
    first = key_pair * all_blocks * BLOCK
    there = tl.load(valid + batch * all_blocks * BLOCK + rows) != 0
    cells = (first + rows)[:, None] * D + col[None, :]
    # What stands in rows without a key need not be a number.
    mask = there[:, None] & (col < D)[None, :]
    total = tl.load(exact_grad + cells, mask=mask, other=0.0)
    own += first * D
    other += first * D
    if block < blocks:
        means = key_pair * blocks * D
        total += _through_means(
            own, other, rows, block, tokens, mean_grad + means, var_grad + means,
            h_bar_grad + key_pair * D * D, h_bar_factor + key_pair, D, DP, SLICE, KEYS, PRECISION,
        )  # fmt: skip
    x = (block - blocks) * BLOCK + lane
    is_video = block < blocks
    inside = tl.where(is_video, rows < tokens, x < text)
    text_row = x + tl.where(x >= text_before, tokens, 0)
    order += key_pair * order_row
    video_row = tl.load(order + rows, mask=is_video & inside, other=0) + text_before
    source = tl.where(is_video, video_row, text_row.to(tl.int64))
    mask = inside[:, None] & (col < D)[None, :]
    out += batch * stride_ob + head * stride_oh + source[:, None] * stride_on
    tl.store(out + col[None, :], total.to(out.dtype.element_ty), mask=mask)
