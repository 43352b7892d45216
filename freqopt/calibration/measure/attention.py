"""One attention call as a recorder sees it: dense, split, and how far the two are apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from freqopt.grid import Grid

CHUNK_BYTES = 256 * 2**20
"""Bound on float32 temporaries while errors and spectra are summed up."""


@dataclass(frozen=True)
class Call:
    """The arguments of one attention: (B, H, N, D) query, (B, Hkv, N, D) key and value."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_mask: Tensor | None
    grid: Grid
    text_before: int
    text_after: int
    scale: float

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

    def split(self, budget: Tensor, probes: int) -> tuple[Tensor, Tensor, Tensor]:
        """Split attention with a budget (H,): out (B, H, N, D), density and probe error (B, H)."""
        from freqopt.kernels.op import split_attention_op

        budget = budget.to(self.query.device, non_blocking=True)
        out, density, probe, *_ = split_attention_op(
            self.query, self.key, self.value, budget, self.key_mask, list(self.grid),
            self.text_before, self.text_after, self.scale, 0.0, probes,
        )  # fmt: skip
        return out, density, probe

    def ordered_scores(self) -> Tensor:
        """(B, H, pairs) scores of all (query tile, key block) pairs, ascending.

        Infinite for the local blocks, which are exact at any threshold. Heads in turn: scoring all
        would need gigabytes.
        """
        from freqopt.kernels.reference import own_blocks
        from freqopt.kernels.scores import route_scores

        group, rows = self.query.shape[1] // self.key.shape[1], []
        for head in range(self.query.shape[1]):
            of_query, of_key = slice(head, head + 1), slice(head // group, head // group + 1)
            score = route_scores(
                self.query[:, of_query], self.key[:, of_key], self.value[:, of_key],
                grid=self.grid, text_before=self.text_before, text_after=self.text_after,
                scale=self.scale,
            )  # fmt: skip
            own = own_blocks(score.shape[2], score.shape[3], score.device)
            rows.append(torch.where(own, torch.inf, score).flatten(2).sort(-1).values)
        return torch.cat(rows, 1)


def count_lifted(ordered: Tensor, thresholds: Sequence[float]) -> Tensor:
    """How many pairs of `Call.ordered_scores` score at least each threshold: (T, B, H) int64."""
    asked = torch.tensor(thresholds, device=ordered.device).expand(*ordered.shape[:2], -1)
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
