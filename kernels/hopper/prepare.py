"""Summaries, ordered copies and first-order products for Hopper: one read of keys and values.

Does what `triton_prepare.summarise_kernel` and `first_order_kernel` do, for head dims 64 and 128 in
half precision. Four producer warps gather the rows of a key block through the token order, with
asynchronous copies of 16 bytes a thread, into a ring of shared memory. From there copies in token
order leave by the tensor memory accelerator, without passing registers. Four warps sum up a block's
keys and leave them, less their mean, in shared memory; four others sum up its values and multiply
the two on the tensor cores.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from freqopt.kernels.hopper.attend import BLOCK, HALF, OPERAND, barrier

LARGEST = gl.constexpr(65504.0)  # of float16


@gluon.jit
def _rows_of(order, block, tokens, text_before, ROWS: gl.constexpr):
    """Rows (64,) of the model's tensors that hold a block's tokens, and which of them there are."""
    position = block * BLOCK + gl.arange(0, BLOCK, layout=gl.SliceLayout(1, ROWS))
    inside = position < tokens
    return gl.load(order + gl.minimum(position, tokens - 1)) + text_before, inside


@gluon.jit
def _gather_rows(source, stride, rows, inside, buffer, D: gl.constexpr, ROWS: gl.constexpr):
    """Start copying 64 rows into a buffer (64, D), zeros where there is none."""
    channel = gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, ROWS)), 0)
    where = source + gl.expand_dims(rows.to(gl.int64) * stride, 1) + channel
    async_copy.async_copy_global_to_shared(buffer, where, mask=gl.expand_dims(inside, 1))


@gluon.jit
def _gather(
    key, value, order, stride_kn, stride_vn, first, count, tokens, text_before,
    k_ring, v_ring, full, empty, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Streams `count` blocks from the first one on.

    A block is announced when the copies of LAG later ones are under way; two to four more of them
    made no difference.
    """
    LAG: gl.constexpr = STAGES * 3 // 5
    # As many threads on a row as copy it 16 bytes each.
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    rows, inside = _rows_of(order, first, tokens, text_before, ROWS)
    for i in range(count):
        stage = i % STAGES
        next_rows, next_inside = _rows_of(order, first + i + 1, tokens, text_before, ROWS)
        mbarrier.wait(empty.index(stage), (i // STAGES + 1) & 1)
        _gather_rows(key, stride_kn, rows, inside, k_ring.index(stage), D, ROWS)
        _gather_rows(value, stride_vn, rows, inside, v_ring.index(stage), D, ROWS)
        async_copy.commit_group()
        rows, inside = next_rows, next_inside
        if i >= LAG:
            # The copy engine and the tensor cores read through another proxy than this wrote.
            async_copy.wait_group(LAG)
            fence_async_shared()
            barrier()
            mbarrier.arrive(full.index((i - LAG) % STAGES), count=1)
    async_copy.wait_group(0)
    fence_async_shared()
    barrier()
    for i in range(gl.maximum(count - LAG, 0), count):
        mbarrier.arrive(full.index(i % STAGES), count=1)


@gluon.jit
def _copy_out(target, row, pieces, stage, D: gl.constexpr):
    """Start copying a ring's buffer to 64 rows of a tensor in token order."""
    for i in gl.static_range(D // HALF):
        piece = pieces.index(stage * (D // HALF) + i)
        tma.async_copy_shared_to_global(target, [row, i * HALF], piece)


@gluon.jit
def _leave(empty, stage):
    """Tell the producer that these warps have read a buffer, their copies included."""
    tma.store_wait(0)
    barrier()
    mbarrier.arrive(empty.index(stage), count=1)


@gluon.jit
def _take(
    i, first, first_block, target, pieces, full,
    D: gl.constexpr, COPY: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Wait for a program's i-th block and start its copy.

    Returns its buffer, and its number in the head and in all heads.
    """
    stage = i % STAGES
    block = first + i
    row = first_block + block
    mbarrier.wait(full.index(stage), (i // STAGES) & 1)
    if COPY:
        _copy_out(target, row * BLOCK, pieces, stage, D)
    return stage, block, row


@gluon.jit
def _sums(tile, COLS: gl.constexpr):
    """Float32 values (64, D) of a buffer, and their column sums and sums of squares (D,)."""
    x = tile.load(COLS).to(gl.float32)
    return x, gl.sum(x, 0), gl.sum(x * x, 0)


@gluon.jit
def _size(block, tokens):
    """Tokens of a block."""
    return gl.minimum(tokens - block * BLOCK, BLOCK).to(gl.float32)


@gluon.jit
def _prepare_keys(
    key_out, key_mean, key_var, sums, first_block, first, count, tokens,
    ring, pieces, full, empty, centred, made, used,
    D: gl.constexpr, COPY: gl.constexpr, STAGES: gl.constexpr, COLS: gl.constexpr,
):  # fmt: skip
    """Copies and sums up the keys, and leaves them less their block's mean to _prepare_values."""
    col = gl.arange(0, D, layout=gl.SliceLayout(0, COLS))
    dtype: gl.constexpr = key_var.dtype.element_ty
    total = gl.zeros([D], gl.float32, layout=gl.SliceLayout(0, COLS))
    for i in range(count):
        stage, block, row = _take(
            i, first, first_block, key_out, pieces, full, D, COPY, STAGES
        )  # fmt: skip
        k, k_sum, k_square = _sums(ring.index(stage), COLS)
        size = _size(block, tokens)
        mean = k_sum / size
        # Rows past the end are of no account: their values are zero.
        off = (k - gl.expand_dims(mean, 0)).to(dtype)
        mbarrier.wait(used.index(i % 2), (i // 2 + 1) & 1)
        centred.index(i % 2).store(off)
        fence_async_shared()
        barrier()
        mbarrier.arrive(made.index(i % 2), count=1)
        total += k_sum
        # float32 leaves room for the subtraction.
        var = gl.maximum(k_square / size - mean * mean, 0.0)
        if dtype == gl.float16:
            var = gl.minimum(var, LARGEST)
        at = row.to(gl.int64) * D + col
        gl.store(key_mean + at, mean)
        gl.store(key_var + at, var.to(dtype))
        _leave(empty, stage)
    gl.store(sums + col, total)


@gluon.jit
def _prepare_values(
    value_out, low_value, spread, sums, first_order, first_block, first, count, tokens,
    ring, pieces, full, empty, centred, made, used,
    D: gl.constexpr, COPY: gl.constexpr, STAGES: gl.constexpr, COLS: gl.constexpr,
):  # fmt: skip
    """Copies and sums up the values, and their products with the centred keys."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16]
    )
    col = gl.arange(0, D, layout=gl.SliceLayout(0, COLS))
    acc = gl.zeros([D, D], gl.float32, layout=ACC)
    total = gl.zeros([D], gl.float32, layout=gl.SliceLayout(0, COLS))
    squares = gl.zeros([D], gl.float32, layout=gl.SliceLayout(0, COLS))
    for i in range(count):
        stage, block, row = _take(
            i, first, first_block, value_out, pieces, full, D, COPY, STAGES
        )  # fmt: skip
        _, v_sum, v_square = _sums(ring.index(stage), COLS)
        size = _size(block, tokens)
        mean = v_sum / size
        var = gl.maximum(v_square / size - mean * mean, 0.0)
        at = row.to(gl.int64) * D + col
        gl.store(low_value + at, mean.to(low_value.dtype.element_ty))
        gl.store(spread + row, gl.sum(var, 0))
        total += v_sum
        squares += v_square
        mbarrier.wait(made.index(i % 2), (i // 2) & 1)
        turned = ring.index(stage).permute([1, 0])
        acc = warpgroup_mma(turned, centred.index(i % 2), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        _leave(empty, stage)
        mbarrier.arrive(used.index(i % 2), count=1)
    gl.store(sums + D + col, total)
    gl.store(sums + 2 * D + col, squares)
    cell_row = gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(1, ACC)), 1)
    cell_col = gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, ACC)), 0)
    gl.store(first_order + cell_row * D + cell_col, acc)


@gluon.jit
def prepare_hopper_kernel(
    key, value, order,
    key_out, value_out, key_mean, low_value, key_var, spread, sums, first_order,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    heads, tokens, blocks, length, text_before,
    D: gl.constexpr, COPY: gl.constexpr, STAGES: gl.constexpr, order_row=0,
):  # fmt: skip
    """One program: `length` consecutive key blocks of one key head; see the module.

    key_out, value_out: tensor descriptors of (pairs * blocks * 64, D) with boxes of (64, 64); not
    read without COPY. sums: (pairs, ranges, 3, D) of k, v and v * v; first_order: (pairs, ranges,
    D, D). The rest is as in portable.prepare.summarise_kernel.
    """
    # Heads run fastest: rows of different heads lie side by side in the model's memory.
    pair = gl.program_id(0)
    part = gl.program_id(1)
    batch = (pair // heads).to(gl.int64)
    head = (pair % heads).to(gl.int64)
    key += batch * stride_kb + head * stride_kh
    value += batch * stride_vb + head * stride_vh
    order += pair.to(gl.int64) * order_row
    at = pair.to(gl.int64) * gl.num_programs(1) + part
    sums += at * (3 * D)
    first_order += at * (D * D)
    first = part * length
    count = gl.minimum(blocks - first, length)
    first_block = pair * blocks

    dtype: gl.constexpr = key.dtype.element_ty
    # Rows are the fastest lanes: eight of them read different banks of the swizzled buffer.
    COLS: gl.constexpr = gl.BlockedLayout([1, 8], [1024 // D, D // 32], [1, 4], [0, 1])
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, D], OPERAND)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, D], OPERAND)
    centred = gl.allocate_shared_memory(dtype, [2, BLOCK, D], OPERAND)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    made = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    used = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    for stage in gl.static_range(2):
        mbarrier.init(made.index(stage), count=1)
        mbarrier.init(used.index(stage), count=1)
    fence_async_shared()
    barrier()
    PIECES: gl.constexpr = STAGES * (D // HALF)
    k_pieces = k_ring._reinterpret(dtype, [PIECES, BLOCK, HALF], OPERAND)
    v_pieces = v_ring._reinterpret(dtype, [PIECES, BLOCK, HALF], OPERAND)

    gl.warp_specialize(
        [
            (
                _prepare_values,
                (
                    value_out, low_value, spread, sums, first_order, first_block, first, count,
                    tokens, v_ring, v_pieces, full, empty, centred, made, used, D, COPY, STAGES,
                    COLS,
                ),
            ),
            (
                _prepare_keys,
                (
                    key_out, key_mean, key_var, sums, first_block, first, count, tokens, k_ring,
                    k_pieces, full, empty, centred, made, used, D, COPY, STAGES, COLS,
                ),
            ),
            (
                _gather,
                (
                    key, value, order, stride_kn, stride_vn, first, count, tokens, text_before,
                    k_ring, v_ring, full, empty, D, STAGES,
                ),
            ),
        ],
        [4, 4],
        [160, 96],
    )  # fmt: skip
