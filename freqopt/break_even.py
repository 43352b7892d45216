"""From which length on splitting an attention pays, where the user does not say (`min_tokens`).

Dense attention takes time by heads * tokens^2 * head_dim. A split call has a floor: its kernels
have to be launched, and none of them is free on a short sequence. Measured on one H200 in bfloat16
with heads of 128, in milliseconds for one call (split at mean densities from 0.05 to 0.3):

    heads  tokens  dense  split in a CUDA graph
       40   4,096   0.51  0.39 - 0.50
       24   4,096   0.31  0.32 - 0.39
       24   8,192   1.20  0.44 - 0.71
       24  16,384   4.8   0.77 - 1.9
        2  32,768   1.56  0.39 - 0.83

Launched kernel by kernel, a split call takes the host 1.0 ms whatever its length.
"""

from __future__ import annotations

import math

import torch

DENSE_MS = 0.0128
"""Dense attention, for a head of 128 over 4,096 tokens: all rows above are within 6 % of it."""

RECORDED_MS = 0.4
"""Floor of a split call inside a CUDA graph."""

LAUNCHED_MS = 1.0
"""Floor of a split call that is launched kernel by kernel."""

CPU_TOKENS = 4096
"""On a CPU (for trying things out) gains come from low densities, hardly from the length."""


def default_min_tokens(
    device: torch.device, heads: int, head_dim: int, *, cuda_graphs: bool = False
) -> int:
    """Length in tokens from which dense attention takes longer than the floor of a split call.

    heads: of all items of the batch together. cuda_graphs: whether calls are recorded and replayed.
    Other GPUs are taken for an H200: where both floors and attention scale alike, so does the
    length.
    """
    if device.type != "cuda":
        return CPU_TOKENS
    floor = RECORDED_MS if cuda_graphs else LAUNCHED_MS
    dense = DENSE_MS * max(heads, 1) * max(head_dim, 1) / 128
    return math.ceil(4096 * math.sqrt(floor / dense))
