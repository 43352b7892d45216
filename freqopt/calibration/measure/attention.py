"""One attention call as a recorder sees it: dense, split, and how far the two are apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from freqopt.grid import Grid
from freqopt.kernels.layout import TokenLayout

CHUNK_BYTES = 256 * 2**20
"""Bound on float32 temporaries while errors and spectra are summed up."""


class AttentionShape(NamedTuple):
    """What the cost of a site's attention depends on, beside its density."""

    heads: int
    tokens: int
    head_dim: int


@dataclass(frozen=True)
class AttentionCall:
    """The arguments of one attention: (B, H, N, D) query, (B, Hkv, N, D) key and value."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_mask: Tensor | None
    grid: Grid
    text_before: int
    text_after: int
    scale: float

    @property
    def shape(self) -> AttentionShape:
        """Heads, tokens and head dim of the queries."""
        return AttentionShape(*self.query.shape[1:])

    def dense(self) -> Tensor:
        """Exact attention, (B, H, N, D)."""
        mask = None if self.key_mask is None else self.key_mask[:, None, None, :]
        return F.scaled_dot_product_attention(
            self.query,
            self.key,
            self.value,
            attn_mask=mask,
            scale=self.scale,
            enable_gqa=self.query.shape[1] != self.key.shape[1],
        )

    @property
    def layout(self) -> TokenLayout:
        """How the sequence is laid out."""
        return TokenLayout(self.grid, self.text_before, self.text_after)

    def split(
        self, threshold: Tensor, probes: int, chunks: Tensor | None = None, largest: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Split attention at thresholds (H,): out (B, H, N, D), density, probe error (B, H).

        chunks: (Hkv,) int32 of the key heads, on the device; largest: of them. None: all by the
        grid.
        """
        from freqopt.kernels.op import split_attention_op

        tokens = self.query, self.key, self.value
        layout = list(self.grid), self.text_before, self.text_after
        limits = threshold.to(self.query.device, non_blocking=True)
        out, density, probe, *_ = split_attention_op(
            *tokens, limits, self.key_mask, *layout, self.scale, 0.0, probes, chunks, largest
        )
        return out, density, probe


def count_lifted(ordered: Tensor, thresholds: Sequence[float]) -> Tensor:
    """(T, B, H) int64: how many of ordered scores (B, H, pairs) are at least each threshold."""
    asked = torch.tensor(thresholds, device=ordered.device, dtype=torch.float32).expand(
        *ordered.shape[:2], -1
    )
    below = torch.searchsorted(ordered, asked.contiguous())
    return (ordered.shape[-1] - below).movedim(-1, 0)


def head_chunks(x: Tensor) -> Iterator[slice]:
    """Slices of heads of (B, H, N, D) whose float32 copies stay within CHUNK_BYTES."""
    per_head = max(1, 4 * x.shape[0] * x.shape[2] * x.shape[3])
    step = max(1, CHUNK_BYTES // per_head)
    for start in range(0, x.shape[1], step):
        yield slice(start, start + step)


def head_energy(x: Tensor) -> Tensor:
    """Squared norm of each head of (B, H, N, D), summed over the batch: (H,) float32."""
    return torch.cat([x[:, part].float().square().sum((0, 2, 3)) for part in head_chunks(x)])


def head_error(out: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
    """Squared error of each head and its projection on the dense output, each (H,) float32."""
    errors, alongs = [], []
    for part in head_chunks(out):
        truth = dense[:, part].float()
        difference = out[:, part].float() - truth
        errors.append(difference.square().sum((0, 2, 3)))
        alongs.append((difference * truth).sum((0, 2, 3)))
    return torch.cat(errors), torch.cat(alongs)
