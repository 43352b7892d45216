"""Finds the threshold that makes a share of pairs exact, without waiting for the device.

Its bits are found from the top by histograms of the scores, a few bits by each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
import triton
from torch import Tensor

from freqopt.kernels.launches import bind
from freqopt.kernels.portable.density import histogram_kernel, narrow_kernel
from freqopt.kernels.split_launches import RANK_CELLS, RANKING
from freqopt.kernels.tape import queued

RANK_BITS = ((8, 23), (8, 15), (7, 8))
"""Bits of a score that one pass over all scores finds of a threshold: how many, and how many lower
ones are left. The sign is no bit of a score; those left are below 1/32,768 of it. A
program's histogram takes time by its bins: two passes of 2,048 took 0.25 ms of 24 heads x 32,760
tokens and 1.3 ms of 75,600 on an H200."""

RANK_BITS_ANEW = ((11, 20), (11, 9))
"""The same for scores that are computed anew for every pass, which takes longer than counting."""

COUNTERS = 24
"""Programs that a head's scores are spread over at most."""

HISTOGRAM, NARROW = (bind(launch, {}) for launch in RANKING)


def threshold_of_density(
    scores: Callable[[], Iterable[tuple[Tensor | None, Tensor]]],
    shape: tuple[int, int, int, int],
    density: float,
    device: torch.device,
    *,
    own: bool,
    rank_bits: tuple[tuple[int, int], ...] = RANK_BITS,
) -> Tensor:
    """Thresholds (B, H) float32 of a density: at most those of reference.threshold_for_density.

    Args:
        scores: called once for each of rank_bits; gives tiles that go together, (tiles,) int32 or
            None for all, and their scores (B, H, tiles, blocks) float32, until all tiles were
            given.
        shape: (B, H, tiles, blocks) of all scores.
        density: share of pairs that are to be exact.
        own: the queries are the keys' tokens, so that a tile's own blocks are exact anyway.
        rank_bits: as RANK_BITS, most significant first; 31 bits with those left below the last.
    """
    batch, heads, tiles, blocks = shape
    pairs, cells = batch * heads, tiles * blocks
    kept = min(max(math.ceil(density * cells), 1), cells)
    bins = 2 ** max(bits for bits, _ in rank_bits)
    histogram = torch.zeros(pairs, bins, device=device, dtype=torch.int32)
    prefix, left = torch.empty(2, pairs, device=device, dtype=torch.int32)
    limits = torch.empty(batch, heads, device=device, dtype=torch.float32)
    for number, (bits, below) in enumerate(rank_bits):
        first, last = number == 0, number == len(rank_bits) - 1
        for tile_list, score in scores():
            rows = score.shape[2]
            steps = triton.cdiv(rows * blocks, RANK_CELLS)
            span = triton.cdiv(steps, COUNTERS) * RANK_CELLS
            counters = triton.cdiv(rows * blocks, span)
            queued(histogram_kernel, HISTOGRAM.grid(counters=counters, pairs=pairs))(
                score, tile_list, prefix, histogram, rows, blocks, span,
                BITS=bits, BELOW=below, FIRST=first, OWN=own, **HISTOGRAM.fixed,
            )  # fmt: skip
        queued(narrow_kernel, NARROW.grid(pairs=pairs))(
            histogram, prefix, left, limits, kept, below,
            BITS=bits, FIRST=first, LAST=last, **NARROW.fixed,
        )  # fmt: skip
    return limits
