"""Routing scores on their own, for calibration and for looking at what the router sees."""

from __future__ import annotations

from collections.abc import Sequence as Extents

import torch
from torch import Tensor

from freqopt.config import KEY_BLOCK
from freqopt.grid import check_grid
from freqopt.kernels import reference
from freqopt.kernels.layout import TokenLayout, repeat_heads


@torch.no_grad()
def route_scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grid: Extents[int],
    text_before: int = 0,
    text_after: int = 0,
    scale: float | None = None,
) -> Tensor:
    """Score of every (query tile, key block) pair; a budget lifts those at or above it.

    Args:
        query: (B, H, N, D); key, value: (B, Hkv, N, D); as in `split_attention`.

    Returns:
        (B, H, tiles, blocks) float32, without unit (docs/design/mathematics.md §4).

    Raises:
        InputError: if the grid and the text do not add up to N.
    """
    extents = check_grid(grid, query.shape[2], text=text_before + text_after)
    sequence = TokenLayout(extents, text_before, text_after)
    heads = query.shape[1]
    tokens = [sequence.video_of(repeat_heads(x, heads).float()) for x in (query, key, value)]
    summary = reference.summarise(tokens[1], tokens[2], KEY_BLOCK)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    return reference.score_pairs(tokens[0], summary, factor, query.dtype).score
