"""Runs the density kernel on random scores and prints whether it found what `kthvalue` does.

Run by test_onnx_glue.py in a process of its own: Triton's interpreter mode is fixed at its import.
"""

from __future__ import annotations

import json
import os
import sys

import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

from freqopt.kernels.portable.density import density_kernel
from freqopt.kernels.reference import threshold_for_density

DEVICE = "cuda" if ON_GPU else "cpu"


def equal(tiles: int, blocks: int, kept: int) -> bool:
    """Among ties, zeros, a tile's own blocks, and numbers across 32 orders of magnitude."""
    generator = torch.Generator().manual_seed(0)
    score = 10 ** (4 * torch.randn(2, 3, tiles, blocks, generator=generator))
    score[:, :, :, ::5] = score[0, 0, 0, 0]
    score[0, 1] = 0.0
    limits = torch.full((2, 3), torch.nan, device=DEVICE)
    density_kernel[(6,)](score.to(DEVICE), limits, kept, tiles, blocks, CELLS=256)
    expected = threshold_for_density(score, (kept - 0.5) / (tiles * blocks))
    return torch.equal(limits.cpu(), expected)


if __name__ == "__main__":
    print(json.dumps({case: equal(*map(int, case.split("x"))) for case in sys.argv[1:]}))
