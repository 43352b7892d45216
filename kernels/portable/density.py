"""Thresholds from a density, on the device: the k-th largest of each head's scores.

PyTorch's launches count scores by their bits, a few bits at a time, with many programs to a head;
the exported operator, where a call's memory is fixed, has one program a head.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = tl.constexpr(64)  # freqopt.config.KEY_BLOCK
TILE = tl.constexpr(128)  # freqopt.config.QUERY_TILE
INFINITY = tl.constexpr(0x7F800000)  # as bits


@triton.jit
def _count_from(
    score, tiles, blocks, low, middle, high, CELLS: tl.constexpr, OWN: tl.constexpr
):  # fmt: skip
    """How many scores of a head are at least each of three numbers, given by their bits.

    Scores are not negative, so their bits are ordered as they are. OWN: a tile's own blocks count
    as infinite, being exact at any threshold.
    """
    from_low = tl.zeros((CELLS,), tl.int32)
    from_middle = tl.zeros((CELLS,), tl.int32)
    from_high = tl.zeros((CELLS,), tl.int32)
    for start in range(0, tiles * blocks, CELLS):
        cell = start + tl.arange(0, CELLS)
        inside = cell < tiles * blocks
        bits = tl.load(score + cell, mask=inside, other=0.0).to(tl.int32, bitcast=True)
        if OWN:
            own = (cell % blocks) * BLOCK // TILE == cell // blocks
            bits = tl.where(own, INFINITY, bits)
        bits = tl.where(inside, bits, -1)
        from_low += (bits >= low).to(tl.int32)
        from_middle += (bits >= middle).to(tl.int32)
        from_high += (bits >= high).to(tl.int32)
    return tl.sum(from_low, 0), tl.sum(from_middle, 0), tl.sum(from_high, 0)


@triton.jit
def density_kernel(
    score, limits, kept, tiles, blocks, CELLS: tl.constexpr, OWN: tl.constexpr = True
):  # fmt: skip
    """One program per (batch, head): its threshold, at which `kept` of its pairs are exact.

    Finds the bits of the kept-th largest of the head's (tiles, blocks) scores from the top, two at
    a time, as the largest number that enough scores reach. OWN: as in histogram_kernel.
    """
    pair = tl.program_id(0).to(tl.int64)
    score += pair * tiles * blocks
    top = 1 << 30
    reached, _, _ = _count_from(score, tiles, blocks, top, top, top, CELLS, OWN)
    found = tl.where(reached >= kept, top, 0)
    for i in range(15):
        step = 1 << (28 - 2 * i)
        one, two, three = _count_from(
            score, tiles, blocks, found + step, found + 2 * step, found + 3 * step, CELLS, OWN
        )
        enough = (one >= kept).to(tl.int32) + (two >= kept).to(tl.int32)
        found += step * (enough + (three >= kept).to(tl.int32))
    tl.store(limits + pair, found.to(tl.float32, bitcast=True))


@triton.jit
def histogram_kernel(
    score, tile_list, prefix, histogram, tiles, blocks, span,
    BITS: tl.constexpr, BELOW: tl.constexpr, CELLS: tl.constexpr, FIRST: tl.constexpr,
    OWN: tl.constexpr = True,
):  # fmt: skip
    """One program: adds `span` of a head's scores to its histogram (pairs, 2**BITS) int32.

    Counted by BITS bits of a score, those above its lowest BELOW, where the bits still above are
    the head's prefix (pairs,) int32, which at the FIRST bits there is none of. OWN: a tile's own
    blocks count as infinite, being exact at any threshold. tile_list: (tiles,) int32, which tiles
    the rows of scores (tiles, blocks) are; None for all in turn.
    """
    part = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    wanted = 0
    if not FIRST:
        wanted = tl.load(prefix + pair)
    score += pair * tiles * blocks
    found = tl.zeros((2**BITS,), tl.int32)
    stop = tl.minimum((part + 1) * span, tiles * blocks)
    for start in range(part * span, stop, CELLS):
        cell = start + tl.arange(0, CELLS)
        inside = cell < stop
        bits = tl.load(score + cell, mask=inside, other=0.0).to(tl.int32, bitcast=True)
        if OWN:
            tile = cell // blocks
            if tile_list is not None:
                tile = tl.load(tile_list + tile, mask=inside, other=0)
            bits = tl.where(cell % blocks * BLOCK // TILE == tile, INFINITY, bits)
        counted = inside & ((bits >> (BITS + BELOW)) == wanted)
        found += tl.histogram((bits >> BELOW) & (2**BITS - 1), 2**BITS, mask=counted)
    bins = tl.arange(0, 2**BITS)
    tl.atomic_add(histogram + pair * 2**BITS + bins, found, mask=found > 0)


@triton.jit
def narrow_kernel(
    histogram, prefix, left, limits, kept, below,
    BITS: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """One program per (batch, head): BITS more bits of the score that `kept` scores reach.

    Appends them to the prefix, keeps in `left` (pairs,) int32 how many are still to be found below
    what lies above them, and empties the histogram for the next bits. At the FIRST bits neither is
    read; after the LAST the prefix, with its `below` lower bits zero, is the threshold, limits
    (pairs,).
    """
    pair = tl.program_id(0)
    bins = tl.arange(0, 2**BITS)
    here = histogram + pair * 2**BITS + bins
    counts = tl.load(here)
    known = 0
    wanted = kept
    if not FIRST:
        known = tl.load(prefix + pair)
        wanted = tl.load(left + pair)
    reached = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts
    bin = tl.maximum(tl.sum((reached >= wanted).to(tl.int32), 0) - 1, 0)
    above = tl.sum(tl.where(bins > bin, counts, 0), 0)
    found = (known << BITS) + bin
    tl.store(left + pair, wanted - above)
    tl.store(prefix + pair, found)
    tl.store(here, tl.zeros((2**BITS,), tl.int32))
    if LAST:
        tl.store(limits + pair, (found << below).to(tl.float32, bitcast=True))
