"""Orders of tokens as benchmarks compare them: the grid's, two by content, and a choice per head.

The choice per head is the better of grid and all by content, made on other tensors than those it
is measured on, as calibration makes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.tensors import Attention
from freqopt.config import ALL, DEFAULT_PROBES
from freqopt.kernels.chunked_order import order_by_content
from freqopt.kernels.content_order import enclosing
from freqopt.kernels.layout import TokenLayout
from freqopt.kernels.op import split_attention_op

GRID, PER_HEAD = "grid", "per head"

CHUNKS = {GRID: 0, "content 1,024": 1024, "content all": ALL}
"""Tokens of the chunks of the orders that all heads share, by name."""

CHOICES = (GRID, "content all")
"""What the choice per head is made of."""

STEPS = 14
"""Bisections of a threshold."""


class Called(NamedTuple):
    """What a call gives: out (B, H, N, D), density and probe_error (B, H)."""

    out: Tensor
    density: Tensor
    probe_error: Tensor


class Ordering(NamedTuple):
    """An order of a benchmark.

    chunks: (Hkv,) int32 on the device, as `freqopt.split_attention` takes them; largest: the
    largest of them, which a call on the device cannot read without waiting.
    """

    name: str
    chunks: Tensor
    largest: int

    def call(self, a: Attention, *, threshold: float = 0.0, density: float = 0.0) -> Called:
        """Split attention at a threshold, or at a density where it is not 0.

        It is what `freqopt.split_attention` calls with `order=chunks`, less its checks, which wait
        for the device to tell what is in the tensor: plans hold these numbers on the CPU.
        """
        thresholds = torch.full((a.query.shape[1],), threshold, device=a.query.device)
        content = (self.chunks, self.largest) if self.largest else (None, 0)
        out, reached, error, *_ = split_attention_op(
            a.query,
            a.key,
            a.value,
            thresholds,
            None,
            list(a.grid),
            0,
            0,
            a.query.shape[-1] ** -0.5,
            density,
            DEFAULT_PROBES,
            *content,
        )
        return Called(out, reached, error)

    def make(self, key: Tensor, grid: tuple[int, int, int]) -> Callable[[], object] | None:
        """What makes the orders of the keys and nothing else, None where it is the grid's."""
        if not self.largest:
            return None
        base = TokenLayout(grid, 0, 0).base_order(key.device)
        if key.device.type != "cuda":
            return lambda: order_by_content(key, base, self.chunks)
        from freqopt.kernels.forward import order as launched

        order = torch.empty(key.shape[:3], device=key.device, dtype=torch.int32)
        return lambda: launched.order_by_content(key, base, self.chunks, self.largest, 0, order)


def ordering(name: str, chunks: Tensor, tokens: int) -> Ordering:
    """An order from the chunks (Hkv,) of its key heads."""
    return Ordering(name, chunks, min(int(chunks.max()), enclosing(tokens)))


def shared_orderings(a: Attention) -> list[Ordering]:
    """Those that all heads of a problem share, the grid's first."""
    heads, tokens = a.key.shape[1:3]
    return [
        ordering(name, torch.full((heads,), chunk, dtype=torch.int32, device=a.key.device), tokens)
        for name, chunk in CHUNKS.items()
    ]


def chosen_per_head(a: Attention, reference: Tensor, densities: tuple[float, ...]) -> Ordering:
    """The better of the grid's order and all by content, for each head of other tensors.

    Better is a lower relative L1 error, its geometric mean over the densities, which every head
    reaches alike under either order. reference: (B, H, N, D), dense attention of `a`.
    """
    found = []
    for each in (order for order in shared_orderings(a) if order.name in CHOICES):
        errors = [head_errors(each.call(a, density=d).out, reference)[0] for d in densities]
        found.append(torch.stack(errors).clamp(min=1e-9).log().mean(0))
    by_key_head = torch.stack(found).unflatten(1, (a.key.shape[1], -1)).mean(2)
    chunks = torch.tensor([CHUNKS[name] for name in CHOICES], device=a.key.device)
    return ordering(PER_HEAD, chunks[by_key_head.argmin(0)].to(torch.int32), a.key.shape[2])


def head_errors(out: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Relative L1 and L2 errors (H,) of (B, H, N, D) outputs, mean over the batch."""
    out, truth = out.float(), truth.float()
    l1 = (out - truth).abs().sum((2, 3)) / truth.abs().sum((2, 3))
    l2 = (out - truth).square().sum((2, 3)).sqrt() / truth.square().sum((2, 3)).sqrt()
    return l1.mean(0), l2.mean(0)


def largest_budget(near: Callable[[float], bool], low: float, high: float) -> float:
    """The largest budget between two powers of ten for which `near` holds, by bisection.

    `low` where it holds for none.
    """
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if near(10.0**middle) else (low, middle)
    return float(10.0**low)


def threshold_at(each: Ordering, a: Attention, density: float) -> float:
    """One threshold for all heads whose mean density under an order is the given one.

    It is at most the one that would fall short of the density; 0 for a density of 1.
    """
    if density >= 1.0:
        return 0.0
    return largest_budget(
        lambda threshold: float(each.call(a, threshold=threshold).density.mean()) > density,
        -4.0,
        4.0,
    )
