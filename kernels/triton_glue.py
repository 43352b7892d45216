"""Triton kernels for the glue between the others, where there is no PyTorch to run it.

Inside onnxruntime a call is kernels only: what `triton_split` does between launches with PyTorch
(centring, summing, the probe's fit, dense text) is done here, and tested against it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from freqopt.kernels.reference import C_MAX, G_MAX, NEWTON_STEPS
from freqopt.kernels.triton_attend import _online_step, _text_logits, _turned

BLOCK = tl.constexpr(64)  # freqopt.config.KEY_BLOCK
SUB = tl.constexpr(8)  # freqopt.config.SUB_BLOCK
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
STEPS = tl.constexpr(NEWTON_STEPS)
C_TOP = tl.constexpr(C_MAX)
G_TOP = tl.constexpr(G_MAX)


@triton.jit
def limits_kernel(budget, limits, heads, MID: tl.constexpr):
    """One program per (batch, head): its two thresholds from the (2, heads) budget."""
    pair = tl.program_id(0)
    head = pair % heads
    exact = tl.load(budget + head)
    middle = exact
    if MID:
        middle = tl.load(budget + heads + head)
    tl.store(limits + pair * 2, exact)
    tl.store(limits + pair * 2 + 1, middle)


@triton.jit
def centre_kernel(
    key_mean, value_mean, spread, key_shift, low_key, low_value, tokens, blocks,
    D: tl.constexpr, DP: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """One program per key head: the head's means, then centred, cast and relative block summaries.

    Rewrites key_mean (centred) and spread (relative to the head's) in place.
    """
    pair = tl.program_id(0).to(tl.int64)
    key_mean += pair * blocks * D
    value_mean += pair * blocks * D
    low_key += pair * blocks * D
    low_value += pair * blocks * D
    spread += pair * blocks
    col = tl.arange(0, DP)
    shift = tl.zeros((DP,), tl.float32)
    centre = tl.zeros((DP,), tl.float32)
    for start in range(0, blocks, BJ):
        block = start + tl.arange(0, BJ)
        size = tl.minimum(tl.maximum(tokens - block * BLOCK, 0), BLOCK).to(tl.float32)
        where = block[:, None] * D + col[None, :]
        mask = (block < blocks)[:, None] & (col < D)[None, :]
        weight = (size / tokens)[:, None]
        shift += tl.sum(tl.load(key_mean + where, mask=mask, other=0.0) * weight, 0)
        centre += tl.sum(tl.load(value_mean + where, mask=mask, other=0.0) * weight, 0)
    total = tl.zeros((BJ,), tl.float32)
    for start in range(0, blocks, BJ):
        block = start + tl.arange(0, BJ)
        size = tl.minimum(tl.maximum(tokens - block * BLOCK, 0), BLOCK).to(tl.float32)
        where = block[:, None] * D + col[None, :]
        mask = (block < blocks)[:, None] & (col < D)[None, :]
        off = tl.load(value_mean + where, mask=mask, other=0.0) - centre[None, :]
        off = tl.where(mask, off, 0.0)
        own = tl.load(spread + block, mask=block < blocks, other=0.0)
        total += (own + tl.sum(off * off, 1)) * (size / tokens)
    head = tl.maximum(tl.sum(total, 0), 1e-30)
    for start in range(0, blocks, BJ):
        block = start + tl.arange(0, BJ)
        where = block[:, None] * D + col[None, :]
        mask = (block < blocks)[:, None] & (col < D)[None, :]
        k = tl.load(key_mean + where, mask=mask, other=0.0) - shift[None, :]
        v = tl.load(value_mean + where, mask=mask, other=0.0)
        tl.store(key_mean + where, k, mask=mask)
        tl.store(low_key + where, k.to(low_key.dtype.element_ty), mask=mask)
        tl.store(low_value + where, v.to(low_value.dtype.element_ty), mask=mask)
        own = tl.load(spread + block, mask=block < blocks, other=0.0)
        tl.store(spread + block, tl.sqrt(own / head), mask=block < blocks)
    tl.store(key_shift + pair * D + col, shift, mask=col < D)


@triton.jit
def order_kernel(first_order, out, groups, tokens, cells, CELLS: tl.constexpr):
    """Token-mean of the first-order products: (heads, groups, cells) summed over groups, cast."""
    pair = tl.program_id(1).to(tl.int64)
    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    inside = cell < cells
    total = tl.zeros((CELLS,), tl.float32)
    for group in range(groups):
        total += tl.load(
            first_order + (pair * groups + group) * cells + cell, mask=inside, other=0.0
        )
    tl.store(out + pair * cells + cell, (total / tokens).to(out.dtype.element_ty), mask=inside)


@triton.jit
def pool_kernel(
    query, order, pooled, stride_qb, stride_qh, stride_qn, heads, tokens, probes, text_before,
    D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Mean squared query of the tile of each probe, (pairs, probes, D): for mid-band mass terms."""
    probe = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    first = (2 * probe.to(tl.int64) + 1) * tokens // (2 * probes) // 128 * 128
    col = tl.arange(0, DP)
    position = first + tl.arange(0, 128)
    real = position < tokens
    source = tl.load(order + position, mask=real, other=0).to(tl.int64) + text_before
    rows = query + (pair // heads) * stride_qb + (pair % heads) * stride_qh
    q = tl.load(
        rows + source[:, None] * stride_qn + col[None, :],
        mask=real[:, None] & (col < D)[None, :],
        other=0.0,
    ).to(tl.float32)
    size = tl.minimum(tokens - first, 128).to(tl.float32)
    tl.store(pooled + (pair * probes + probe) * D + col, tl.sum(q * q, 0) / size, mask=col < D)


@triton.jit
def _merged(peak, mass, pair, parts, probe, real, probes):
    """Softmax sums of probes over the key ranges: peak (base 2), masses of exact and missing."""
    top = tl.full(probe.shape, -1e30, tl.float32)
    for part in range(parts):
        at = (pair * parts + part) * probes + probe
        top = tl.maximum(top, tl.load(peak + at, mask=real, other=-1e30))
    exact = tl.zeros(probe.shape, tl.float32)
    missing = tl.zeros(probe.shape, tl.float32)
    for part in range(parts):
        at = (pair * parts + part) * probes + probe
        weight = tl.exp2(tl.load(peak + at, mask=real, other=-1e30) - top)
        exact += tl.load(mass + at * 2, mask=real, other=0.5) * weight
        missing += tl.load(mass + at * 2 + 1, mask=real, other=0.0) * weight
    return top, exact, missing


@triton.jit
def _low_columns(
    q, low_key, mass_term, row, block, blocks, tokens, real, col, scale,
    D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits (natural, -inf off the low band) and mass terms of probes against low-band blocks."""
    inside = block < blocks
    k = tl.load(
        low_key + block[:, None] * D + col[None, :],
        mask=inside[:, None] & (col < D)[None, :],
        other=0.0,
    )
    cells = real[:, None] & inside[None, :]
    term = tl.load(mass_term + row[:, None] * blocks + block[None, :], mask=cells, other=-1.0)
    term = term.to(tl.float32)
    size = tl.minimum(tl.maximum(tokens - block * BLOCK, 1), BLOCK).to(tl.float32)
    logit = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + tl.log(size)[None, :]
    return tl.where(term >= 0.0, logit, -float("inf")), tl.maximum(term, 0.0)


@triton.jit
def _fine_columns(
    q, square, fine_key, fine_var, key_shift, route, row, fine, blocks, tokens, real, col, scale,
    D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same of probes against mid-band sub-blocks; q and square are float32."""
    size = tl.minimum(tl.maximum(tokens - fine * SUB, 0), SUB).to(tl.float32)
    inside = size > 0
    mask = inside[:, None] & (col < D)[None, :]
    where = fine[:, None] * D + col[None, :]
    shift = tl.load(key_shift + col, mask=col < D, other=0.0)
    k = tl.load(fine_key + where, mask=mask, other=0.0).to(tl.float32) - shift[None, :]
    k = tl.where(mask, k, 0.0)
    var = tl.load(fine_var + where, mask=mask, other=0.0).to(tl.float32)
    cells = real[:, None] & inside[None, :]
    band = tl.load(
        route + row[:, None] * blocks + (fine * SUB // BLOCK)[None, :], mask=cells, other=0
    )
    capacity = tl.log(tl.maximum(size, 1.0))[None, :]
    logit = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + capacity
    spread = tl.dot(square, tl.trans(var), input_precision=PRECISION) * (0.5 * scale * scale)
    return tl.where((band == 1) & cells, logit, -float("inf")), tl.minimum(spread, capacity)


@triton.jit
def fit_kernel(
    query, order, low_key, low_value, low_order, fine_key, fine_value, fine_var, fine_order,
    key_shift, mass_term, route, pooled, peak, mass, exact_out, missing_out, coefficients,
    stride_qb, stride_qh, stride_qn,
    heads, group_size, tokens, tiles, blocks, probes, parts, text_before, scale,
    D: tl.constexpr, DP: tl.constexpr, BP: tl.constexpr, BJ: tl.constexpr, MID: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per (batch, head): `reference.fit_probe` on what the probe kernel found.

    Writes (c, g). Logits are recomputed in every pass: storing them would cost more memory than
    the sixty-four queries are worth.
    """
    pair = tl.program_id(0).to(tl.int64)
    batch, head = pair // heads, pair % heads
    key_pair = batch * (heads // group_size) + head // group_size
    query += batch * stride_qb + head * stride_qh
    low_key += key_pair * blocks * D
    low_value += key_pair * blocks * D
    key_shift += key_pair * D
    RATIO: tl.constexpr = BLOCK // SUB
    fine_key += key_pair * blocks * RATIO * D
    fine_value += key_pair * blocks * RATIO * D
    fine_var += key_pair * blocks * RATIO * D
    col = tl.arange(0, DP)
    in_dim = (col < D)[None, :]

    target = 0.0
    for first in range(0, probes, BP):
        probe = first + tl.arange(0, BP)
        real = probe < probes
        top, exact, missing = _merged(peak, mass, pair, parts, probe, real, probes)
        target += tl.sum(tl.where(real, missing / (exact + missing), 0.0), 0)

    c = 1.0
    for step in range(STEPS + 1):
        total = 0.0
        slope = 0.0
        energy = 0.0
        aligned = 0.0
        for first in range(0, probes, BP):
            probe = first + tl.arange(0, BP)
            real = probe < probes
            position = (2 * probe.to(tl.int64) + 1) * tokens // (2 * probes)
            row = pair * tiles + position // 128
            source = tl.load(order + position, mask=real, other=0).to(tl.int64) + text_before
            rows = query + source[:, None] * stride_qn
            q = tl.load(rows + col[None, :], mask=real[:, None] & in_dim, other=0.0)
            top, exact, missing = _merged(peak, mass, pair, parts, probe, real, probes)
            log_total = (top + tl.log2(exact + missing)) * LN2
            low = tl.zeros((BP,), tl.float32)
            middle = tl.zeros((BP,), tl.float32)
            slopes = tl.zeros((BP,), tl.float32)
            plain = tl.zeros((BP, DP), tl.float32)
            for start in range(0, blocks, BJ):
                block = start + tl.arange(0, BJ)
                logit, term = _low_columns(
                    q, low_key, mass_term, row, block, blocks, tokens, real, col, scale, D,
                    PRECISION,
                )  # fmt: skip
                share = tl.exp(logit - log_total[:, None] + c * term)
                share = tl.where(real[:, None], share, 0.0)
                low += tl.sum(share, 1)
                slopes += tl.sum(share * term, 1)
                if step == STEPS:
                    v = tl.load(
                        low_value + block[:, None] * D + col[None, :],
                        mask=(block < blocks)[:, None] & in_dim,
                        other=0.0,
                    ).to(tl.float32)
                    plain = tl.dot(share, v, plain, input_precision=PRECISION)
            if MID:
                square = tl.load(
                    pooled + (pair * probes + probe)[:, None] * D + col[None, :],
                    mask=real[:, None] & in_dim,
                    other=0.0,
                )
                for start in range(0, blocks * RATIO, BJ):
                    fine = start + tl.arange(0, BJ)
                    logit, term = _fine_columns(
                        q.to(tl.float32), square, fine_key, fine_var, key_shift, route, row, fine,
                        blocks, tokens, real, col, scale, D, PRECISION,
                    )  # fmt: skip
                    share = tl.exp(logit - log_total[:, None] + c * term)
                    share = tl.where(real[:, None], share, 0.0)
                    middle += tl.sum(share, 1)
                    slopes += tl.sum(share * term, 1)
                    if step == STEPS:
                        v = tl.load(
                            fine_value + fine[:, None] * D + col[None, :],
                            mask=(fine < blocks * RATIO)[:, None] & in_dim,
                            other=0.0,
                        ).to(tl.float32)
                        plain = tl.dot(share, v, plain, input_precision=PRECISION)
            total += tl.sum(low + middle, 0)
            slope += tl.sum(slopes, 0)
            if step == STEPS:
                turned = low[:, None] * _turned(
                    rows, low_order + key_pair * D * D, real[:, None], D, DP, BP, PRECISION
                )
                if MID:
                    turned += middle[:, None] * _turned(
                        rows, fine_order + key_pair * D * D, real[:, None], D, DP, BP, PRECISION
                    )
                whole = exact + missing
                exact_sum = tl.zeros((BP, DP), tl.float32)
                missing_sum = tl.zeros((BP, DP), tl.float32)
                for part in range(parts):
                    at = (pair * parts + part) * probes + probe
                    weight = tl.exp2(tl.load(peak + at, mask=real, other=-1e30) - top)[:, None]
                    cell = at[:, None] * D + col[None, :]
                    mask = real[:, None] & in_dim
                    exact_sum += tl.load(exact_out + cell, mask=mask, other=0.0) * weight
                    missing_sum += tl.load(missing_out + cell, mask=mask, other=0.0) * weight
                truth = (exact_sum + missing_sum) / whole[:, None]
                sums = (exact / whole + low + middle)[:, None]
                plain = (exact_sum / whole[:, None] + plain) / sums
                correction = tl.where(real[:, None], turned * scale / sums, 0.0)
                energy += tl.sum(tl.sum(correction * correction, 1), 0)
                aligned += tl.sum(tl.sum((truth - plain) * correction, 1), 0)
        if step < STEPS:
            if (slope > 1e-12) & (target > 1e-12):
                change = tl.log(tl.maximum(total, 1e-30) / tl.maximum(target, 1e-30)) * total
                c = c - change / tl.maximum(slope, 1e-12)
            c = tl.minimum(tl.maximum(c, 0.0), C_TOP)
        else:
            g = 1.0
            if energy > 1e-30:
                g = tl.minimum(tl.maximum(aligned / energy, 0.0), G_TOP)
            tl.store(coefficients + pair * 2, c)
            tl.store(coefficients + pair * 2 + 1, g)


@triton.jit
def text_kernel(
    query, key, value, text_key, text_value, key_mask, out,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh,
    stride_vn, stride_mb, stride_ob, stride_oh, stride_on,
    heads, group_size, tokens, blocks, text, text_before, scale,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BM text queries, densely over the ordered video keys and all text keys."""
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // heads, pair % heads
    key_head = head // group_size
    key_pair = batch * (heads // group_size) + key_head
    col = tl.arange(0, DP)
    in_dim = (col < D)[None, :]
    x = tl.program_id(0) * BM + tl.arange(0, BM)
    real = x < text
    source = (x + tl.where(x >= text_before, tokens, 0)).to(tl.int64)
    q = tl.load(
        query + batch * stride_qb + head * stride_qh + source[:, None] * stride_qn + col[None, :],
        mask=real[:, None] & in_dim,
        other=0.0,
    )
    scale_log2 = scale * LOG2E
    none = tl.zeros((BM,), tl.float32)
    column = tl.arange(0, BLOCK)
    peak = tl.full((BM,), -1e30, tl.float32)
    mass = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, DP), tl.float32)
    base = key_pair * blocks * BLOCK
    for block in range(0, blocks):
        where = (column + (base + block * BLOCK))[:, None] * D + col[None, :]
        k = tl.load(key + where, mask=in_dim, other=0.0)
        v = tl.load(value + where, mask=in_dim, other=0.0)
        bias = tl.where(column + block * BLOCK < tokens, 0.0, -float("inf"))
        peak, mass, acc, fade = _online_step(
            q, k, v, bias[None, :], none, scale_log2, peak, mass, acc, PRECISION
        )
    text_key += batch * stride_kb + key_head * stride_kh
    text_value += batch * stride_vb + key_head * stride_vh
    for start in range(0, text, BLOCK):
        logit, rows = _text_logits(
            q, text_key, key_mask + batch * stride_mb, start + column, text, text_before, tokens,
            col, stride_kn, scale_log2, none, D, HAS_MASK, PRECISION,
        )  # fmt: skip
        v = tl.load(
            text_value + rows[:, None] * stride_vn + col[None, :],
            mask=(start + column < text)[:, None] & in_dim,
            other=0.0,
        )
        new_peak = tl.maximum(peak, tl.max(logit, 1))
        fade = tl.exp2(peak - new_peak)
        weight = tl.exp2(logit - new_peak[:, None])
        mass = mass * fade + tl.sum(weight, 1)
        acc = tl.dot(weight.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
        peak = new_peak
    tl.store(
        out + batch * stride_ob + head * stride_oh + source[:, None] * stride_on + col[None, :],
        (acc / mass[:, None]).to(out.dtype.element_ty),
        mask=real[:, None] & in_dim,
    )
