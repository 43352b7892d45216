"""The launches of an order by content, declared once; see `freqopt.kernels.launches`."""

from __future__ import annotations

import functools

from freqopt.kernels.content_order import LEAF, RANK, SEGMENT_SAMPLES
from freqopt.kernels.launches import Bound, KernelLaunch, bind
from freqopt.kernels.portable import order, tree
from freqopt.kernels.tiles import padded_dim

MOMENT_PARTS = 4
"""Programs that a head's sampled tokens are spread over, where an order is made by content."""

LEVELS = {
    8192: (8, 256), 4096: (4, 256), 2048: (4, 256), 1024: (2, 128), 512: (1, 128),
    256: (1, 128), 128: (1, 64),
}  # fmt: skip
"""Warps of a segment that one program halves, and tokens that it reads at a time, by the segment's
tokens: the fastest of those tried on an H200. Larger segments take three launches, so that more
than one program reads their coordinates."""

SEGMENT_PIECE, DIVIDE_PIECE = 128, 8192

SIZE = {"D": "dim", "DP": "padded"}

CONTENT_ORDER = (
    KernelLaunch("moments", order.moments_kernel, "parts pairs",
                 {**SIZE, "ROWS": 64}, warps=8, stages=3),
    KernelLaunch("directions", order.directions_kernel, "pairs",
                 {**SIZE, "SLICE": 32}, warps=8, stages=3),
    KernelLaunch("project", order.project_kernel, "pairs tokens/ROWS",
                 {**SIZE, "ROWS": 128}, warps=8, stages=3),
    KernelLaunch("segment", tree.segment_kernel, "pairs segments",
                 {"PIECE": SEGMENT_PIECE, "PIECES": SEGMENT_SAMPLES // SEGMENT_PIECE}, stages=3),
    KernelLaunch("rank_tokens", tree.rank_tokens_kernel, "pairs tokens/ROWS", {"ROWS": 128},
                 stages=3),
    KernelLaunch("divide", tree.divide_kernel, "pairs segments", {"PIECE": DIVIDE_PIECE},
                 warps=32, stages=3),
    *(
        KernelLaunch(
            f"halve_{tokens}", tree.halve_kernel, "pairs tokens/SIZE",
            {"SIZE": tokens, "STEP": max(tokens // SEGMENT_SAMPLES, 1), "PIECE": piece},
            warps, 3,
        )
        for tokens, (warps, piece) in LEVELS.items()
    ),
    KernelLaunch("leaf", tree.leaf_kernel, "pairs tokens/SIZE", {"SIZE": LEAF}, warps=1, stages=3),
)  # fmt: skip
"""Of an order by content. Levels above the largest of `LEVELS` launch segment, rank_tokens and
divide each."""


def numbers_of_order(dim: int) -> dict[str, int]:
    """Numbers that these launches give by name. dim: channels of the tokens."""
    return {"dim": dim, "padded": max(padded_dim(dim), RANK)}


@functools.lru_cache(maxsize=64)
def order_launches(dim: int) -> dict[str, Bound]:
    """Those of an order of tokens with so many channels, by name."""
    numbers = numbers_of_order(dim)
    return {launch.name: bind(launch, numbers) for launch in CONTENT_ORDER}
