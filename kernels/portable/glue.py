"""Triton kernels for what comes between the large ones: sums, centring, the probes' fit.

Every call launches them, but for the dense attention of text queries: PyTorch has its own, and
onnxruntime and TensorRT, where a call is kernels only, have this one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from freqopt.kernels.portable.attend import _online_step, _text_logits, _turned
from freqopt.kernels.reference import (
    C_MAX,
    G_MAX,
    LEAST_CORRECTION,
    LEAST_MASS,
    NEWTON_STEPS,
)

BLOCK = tl.constexpr(64)  # freqopt.config.KEY_BLOCK
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
MIDDLE = tl.constexpr(2.0794415416798357)  # of what a mass term can be, 0 to log(64)
MOMENTS = tl.constexpr(16)
UNIT = tl.constexpr(16)  # least probes and columns of a program
STEPS = tl.constexpr(NEWTON_STEPS)
C_TOP = tl.constexpr(C_MAX)
G_TOP = tl.constexpr(G_MAX)
LEAST_SHARE = tl.constexpr(LEAST_MASS)
LEAST_ENERGY = tl.constexpr(LEAST_CORRECTION)


@triton.jit
def limits_kernel(budget, limits, heads):
    """One program per (batch, head): its threshold from the (heads,) budget."""
    pair = tl.program_id(0)
    tl.store(limits + pair, tl.load(budget + pair % heads))


@triton.jit
def probe_tiles_kernel(tile_list, tokens, probes, ROWS: tl.constexpr):
    """One program: the tile of each probe, tile_list (probes,) int32, as `_probe_rows` finds it."""
    for start in range(0, probes, ROWS):
        probe = start + tl.arange(0, ROWS)
        position = (2 * probe.to(tl.int64) + 1) * tokens // (2 * probes)
        tl.store(tile_list + probe, (position // 128).to(tl.int32), mask=probe < probes)


@triton.jit
def total_kernel(
    sums, key_shift, head_spread, tokens, groups,
    D: tl.constexpr, DP: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: COLS channels of one key head: its mean key, and their share of its spread.

    sums: (pairs, groups, 3, D) as summarise_kernel leaves them. head_spread: (pairs, DP / COLS)
    squared distance of the values from their mean, summed over a program's channels.
    """
    part = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    col = part * COLS + tl.arange(0, COLS)
    in_dim = col < D
    k_totals = tl.zeros((ROWS, COLS), tl.float32)
    v_totals = tl.zeros((ROWS, COLS), tl.float32)
    squares = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, groups, ROWS):
        group = start + tl.arange(0, ROWS)
        at = (pair * groups + group)[:, None] * 3 * D + col[None, :]
        mask = (group < groups)[:, None] & in_dim[None, :]
        k_totals += tl.load(sums + at, mask=mask, other=0.0)
        v_totals += tl.load(sums + at + D, mask=mask, other=0.0)
        squares += tl.load(sums + at + 2 * D, mask=mask, other=0.0)
    centre = tl.sum(v_totals, 0) / tokens
    spread = tl.sum(tl.sum(squares, 0) / tokens - centre * centre, 0)
    tl.store(key_shift + pair * D + col, tl.sum(k_totals, 0) / tokens, mask=in_dim)
    tl.store(head_spread + pair * (DP // COLS) + part, spread)


@triton.jit
def centre_kernel(
    key_mean, spread, key_shift, head_spread, low_key, blocks,
    D: tl.constexpr, DP: tl.constexpr, COLS: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """One program: means of BJ key blocks of one key head, centred on its mean key and cast.

    Rewrites spread in place, as a root and relative to the head's.
    """
    pair = tl.program_id(1).to(tl.int64)
    col = tl.arange(0, DP)
    block = tl.program_id(0) * BJ + tl.arange(0, BJ)
    inside = block < blocks
    row = pair * blocks + block
    where = row[:, None] * D + col[None, :]
    mask = inside[:, None] & (col < D)[None, :]
    shift = tl.load(key_shift + pair * D + col, mask=col < D, other=0.0)
    k = tl.load(key_mean + where, mask=mask, other=0.0) - shift[None, :]
    tl.store(low_key + where, k.to(low_key.dtype.element_ty), mask=mask)
    PARTS: tl.constexpr = DP // COLS
    head = tl.sum(tl.load(head_spread + pair * PARTS + tl.arange(0, PARTS)), 0)
    own = tl.load(spread + row, mask=inside, other=0.0)
    tl.store(spread + row, tl.sqrt(own / tl.maximum(head, 1e-30)), mask=inside)


@triton.jit
def h_bar_kernel(first_order, out, groups, tokens, cells, CELLS: tl.constexpr):
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
def merge_kernel(
    peak, mass, exact_out, missing_out, probes, parts,
    D: tl.constexpr, DP: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Softmax sums of BP probes of one head over its key ranges, written where the first one was.

    Leaves the logarithm of the softmax sum in `peak`, and shares of that sum in the others.
    """
    pair = tl.program_id(1).to(tl.int64)
    probe = tl.program_id(0) * BP + tl.arange(0, BP)
    real = probe < probes
    first = pair * parts * probes + probe
    col = tl.arange(0, DP)
    cells = real[:, None] & (col < D)[None, :]
    top = tl.full((BP,), -1e30, tl.float32)
    for part in range(parts):
        top = tl.maximum(top, tl.load(peak + first + part * probes, mask=real, other=-1e30))
    exact_mass = tl.zeros((BP,), tl.float32)
    missing_mass = tl.zeros((BP,), tl.float32)
    exact = tl.zeros((BP, DP), tl.float32)
    missing = tl.zeros((BP, DP), tl.float32)
    for part in range(parts):
        at = first + part * probes
        weight = tl.exp2(tl.load(peak + at, mask=real, other=-1e30) - top)
        exact_mass += tl.load(mass + at * 2, mask=real, other=0.5) * weight
        missing_mass += tl.load(mass + at * 2 + 1, mask=real, other=0.5) * weight
        cell = at[:, None] * D + col[None, :]
        exact += tl.load(exact_out + cell, mask=cells, other=0.0) * weight[:, None]
        missing += tl.load(missing_out + cell, mask=cells, other=0.0) * weight[:, None]
    total = exact_mass + missing_mass
    tl.debug_barrier()
    tl.store(peak + first, (top + tl.log2(total)) * LN2, mask=real)
    tl.store(mass + first * 2, exact_mass / total, mask=real)
    tl.store(mass + first * 2 + 1, missing_mass / total, mask=real)
    cell = first[:, None] * D + col[None, :]
    tl.store(exact_out + cell, exact / total[:, None], mask=cells)
    tl.store(missing_out + cell, missing / total[:, None], mask=cells)


@triton.jit
def _probe_rows(
    query, order, probe, probes, tokens, text_before, stride_qn, col, D: tl.constexpr
):  # fmt: skip
    """Pointers to the queries of probes as (BP, 1), the queries (BP, DP), and their tiles (BP,)."""
    position = (2 * probe.to(tl.int64) + 1) * tokens // (2 * probes)
    real = probe < probes
    source = tl.load(order + position, mask=real, other=0).to(tl.int64) + text_before
    rows = query + source[:, None] * stride_qn
    q = tl.load(rows + col[None, :], mask=real[:, None] & (col < D)[None, :], other=0.0)
    return rows, q, position // 128


@triton.jit
def _store_moments(
    moments, logit, term, pair, probes, first, unit, units, BP: tl.constexpr, BJ: tl.constexpr
):  # fmt: skip
    """Sums over cells (BP, BJ) of exp(logit + term) * (term - MIDDLE)^k, k below MOMENTS.

    They are all that c is fitted on: as a function of c, the cells' mass is their power series
    around c = 1, exact to float32 with so many for c up to 2 (2.08^16 / 16! = 6e-9).

    moments: (pairs, ceil(probes / UNIT), units, MOMENTS), for units of UNIT by UNIT cells, so that
    who reads them need not know this tile. Its sums are those of its first unit, of probe `first`
    and columns `unit`; the others get zeros.
    """
    row = tl.arange(0, BP // UNIT)
    column = tl.arange(0, BJ // UNIT)
    all_rows = tl.cdiv(probes, UNIT)
    at = (pair * all_rows + first // UNIT + row)[:, None] * units + unit + column[None, :]
    inside = (first // UNIT + row < all_rows)[:, None] & (unit + column < units)[None, :]
    own = (row == 0)[:, None] & (column == 0)[None, :]
    power = tl.exp(logit + term)
    off = term - MIDDLE
    for k in tl.static_range(MOMENTS):
        total = tl.sum(tl.sum(power, 1), 0)
        tl.store(moments + at * MOMENTS + k, tl.where(own, total, 0.0), mask=inside)
        power *= off


@triton.jit
def estimate_kernel(
    query, order, low_key, mass_term, peak, logit_out, term_out, moments,
    stride_qb, stride_qh, stride_qn,
    heads, group_size, tokens, tiles, blocks, probes, parts, text_before, scale,
    D: tl.constexpr, DP: tl.constexpr, BP: tl.constexpr, BJ: tl.constexpr,
    PRECISION: tl.constexpr, BY_PROBE: tl.constexpr = False,
    order_row=0, order_share=1, queries=None,
):  # fmt: skip
    """One program: BP probes of one head against BJ key blocks of the low band.

    order, text_before: the queries', as in pool_tiles_kernel; queries: how many, if not `tokens`.

    BY_PROBE: mass_term has a row for each probe, not for each tile.

    Writes (pairs, probes, blocks): logits less the probe's softmax sum, float32, -inf where the
    pair is exact; what the probe's c multiplies, float16; and moments, see `_store_moments`.
    """
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // heads, pair % heads
    key_pair = batch * (heads // group_size) + head // group_size
    probe = tl.program_id(2) * BP + tl.arange(0, BP)
    real = probe < probes
    col = tl.arange(0, DP)
    in_dim = (col < D)[None, :]
    if queries is None:
        queries = tokens
    _rows, q, tile = _probe_rows(
        query + batch * stride_qb + head * stride_qh, order + pair // order_share * order_row,
        probe, probes, queries, text_before, stride_qn, col, D,
    )  # fmt: skip
    row = (pair * tiles + (probe if BY_PROBE else tile))[:, None] * blocks
    log_total = tl.load(peak + pair * parts * probes + probe, mask=real, other=0.0)
    step = tl.program_id(0)
    out = (pair * probes + probe)[:, None] * blocks
    block = step * BJ + tl.arange(0, BJ)
    inside = block < blocks
    cells = real[:, None] & inside[None, :]
    k = tl.load(
        low_key + (key_pair * blocks + block)[:, None] * D + col[None, :],
        mask=inside[:, None] & in_dim,
        other=0.0,
    )
    term = tl.load(mass_term + row + block[None, :], mask=cells, other=-1.0).to(tl.float32)
    size = tl.minimum(tl.maximum(tokens - block * BLOCK, 1), BLOCK).to(tl.float32)
    logit = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + tl.log(size)[None, :]
    logit = tl.where(term >= 0.0, logit - log_total[:, None], -float("inf"))
    tl.store(logit_out + out + block[None, :], logit, mask=cells)
    term = tl.maximum(term, 0.0).to(term_out.dtype.element_ty)
    tl.store(term_out + out + block[None, :], term, mask=cells)
    _store_moments(
        moments, logit, term.to(tl.float32), pair, probes, tl.program_id(2) * BP,
        step * (BJ // UNIT), tl.cdiv(blocks, UNIT), BP, BJ,
    )  # fmt: skip


@triton.jit
def _shares(logit, term, pair, probe, probes, block, blocks, c):
    """Softmax shares of key blocks with c on their mass terms, (BP, BJ); 0 past the last block."""
    cells = (probe < probes)[:, None] & (block < blocks)[None, :]
    at = (pair * probes + probe)[:, None] * blocks + block[None, :]
    given = tl.load(term + at, mask=cells, other=0.0).to(tl.float32)
    return tl.exp(tl.load(logit + at, mask=cells, other=-float("inf")) + c * given)


@triton.jit
def fit_kernel(
    query, order, low_value, h_bar, logit, term, moments, mass,
    exact_out, missing_out, coefficients, probe_energy,
    stride_qb, stride_qh, stride_qn,
    heads, group_size, tokens, blocks, probes, parts, text_before, scale,
    D: tl.constexpr, DP: tl.constexpr, BP: tl.constexpr, BJ: tl.constexpr, ROWS: tl.constexpr,
    PRECISION: tl.constexpr, order_row=0, order_share=1,
):  # fmt: skip
    """One program per (batch, head): c and g of `reference.fit_probe`, on what was found before.

    order, tokens, text_before: the queries', as in pool_tiles_kernel. ROWS: units whose moments are
    read at a time. Writes (c, g) and the energy of the probes' exact attention. What is left of
    the probes without a first-order term takes the place of exact_out, that term of missing_out,
    and the low band's share of a probe's softmax sum that of the exact mass: for ridge_kernel.
    """
    pair = tl.program_id(0).to(tl.int64)
    batch, head = pair // heads, pair % heads
    key_pair = batch * (heads // group_size) + head // group_size
    query += batch * stride_qb + head * stride_qh
    order += pair // order_share * order_row
    low_value += key_pair * blocks * D
    mass += pair * parts * probes * 2
    exact_out += pair * parts * probes * D
    missing_out += pair * parts * probes * D
    col = tl.arange(0, DP)
    in_dim = (col < D)[None, :]

    target = 0.0
    for first in range(0, probes, BP):
        probe = first + tl.arange(0, BP)
        target += tl.sum(tl.load(mass + probe * 2 + 1, mask=probe < probes, other=0.0), 0)
    k = tl.arange(0, MOMENTS)
    moment = tl.zeros((MOMENTS,), tl.float32)
    units = tl.cdiv(probes, UNIT) * tl.cdiv(blocks, UNIT)
    for start in range(0, units, ROWS):
        unit = start + tl.arange(0, ROWS)
        at = (pair * units + unit)[:, None] * MOMENTS + k[None, :]
        moment += tl.sum(tl.load(moments + at, mask=(unit < units)[:, None], other=0.0), 0)
    c = 1.0
    for _step in range(STEPS):
        # (c - 1)^k / k!, and its derivative by c.
        power = tl.cumprod(tl.where(k == 0, 1.0, (c - 1.0) / tl.maximum(k, 1)), 0)
        slope = tl.cumprod(tl.where(k < 2, 1.0, (c - 1.0) / tl.maximum(k - 1, 1)), 0)
        slope = tl.where(k == 0, 0.0, slope)
        scaled = tl.exp((c - 1.0) * MIDDLE) * moment
        found = tl.sum(scaled * power, 0)
        steep = found * MIDDLE + tl.sum(scaled * slope, 0)
        if (steep > 1e-12) & (target > probes * LEAST_SHARE):
            change = tl.log(tl.maximum(found, 1e-30) / tl.maximum(target, 1e-30)) * found
            c = c - change / tl.maximum(steep, 1e-12)
        c = tl.minimum(tl.maximum(c, 0.0), C_TOP)

    energy, aligned, whole = 0.0, 0.0, 0.0
    for first in range(0, probes, BP):
        probe = first + tl.arange(0, BP)
        real = probe < probes
        low = tl.zeros((BP,), tl.float32)
        plain = tl.zeros((BP, DP), tl.float32)
        for start in range(0, blocks, BJ):
            block = start + tl.arange(0, BJ)
            share = _shares(logit, term, pair, probe, probes, block, blocks, c)
            low += tl.sum(share, 1)
            v = tl.load(
                low_value + block[:, None] * D + col[None, :],
                mask=(block < blocks)[:, None] & in_dim,
                other=0.0,
            ).to(tl.float32)
            plain = tl.dot(share, v, plain, input_precision=PRECISION)
        rows, _q, _tile = _probe_rows(
            query, order, probe, probes, tokens, text_before, stride_qn, col, D
        )
        turned = low[:, None] * _turned(
            rows, h_bar + key_pair * D * D, real[:, None], D, DP, BP, PRECISION
        )
        cell = probe[:, None] * D + col[None, :]
        mask = real[:, None] & in_dim
        exact = tl.load(exact_out + cell, mask=mask, other=0.0)
        truth = exact + tl.load(missing_out + cell, mask=mask, other=0.0)
        sums = tl.maximum(tl.load(mass + probe * 2, mask=real, other=1.0) + low, 1e-30)
        rest = tl.where(mask, truth - (exact + plain) / sums[:, None], 0.0)
        correction = tl.where(mask, turned * scale / sums[:, None], 0.0)
        energy += tl.sum(tl.sum(correction * correction, 1), 0)
        aligned += tl.sum(tl.sum(rest * correction, 1), 0)
        whole += tl.sum(tl.sum(truth * truth, 1), 0)
        tl.debug_barrier()
        tl.store(exact_out + cell, rest, mask=mask)
        tl.store(missing_out + cell, correction, mask=mask)
        tl.store(mass + probe * 2, low / sums, mask=real)
    g = 1.0
    if (energy > whole * LEAST_ENERGY) & (energy > 1e-30) & (tl.abs(aligned) < 3e38):
        g = tl.minimum(tl.maximum(aligned / energy, 0.0), G_TOP)
    tl.store(coefficients + pair * 2, c)
    tl.store(coefficients + pair * 2 + 1, g)
    tl.store(probe_energy + pair, whole)


@triton.jit
def text_kernel(
    query, key, value, text_key, text_value, key_mask, out,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh,
    stride_vn, stride_mb, stride_ob, stride_oh, stride_on,
    heads, group_size, tokens, blocks, text, text_before, scale,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr, queries=None, query_text=None, query_before=0,
):  # fmt: skip
    """One program: BM text queries, densely over the ordered video keys and all text keys.

    queries, query_text, query_before: how many queries are no text and how many are, and where the
    former begin, if they are not the keys' tokens.
    """
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // heads, pair % heads
    key_head = head // group_size
    key_pair = batch * (heads // group_size) + key_head
    col = tl.arange(0, DP)
    in_dim = (col < D)[None, :]
    x = tl.program_id(0) * BM + tl.arange(0, BM)
    if queries is None:
        queries, query_text, query_before = tokens, text, text_before
    real = x < query_text
    source = (x + tl.where(x >= query_before, queries, 0)).to(tl.int64)
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
        peak, mass, acc = _online_step(
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
