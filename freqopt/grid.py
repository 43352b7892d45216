"""The token lattice of a video and the order in which the split walks it.

Tokens arrive in raster order (t slowest, w fastest). The split needs 64 consecutive tokens to be a
compact cube, for any grid and with no divisibility rule, so it visits them along a Hilbert curve.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from freqopt.errors import InputError

Grid = tuple[int, int, int]
"""Extents (t, h, w) of the lattice; images are (1, h, w), sequences (1, 1, n)."""


def check_grid(grid: Sequence[int], tokens: int, *, text: int = 0) -> Grid:
    """Return `grid` as a tuple after checking that it accounts for every token.

    Args:
        grid: extents (t, h, w), all positive.
        tokens: length of the whole sequence, text included.
        text: number of text tokens, before and after the video together.

    Raises:
        InputError: if the extents are not three positive integers or do not multiply to
            ``tokens - text``.
    """
    try:
        # A set has no order, or another one.
        extents = () if isinstance(grid, (set, frozenset, dict)) else tuple(map(_whole, grid))
    except TypeError:
        extents = ()
    if len(extents) != 3 or min(extents) < 1:
        raise InputError(
            f"grid {grid!r} is not three positive whole extents (t, h, w); "
            "an image is (1, h, w) and a plain sequence (1, 1, n)"
        )
    if math.prod(extents) + text != tokens:
        t, h, w = extents
        raise InputError(
            f"grid {extents} has {t * h * w} tokens and there are {text} text tokens, "
            f"but the sequence has {tokens}; t*h*w + text_before + text_after must equal it"
        )
    return extents


def _whole(extent: object) -> int:
    """A number that is whole by its type: 3.0 and "3" are mistakes, and True is none."""
    if isinstance(extent, (bool, str)):
        raise TypeError
    return operator.index(extent)  # type: ignore[arg-type]


def hilbert_index(coordinates: Tensor, bits: int) -> Tensor:
    """Position of lattice points along a Hilbert curve.

    Skilling's transpose algorithm ("Programming the Hilbert curve", AIP Conf. Proc. 707, 2004),
    vectorised over points.

    Args:
        coordinates: (points, dims) int64, each in [0, 2**bits).
        bits: bits per coordinate.

    Returns:
        (points,) int64 positions in [0, 2**(bits * dims)).
    """
    axes = list(coordinates.unbind(1))
    dims = len(axes)
    for level in reversed(range(1, bits)):
        bit, below = 1 << level, (1 << level) - 1
        for i in range(dims):
            is_set = (axes[i] & bit) != 0
            swap = torch.where(is_set, 0, (axes[0] ^ axes[i]) & below)
            axes[0] = torch.where(is_set, axes[0] ^ below, axes[0] ^ swap)
            if i:
                axes[i] = axes[i] ^ swap
    for i in range(1, dims):
        axes[i] = axes[i] ^ axes[i - 1]
    flip = torch.zeros_like(axes[0])
    for level in reversed(range(1, bits)):
        flip = torch.where((axes[-1] & (1 << level)) != 0, flip ^ ((1 << level) - 1), flip)
    index = torch.zeros_like(flip)
    for level in reversed(range(bits)):
        for axis in axes:
            index = (index << 1) | (((axis ^ flip) >> level) & 1)
    return index


@functools.lru_cache(maxsize=64)
def _token_order_cpu(grid: Grid) -> Tensor:
    extents = [extent for extent in grid if extent > 1]
    if len(extents) < 2:
        return torch.arange(math.prod(grid), dtype=torch.int32, device="cpu")
    points = torch.cartesian_prod(*[torch.arange(extent, device="cpu") for extent in extents])
    bits = max(extent - 1 for extent in extents).bit_length()
    return torch.argsort(hilbert_index(points, bits)).to(torch.int32)


@functools.cache
def token_order(grid: Grid, device: torch.device) -> Tensor:
    """Hilbert order of a grid's tokens, kept for good per grid and device.

    The order is that of the smallest enclosing power-of-two cube with the points outside the grid
    left out, so aligned cubes stay contiguous. Extents of 1 are dropped first: an image gets a
    planar curve and a sequence its own order.

    Args:
        grid: extents (t, h, w).
        device: where the result lives.

    Returns:
        (t*h*w,) int32; element p is the raster index of the p-th token in token order. Never
        dropped: a CUDA graph that was recorded with it goes on reading that memory.

    Raises:
        InputError: a grid that is new to the device comes up while a CUDA graph is being captured.
    """
    order = _token_order_cpu(grid)
    if device.type != "cuda":
        return order.to(device)
    if torch.cuda.is_current_stream_capturing():
        raise InputError(
            f"the token order of grid {grid} is not on {device} yet, and nothing can be copied "
            "there while a CUDA graph is captured: run the model once before the capture"
        )
    # Another thread allocates outside the pool of the CUDA graph that may be warming up in this
    # one, whose memory is taken back after each replay.
    with ThreadPoolExecutor(max_workers=1) as other:
        return other.submit(order.to, device).result()
