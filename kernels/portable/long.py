"""Triton kernel of the walk over long sequences: routes of some tiles.

A long sequence's query tiles go through one small workspace, some at a time
(`freqopt.kernels.forward.long`): what is kept of a route is two bits a pair.
"""

from __future__ import annotations

import triton
import triton.language as tl

from freqopt.kernels.portable.prepare import EXACT, LOW, best_block

BLOCK = tl.constexpr(64)  # freqopt.config.KEY_BLOCK
TILE = tl.constexpr(128)  # freqopt.config.QUERY_TILE
PER_BYTE = tl.constexpr(4)  # freqopt.kernels.layout.PER_BYTE


@triton.jit
def route_tiles_kernel(
    score, threshold, mass_term, packed, exact_list, counts, tile_list,
    tiles, all_tiles, blocks, bytes_per_tile, BJ: tl.constexpr, OWN: tl.constexpr = True,
):  # fmt: skip
    """One program: the route of one listed tile, as `prepare.route_kernel` finds it.

    score and exact_list may be the same memory: a row's scores are read before entries, which are
    never more, take their place. packed: (pairs, all_tiles, bytes_per_tile), as layout.pack_route.
    """
    at = tl.program_id(0)
    tile = tl.load(tile_list + at)
    pair = tl.program_id(1).to(tl.int64)
    row = pair * tiles + at
    score += row * blocks
    mass_term += row * blocks
    exact_list += row * blocks
    packed += (pair * all_tiles + tile) * bytes_per_tile
    exact_from = tl.load(threshold + pair)
    exact_count = tl.zeros((), tl.int32)
    shifts = tl.arange(0, PER_BYTE) * 2
    best = tl.zeros((), tl.int32)
    if not OWN:
        best = best_block(score, blocks, BJ)
    for start in range(0, blocks, BJ):
        block = start + tl.arange(0, BJ)
        inside = block < blocks
        s = tl.load(score + block, mask=inside, other=-1.0)
        tl.debug_barrier()  # every thread has read its scores
        always = (block * BLOCK // TILE == tile) if OWN else (block == best)
        # Not s >= exact_from: what is no number, score or threshold, is attended exactly.
        exact = tl.where(s < exact_from, always & inside, inside)
        place = tl.cumsum(exact.to(tl.int32), 0) - 1 + exact_count
        tl.store(exact_list + place, block, mask=exact)
        exact_count += tl.sum(exact.to(tl.int32), 0)
        band = tl.where(exact, EXACT, LOW)
        four = tl.reshape(band, (BJ // PER_BYTE, PER_BYTE)) << shifts[None, :]
        byte = start // PER_BYTE + tl.arange(0, BJ // PER_BYTE)
        tl.store(packed + byte, tl.sum(four, 1).to(tl.uint8), mask=byte < bytes_per_tile)
        minus = tl.full((BJ,), -1.0, mass_term.dtype.element_ty)
        tl.store(mass_term + block, minus, mask=exact)
    tl.store(counts + row, exact_count)
