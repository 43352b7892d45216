"""What a set of kernels is compiled for. Imports nothing, so it can be named without Triton."""

from __future__ import annotations

from dataclasses import dataclass

CAPABILITIES = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
"""Compute capabilities that kernels can be compiled for: bytes of shared memory per program."""

DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
"""Types of tensors that are attended, and Triton's names of them."""


@dataclass(frozen=True)
class Variant:
    """A GPU's compute capability (90 for 9.0), the tensors' type and head dim.

    masked: with a key mask. content: with the kernels that make an order by content, and that serve
    queries of other tokens, in an export.
    """

    capability: int
    dtype: str
    head_dim: int
    masked: bool
    content: bool = False
