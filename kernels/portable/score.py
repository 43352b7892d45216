"""Triton kernels of the routing scores: pooled queries, dispersions, scores.

Queries are read once, by the first kernel; what scoring takes of them is an eighth of their size.
Shapes as in `freqopt.kernels.reference`; the definition is reference.score_pairs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from freqopt.kernels.portable.prepare import BLOCK, SUB, _saturated

LOG2_BLOCK = tl.constexpr(6.0)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
TILE = tl.constexpr(128)  # freqopt.config.QUERY_TILE
SUBS = tl.constexpr(16)  # sub-tiles of a tile

# A product of the tensor cores leaves columns 8n + 2l and 8n + 2l + 1 in lane l of four, for every
# n. Sub-tiles of four tiles are kept in such an order that a lane's columns are of one tile:
# sub-tile s of tile i is row 8 (s // 2) + 2 (i % 4) + s % 2 of the 64 that the four have.
LANES = tl.constexpr(4)
PAIR = tl.constexpr(2)


@triton.jit
def _tile_at(index, tile_list, tiles, past):
    """Which tile the row `index` of the results is; `past` beyond the last."""
    tile = tl.where(index < tiles, index, past)
    if tile_list is not None:
        tile = tl.load(tile_list + index, mask=index < tiles, other=past)
    return tile


@triton.jit
def _row_of(index, sub):
    """Row of a head's pooled queries that belongs to a tile's sub-tile, in the order above."""
    return (index // LANES * SUBS + sub // PAIR * PAIR) * LANES + index % LANES * PAIR + sub % PAIR


@triton.jit
def pool_tiles_kernel(
    query, order, sub_mean, tile_square,
    stride_qb, stride_qh, stride_qn, heads, tokens, tiles, text_before, scale,
    D: tl.constexpr, DP: tl.constexpr, tile_list=None, order_row=0, order_share=1,
):  # fmt: skip
    """One program: mean queries of a tile's 16 sub-tiles, and the tile's mean squared query.

    sub_mean: (pairs, ceil(tiles / 4) * 64, D) in the order above, negated where the scale is
    negative; tile_square: (pairs, tiles, D). order: (T,) entries from pair // order_share *
    order_row on. Both are of the queries' type.
    """
    index = tl.program_id(1)
    pair = tl.program_id(0).to(tl.int64)
    tile = _tile_at(index, tile_list, tiles, 0)
    query += pair // heads * stride_qb + pair % heads * stride_qh
    order += pair // order_share * order_row
    sub = tl.arange(0, SUBS)
    col = tl.arange(0, DP)
    in_dim = col < D
    first = tile * TILE + sub * SUB
    total = tl.zeros((SUBS, DP), tl.float32)
    square = tl.zeros((SUBS, DP), tl.float32)
    for r in tl.static_range(SUB):
        valid = first + r < tokens
        source = tl.load(order + first + r, mask=valid, other=0).to(tl.int64) + text_before
        mask = valid[:, None] & in_dim[None, :]
        q = tl.load(query + source[:, None] * stride_qn + col[None, :], mask=mask, other=0.0)
        q = q.to(tl.float32)
        total += q
        square += q * q
    count = tl.minimum(tl.maximum(tokens - first, 1), SUB).to(tl.float32)
    mean = total / count[:, None]
    mean = tl.where(scale < 0, -mean, mean)
    row = pair * tl.cdiv(tiles, LANES) * (LANES * SUBS) + _row_of(index, sub)
    at = row[:, None] * D + col[None, :]
    tl.store(sub_mean + at, mean.to(sub_mean.dtype.element_ty), mask=in_dim[None, :])
    counted = tl.minimum(tokens - tile * TILE, TILE).to(tl.float32)
    tile_mean = _saturated(tl.sum(square, 0) / counted, tile_square.dtype.element_ty)
    tl.store(tile_square + (pair * tiles + index) * D + col, tile_mean, mask=in_dim)


@triton.jit
def _log_counts(block, blocks, ragged):
    """Base-2 logarithms of blocks' counts; ragged: that of the last block."""
    return tl.where(block < blocks - 1, LOG2_BLOCK, ragged)


@triton.jit
def _weight(half, capacity):
    """Tokens of a block times e^(mass term), from half the dispersion and the count's logarithm."""
    return tl.exp2(tl.minimum(half + capacity, 2.0 * capacity))


@triton.jit
def disperse_kernel(
    tile_square, key_var, score, mass_term,
    heads, group_size, tokens, tiles, blocks, scale,
    D: tl.constexpr, DP: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: half the dispersion of BI tiles' logits in BJ blocks, and its mass terms.

    Half the dispersion times log2(e) goes to where the pair's score is going to be (float32), the
    mass term, capped at the logarithm of the block's count, to `mass_term` (float16, in nats).
    """
    index = tl.program_id(1) * BI + tl.arange(0, BI)
    block = tl.program_id(2) * BJ + tl.arange(0, BJ)
    pair = tl.program_id(0).to(tl.int64)
    key_pair = pair // heads * (heads // group_size) + pair % heads // group_size
    col = tl.arange(0, DP)
    in_dim = (col < D)[None, :]
    rows, columns = (index < tiles)[:, None], (block < blocks)[:, None]
    tile_square += pair * tiles * D
    key_var += key_pair * blocks * D
    square = tl.load(tile_square + index[:, None] * D + col[None, :], mask=rows & in_dim, other=0.0)
    var = tl.load(key_var + block[:, None] * D + col[None, :], mask=columns & in_dim, other=0.0)
    half = tl.dot(square, tl.trans(var), input_precision=PRECISION) * (0.5 * scale * scale * LOG2E)
    capacity = _log_counts(
        block, blocks, tl.log2(tl.cast(tokens - (blocks - 1) * BLOCK, tl.float32))
    )
    corner = (pair * tiles + tl.program_id(1) * BI) * blocks + tl.program_id(2) * BJ
    where = tl.arange(0, BI)[:, None] * blocks + tl.arange(0, BJ)[None, :]
    inside = rows & (block < blocks)[None, :]
    term = tl.minimum(half, capacity[None, :]) * LN2
    tl.store(score + corner + where, half, mask=inside)
    tl.store(mass_term + corner + where, term.to(mass_term.dtype.element_ty), mask=inside)


@triton.jit
def _load_keys(low_key, block, blocks, col, D: tl.constexpr):
    """Centred means (BJ, DP) of key blocks; past the end, again the last block's."""
    offset = tl.minimum(block, blocks - 1)[:, None] * D + col[None, :]
    return tl.load(low_key + offset, mask=(col < D)[None, :], other=0.0)


@triton.jit
def _by_lane(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, COLUMNS) -> (ROWS, 4, COLUMNS / 4): columns by the lane that holds them."""
    x = tl.reshape(x, (ROWS, COLUMNS // (LANES * PAIR), LANES, PAIR))
    return tl.reshape(tl.permute(x, (0, 2, 1, 3)), (ROWS, LANES, COLUMNS // LANES))


@triton.jit
def score_kernel(
    sub_mean, low_key, spread, score,
    heads, group_size, tokens, tiles, blocks, scale,
    D: tl.constexpr, DP: tl.constexpr, TILES: tl.constexpr, BJ: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, tile_list=None, queries=None,
):  # fmt: skip
    """One program: TILES query tiles of one head against every key block, in two passes.

    tile_list: (tiles,) int32, which tiles the `tiles` rows of the results are; without it, all.
    queries: how many there are, if not one for each of the `tokens` keys.

    The first pass, WIDE blocks a step, finds the softmax normaliser of each sub-tile; the second,
    BJ blocks a step, puts the score (float32) of a pair in the place of half its dispersion. What
    depends on the pair of tile and block costs nothing per sub-tile: the first pass adds up
    exponentials times a weight, the second multiplies a sum over sub-tiles. Such sums stay within
    a thread, for four tiles and more, and lanes meet once, between the passes.
    """
    GROUP: tl.constexpr = min(TILES, LANES)  # tiles side by side among the rows of a program
    ROWS: tl.constexpr = TILES * SUBS
    first = tl.program_id(1) * TILES
    pair = tl.program_id(0).to(tl.int64)
    key_pair = pair // heads * (heads // group_size) + pair % heads // group_size
    low_key += key_pair * blocks * D
    spread += key_pair * blocks
    score += (pair * tiles + first) * blocks
    sub_mean += pair * tl.cdiv(tiles, LANES) * (LANES * SUBS) * D

    col = tl.arange(0, DP)
    row = tl.arange(0, ROWS)
    index = first + row // (GROUP * SUBS) * GROUP + row // PAIR % GROUP
    sub = row % (GROUP * SUBS) // (GROUP * PAIR) * PAIR + row % PAIR
    mean = tl.load(
        sub_mean + _row_of(index, sub)[:, None] * D + col[None, :],
        mask=(index < tiles)[:, None] & (col < D)[None, :],
        other=0.0,
    )
    tile = tl.arange(0, TILES)
    listed = first + tile < tiles
    # Logits are in base 2. The means carry the scale's sign, so that the largest product is the
    # largest logit.
    slope = tl.abs(scale) * LOG2E
    ragged = tl.log2(tl.cast(tokens - (blocks - 1) * BLOCK, tl.float32))

    peak = tl.full((ROWS, LANES), -1e30, tl.float32)
    total = tl.zeros((ROWS, LANES), tl.float32)
    for start in range(0, blocks, WIDE):
        block = start + tl.arange(0, WIDE)
        inside = (block < blocks)[None, :]
        where = tile[:, None] * blocks + block[None, :]
        half = tl.load(score + where, mask=listed[:, None] & inside, other=0.0)
        weight = tl.where(inside, _weight(half, _log_counts(block, blocks, ragged)[None, :]), 0.0)
        k = _load_keys(low_key, block, blocks, col, D)
        product = _by_lane(tl.dot(mean, tl.trans(k), input_precision=PRECISION), ROWS, WIDE)
        new_peak = tl.maximum(peak, tl.max(product, 2))
        base = new_peak * slope
        cell = tl.exp2(product * slope - base[:, :, None])
        few: tl.constexpr = (TILES // GROUP, 1, GROUP, 1, LANES, WIDE // LANES)
        every: tl.constexpr = (TILES // GROUP, SUBS // PAIR, GROUP, PAIR, LANES, WIDE // LANES)
        cell = tl.reshape(cell, every) * tl.reshape(_by_lane(weight, TILES, WIDE), few)
        cell = tl.reshape(cell, (ROWS, LANES, WIDE // LANES))
        total = total * tl.exp2(peak * slope - base) + tl.sum(cell, 2)
        peak = new_peak
    top = tl.max(peak, 1)
    total = tl.sum(total * tl.exp2((peak - top[:, None]) * slope), 1)

    # Squared mass and the sub-tile's share in its tile's mean come from one exponential.
    if queries is None:
        queries = tokens
    past = tl.cdiv(queries, TILE)
    left = queries - _tile_at(index, tile_list, tiles, past) * TILE
    present = tl.minimum(tl.maximum(tl.cdiv(left, SUB), 0), SUBS)
    share = tl.where(sub < present, 1.0 / tl.maximum(present, 1).to(tl.float32), 0.0)
    offset = tl.log2(share) - 2.0 * (top * slope + tl.log2(total))
    for start in range(0, blocks, BJ):
        block = start + tl.arange(0, BJ)
        inside = block < blocks
        k = _load_keys(low_key, block, blocks, col, D)
        twice = tl.dot(k, tl.trans(mean), input_precision=PRECISION) * (2.0 * slope)
        cell = tl.exp2(twice + offset[None, :])
        cell = tl.reshape(cell, (BJ, TILES // GROUP, SUBS // PAIR, GROUP, PAIR))
        cell = tl.reshape(tl.sum(tl.sum(cell, 4), 2), (BJ, TILES))
        there = listed[None, :] & inside[:, None]
        where = tile[None, :] * blocks + block[:, None]
        half = tl.load(score + where, mask=there, other=0.0)
        value_spread = tl.load(spread + block, mask=inside, other=0.0) * blocks
        weight = _weight(half, _log_counts(block, blocks, ragged)[:, None])
        value = tl.sqrt(cell * half * (2.0 * LN2)) * weight * value_spread[:, None]
        tl.store(score + where, value, mask=there)
