"""The Hopper attention kernel with 8-bit products in the exact blocks, for `low_precision`.

Keys are kept as int8 around their head's mean, which a softmax does not see, in one step per head;
queries as int8 in one step per row. With VALUES8, values are e4m3 around their mean and so are the
softmax weights. Low band and first-order term stay in half precision. Head dim 128, no text.
What loads, scores and adds up the low band is `freqopt.kernels.gluon_attend`'s own.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from freqopt.kernels.gluon_attend import (
    BLOCK,
    HALF,
    LOG2E,
    MMA,
    ROWS,
    TILE,
    _as_operand,
    _buffers,
    _faded,
    _leave,
    _list_bias,
    _load_tile,
    _low_bias,
    _low_term,
    _softmax,
    _start_scores,
    _start_values,
    _turned,
    barrier,
)

DIM = 128
E4M3_MAX = 448.0

# An integer below 2^22 added to the bits of 1.5 * 2^23 is that number plus the integer: sums that
# start there need no conversion, as the softmax's multiply-add takes the number off again.
ORIGIN = gl.constexpr(12582912.0)
ORIGIN_BITS = gl.constexpr(0x4B400000)

MMA8 = gl.constexpr(
    gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32])
)
KEYS8 = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2))
VALUES8 = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=8, rank=2))


@triton.jit
def quantise_kernel(
    key, value, key_shift, key_step, value_shift, value_step, key_out, value_out, blocks,
    D: tl.constexpr, GROUP: tl.constexpr, WITH_VALUES: tl.constexpr,
):  # fmt: skip
    """One program: GROUP key blocks of one head. Values are transposed, (D, 64 keys) a block.

    Keys within 16 are in the order in which a thread's e4m3 weights lie after the score product, so
    that weights become an operand without an exchange between lanes ("FlashAttention-3", §3.3).
    """
    group = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    col = tl.arange(0, D)
    row = tl.arange(0, 64)
    shift = tl.load(key_shift + pair * D + col)
    scale = 1.0 / tl.load(key_step + pair)
    source = (row & 48) | (row & 2) << 2 | (row & 12) >> 1 | (row & 1)
    for i in range(GROUP):
        block = group * GROUP + i
        there = block < blocks
        base = (pair * blocks + block) * 64
        where = (base + row)[:, None] * D + col[None, :]
        k = tl.load(key + where, mask=there, other=0.0).to(tl.float32)
        # Rows past the last token may be out of range; their weight is 0.
        x = tl.minimum(tl.maximum((k - shift[None, :]) * scale, -127.0), 127.0) + 12582912.0
        tl.store(key_out + where, x.to(tl.int32, bitcast=True).to(tl.int8), mask=there)
        if WITH_VALUES:
            mean = tl.load(value_shift + pair * D + col)
            down = 1.0 / tl.load(value_step + pair)
            at = (base + source)[:, None] * D + col[None, :]
            v = tl.load(value + at, mask=there, other=0.0).to(tl.float32)
            v = ((v - mean[None, :]) * down).to(tl.float8e4nv)
            to = ((pair * blocks + block) * D + col)[:, None] * 64 + row[None, :]
            tl.store(value_out + to, tl.trans(v), mask=there)


@gluon.jit
def _load8(source, row0, row1, pieces, full, empty, step, D: gl.constexpr, STAGES: gl.constexpr):
    """Two blocks of 64 keys in 8 bits, from rows row0 and row1, into half of the ring's next
    buffer."""
    stage = step % STAGES
    mbarrier.wait(empty.index(stage), (step // STAGES + 1) & 1)
    arrived = full.index(stage)
    mbarrier.expect(arrived, TILE * D)
    tma.async_copy_global_to_shared(source, [row0, 0], arrived, pieces.index(stage * 4))
    tma.async_copy_global_to_shared(source, [row1, 0], arrived, pieces.index(stage * 4 + 1))


@gluon.jit
def _produce(
    key, value, low_key, low_value, low_order, exact_list, n_exact, key_pair, blocks,
    k_pieces, v_pieces, k8_pieces, v8_pieces, k_full, k_empty, v_full, v_empty,
    D: gl.constexpr, WITH_VALUES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """As `gluon_attend._produce`, with 8-bit keys (and values) of the exact blocks."""
    low_tiles = (blocks + TILE - 1) // TILE
    first_block = key_pair * blocks
    for i in range(low_tiles):
        row = first_block + i * TILE
        _load_tile(low_key, row, row + HALF, k_pieces, k_full, k_empty, i, D, STAGES)
        _load_tile(low_value, row, row + HALF, v_pieces, v_full, v_empty, i, D, STAGES)
    row = key_pair * D
    _load_tile(low_order, row, row + D - HALF, k_pieces, k_full, k_empty, low_tiles, D, STAGES)
    pairs = (n_exact + 1) // 2
    for i in range(pairs):
        at = gl.where(i == 0, pairs - 1, i - 1) * 2
        block0 = first_block + gl.load(exact_list + at)
        block1 = first_block + gl.load(exact_list + gl.minimum(at + 1, n_exact - 1))
        step = low_tiles + i
        row0, row1 = block0 * BLOCK, block1 * BLOCK
        _load8(key, row0, row1, k8_pieces, k_full, k_empty, step + 1, D, STAGES)
        if WITH_VALUES:
            row0, row1 = block0 * D, block1 * D
            _load8(value, row0, row1, v8_pieces, v_full, v_empty, step, D, STAGES)
        else:
            _load_tile(value, row0, row1, v_pieces, v_full, v_empty, step, D, STAGES)


@gluon.jit
def _start_scores8(q, ring, full, step, origin, STAGES: gl.constexpr):
    """Issue origin + q k^T in integers on the ring's buffer of a step."""
    stage = step % STAGES
    mbarrier.wait(full.index(stage), (step // STAGES) & 1)
    return warpgroup_mma(q, ring.index(stage * 2).permute([1, 0]), origin, is_async=True)


@gluon.jit
def _start_values8(weight, ring, full, step, acc, STAGES: gl.constexpr):
    """Issue acc + weight v in e4m3 on the ring's buffer of a step."""
    stage = step % STAGES
    mbarrier.wait(full.index(stage), (step // STAGES) & 1)
    return warpgroup_mma(weight, ring.index(stage * 2).permute([1, 0]), acc, is_async=True)


@gluon.jit
def _softmax8(logit, peak, mass, row_scale, origin_scaled):
    """`gluon_attend._softmax` of integers around ORIGIN, which a row's scale makes logits."""
    new_peak = gl.maximum(peak, (gl.max(logit, 1) - ORIGIN) * row_scale)
    fade = gl.exp2(peak - new_peak)
    offset = gl.expand_dims(new_peak + origin_scaled, 1)
    weight = gl.exp2(logit * gl.expand_dims(row_scale, 1) - offset)
    return weight, new_peak, mass * fade + gl.sum(weight, 1), fade


@gluon.jit
def _as_operand8(weight, ACC: gl.constexpr):
    """Weights as the left operand in e4m3, keys ordered as by `quantise_kernel`."""
    layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=ACC, k_width=4)
    ordered = weight.to(gl.float8e4nv).reshape([ROWS, 8, 2, 4, 2]).permute([0, 1, 3, 2, 4])
    return gl.convert_layout(ordered.reshape([ROWS, TILE]), layout, assert_trivial=True)


@gluon.jit
def _number(logit):
    """Integer sums that started at ORIGIN's bits, as float32."""
    return logit.to(gl.float32, bitcast=True)


@gluon.jit
def _consume(
    query, order, key_step, value_shift, value_step, mass_term, coefficients, exact_list, n_exact,
    out, q_buffer, q8_buffer, k_ring, v_ring, k8_ring, v8_ring, k_full, k_empty, v_full, v_empty,
    first_position, tokens, blocks, stride_qn, stride_on, scale,
    D: gl.constexpr, WITH_VALUES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """64 queries through the low band, its first-order term and the exact blocks."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16]
    )
    ACC8: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 32]
    )
    GATHERED: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    dtype: gl.constexpr = v_ring.dtype
    term = _low_term(mass_term, 0, blocks)
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, GATHERED))
    col = gl.arange(0, D, layout=gl.SliceLayout(0, GATHERED))
    position = first_position + row
    real = position < tokens
    source = gl.load(order + position, mask=real, other=0).to(gl.int64)
    rows = gl.expand_dims(source, 1)
    cols = gl.expand_dims(col, 0)
    there = gl.expand_dims(real, 1)
    q_buffer.store(gl.load(query + rows * stride_qn + cols, mask=there, other=0.0))
    fence_async_shared()
    barrier()
    scale_log2 = scale * LOG2E
    c = gl.load(coefficients)
    g = gl.load(coefficients + 1)

    # The low band, as in gluon_attend. No row needs a shift: the exact keys are centred too.
    zero = gl.zeros([ROWS, TILE], gl.float32, layout=MMA)
    acc = gl.zeros([ROWS, D], gl.float32, layout=ACC)
    peak = gl.full([ROWS], -1e30, gl.float32, layout=gl.SliceLayout(1, MMA))
    mass = gl.zeros([ROWS], gl.float32, layout=gl.SliceLayout(1, MMA))
    low_tiles = (blocks + TILE - 1) // TILE
    inverse_scale = 1.0 / scale_log2
    pending = _start_scores(q_buffer, k_ring, k_full, 0, zero, STAGES)
    bias = _low_bias(term, c, 0, tokens, inverse_scale)
    term = _low_term(mass_term, TILE, blocks)
    logit = warpgroup_mma_wait(0, deps=[pending])
    _leave(k_empty, 0, STAGES)
    weight, peak, mass, fade = _softmax(logit + bias, peak, mass, scale_log2)
    operand = _as_operand(weight, dtype, ACC)
    for i in range(1, low_tiles):
        pending = _start_scores(q_buffer, k_ring, k_full, i, zero, STAGES)
        growing = _start_values(operand, v_ring, v_full, i - 1, acc, STAGES)
        bias = _low_bias(term, c, i * TILE, tokens, inverse_scale)
        term = _low_term(mass_term, (i + 1) * TILE, blocks)
        logit = warpgroup_mma_wait(1, deps=[pending])
        _leave(k_empty, i, STAGES)
        weight, peak, mass, fade = _softmax(logit + bias, peak, mass, scale_log2)
        acc, operand = warpgroup_mma_wait(0, deps=[growing, operand])
        _leave(v_empty, i - 1, STAGES)
        acc = _faded(acc, fade)
        operand = _as_operand(weight, dtype, ACC)
    growing = _start_values(operand, v_ring, v_full, low_tiles - 1, acc, STAGES)
    acc, operand = warpgroup_mma_wait(0, deps=[growing, operand])
    _leave(v_empty, low_tiles - 1, STAGES)
    turned = _turned(q_buffer, k_ring, k_full, low_tiles, D, ACC, STAGES)
    _leave(k_empty, low_tiles, STAGES)
    first_order = gl.convert_layout(mass * (g * scale), gl.SliceLayout(1, ACC))
    acc = acc + turned * gl.expand_dims(first_order, 1)

    # Queries in 8 bits take the place of the others: shared memory has no room for both.
    q_rows = q_buffer.load(GATHERED).to(gl.float32)
    row_step = gl.maximum(gl.max(gl.abs(q_rows), 1), 1e-20) * (1.0 / 127.0)
    whole = (q_rows * gl.expand_dims(1.0 / row_step, 1) + ORIGIN).to(gl.int32, bitcast=True)
    barrier()
    q8_buffer.store(whole.to(gl.int8))
    fence_async_shared()
    barrier()
    row_scale = row_step * (gl.load(key_step) * scale_log2)
    row_scale = gl.convert_layout(row_scale, gl.SliceLayout(1, MMA8))
    origin_scaled = row_scale * ORIGIN
    origin = gl.full([ROWS, TILE], ORIGIN_BITS, gl.int32, layout=MMA8)
    peak = gl.convert_layout(peak, gl.SliceLayout(1, MMA8))
    mass = gl.convert_layout(mass, gl.SliceLayout(1, MMA8))
    pairs = (n_exact + 1) // 2
    bias = gl.convert_layout(_list_bias(exact_list, (pairs - 1) * 2, n_exact, tokens), MMA8)
    step = low_tiles

    if WITH_VALUES:
        # A weight of 1 is kept as 256: e4m3 ends at 448 and has all its digits from 1 / 64 up.
        peak -= 8.0
        mass *= 256.0
        down = gl.load(value_step)
        mean = gl.load(value_shift + gl.arange(0, D, layout=gl.SliceLayout(0, ACC)))
        low_mass = gl.convert_layout(mass, gl.SliceLayout(1, ACC))
        acc = acc * 256.0 - gl.expand_dims(low_mass, 1) * gl.expand_dims(mean, 0)
        acc = gl.convert_layout(acc * (1.0 / down), ACC8)
        first = _start_scores8(q8_buffer, k8_ring, k_full, step + 1, origin, STAGES)
        logit8 = _number(warpgroup_mma_wait(0, deps=[first])) + bias
        _leave(k_empty, step + 1, STAGES)
        weight8, peak, mass, fade = _softmax8(logit8, peak, mass, row_scale, origin_scaled)
        # Weights are rounded and sums fade where the next step begins: 8-bit registers that a loop
        # carries are packed anew each time, and a fade at its end makes ptxas serialise products.
        for i in range(1, pairs):
            acc = _faded(acc, fade)
            operand8 = _as_operand8(weight8, ACC8)
            pending8 = _start_scores8(q8_buffer, k8_ring, k_full, step + 1 + i, origin, STAGES)
            gaining = _start_values8(operand8, v8_ring, v_full, step + i - 1, acc, STAGES)
            logit8 = _number(warpgroup_mma_wait(1, deps=[pending8]))
            _leave(k_empty, step + 1 + i, STAGES)
            weight8, peak, mass, fade = _softmax8(logit8, peak, mass, row_scale, origin_scaled)
            acc = warpgroup_mma_wait(0, deps=[gaining])
            _leave(v_empty, step + i - 1, STAGES)
        operand8 = _as_operand8(weight8, ACC8)
        acc = _faded(acc, fade)
        gaining = _start_values8(operand8, v8_ring, v_full, step + pairs - 1, acc, STAGES)
        acc = warpgroup_mma_wait(0, deps=[gaining])
        total = gl.expand_dims(gl.convert_layout(mass, gl.SliceLayout(1, ACC8)), 1)
        mean = gl.load(value_shift + gl.arange(0, D, layout=gl.SliceLayout(0, ACC8)))
        result = acc / total * gl.load(value_step) + gl.expand_dims(mean, 0)
        q_buffer.store(result.to(out.dtype.element_ty))
    else:
        pending = _start_scores8(q8_buffer, k8_ring, k_full, step + 1, origin, STAGES)
        logit = _number(warpgroup_mma_wait(0, deps=[pending])) + bias
        _leave(k_empty, step + 1, STAGES)
        weight, peak, mass, fade = _softmax8(logit, peak, mass, row_scale, origin_scaled)
        acc = _faded(acc, fade)
        operand = _as_operand(weight, dtype, ACC)
        for i in range(1, pairs):
            pending = _start_scores8(q8_buffer, k8_ring, k_full, step + 1 + i, origin, STAGES)
            growing = _start_values(operand, v_ring, v_full, step + i - 1, acc, STAGES)
            logit = _number(warpgroup_mma_wait(1, deps=[pending]))
            _leave(k_empty, step + 1 + i, STAGES)
            weight, peak, mass, fade = _softmax8(logit, peak, mass, row_scale, origin_scaled)
            acc, operand = warpgroup_mma_wait(0, deps=[growing, operand])
            _leave(v_empty, step + i - 1, STAGES)
            acc = _faded(acc, fade)
            operand = _as_operand(weight, dtype, ACC)
        growing = _start_values(operand, v_ring, v_full, step + pairs - 1, acc, STAGES)
        acc, operand = warpgroup_mma_wait(0, deps=[growing, operand])
        total = gl.expand_dims(gl.convert_layout(mass, gl.SliceLayout(1, ACC)), 1)
        q_buffer.store((acc / total).to(out.dtype.element_ty))
    barrier()
    gl.store(out + rows * stride_on + cols, q_buffer.load(GATHERED), mask=there)


@gluon.jit
def attend8_kernel(
    query, order, key, value, low_key, low_value, low_order, key_step, value_shift, value_step,
    mass_term, coefficients, exact_list, counts, out,
    stride_qb, stride_qh, stride_qn, stride_ob, stride_oh, stride_on,
    heads, group_size, tokens, tiles, blocks, scale,
    D: gl.constexpr, WITH_VALUES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One program: the 128 queries of one tile of one head; see `attend_hopper_kernel`.

    key: descriptor of int8 (pairs * blocks * 64, D), boxes (64, D); value: as there, or with
    WITH_VALUES of e4m3 (pairs * blocks * D, 64), boxes (D, 64). key_step, value_step (pairs,).
    """
    tile = gl.program_id(0)
    pair = gl.program_id(1).to(gl.int64)
    batch = pair // heads
    head = pair % heads
    key_pair = (batch * (heads // group_size) + head // group_size).to(gl.int32)
    row = pair * tiles + tile
    query += batch * stride_qb + head * stride_qh
    out += batch * stride_ob + head * stride_oh
    exact_list += row * blocks
    mass_term += row * blocks
    n_exact = gl.load(counts + row)

    q_buffers, rings, pieces, barriers = _buffers(low_key.dtype, D, STAGES)
    k_ring, v_ring = rings
    k_pieces, v_pieces = pieces
    k_full, k_empty, v_full, v_empty = barriers
    q8_buffers = q_buffers._reinterpret(gl.int8, [4, ROWS, D], KEYS8)
    k8_ring = k_ring._reinterpret(gl.int8, [STAGES * 2, TILE, D], KEYS8)
    k8_pieces = k_ring._reinterpret(gl.int8, [STAGES * 4, BLOCK, D], KEYS8)
    v8_ring = v_ring._reinterpret(gl.float8e4nv, [STAGES * 2, D, TILE], VALUES8)
    v8_pieces = v_ring._reinterpret(gl.float8e4nv, [STAGES * 4, D, BLOCK], VALUES8)

    first = tile * TILE
    mean = value_shift + key_pair * D
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    query, order, key_step + key_pair, mean, value_step + key_pair, mass_term,
                    coefficients + pair * 2, exact_list, n_exact, out, q_buffers.index(0),
                    q8_buffers.index(0), k_ring, v_ring, k8_ring, v8_ring, k_full, k_empty,
                    v_full, v_empty, first, tokens, blocks, stride_qn, stride_on, scale, D,
                    WITH_VALUES, STAGES,
                ),
            ),
            (
                _consume,
                (
                    query, order, key_step + key_pair, mean, value_step + key_pair, mass_term,
                    coefficients + pair * 2, exact_list, n_exact, out, q_buffers.index(1),
                    q8_buffers.index(2), k_ring, v_ring, k8_ring, v8_ring, k_full, k_empty,
                    v_full, v_empty, first + ROWS, tokens, blocks, stride_qn, stride_on, scale, D,
                    WITH_VALUES, STAGES,
                ),
            ),
            (
                _produce,
                (
                    key, value, low_key, low_value, low_order, exact_list, n_exact, key_pair,
                    blocks, k_pieces, v_pieces, k8_pieces, v8_pieces, k_full, k_empty, v_full,
                    v_empty, D, WITH_VALUES, STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
