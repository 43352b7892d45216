"""Triton kernel that makes a head's first-order matrix of what its probes left."""

from __future__ import annotations

import triton
import triton.language as tl

from freqopt.kernels.portable.attend import _turned
from freqopt.kernels.portable.glue import LEAST_ENERGY, _probe_rows
from freqopt.kernels.reference import (
    INVERSE_STEPS,
    LEAST_TERM,
    LEAST_TOLD,
    RIDGE,
    RIDGE_PROBES,
    UPDATE_MAX,
    UPDATE_SHARE,
)

PROBES = tl.constexpr(RIDGE_PROBES)
STRENGTH = tl.constexpr(RIDGE)
LEAST_TERMS = tl.constexpr(LEAST_TERM)
LEAST_SHARE_TOLD = tl.constexpr(LEAST_TOLD)
MOST = tl.constexpr(UPDATE_MAX)
TAKEN = tl.constexpr(UPDATE_SHARE)
LAST_STEPS = tl.constexpr(3)
FIRST_STEPS = tl.constexpr(INVERSE_STEPS - LAST_STEPS.value)
"""Each step squares what the inverse is off by: the first bring it to where only the last have to
be accurate."""

SINGLE = tl.constexpr("tf32x3")
"""Precision of what decides on the inverse of a matrix whose eigenvalues differ by 86."""

HALF_TOP = tl.constexpr(65504.0)


@triton.jit
def _sum(x):
    """Of all cells."""
    return tl.sum(tl.sum(x, 1), 0)


@triton.jit
def _left_of(exact_out, missing_out, cell, mask, g):
    """What g leaves of the probes, and their first-order terms, at cells of fit_kernel's."""
    turned = tl.load(missing_out + cell, mask=mask, other=0.0)
    return tl.load(exact_out + cell, mask=mask, other=0.0) - g * turned, turned


@triton.jit
def _inverse(matrix, eye):
    """Inverse of the probes' products, as large as `eye`."""
    found = eye / (1.0 + STRENGTH)
    for _step in range(FIRST_STEPS):
        product = tl.dot(matrix, found, input_precision="tf32")
        found = 2.0 * found - tl.dot(found, product, input_precision="tf32")
    for _step in range(LAST_STEPS):
        product = tl.dot(matrix, found, input_precision=SINGLE)
        found = 2.0 * found - tl.dot(found, product, input_precision=SINGLE)
    return found


@triton.jit
def ridge_kernel(
    query, order, h_bar, mass, exact_out, missing_out, coefficients, probe_energy,
    matrix, probe_error,
    stride_qb, stride_qh, stride_qn,
    heads, group_size, tokens, probes, parts, text_before, scale,
    D: tl.constexpr, DP: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
    order_row=0, order_share=1,
):  # fmt: skip
    """One program per (batch, head): `reference.fit_update` on what fit_kernel left.

    order, tokens, text_before: the queries', as in pool_tiles_kernel. BD: channels at a time;
    PRECISION: of products that are no more accurate than the attended tensors have to be.
    Writes the first-order matrix (pairs, D, D) and the relative L2 error (pairs,). Without probes
    the matrix is H-bar times the g that it is given.
    """
    pair = tl.program_id(0).to(tl.int64)
    batch, head = pair // heads, pair % heads
    query += batch * stride_qb + head * stride_qh
    order += pair // order_share * order_row
    h_bar += (batch * (heads // group_size) + head // group_size) * D * D
    matrix += pair * D * D
    mass += pair * parts * probes * 2
    exact_out += pair * parts * probes * D
    missing_out += pair * parts * probes * D
    g = tl.load(coefficients + pair * 2 + 1)
    whole = tl.load(probe_energy + pair)
    lane = tl.arange(0, PROBES)
    col = tl.arange(0, BD)
    eye = (lane[:, None] == lane[None, :]).to(tl.float32)

    chosen = tl.minimum(probes, PROBES)
    probe = (2 * lane + 1) * probes // tl.maximum(2 * chosen, 1)
    probe = tl.where(lane < chosen, probe, probes)
    real = (probe < probes)[:, None]
    at = tl.minimum(probe, tl.maximum(probes - 1, 0))
    rows, _q, _tile = _probe_rows(
        query, order, probe, probes, tokens, text_before, stride_qn, col, D
    )
    share = tl.load(mass + at * 2, mask=probe < probes, other=0.0) * scale
    of_queries = tl.zeros((PROBES, PROBES), tl.float32)
    of_terms = tl.zeros((PROBES, PROBES), tl.float32)
    for start in range(0, DP, BD):
        inside = real & (start + col < D)[None, :]
        f = tl.load(rows + (start + col)[None, :], mask=inside, other=0.0)
        f = f.to(tl.float32) * share[:, None]
        cell = at[:, None] * D + (start + col)[None, :]
        _left, turned = _left_of(exact_out, missing_out, cell, inside, g)
        of_queries = tl.dot(f, tl.trans(f), of_queries, input_precision=SINGLE)
        of_terms = tl.dot(turned, tl.trans(turned), of_terms, input_precision=SINGLE)
    energy = _sum(of_terms * eye)
    query_trace = tl.maximum(_sum(of_queries * eye), 1e-30)
    term_trace = tl.maximum(energy, 1e-30)
    products = of_queries / query_trace + of_terms / term_trace
    inverse = _inverse(products + eye * STRENGTH, eye)
    # A probe's own weight over this is what all others miss of it.
    own = tl.sum(inverse * eye, 1)[:, None]

    aligned, told_energy, before, terms = 0.0, 0.0, 0.0, 0.0
    for start in range(0, DP, BD):
        inside = real & (start + col < D)[None, :]
        cell = at[:, None] * D + (start + col)[None, :]
        left, _turned_cells = _left_of(exact_out, missing_out, cell, inside, g)
        weights = tl.dot(inverse, left, input_precision=PRECISION)
        told = left - weights / own
        own_terms = left - weights * STRENGTH  # of the update
        terms += _sum(own_terms * own_terms)
        aligned += _sum(left * told)
        told_energy += _sum(told * told)
        before += _sum(left * left)
    fits = (energy > whole * LEAST_ENERGY) & (energy > 1e-30)
    fits = fits & (energy > before * LEAST_TERMS) & (told_energy > before * LEAST_SHARE_TOLD)
    factor = tl.maximum(aligned / tl.maximum(told_energy, 1e-30), 0.0)
    most = tl.minimum(tl.sqrt(energy / tl.maximum(terms, 1e-30)) * MOST, 1.0)
    factor = tl.minimum(factor, most) * TAKEN
    factor = tl.where(fits & (tl.abs(aligned) < 3e38), factor, 0.0)
    wrong = before
    if factor > 0.0:
        wrong = tl.maximum(before - factor * (2.0 * aligned - factor * told_energy), 0.0)

    for start in range(0, DP, BD):
        key_col = start + col
        z = tl.zeros((PROBES, BD), tl.float32)
        if factor > 0.0:
            for first in range(0, DP, BD):
                value_col = first + col
                inside = real & (value_col < D)[None, :]
                cell = at[:, None] * D + value_col[None, :]
                _left, turned = _left_of(exact_out, missing_out, cell, inside, g)
                in_matrix = (value_col < D)[:, None] & (key_col < D)[None, :]
                where = value_col[:, None] * D + key_col[None, :]
                h = tl.load(h_bar + where, mask=in_matrix, other=0.0).to(tl.float32)
                z = tl.dot(turned, h, z, input_precision=PRECISION)
            f = tl.load(rows + key_col[None, :], mask=real & (key_col < D)[None, :], other=0.0).to(
                tl.float32
            )
            z = z / term_trace + f * (share / query_trace)[:, None]
        for first in range(0, DP, BD):
            value_col = first + col
            in_matrix = (value_col < D)[:, None] & (key_col < D)[None, :]
            where = value_col[:, None] * D + key_col[None, :]
            m = g * tl.load(h_bar + where, mask=in_matrix, other=0.0).to(tl.float32)
            if factor > 0.0:
                inside = real & (value_col < D)[None, :]
                cell = at[:, None] * D + value_col[None, :]
                left, _turned_cells = _left_of(exact_out, missing_out, cell, inside, g)
                weights = tl.dot(inverse, left, input_precision=PRECISION)
                m += factor * tl.dot(tl.trans(weights), z, input_precision=PRECISION)
            if matrix.dtype.element_ty == tl.float16:
                m = tl.minimum(tl.maximum(m, -HALF_TOP), HALF_TOP)
            tl.store(matrix + where, m.to(matrix.dtype.element_ty), mask=in_matrix)

    if probes > PROBES:
        # Probes that it was not fitted to are predicted as they are.
        tl.debug_barrier()
        wide = tl.arange(0, DP)
        for first in range(0, probes, PROBES):
            other = first + lane
            which = (2 * other + 1) * chosen // (2 * probes)
            seen = (2 * which + 1) * probes // (2 * chosen) == other
            there = (other < probes) & ~seen
            other_rows, _others, _tiles = _probe_rows(
                query, order, other, probes, tokens, text_before, stride_qn, wide, D
            )
            predicted = _turned(other_rows, matrix, there[:, None], D, DP, PROBES, PRECISION)
            other_share = tl.load(mass + other * 2, mask=there, other=0.0) * scale
            cells = there[:, None] & (wide < D)[None, :]
            where_other = other[:, None] * D + wide[None, :]
            rest = tl.load(exact_out + where_other, mask=cells, other=0.0)
            rest = tl.where(cells, rest - other_share[:, None] * predicted, 0.0)
            wrong += _sum(rest * rest)
    tl.store(probe_error + pair, tl.sqrt(wrong / tl.maximum(whole, 1e-30)))
