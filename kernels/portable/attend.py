"""Triton kernels that attend: the probe's exact pass, and the online softmax over both bands.

Logits live in base 2 and in the frame of centred keys: subtracting the mean key from every key is
exact for a softmax, and lets the low band keep its means in half precision
(docs/design/mathematics.md §3).
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = tl.constexpr(64)  # freqopt.config.KEY_BLOCK
EXACT = tl.constexpr(2)  # freqopt.kernels.reference.EXACT
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _text_logits(
    q, key, key_mask, x, text, text_before, tokens, col, stride_kn, scale_log2, shift,
    D: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits of q against text keys `x` (counted without the video), and their source rows."""
    source = (x + tl.where(x >= text_before, tokens, 0)).to(tl.int64)
    inside = x < text
    k = tl.load(
        key + source[:, None] * stride_kn + col[None, :],
        mask=inside[:, None] & (col < D)[None, :],
        other=0.0,
    )
    logit = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2 - shift[:, None]
    if HAS_MASK:
        inside = inside & (tl.load(key_mask + source, mask=inside, other=0) != 0)
    return tl.where(inside[None, :], logit, -float("inf")), source


@triton.jit
def _source_rows(order, position, tokens, text_before):
    """Rows of the model's tensors that hold tokens of the given positions; past the end, the last.

    Whoever reads a row past the end masks its logit, so that its weight is zero.
    """
    last = tokens - 1
    return tl.load(order + tl.minimum(position, last)).to(tl.int64) + text_before


@triton.jit
def probe_kernel(
    query, order, key, value, text_key, text_value, key_mask, route, key_shift,
    peak_out, mass_out, exact_out, missing_out,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh,
    stride_vn, stride_mb,
    heads, group_size, tokens, tiles, blocks, probes, text, text_before, scale,
    D: tl.constexpr, DP: tl.constexpr, BP: tl.constexpr, HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr, IN_PLACE: tl.constexpr = False, BY_PROBE: tl.constexpr = False,
    order_row=0, order_share=1, queries=None, query_before=0, key_order=None, key_order_row=0,
):  # fmt: skip
    """One program: BP probes of one head against one range of key blocks (text in the last range).

    order: the queries', (T,) entries from pair // order_share * order_row on. queries and
    query_before: how many there are and where they begin, if they are not the keys' tokens;
    key_order: the keys' order then, where it is read.

    IN_PLACE: key and value are the model's own, as text_key and text_value. BY_PROBE: the route has
    a row for each probe, not for each tile.

    Keeps apart what the route serves exactly and what it misses: for each probe the running peak,
    the two masses and the two weighted value sums, merged by the host over ranges.
    """
    part, parts = tl.program_id(0), tl.num_programs(0)
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // heads, pair % heads
    key_head = head // group_size
    key_pair = batch * (heads // group_size) + key_head
    col = tl.arange(0, DP)
    in_dim = col < D
    probe = tl.program_id(2) * BP + tl.arange(0, BP)
    real = probe < probes
    order += pair // order_share * order_row
    if queries is None:
        queries, query_before = tokens, text_before
    if key_order is None:
        key_order = order
    else:
        key_order += key_pair * key_order_row
    position = (2 * probe.to(tl.int64) + 1) * queries // (2 * probes)
    source = tl.load(order + position, mask=real, other=0).to(tl.int64) + query_before
    q = tl.load(
        query + batch * stride_qb + head * stride_qh + source[:, None] * stride_qn + col[None, :],
        mask=real[:, None] & in_dim[None, :],
        other=0.0,
    )
    scale_log2 = scale * LOG2E
    shift_key = tl.load(key_shift + key_pair * D + col, mask=in_dim, other=0.0)
    shift = tl.sum(q.to(tl.float32) * shift_key[None, :], 1) * scale_log2
    routes = route + (pair * tiles + (probe if BY_PROBE else position // 128)) * blocks
    row = tl.arange(0, BLOCK)
    if IN_PLACE:
        key += batch * stride_kb + key_head * stride_kh
        value += batch * stride_vb + key_head * stride_vh

    peak = tl.full((BP,), -1e30, tl.float32)
    exact_mass = tl.zeros((BP,), tl.float32)
    missing_mass = tl.zeros((BP,), tl.float32)
    exact_acc = tl.zeros((BP, DP), tl.float32)
    missing_acc = tl.zeros((BP, DP), tl.float32)
    span = tl.cdiv(blocks, parts)
    for block in range(part * span, tl.minimum((part + 1) * span, blocks)):
        if IN_PLACE:
            rows = _source_rows(key_order, row + block * BLOCK, tokens, text_before)[:, None]
            k = tl.load(key + rows * stride_kn + col[None, :], mask=in_dim[None, :], other=0.0)
            v = tl.load(value + rows * stride_vn + col[None, :], mask=in_dim[None, :], other=0.0)
        else:
            where = (row + (key_pair * blocks + block) * BLOCK)[:, None] * D + col[None, :]
            k = tl.load(key + where, mask=in_dim[None, :], other=0.0)
            v = tl.load(value + where, mask=in_dim[None, :], other=0.0)
        logit = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2 - shift[:, None]
        logit = tl.where((row + block * BLOCK < tokens)[None, :], logit, -float("inf"))
        is_exact = tl.load(routes + block, mask=real, other=0) == EXACT
        new_peak = tl.maximum(peak, tl.max(logit, 1))
        fade = tl.exp2(peak - new_peak)
        weight = tl.exp2(logit - new_peak[:, None])
        exact = tl.where(is_exact[:, None], weight, 0.0)
        missing = weight - exact
        exact_mass = exact_mass * fade + tl.sum(exact, 1)
        missing_mass = missing_mass * fade + tl.sum(missing, 1)
        exact_acc = tl.dot(
            exact.to(v.dtype), v, exact_acc * fade[:, None], input_precision=PRECISION
        )
        missing_acc = tl.dot(
            missing.to(v.dtype), v, missing_acc * fade[:, None], input_precision=PRECISION
        )
        peak = new_peak
    if part == parts - 1:
        text_key += batch * stride_kb + key_head * stride_kh
        text_value += batch * stride_vb + key_head * stride_vh
        for start in range(0, text, BLOCK):
            logit, rows = _text_logits(
                q, text_key, key_mask + batch * stride_mb, start + row, text, text_before, tokens,
                col, stride_kn, scale_log2, shift, D, HAS_MASK, PRECISION,
            )  # fmt: skip
            v = tl.load(
                text_value + rows[:, None] * stride_vn + col[None, :],
                mask=(start + row < text)[:, None] & in_dim[None, :],
                other=0.0,
            )
            new_peak = tl.maximum(peak, tl.max(logit, 1))
            fade = tl.exp2(peak - new_peak)
            weight = tl.exp2(logit - new_peak[:, None])
            exact_mass = exact_mass * fade + tl.sum(weight, 1)
            missing_mass = missing_mass * fade
            exact_acc = tl.dot(
                weight.to(v.dtype), v, exact_acc * fade[:, None], input_precision=PRECISION
            )
            missing_acc = missing_acc * fade[:, None]
            peak = new_peak

    out = (pair * parts + part) * probes + probe
    tl.store(peak_out + out, peak, mask=real)
    tl.store(mass_out + out * 2, exact_mass, mask=real)
    tl.store(mass_out + out * 2 + 1, missing_mass, mask=real)
    cell = out[:, None] * D + col[None, :]
    mask = real[:, None] & in_dim[None, :]
    tl.store(exact_out + cell, exact_acc, mask=mask)
    tl.store(missing_out + cell, missing_acc, mask=mask)


@triton.jit
def _online_step(q, k, v, bias, shift, scale_log2, peak, mass, acc, PRECISION: tl.constexpr):
    """One tile of keys in the online softmax: logits q k^T * scale - shift + bias, base 2."""
    logit = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
    logit = logit - shift[:, None] + bias
    new_peak = tl.maximum(peak, tl.max(logit, 1))
    fade = tl.exp2(peak - new_peak)
    weight = tl.exp2(logit - new_peak[:, None])
    mass = mass * fade + tl.sum(weight, 1)
    acc = tl.dot(weight.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
    return new_peak, mass, acc


@triton.jit
def _exact_step(
    q, key, value, rows, stride_kn, stride_vn, col, shift, scale_log2, peak, mass, acc,
    D: tl.constexpr, DP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of exact keys, whole blocks at `rows` of key and value: nothing is masked."""
    k_where = rows[:, None] * stride_kn + col[None, :]
    v_where = rows[:, None] * stride_vn + col[None, :]
    if D == DP:
        k = tl.load(key + k_where)
        v = tl.load(value + v_where)
    else:
        k = tl.load(key + k_where, mask=(col < D)[None, :], other=0.0)
        v = tl.load(value + v_where, mask=(col < D)[None, :], other=0.0)
    logit = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    new_peak = tl.maximum(peak, tl.max(logit, 1) * scale_log2 - shift)
    weight = tl.exp2(logit * scale_log2 - (new_peak + shift)[:, None])
    fade = tl.exp2(peak - new_peak)
    mass = mass * fade + tl.sum(weight, 1)
    acc = tl.dot(weight.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
    return new_peak, mass, acc


@triton.jit
def _turned(
    query_rows, matrix, mask_rows, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """q H^T for the first-order term, (BM, DP), in slices of q's columns to bound shared memory.

    query_rows: (BM, 1) pointers to the queries; matrix: H-bar, or M (D, D), values by keys.
    """
    SLICE: tl.constexpr = 64 if DP > 64 else DP
    value_col = tl.arange(0, DP)
    turned = tl.zeros((BM, DP), tl.float32)
    for start in range(0, DP, SLICE):
        key_col = start + tl.arange(0, SLICE)
        q = tl.load(
            query_rows + key_col[None, :], mask=mask_rows & (key_col < D)[None, :], other=0.0
        )
        cell = value_col[None, :] * D + key_col[:, None]
        inside = (value_col < D)[None, :] & (key_col < D)[:, None]
        h = tl.load(matrix + cell, mask=inside, other=0.0)
        turned = tl.dot(q, h, turned, input_precision=PRECISION)
    return turned


@triton.jit
def attend_kernel(
    query, order, key, value, text_key, text_value, key_mask, key_shift,
    low_key, low_value, matrix, mass_term, coefficients, exact_list, counts, out,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh,
    stride_vn, stride_mb, stride_ob, stride_oh, stride_on,
    heads, group_size, tokens, tiles, blocks, text, text_before, scale,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, TEXT: tl.constexpr,
    HAS_MASK: tl.constexpr, RAGGED: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    IN_PLACE: tl.constexpr = False, tile_list=None,
    order_row=0, order_share=1, queries=None, query_before=0, key_order=None, key_order_row=0,
    log_sum=None, log_sum_row=0,
):  # fmt: skip
    """One program: BM queries of one tile, through low band, text and exact blocks.

    order and the arguments after tile_list: as in probe_kernel. log_sum: (pairs, log_sum_row)
    float32, where the logarithms of the softmax sums go, if anywhere.

    WIDE: key blocks per step of the exact loop. IN_PLACE: key and value are the model's own, as
    text_key and text_value. tile_list: as in score_kernel, of mass terms, lists and counts. The low
    band comes first: its first-order term is then one product with the running mass, and the exact
    loop is a plain list-driven flash loop whose peak is already close to final.
    """
    part = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // heads, pair % heads
    key_head = head // group_size
    key_pair = batch * (heads // group_size) + key_head
    tile = part * BM // 128
    row = pair * tiles + tile
    if tile_list is not None:
        tile = tl.load(tile_list + tile)
        part = tile * (128 // BM) + part % (128 // BM)
    col = tl.arange(0, DP)
    in_dim = col < D
    order += pair // order_share * order_row
    if queries is None:
        queries, query_before = tokens, text_before
    if key_order is None:
        key_order = order
    else:
        key_order += key_pair * key_order_row
    position = part * BM + tl.arange(0, BM)
    real = position < queries
    source = tl.load(order + position, mask=real, other=0).to(tl.int64) + query_before
    query_rows = query + batch * stride_qb + head * stride_qh + source[:, None] * stride_qn
    q = tl.load(query_rows + col[None, :], mask=real[:, None] & in_dim[None, :], other=0.0)
    scale_log2 = scale * LOG2E
    c = tl.load(coefficients + pair * 2)
    shift_key = tl.load(key_shift + key_pair * D + col, mask=in_dim, other=0.0)
    shift = tl.sum(q.to(tl.float32) * shift_key[None, :], 1) * scale_log2
    column = tl.arange(0, BLOCK)
    peak = tl.full((BM,), -1e30, tl.float32)
    mass = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, DP), tl.float32)

    low_key += key_pair * blocks * D
    low_value += key_pair * blocks * D
    mass_term += row * blocks
    for start in range(0, blocks, WIDE * BLOCK):
        block = start + tl.arange(0, WIDE * BLOCK)
        inside = block < blocks
        mask = inside[:, None] & in_dim[None, :]
        k = tl.load(low_key + block[:, None] * D + col[None, :], mask=mask, other=0.0)
        v = tl.load(low_value + block[:, None] * D + col[None, :], mask=mask, other=0.0)
        term = tl.load(mass_term + block, mask=inside, other=-1.0).to(tl.float32)
        size = tl.minimum(tl.maximum(tokens - block * BLOCK, 1), BLOCK).to(tl.float32)
        bias = tl.where(term >= 0.0, tl.log2(size) + c * term * LOG2E, -float("inf"))
        peak, mass, acc = _online_step(
            q, k, v, bias[None, :], tl.zeros((BM,), tl.float32), scale_log2, peak, mass, acc,
            PRECISION,
        )  # fmt: skip
    turned = _turned(query_rows, matrix + pair * D * D, real[:, None], D, DP, BM, PRECISION)
    acc += scale * mass[:, None] * turned

    if TEXT:
        text_key += batch * stride_kb + key_head * stride_kh
        text_value += batch * stride_vb + key_head * stride_vh
        for start in range(0, text, BLOCK):
            logit, rows = _text_logits(
                q, text_key, key_mask + batch * stride_mb, start + column, text, text_before,
                tokens, col, stride_kn, scale_log2, shift, D, HAS_MASK, PRECISION,
            )  # fmt: skip
            v = tl.load(
                text_value + rows[:, None] * stride_vn + col[None, :],
                mask=(start + column < text)[:, None] & in_dim[None, :],
                other=0.0,
            )
            new_peak = tl.maximum(peak, tl.max(logit, 1))
            fade = tl.exp2(peak - new_peak)
            weight = tl.exp2(logit - new_peak[:, None])
            mass = mass * fade + tl.sum(weight, 1)
            acc = tl.dot(weight.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
            peak = new_peak

    # The list ascends, so a ragged last block can only be its last entry: peel it off.
    n_exact = tl.load(counts + row)
    exact_list += row * blocks
    base = key_pair * blocks * BLOCK
    if IN_PLACE:
        key += batch * stride_kb + key_head * stride_kh
        value += batch * stride_vb + key_head * stride_vh
    n_full = n_exact
    if RAGGED:
        last = tl.load(exact_list + n_exact - 1)
        n_full = n_exact - (last == blocks - 1).to(tl.int32)
    n_wide = n_full // WIDE * WIDE
    lane = tl.arange(0, WIDE * BLOCK)
    for i in range(0, n_wide, WIDE):
        if WIDE == 1:
            rows = tl.load(exact_list + i) * BLOCK + lane
        else:
            rows = tl.load(exact_list + i + lane // BLOCK) * BLOCK + lane % BLOCK
        rows = _source_rows(key_order, rows, tokens, text_before) if IN_PLACE else base + rows
        peak, mass, acc = _exact_step(
            q, key, value, rows, stride_kn if IN_PLACE else D, stride_vn if IN_PLACE else D, col,
            shift, scale_log2, peak, mass, acc, D, DP, PRECISION,
        )  # fmt: skip
    if WIDE > 1:
        for i in range(n_wide, n_full):
            rows = tl.load(exact_list + i) * BLOCK + column
            rows = _source_rows(key_order, rows, tokens, text_before) if IN_PLACE else base + rows
            peak, mass, acc = _exact_step(
                q, key, value, rows, stride_kn if IN_PLACE else D, stride_vn if IN_PLACE else D,
                col, shift, scale_log2, peak, mass, acc, D, DP, PRECISION,
            )  # fmt: skip
    if RAGGED:
        if n_full < n_exact:
            if IN_PLACE:
                rows = (blocks - 1) * BLOCK + column
                rows = _source_rows(key_order, rows, tokens, text_before)[:, None]
                k_where = rows * stride_kn + col[None, :]
                v_where = rows * stride_vn + col[None, :]
            else:
                k_where = (base + (blocks - 1) * BLOCK + column)[:, None] * D + col[None, :]
                v_where = k_where
            k = tl.load(key + k_where, mask=in_dim[None, :], other=0.0)
            v = tl.load(value + v_where, mask=in_dim[None, :], other=0.0)
            inside = (blocks - 1) * BLOCK + column < tokens
            bias = tl.where(inside, 0.0, -float("inf"))
            peak, mass, acc = _online_step(
                q, k, v, bias[None, :], shift, scale_log2, peak, mass, acc, PRECISION
            )

    if log_sum is not None:
        total = (peak + tl.log2(mass) + shift) * LN2
        tl.store(log_sum + pair * log_sum_row + source, total, mask=real)
    result = acc / mass[:, None]
    tl.store(
        out + batch * stride_ob + head * stride_oh + source[:, None] * stride_on + col[None, :],
        result.to(out.dtype.element_ty),
        mask=real[:, None] & in_dim[None, :],
    )
