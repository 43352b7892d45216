"""Thresholds from a density, on the device: the k-th largest of each head's scores.

PyTorch has `kthvalue` for it; the exported operator, which nobody resolves a density for, has this.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = tl.constexpr(64)  # freqopt.config.KEY_BLOCK
TILE = tl.constexpr(128)  # freqopt.config.QUERY_TILE
INFINITY = tl.constexpr(0x7F800000)  # as bits


@triton.jit
def _count_from(score, tiles, blocks, low, middle, high, CELLS: tl.constexpr):
    """How many scores of a head are at least each of three numbers, given by their bits.

    Scores are not negative, so their bits are ordered as they are. A tile's own blocks count as
    infinite, being exact at any threshold.
    """
    from_low = tl.zeros((CELLS,), tl.int32)
    from_middle = tl.zeros((CELLS,), tl.int32)
    from_high = tl.zeros((CELLS,), tl.int32)
    for start in range(0, tiles * blocks, CELLS):
        cell = start + tl.arange(0, CELLS)
        inside = cell < tiles * blocks
        bits = tl.load(score + cell, mask=inside, other=0.0).to(tl.int32, bitcast=True)
        own = (cell % blocks) * BLOCK // TILE == cell // blocks
        bits = tl.where(own, INFINITY, bits)
        bits = tl.where(inside, bits, -1)
        from_low += (bits >= low).to(tl.int32)
        from_middle += (bits >= middle).to(tl.int32)
        from_high += (bits >= high).to(tl.int32)
    return tl.sum(from_low, 0), tl.sum(from_middle, 0), tl.sum(from_high, 0)


@triton.jit
def density_kernel(
    score, limits, kept, tiles, blocks, CELLS: tl.constexpr
):  # fmt: skip
    """One program per (batch, head): its threshold, at which `kept` of its pairs are exact.

    Finds the bits of the kept-th largest of the head's (tiles, blocks) scores from the top, two at
    a time, as the largest number that enough scores reach.
    """
    pair = tl.program_id(0).to(tl.int64)
    score += pair * tiles * blocks
    top = 1 << 30
    reached, _, _ = _count_from(score, tiles, blocks, top, top, top, CELLS)
    found = tl.where(reached >= kept, top, 0)
    for i in range(15):
        step = 1 << (28 - 2 * i)
        one, two, three = _count_from(
            score, tiles, blocks, found + step, found + 2 * step, found + 3 * step, CELLS
        )
        enough = (one >= kept).to(tl.int32) + (two >= kept).to(tl.int32)
        found += step * (enough + (three >= kept).to(tl.int32))
    tl.store(limits + pair, found.to(tl.float32, bitcast=True))
