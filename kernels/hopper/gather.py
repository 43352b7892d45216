"""The Hopper attention kernel for long sequences: keys and values are gathered where they are.

`attend` streams blocks of reordered copies with the tensor memory accelerator. Here four
producer warps fetch the rows of a block one by one, in token order, with asynchronous copies of 16
bytes a thread; low band, H-bar, text and the consumers are the same, and so are the results.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from freqopt.kernels.hopper.attend import (
    BLOCK,
    HALF,
    ROWS,
    TILE,
    _buffers,
    _consume,
    _load_tile,
    barrier,
)

# Eight threads on the 128 bytes of a piece's row: as the swizzle keeps them together.
PIECE = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))


@gluon.jit
def _rows_of(order, block, tokens, text_before):
    """Rows (64,) of the model's tensors that hold a block's tokens; past the end, the last."""
    position = block * BLOCK + gl.arange(0, BLOCK, layout=gl.SliceLayout(1, PIECE))
    return gl.load(order + gl.minimum(position, tokens - 1)) + text_before


@gluon.jit
def _gather_tile(
    source, stride, rows0, rows1, pieces, empty, step, D: gl.constexpr, STAGES: gl.constexpr
):
    """Start copying two blocks of 64 rows into the ring's next buffer; see _load_tile."""
    stage = step % STAGES
    mbarrier.wait(empty.index(stage), (step // STAGES + 1) & 1)
    channel = gl.expand_dims(gl.arange(0, HALF, layout=gl.SliceLayout(0, PIECE)), 0)
    from0 = source + gl.expand_dims(rows0.to(gl.int64) * stride, 1) + channel
    from1 = source + gl.expand_dims(rows1.to(gl.int64) * stride, 1) + channel
    for i in gl.static_range(D // HALF):
        piece = (stage * (D // HALF) + i) * 2
        async_copy.async_copy_global_to_shared(pieces.index(piece), from0 + i * HALF)
        async_copy.async_copy_global_to_shared(pieces.index(piece + 1), from1 + i * HALF)
    async_copy.commit_group()


@gluon.jit
def _announce(full, step, outstanding: gl.constexpr, STAGES: gl.constexpr):
    """Tell the consumers that a buffer's copies are there, all but the latest groups' being done.

    The tensor cores read shared memory through another proxy than these copies write it.
    """
    async_copy.wait_group(outstanding)
    fence_async_shared()
    barrier()
    mbarrier.arrive(full.index(step % STAGES), count=1)


@gluon.jit
def _gather(
    key, value, order, text_key, text_value, low_key, low_value, matrix, exact_list, n_exact,
    stride_kn, stride_vn, pair, key_pair, tokens, blocks, text_before, text_tiles, k_pieces,
    v_pieces, k_full, k_empty, v_full, v_empty, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """attend._produce, but for the exact blocks.

    A buffer is announced when the next two's copies are under way: the one after them waits for a
    buffer that the consumers leave without this one.
    """
    low_tiles = (blocks + TILE - 1) // TILE
    first_block = key_pair * blocks
    for i in range(low_tiles):
        row = first_block + i * TILE
        _load_tile(low_key, row, row + HALF, k_pieces, k_full, k_empty, i, D, STAGES)
        _load_tile(low_value, row, row + HALF, v_pieces, v_full, v_empty, i, D, STAGES)
    row = pair * D
    _load_tile(matrix, row, row + D - HALF, k_pieces, k_full, k_empty, low_tiles, D, STAGES)
    for i in range(text_tiles):
        row = (key_pair * text_tiles + i) * TILE
        step = low_tiles + i
        _load_tile(text_key, row, row + HALF, k_pieces, k_full, k_empty, step + 1, D, STAGES)
        _load_tile(text_value, row, row + HALF, v_pieces, v_full, v_empty, step, D, STAGES)

    # The last pair comes first, as in attend. Rows are looked up a step ahead, blocks two.
    pairs = (n_exact + 1) // 2
    step = low_tiles + text_tiles
    last = n_exact - 1
    at = (pairs - 1) * 2
    rows0 = _rows_of(order, gl.load(exact_list + at), tokens, text_before)
    rows1 = _rows_of(order, gl.load(exact_list + gl.minimum(at + 1, last)), tokens, text_before)
    block0 = gl.load(exact_list)
    block1 = gl.load(exact_list + gl.minimum(1, last))
    _gather_tile(key, stride_kn, rows0, rows1, k_pieces, k_empty, step + 1, D, STAGES)
    _gather_tile(value, stride_vn, rows0, rows1, v_pieces, v_empty, step, D, STAGES)
    for i in range(1, pairs):
        rows0 = _rows_of(order, block0, tokens, text_before)
        rows1 = _rows_of(order, block1, tokens, text_before)
        block0 = gl.load(exact_list + gl.minimum(i * 2, last))
        block1 = gl.load(exact_list + gl.minimum(i * 2 + 1, last))
        step += 1
        _gather_tile(key, stride_kn, rows0, rows1, k_pieces, k_empty, step + 1, D, STAGES)
        _announce(k_full, step, 2, STAGES)
        _gather_tile(value, stride_vn, rows0, rows1, v_pieces, v_empty, step, D, STAGES)
        _announce(v_full, step - 1, 2, STAGES)
    _announce(k_full, step + 1, 1, STAGES)
    _announce(v_full, step, 0, STAGES)


@gluon.jit
def gather_hopper_kernel(
    query, order, key, value, text_key, text_value, key_mask, low_key, low_value, matrix,
    key_shift, mass_term, coefficients, exact_list, counts, out,
    stride_qb, stride_qh, stride_qn, stride_mb, stride_ob, stride_oh, stride_on,
    heads, group_size, tokens, tiles, blocks, text, text_before, scale,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, tile_list, turn,
    D: gl.constexpr, HAS_MASK: gl.constexpr, STAGES: gl.constexpr,
    order_row=0, order_share=1, queries=0, query_before=0, OWN: gl.constexpr = True,
    log_sum=None, log_sum_row=0, LOG_SUM: gl.constexpr = False, key_order=None, key_order_row=0,
):  # fmt: skip
    """One program: the 128 queries of one listed tile of one head.

    key, value: the model's own; the rest is as in attend.attend_hopper_kernel, with a row of
    mass_term, exact_list and counts for each listed tile. turn: (pairs, tiles) int64, which of
    these rows each program takes. key_order: the keys', where they are not the queries' OWN.
    """
    pair = gl.program_id(1).to(gl.int64)
    at = gl.load(turn + pair * tiles + gl.program_id(0)).to(gl.int32)
    batch = pair // heads
    head = pair % heads
    key_head = head // group_size
    key_pair = (batch * (heads // group_size) + key_head).to(gl.int32)
    row = pair * tiles + at
    query += batch * stride_qb + head * stride_qh
    order += pair // order_share * order_row
    if OWN:
        queries, query_before, key_order = tokens, text_before, order
    else:
        key_order += key_pair.to(gl.int64) * key_order_row
    if LOG_SUM:
        log_sum += pair * log_sum_row
    else:
        log_sum = out
    key += batch * stride_kb + key_head * stride_kh
    value += batch * stride_vb + key_head * stride_vh
    out += batch * stride_ob + head * stride_oh
    key_mask += batch * stride_mb
    exact_list += row * blocks
    mass_term += row * blocks
    n_exact = gl.load(counts + row)
    text_tiles = (text + TILE - 1) // TILE
    first = gl.load(tile_list + at) * TILE

    q_buffers, rings, pieces, barriers = _buffers(low_key.dtype, D, STAGES)
    k_ring, v_ring = rings
    k_pieces, v_pieces = pieces
    k_full, k_empty, v_full, v_empty = barriers

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
                _gather,
                (
                    key, value, key_order, text_key, text_value, low_key, low_value, matrix,
                    exact_list, n_exact, stride_kn, stride_vn, pair.to(gl.int32), key_pair, tokens,
                    blocks, text_before, text_tiles, k_pieces, v_pieces, k_full, k_empty,
                    v_full, v_empty, D, STAGES,
                ),
            ),
        ],
        [4, 4],
        [232, 40],
    )  # fmt: skip
