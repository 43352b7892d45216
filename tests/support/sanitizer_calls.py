r"""Small calls through every GPU kernel of the op, for compute-sanitizer; not a test by itself.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \
        python tests/support/sanitizer_calls.py

Without PyTorch's caching every tensor is an allocation of its own, so that a read past its end is
one past an allocation. Lengths are odd, and the switches for long and for large calls are lowered.
"""

from __future__ import annotations

from unittest import mock

import torch
from torch import Tensor

import freqopt
from freqopt.kernels import overlap, workspace

GRID = (5, 9, 13)
TEXT = (7, 12)


def tensors(dtype: torch.dtype, dim: int, heads: int, kv_heads: int, text: int) -> list[Tensor]:
    """Query, key and value as views of (B, N, H, D), so with the strides that models have."""
    generator = torch.Generator("cuda").manual_seed(0)
    tokens = GRID[0] * GRID[1] * GRID[2] + text
    return [
        torch.randn(1, tokens, n, dim, device="cuda", generator=generator).to(dtype).transpose(1, 2)
        for n in (heads, kv_heads, kv_heads)
    ]


def call(
    name: str, dtype: torch.dtype, dim: int, *, text: bool = False, backward: bool = False,
    density: float = 0.0,
) -> None:  # fmt: skip
    """One call; prints its name, so that what the sanitizer finds can be placed."""
    before, after = TEXT if text else (0, 0)
    query, key, value = tensors(dtype, dim, 4, 2, before + after)
    key_mask = None
    if text:
        key_mask = torch.ones(1, key.shape[2], dtype=torch.bool, device="cuda")
        key_mask[:, -3:] = False
    given = [x.requires_grad_(backward) for x in (query, key, value)]
    out, stats = freqopt.split_attention(
        *given, grid=GRID, text_before=before, text_after=after, key_mask=key_mask,
        threshold=None if density else 1.3, density=density or None, return_stats=True,
    )  # fmt: skip
    if backward:
        out.float().square().sum().backward()
    torch.cuda.synchronize()
    if not bool(out.isfinite().all()):
        raise SystemExit(f"{name}: the output is not finite")
    print(f"{name}: density {float(stats.density.mean()):.3f}", flush=True)


def main() -> None:
    """All calls, each kernel at least once."""
    half = torch.bfloat16
    call("hopper", half, 128)
    call("hopper, text and mask", torch.float16, 64, text=True)
    call("portable", half, 96, text=True)
    call("float32", torch.float32, 64)
    call("density", half, 128, density=0.2)
    call("backward", half, 128, backward=True, text=True)
    call("backward", half, 64, backward=True)
    with mock.patch.object(overlap, "OVERLAP_ROWS", 0):
        call("probes beside the scores", half, 128, text=True)
    with mock.patch.object(workspace, "LONG_TOKENS", 1):
        call("long", half, 128, text=True)
        call("long, density", half, 64, density=0.2)
        call("long, portable", torch.float32, 64)


if __name__ == "__main__":
    main()
