"""The attention kernel for Hopper, in Gluon: warps with different jobs instead of one loop.

Does what `portable.attend.attend_kernel` does, for head dims 64 and 128 in half precision. Two
consumer groups of four warps attend 64 queries each, and one producer warp streams keys and values
to both through shared memory with the tensor memory accelerator. A tile's products run beside the
softmax of the tile before ("FlashAttention-3", arXiv 2407.08608, §3.1-3.2).
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

# The barrier of the warps that run a function together; Triton 3.7 renamed it.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

BLOCK = gl.constexpr(64)  # freqopt.config.KEY_BLOCK
TILE = gl.constexpr(128)  # freqopt.config.QUERY_TILE, and keys per step: two blocks
ROWS = gl.constexpr(64)  # queries of one consumer
HALF = gl.constexpr(64)  # channels in one swizzled row of 128 bytes
LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)

OPERAND = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
MMA = gl.constexpr(
    gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16])
)
LANES = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


@gluon.jit
def _load_tile(
    source, row0, row1, pieces, full, empty, step, D: gl.constexpr, STAGES: gl.constexpr
):
    """Two blocks of 64 rows into the ring's next buffer, once both consumers have left it.

    pieces: the ring as (64 rows, 64 channels) pieces, channels slowest within a buffer: how a
    (128, D) operand lies in memory.
    """
    stage = step % STAGES
    mbarrier.wait(empty.index(stage), (step // STAGES + 1) & 1)
    arrived = full.index(stage)
    mbarrier.expect(arrived, TILE * D * 2)
    for i in gl.static_range(D // HALF):
        piece = (stage * (D // HALF) + i) * 2
        tma.async_copy_global_to_shared(source, [row0, i * HALF], arrived, pieces.index(piece))
        tma.async_copy_global_to_shared(source, [row1, i * HALF], arrived, pieces.index(piece + 1))


@gluon.jit
def _produce(
    key, value, text_key, text_value, low_key, low_value, matrix, exact_list, n_exact,
    pair, key_pair, blocks, text_tiles, k_pieces, v_pieces, k_full, k_empty, v_full, v_empty,
    D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Streams the low band's means, the first-order matrix, the text, then the exact blocks.

    Those go in pairs, of which the last comes first.
    """
    low_tiles = (blocks + TILE - 1) // TILE
    first_block = key_pair * blocks
    for i in range(low_tiles):
        row = first_block + i * TILE
        _load_tile(low_key, row, row + HALF, k_pieces, k_full, k_empty, i, D, STAGES)
        _load_tile(low_value, row, row + HALF, v_pieces, v_full, v_empty, i, D, STAGES)
    # With head dim 64 the same rows land in both halves of the buffer, and one is not read.
    row = pair * D
    _load_tile(matrix, row, row + D - HALF, k_pieces, k_full, k_empty, low_tiles, D, STAGES)
    for i in range(text_tiles):
        row = (key_pair * text_tiles + i) * TILE
        step = low_tiles + i
        _load_tile(text_key, row, row + HALF, k_pieces, k_full, k_empty, step + 1, D, STAGES)
        _load_tile(text_value, row, row + HALF, v_pieces, v_full, v_empty, step, D, STAGES)
    pairs = (n_exact + 1) // 2
    for i in range(pairs):
        at = gl.where(i == 0, pairs - 1, i - 1) * 2
        row0 = (first_block + gl.load(exact_list + at)) * BLOCK
        row1 = (first_block + gl.load(exact_list + gl.minimum(at + 1, n_exact - 1))) * BLOCK
        step = low_tiles + text_tiles + i
        _load_tile(key, row0, row1, k_pieces, k_full, k_empty, step + 1, D, STAGES)
        _load_tile(value, row0, row1, v_pieces, v_full, v_empty, step, D, STAGES)


@gluon.jit
def _start_scores(q, ring, full, step, zero, STAGES: gl.constexpr):
    """Issue q k^T on the ring's buffer of a step."""
    stage = step % STAGES
    mbarrier.wait(full.index(stage), (step // STAGES) & 1)
    return warpgroup_mma(q, ring.index(stage).permute([1, 0]), zero, use_acc=False, is_async=True)


@gluon.jit
def _turned(q, ring, full, step, D: gl.constexpr, ACC: gl.constexpr, STAGES: gl.constexpr):
    """q M^T (64, D), the first-order term, of M's rows in the ring's buffer of a step."""
    stage = step % STAGES
    mbarrier.wait(full.index(stage), (step // STAGES) & 1)
    matrix = ring.index(stage).slice(0, D)
    zero = gl.zeros([ROWS, D], gl.float32, layout=ACC)
    pending = warpgroup_mma(q, matrix.permute([1, 0]), zero, use_acc=False, is_async=True)
    return warpgroup_mma_wait(0, deps=[pending])


@gluon.jit
def _start_values(weight, ring, full, step, acc, STAGES: gl.constexpr):
    """Issue acc + weight v on the ring's buffer of a step."""
    stage = step % STAGES
    mbarrier.wait(full.index(stage), (step // STAGES) & 1)
    return warpgroup_mma(weight, ring.index(stage), acc, is_async=True)


@gluon.jit
def _leave(empty, step, STAGES: gl.constexpr):
    """Tell the producer that this consumer has read a step's buffer."""
    barrier()
    mbarrier.arrive(empty.index(step % STAGES), count=1)


@gluon.jit
def _softmax(logit, peak, mass, scale_log2):
    """One step of the online softmax: weights, the new state, and the fade of what came before."""
    new_peak = gl.maximum(peak, gl.max(logit, 1) * scale_log2)
    fade = gl.exp2(peak - new_peak)
    weight = gl.exp2(logit * scale_log2 - gl.expand_dims(new_peak, 1))
    return weight, new_peak, mass * fade + gl.sum(weight, 1), fade


@gluon.jit
def _text_bias(key_mask, start, text, text_before, tokens, HAS_MASK: gl.constexpr):
    """Additive logit of 128 text keys: 0, or -inf past the last and where the mask hides one."""
    x = start + gl.arange(0, TILE, layout=LANES)
    inside = x < text
    if HAS_MASK:
        source = x + gl.where(x >= text_before, tokens, 0)
        inside = inside & (gl.load(key_mask + source, mask=inside, other=0) != 0)
    return _as_columns(gl.where(inside, 0.0, -float("inf")))


@gluon.jit
def _list_bias(exact_list, at, n_exact, tokens):
    """Additive logit of a pair of listed blocks: -inf past the list's end and the last token."""
    lane = gl.arange(0, TILE, layout=LANES)
    entry = at + lane // BLOCK
    block = gl.load(exact_list + gl.minimum(entry, n_exact - 1))
    inside = (entry < n_exact) & (block * BLOCK + lane % BLOCK < tokens)
    return _as_columns(gl.where(inside, 0.0, -float("inf")))


@gluon.jit
def _as_columns(bias):
    """128 numbers, one to a thread, as a row over the logits' columns."""
    return gl.expand_dims(gl.convert_layout(bias, gl.SliceLayout(0, MMA)), 0)


@gluon.jit
def _low_term(mass_term, start, blocks):
    """Mass terms of 128 low-band blocks, one to a thread: negative where another band serves."""
    block = start + gl.arange(0, TILE, layout=LANES)
    return gl.load(mass_term + block, mask=block < blocks, other=-1.0)


@gluon.jit
def _low_bias(term, c, start, tokens, inverse_scale):
    """Additive logit of 128 low-band blocks before scaling: log count and mass term, or -inf."""
    block = start + gl.arange(0, TILE, layout=LANES)
    size = gl.minimum(gl.maximum(tokens - block * BLOCK, 1), BLOCK).to(gl.float32)
    term = term.to(gl.float32)
    bias = gl.where(term >= 0.0, (gl.log2(size) + c * term * LOG2E) * inverse_scale, -float("inf"))
    return _as_columns(bias)


@gluon.jit
def _faded(acc, fade):
    """The sum so far after the peak moved."""
    return acc * gl.expand_dims(gl.convert_layout(fade, gl.SliceLayout(1, acc.type.layout)), 1)


@gluon.jit
def _as_operand(weight, dtype: gl.constexpr, ACC: gl.constexpr):
    """Weights as the left operand of the product with values."""
    layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=ACC, k_width=2)
    return gl.convert_layout(weight.to(dtype), layout)


@gluon.jit
def _consume(
    query, order, key_shift, mass_term, coefficients, exact_list, n_exact, key_mask, out, log_sum,
    q_buffer, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
    first_position, tokens, blocks, text, text_tiles, text_before, queries, query_before,
    stride_qn, stride_on, scale,
    D: gl.constexpr, HAS_MASK: gl.constexpr, STAGES: gl.constexpr, LOG_SUM: gl.constexpr,
):  # fmt: skip
    """64 queries through the low band, its first-order term, the text, and the exact blocks."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16]
    )
    GATHERED: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    dtype: gl.constexpr = v_ring.dtype
    term = _low_term(mass_term, 0, blocks)
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, GATHERED))
    col = gl.arange(0, D, layout=gl.SliceLayout(0, GATHERED))
    position = first_position + row
    real = position < queries
    source = gl.load(order + position, mask=real, other=0).to(gl.int64) + query_before
    rows = gl.expand_dims(source, 1)
    cols = gl.expand_dims(col, 0)
    there = gl.expand_dims(real, 1)
    q_rows = gl.load(query + rows * stride_qn + cols, mask=there, other=0.0)
    q_buffer.store(q_rows)
    fence_async_shared()
    barrier()
    scale_log2 = scale * LOG2E
    shift_key = gl.load(key_shift + col)
    # Exact logits miss the mean key's share, the same for all keys: give it to the low band.
    shift = gl.sum(q_rows.to(gl.float32) * gl.expand_dims(shift_key, 0), 1)
    shift = gl.expand_dims(gl.convert_layout(shift, gl.SliceLayout(1, MMA)), 1)
    c = gl.load(coefficients)

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
    weight, peak, mass, fade = _softmax(logit + shift + bias, peak, mass, scale_log2)
    operand = _as_operand(weight, dtype, ACC)
    for i in range(1, low_tiles):
        pending = _start_scores(q_buffer, k_ring, k_full, i, zero, STAGES)
        growing = _start_values(operand, v_ring, v_full, i - 1, acc, STAGES)
        bias = _low_bias(term, c, i * TILE, tokens, inverse_scale)
        term = _low_term(mass_term, (i + 1) * TILE, blocks)
        logit = warpgroup_mma_wait(1, deps=[pending])
        _leave(k_empty, i, STAGES)
        weight, peak, mass, fade = _softmax(logit + shift + bias, peak, mass, scale_log2)
        acc, operand = warpgroup_mma_wait(0, deps=[growing, operand])
        _leave(v_empty, i - 1, STAGES)
        acc = _faded(acc, fade)
        operand = _as_operand(weight, dtype, ACC)

    growing = _start_values(operand, v_ring, v_full, low_tiles - 1, acc, STAGES)
    acc, operand = warpgroup_mma_wait(0, deps=[growing, operand])
    _leave(v_empty, low_tiles - 1, STAGES)
    turned = _turned(q_buffer, k_ring, k_full, low_tiles, D, ACC, STAGES)
    _leave(k_empty, low_tiles, STAGES)
    first_order = gl.convert_layout(mass * scale, gl.SliceLayout(1, ACC))
    acc = acc + turned * gl.expand_dims(first_order, 1)

    # Text is a few tiles at most: the other consumer's products fill the gaps between these.
    step = low_tiles
    for i in range(text_tiles):
        pending = _start_scores(q_buffer, k_ring, k_full, step + 1, zero, STAGES)
        bias = _text_bias(key_mask, i * TILE, text, text_before, tokens, HAS_MASK)
        logit = warpgroup_mma_wait(0, deps=[pending])
        _leave(k_empty, step + 1, STAGES)
        weight, peak, mass, fade = _softmax(logit + bias, peak, mass, scale_log2)
        operand = _as_operand(weight, dtype, ACC)
        growing = _start_values(operand, v_ring, v_full, step, _faded(acc, fade), STAGES)
        acc, operand = warpgroup_mma_wait(0, deps=[growing, operand])
        _leave(v_empty, step, STAGES)
        step += 1

    # The last pair of blocks comes first: it may be half a pair, or end in a ragged block.
    pairs = (n_exact + 1) // 2
    bias = _list_bias(exact_list, (pairs - 1) * 2, n_exact, tokens)
    pending = _start_scores(q_buffer, k_ring, k_full, step + 1, zero, STAGES)
    logit = warpgroup_mma_wait(0, deps=[pending])
    _leave(k_empty, step + 1, STAGES)
    weight, peak, mass, fade = _softmax(logit + bias, peak, mass, scale_log2)
    acc = _faded(acc, fade)
    operand = _as_operand(weight, dtype, ACC)
    for i in range(1, pairs):
        pending = _start_scores(q_buffer, k_ring, k_full, step + 1 + i, zero, STAGES)
        growing = _start_values(operand, v_ring, v_full, step + i - 1, acc, STAGES)
        logit = warpgroup_mma_wait(1, deps=[pending])
        _leave(k_empty, step + 1 + i, STAGES)
        weight, peak, mass, fade = _softmax(logit, peak, mass, scale_log2)
        acc, operand = warpgroup_mma_wait(0, deps=[growing, operand])
        _leave(v_empty, step + i - 1, STAGES)
        acc = _faded(acc, fade)
        operand = _as_operand(weight, dtype, ACC)
    growing = _start_values(operand, v_ring, v_full, step + pairs - 1, acc, STAGES)
    acc, operand = warpgroup_mma_wait(0, deps=[growing, operand])

    if LOG_SUM:
        total = (gl.log2(mass) + peak) * LN2
        total = gl.convert_layout(total, gl.SliceLayout(1, GATHERED))
        gl.store(log_sum + source, total, mask=real)
    mass = gl.expand_dims(gl.convert_layout(mass, gl.SliceLayout(1, ACC)), 1)
    q_buffer.store((acc / mass).to(out.dtype.element_ty))
    barrier()
    gl.store(out + rows * stride_on + cols, q_buffer.load(GATHERED), mask=there)


@gluon.jit
def _buffers(dtype: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):
    """Shared memory of a program, with its barriers set up.

    Queries of both consumers (2, 64, D); rings of keys and of values (STAGES, 128, D); the same
    rings as pieces (64, 64), which copies fill; and the barriers of their buffers: full and empty
    of the keys, full and empty of the values. A buffer is full by one arrival and empty by two.
    """
    q_buffers = gl.allocate_shared_memory(dtype, [2, ROWS, D], OPERAND)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, TILE, D], OPERAND)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, TILE, D], OPERAND)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_empty.index(stage), count=2)
    fence_async_shared()
    barrier()
    PIECES: gl.constexpr = STAGES * (D // HALF) * 2
    k_pieces = k_ring._reinterpret(dtype, [PIECES, HALF, HALF], OPERAND)
    v_pieces = v_ring._reinterpret(dtype, [PIECES, HALF, HALF], OPERAND)
    return (
        q_buffers, (k_ring, v_ring), (k_pieces, v_pieces), (k_full, k_empty, v_full, v_empty)
    )  # fmt: skip


@gluon.jit
def attend_hopper_kernel(
    query, order, key, value, text_key, text_value, key_mask, low_key, low_value, matrix,
    key_shift, mass_term, coefficients, exact_list, counts, out,
    stride_qb, stride_qh, stride_qn, stride_mb, stride_ob, stride_oh, stride_on,
    heads, group_size, tokens, tiles, blocks, text, text_before, scale,
    D: gl.constexpr, HAS_MASK: gl.constexpr, STAGES: gl.constexpr,
    order_row=0, order_share=1, queries=0, query_before=0, OWN: gl.constexpr = True,
    log_sum=None, log_sum_row=0, LOG_SUM: gl.constexpr = False,
):  # fmt: skip
    """One program: the 128 queries of one tile of one head; see the module.

    order: the queries', (T,) entries from pair // order_share * order_row on. queries,
    query_before: how many there are and where they begin, unless they are the keys' OWN tokens.
    log_sum: (pairs, log_sum_row) float32, which with LOG_SUM gets the softmax sums' logarithms.

    key, value (pairs * blocks * 64, D), text_key, text_value (pairs * text rounded up to 128, D),
    low_key, low_value (pairs * blocks, D) and matrix (query heads' pairs * D, D) are tensor
    descriptors with boxes of (64, 64).
    """
    tile = gl.program_id(0)
    pair = gl.program_id(1).to(gl.int64)
    batch = pair // heads
    head = pair % heads
    key_pair = (batch * (heads // group_size) + head // group_size).to(gl.int32)
    row = pair * tiles + tile
    query += batch * stride_qb + head * stride_qh
    order += pair // order_share * order_row
    if OWN:
        queries, query_before = tokens, text_before
    if LOG_SUM:
        log_sum += pair * log_sum_row
    else:
        log_sum = out
    out += batch * stride_ob + head * stride_oh
    key_mask += batch * stride_mb
    exact_list += row * blocks
    mass_term += row * blocks
    n_exact = gl.load(counts + row)
    text_tiles = (text + TILE - 1) // TILE

    q_buffers, rings, pieces, barriers = _buffers(key.dtype, D, STAGES)
    k_ring, v_ring = rings
    k_pieces, v_pieces = pieces
    k_full, k_empty, v_full, v_empty = barriers

    first = tile * TILE
    shift = key_shift + key_pair * D
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    query, order, shift, mass_term, coefficients + pair * 2, exact_list, n_exact,
                    key_mask, out, log_sum, q_buffers.index(0), k_ring, v_ring, k_full, k_empty,
                    v_full, v_empty, first, tokens, blocks, text, text_tiles, text_before, queries,
                    query_before, stride_qn, stride_on, scale, D, HAS_MASK, STAGES, LOG_SUM,
                ),
            ),
            (
                _consume,
                (
                    query, order, shift, mass_term, coefficients + pair * 2, exact_list, n_exact,
                    key_mask, out, log_sum, q_buffers.index(1), k_ring, v_ring, k_full, k_empty,
                    v_full, v_empty, first + ROWS, tokens, blocks, text, text_tiles, text_before,
                    queries, query_before, stride_qn, stride_on, scale, D, HAS_MASK, STAGES,
                    LOG_SUM,
                ),
            ),
            (
                _produce,
                (
                    key, value, text_key, text_value, low_key, low_value, matrix, exact_list,
                    n_exact, pair.to(gl.int32), key_pair, blocks, text_tiles, k_pieces, v_pieces,
                    k_full, k_empty, v_full, v_empty, D, STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
