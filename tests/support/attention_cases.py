"""Attention problems shared by the op's tests, and the float32 truth they are compared with."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from freqopt.kernels import chunked, reference
from freqopt.kernels.layout import Sequence


@dataclass(frozen=True)
class Case:
    """One problem; `spread` widens the logits, `smooth` gives the tokens a spatial spectrum."""

    grid: tuple[int, int, int]
    dim: int = 32
    heads: int = 2
    kv_heads: int = 2
    batch: int = 2
    before: int = 0
    after: int = 0
    masked: bool = False
    mid: bool = False

    @property
    def length(self) -> int:
        t, h, w = self.grid
        return t * h * w + self.before + self.after

    @property
    def sequence(self) -> Sequence:
        return Sequence(self.grid, self.before, self.after)


CASES = [
    Case((3, 6, 10)),
    Case((5, 7, 9), before=3, after=5, masked=True),
    Case((1, 17, 23), dim=24, batch=1, after=7),
    Case((4, 8, 8), heads=4, kv_heads=2, mid=True),
    Case((5, 9, 11), dim=40, batch=1, before=9, mid=True, masked=True),
    Case((1, 1, 333), batch=1, dim=16),
    Case((6, 8, 11), batch=1, dim=64, mid=True),
]


def smooth_field(case: Case, heads: int, dim: int, generator: torch.Generator) -> Tensor:
    """(B, heads, N, D) of low-frequency content over the lattice plus noise; text is noise."""
    t, h, w = case.grid
    axes = torch.cartesian_prod(*[torch.linspace(0, 1, n) for n in (t, h, w)])
    waves = torch.randn(case.batch, heads, 3, dim, generator=generator) * 3
    phase = torch.randn(case.batch, heads, 1, dim, generator=generator) * 3
    video = 2 * torch.sin(axes @ waves + phase)
    video = video + 0.3 * torch.randn(video.shape, generator=generator)
    text = torch.randn(case.batch, heads, case.before + case.after, dim, generator=generator)
    return torch.cat([text[:, :, : case.before], video, text[:, :, case.before :]], 2)


def make_tensors(case: Case, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """query, key, value (as views of (B, N, H, D) storage) and the key mask, float32 on the CPU."""
    generator = torch.Generator().manual_seed(seed)

    def stored(heads: int) -> Tensor:
        field = smooth_field(case, heads, case.dim, generator)
        return field.transpose(1, 2).contiguous().transpose(1, 2)

    query, key, value = stored(case.heads), stored(case.kv_heads), stored(case.kv_heads)
    mask = None
    if case.masked:
        mask = torch.ones(case.batch, case.length, dtype=torch.bool)
        mask[0, case.length - case.after + 1 :] = False
        mask[-1, : case.before // 2] = False
    return query, key + 0.5, value, mask


def budget_for(case: Case, tensors: tuple[Tensor, ...], density: float) -> Tensor:
    """(2, H) budget that falls into a wide gap between two routing scores near a density.

    Implementations round differently; with no score close to the budget their routes must agree
    exactly.
    """
    query, key, value, mask = tensors
    tokens = chunked.take_apart(query, key, value, mask, case.sequence)
    summary = reference.summarise(tokens.key, tokens.value, 64)
    score = reference.score_pairs(tokens.query, summary, case.dim**-0.5, query.dtype).score

    def near(share: float) -> Tensor:
        per_head = score.transpose(0, 1).flatten(1).sort(-1).values.clamp(min=1e-20)
        if per_head.shape[1] == 1:
            return 0.5 * per_head[:, 0]
        at = min(int((1 - share) * per_head.shape[1]), per_head.shape[1] - 2)
        window = per_head[:, max(at - 3, 0) : at + 5]
        gaps = window[:, 1:] / window[:, :-1]
        best = gaps.argmax(-1, keepdim=True)
        return (window.gather(1, best) * window.gather(1, best + 1)).sqrt().squeeze(1)

    exact = near(density)
    middle = torch.minimum(near(min(density * 2.5, 0.95)), exact) if case.mid else exact
    return torch.stack([exact, middle])


def attended_exactly(case: Case, budget: Tensor) -> tuple[Case, Tensor]:
    """What kernels and exports serve: the pairs of a mid band exactly, so its threshold counts."""
    return replace(case, mid=False), budget[int(case.mid)].expand(2, -1)


def reference_split(
    case: Case, tensors: tuple[Tensor, ...], budget: Tensor, probes: int = 64
) -> tuple[Tensor, reference.Split]:
    """The definition's result in the model's order, with its findings."""
    query, key, value, mask = tensors
    tokens = chunked.take_apart(query, key, value, mask, case.sequence)
    split = reference.split_tokens(
        tokens.query, tokens.key, tokens.value, tokens.text_key, tokens.text_value,
        tokens.text_bias, budget, scale=case.dim**-0.5, mid_band=case.mid, probes=probes,
        dtype=query.dtype,
    )  # fmt: skip
    out = torch.full_like(query, torch.nan)
    text = dense(case, tensors)
    case.sequence.store(out, split.out, case.sequence.text_of(text))
    return out, split


def dense(case: Case, tensors: tuple[Tensor, ...]) -> Tensor:
    """Dense attention in float32, video keys always attended."""
    query, key, value, mask = tensors
    key, value = (x.repeat_interleave(case.heads // case.kv_heads, 1) for x in (key, value))
    logits = query.float() @ key.float().mT * case.dim**-0.5
    whole = case.sequence.sequence_mask(mask)
    if whole is not None:
        logits = logits.masked_fill(~whole[:, None, None], -torch.inf)
    return logits.softmax(-1) @ value.float()


def relative(out: Tensor, truth: Tensor) -> float:
    """Relative L2 distance; NaN anywhere gives NaN, which no bound accepts."""
    return float((out.float() - truth.float()).norm() / truth.float().norm())
