"""Tile shapes, warps and stages: what a launch may choose without changing the result.

Shipped choices come from measurements on an H200 and, for other GPUs, from what fits them;
`freqopt.kernels.tuned` puts measured ones of the machine at hand in their place.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from freqopt.config import KEY_BLOCK, QUERY_TILE
from freqopt.kernels.device import HOPPER_SHARED


class Launch(NamedTuple):
    """Tile choices for one (dtype, head dim, shared memory); see docs/design/kernels.md.

    rows, wide, warps, stages: of the portable attention kernel (queries per program, key blocks per
    step is 2 where wide). first_*: of the first-order products. disperse_side: query tiles and key
    blocks per program of the dispersions. score_*: query tiles per program of the scores, and key
    blocks per step of their first pass (wide) and their second. probe_*: queries per program of the
    probe's exact pass, and its stages. fit_*: probes and key blocks per step of its fit.
    text_rows: text queries per program, in exports. precision: of float32 products.
    """

    rows: int
    wide: int
    warps: int
    stages: int
    first_stages: int
    first_warps: int
    disperse_side: int
    score_tiles: int
    score_blocks: int
    score_wide: int
    score_warps: int
    score_stages: int
    probe_rows: int
    probe_stages: int
    fit_rows: int
    fit_columns: int
    text_rows: int
    precision: str

    def changed(self, fields: Mapping[str, int]) -> Launch:
        """This launch with the values of some fields."""
        values: dict[str, Any] = dict(fields)
        return self._replace(**values)


PROBE_ROWS = 64
"""Queries per program of the probe's exact pass, where there is room."""


@functools.lru_cache(maxsize=64)
def launch_for(dtype: torch.dtype, head_dim: int, shared: int = HOPPER_SHARED) -> Launch:
    """Tile shapes that fit registers and `shared` bytes of shared memory per program.

    Hopper has 227 KiB, sm_80 163 KiB, consumer cards 99 KiB.
    """
    padded = padded_dim(head_dim)
    wide, roomy = padded > 128, shared >= 220 * 1024
    single = dtype == torch.float32
    bytes_per_row = padded * dtype.itemsize
    rows = QUERY_TILE
    while rows > 16 and rows * bytes_per_row > 32 * 1024:
        rows //= 2
    if single and not roomy:
        rows = max(rows // 2, 16)
    key_tile = 2 * KEY_BLOCK * bytes_per_row
    stages = max(1, min(3, (shared - rows * bytes_per_row) // key_tile - 1))
    ample = roomy and not wide and not single
    warps = 8 if rows >= 64 else 4
    if ample and padded == 128:
        rows, warps = 64, 4  # two programs to a processor
    return Launch(
        rows=rows,
        wide=1,
        warps=warps,
        stages=1 if single else stages,
        first_stages=3 if ample else 1,
        first_warps=4 if ample else 8,
        disperse_side=64 if bytes_per_row <= 256 else 32,
        score_tiles=8 if ample else (4 if bytes_per_row <= 512 else 2),
        score_blocks=64 if bytes_per_row <= 256 else 32,
        score_wide=64 if bytes_per_row <= 256 else 32,
        score_warps=4,
        score_stages=2 if ample or bytes_per_row <= 256 else 1,
        probe_rows=16 if single and padded >= 128 else (32 if wide else PROBE_ROWS),
        probe_stages=3 if ample else 2,
        fit_rows=64 if ample else (16 if wide else 32),
        fit_columns=64 if ample else 32,
        text_rows=32 if single and wide else 64,
        precision="tf32x3" if single else "tf32",
    )


def padded_dim(head_dim: int) -> int:
    """Head dim of the kernels' tiles: the next power of two, at least 16."""
    return max(1 << (head_dim - 1).bit_length(), 16)
