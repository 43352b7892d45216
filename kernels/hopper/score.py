"""The score kernel for Hopper, in Gluon: keys and dispersions arrive while a step is computed.

Does what `triton_score.score_kernel` does, for head dims 64 and 128 in half precision, on the same
pooled queries and by the same sums. There a step begins by waiting for its own keys; here the
tensor memory accelerator brings them a step ahead, and so do loads the dispersions. Three programs
of four warps fit a multiprocessor: one's exponentials run beside the products of another.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from freqopt.kernels.hopper.attend import BLOCK, HALF, LOG2E, OPERAND, TILE, barrier

TILES = gl.constexpr(8)  # query tiles of a program
ROWS = gl.constexpr(128)  # their sub-tiles
STEP = gl.constexpr(64)  # key blocks of a step
SUB = gl.constexpr(8)  # freqopt.config.SUB_TILE
LN2 = gl.constexpr(0.6931471805599453)
LOG2_BLOCK = gl.constexpr(6.0)

BY_ROW = gl.constexpr(
    gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
)
BY_BLOCK = gl.constexpr(
    gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16])
)
# Two times four tiles and a step's blocks: coalesced, and without conflicts between tiles.
CELLS = gl.constexpr(gl.BlockedLayout([1, 1, 1], [1, 1, 32], [1, 4, 1], [2, 1, 0]))
WEIGHTS = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 4, [2, 1, 0]))
MEANS = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))


@gluon.jit
def _fetch(low_key, first_block, step, steps, pieces, full, D: gl.constexpr):
    """Keys of a step into its buffer, of two; the second pass's steps follow the first's."""
    stage = step % 2
    arrived = full.index(stage)
    row = first_block + step % steps * STEP
    mbarrier.expect(arrived, STEP * D * 2)
    for i in gl.static_range(D // HALF):
        piece = pieces.index(stage * (D // HALF) + i)
        tma.async_copy_global_to_shared(low_key, [row, i * HALF], arrived, piece)


@gluon.jit
def _weight(half, capacity):
    """Tokens of a block times e^(mass term), from half the dispersion and the count's logarithm."""
    return gl.exp2(gl.minimum(half + capacity, 2.0 * capacity))


@gluon.jit
def _by_lane(x):
    """(ROWS, STEP) -> (ROWS, 4, STEP / 4): columns by the lane that holds them."""
    return x.reshape([ROWS, STEP // 8, 4, 2]).permute([0, 2, 1, 3]).reshape([ROWS, 4, STEP // 4])


@gluon.jit
def _as_tiles(x):
    """The reverse of _by_lane, rows apart: (2, 8, 4, 2, STEP), the first and third a tile's."""
    x = x.reshape([ROWS, 4, STEP // 8, 2]).permute([0, 2, 1, 3])
    return x.reshape([TILES // 4, 8, 4, 2, STEP])


@gluon.jit
def _tile_sums(cell):
    """(STEP, ROWS) -> (STEP, 2, 4): sums over a tile's sub-tiles, all in one thread."""
    return gl.sum(gl.sum(cell.reshape([STEP, TILES // 4, 8, 4, 2]), 4), 2)


@gluon.jit
def _add_step(product, weight, peak, total, slope):
    """A step of the online softmax's sums, (ROWS, 4): each lane has its own peak and total."""
    product = _by_lane(product)
    new_peak = gl.maximum(peak, gl.convert_layout(gl.max(product, 2), peak.type.layout))
    base = new_peak * slope
    wide = gl.expand_dims(gl.convert_layout(base, gl.SliceLayout(2, product.type.layout)), 2)
    cell = _as_tiles(gl.exp2(product * slope - wide))
    parent: gl.constexpr = cell.type.layout
    shared: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, parent))
    cell = cell * gl.expand_dims(gl.expand_dims(weight.load(shared), 1), 3)
    added = gl.sum(_by_lane(cell.reshape([ROWS, STEP])), 2)
    added = gl.convert_layout(added, peak.type.layout)
    return new_peak, total * gl.exp2(peak * slope - base) + added


@gluon.jit
def score_hopper_kernel(
    sub_mean, low_key, spread, score, tile_list,
    heads, group_size, tokens, tiles, blocks, scale,
    D: gl.constexpr, LISTED: gl.constexpr, OWN: gl.constexpr = True, queries=0,
):  # fmt: skip
    """One program: eight query tiles of one head against every key block, in two passes.

    low_key (pairs * blocks, D) is a tensor descriptor with boxes of (64, 64). tile_list: (tiles,)
    int32, read where LISTED. queries: how many, unless they are the keys' OWN. The rest as in
    portable.score.score_kernel.
    """
    if OWN:
        queries = tokens
    first = gl.program_id(1) * TILES
    pair = gl.program_id(0).to(gl.int64)
    key_pair = pair // heads * (heads // group_size) + pair % heads // group_size
    first_block = (key_pair * blocks).to(gl.int32)
    spread += key_pair * blocks
    score += (pair * tiles + first) * blocks
    sub_mean += (pair * ((tiles + 3) // 4) * HALF + first * 16) * D
    steps = (blocks + STEP - 1) // STEP

    means = gl.allocate_shared_memory(low_key.dtype, [ROWS, D], OPERAND)
    ring = gl.allocate_shared_memory(low_key.dtype, [2, STEP, D], OPERAND)
    weights = gl.allocate_shared_memory(gl.float32, [2, TILES // 4, 4, STEP], WEIGHTS)
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(2):
        mbarrier.init(full.index(stage), count=1)
    pieces = ring._reinterpret(low_key.dtype, [2 * (D // HALF), HALF, HALF], OPERAND)

    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, MEANS))
    col = gl.arange(0, D, layout=gl.SliceLayout(0, MEANS))
    there = first + row // 64 * 4 + row // 2 % 4 < tiles
    where = gl.expand_dims(row, 1) * D + gl.expand_dims(col, 0)
    means.store(gl.load(sub_mean + where, mask=gl.expand_dims(there, 1), other=0.0))
    fence_async_shared()
    barrier()
    _fetch(low_key, first_block, 0, steps, pieces, full, D)

    slope = gl.abs(scale) * LOG2E
    # The program's number makes it a tensor where counts are constants.
    ragged = tokens - (blocks - 1) * BLOCK + gl.program_id(0) * 0
    ragged = gl.log2(ragged.to(gl.float32))
    four = gl.arange(0, TILES // 4, layout=gl.SliceLayout(1, gl.SliceLayout(2, CELLS)))
    one = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(2, CELLS)))
    tile = gl.expand_dims(four, 1) * 4 + gl.expand_dims(one, 0)
    tile = gl.expand_dims(tile, 2)
    column = gl.arange(0, STEP, layout=gl.SliceLayout(0, gl.SliceLayout(0, CELLS)))
    column = gl.expand_dims(gl.expand_dims(column, 0), 0)
    cells = score + tile * blocks + column
    listed = first + tile < tiles

    zero = gl.zeros([ROWS, STEP], gl.float32, layout=BY_ROW)
    total = gl.sum(_by_lane(zero), 2)
    peak = total - 1e30
    half = gl.load(cells, mask=listed & (column < blocks), other=0.0)
    for i in range(steps):
        block = i * STEP + column
        capacity = gl.where(block < blocks - 1, LOG2_BLOCK, ragged)
        weight = gl.where(block < blocks, _weight(half, capacity), 0.0)
        weights.index(i % 2).store(weight)
        cells += STEP
        half = gl.load(cells, mask=listed & (block + STEP < blocks), other=0.0)
        # All have left the buffer of the step before, and the weights are there.
        barrier()
        _fetch(low_key, first_block, i + 1, steps, pieces, full, D)
        mbarrier.wait(full.index(i % 2), i // 2 & 1)
        keys = ring.index(i % 2).permute([1, 0])
        product = warpgroup_mma(means, keys, zero, use_acc=False, is_async=True)
        product = warpgroup_mma_wait(0, deps=[product])
        if i == steps - 1:  # columns past the end are the next head's keys
            at = gl.arange(0, STEP, layout=gl.SliceLayout(0, BY_ROW))
            product = gl.where(gl.expand_dims(i * STEP + at < blocks, 0), product, 0.0)
        peak, total = _add_step(product, weights.index(i % 2), peak, total, slope)
    top = gl.max(peak, 1)
    fade = gl.exp2((peak - gl.expand_dims(top, 1)) * slope)
    mass = top * slope + gl.log2(gl.sum(total * fade, 1))
    mass = gl.convert_layout(mass, gl.SliceLayout(0, BY_BLOCK))

    # Squared mass and the sub-tile's share in its tile's mean come from one exponential.
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(0, BY_BLOCK))
    index = first + row // 64 * 4 + row // 2 % 4
    sub = row % 64 // 8 * 2 + row % 2
    past = (queries + TILE - 1) // TILE
    at_tile = gl.where(index < tiles, index, past)
    if LISTED:
        at_tile = gl.load(tile_list + index, mask=index < tiles, other=past)
    left = queries - at_tile * TILE
    present = gl.minimum(gl.maximum((left + SUB - 1) // SUB, 0), 16)
    share = gl.where(sub < present, 1.0 / gl.maximum(present, 1).to(gl.float32), 0.0)
    offset = gl.expand_dims(gl.log2(share) - 2.0 * mass, 0)

    zero = gl.zeros([STEP, ROWS], gl.float32, layout=BY_BLOCK)
    sums: gl.constexpr = _tile_sums(zero).type.layout
    block = gl.arange(0, STEP, layout=gl.SliceLayout(1, gl.SliceLayout(2, sums)))
    four = gl.arange(0, TILES // 4, layout=gl.SliceLayout(0, gl.SliceLayout(2, sums)))
    one = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(0, sums)))
    tile = gl.expand_dims(gl.expand_dims(four, 0), 2) * 4
    tile = tile + gl.expand_dims(gl.expand_dims(one, 0), 0)
    block = gl.expand_dims(gl.expand_dims(block, 1), 2)
    cells = score + tile * blocks + block
    listed = first + tile < tiles
    half = gl.load(cells, mask=listed & (block < blocks), other=0.0)
    value_spread = gl.load(spread + block, mask=block < blocks, other=0.0)
    for i in range(steps, 2 * steps):
        barrier()
        if i + 1 < 2 * steps:
            _fetch(low_key, first_block, i + 1, steps, pieces, full, D)
        mbarrier.wait(full.index(i % 2), i // 2 & 1)
        turned = means.permute([1, 0])
        product = warpgroup_mma(ring.index(i % 2), turned, zero, use_acc=False, is_async=True)
        product = warpgroup_mma_wait(0, deps=[product])
        capacity = gl.where(block < blocks - 1, LOG2_BLOCK, ragged)
        factor = _weight(half, capacity) * (value_spread * blocks)
        twice = half * (2.0 * LN2)
        here, target = listed & (block < blocks), cells
        block += STEP
        cells += STEP
        half = gl.load(cells, mask=listed & (block < blocks), other=0.0)
        value_spread = gl.load(spread + block, mask=block < blocks, other=0.0)
        cell = _tile_sums(gl.exp2(product * (2.0 * slope) + offset))
        gl.store(target, gl.sqrt(cell * twice) * factor, mask=here)
