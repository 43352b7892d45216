"""Attention problems shared by the op's tests, and the float32 truth they are compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from freqopt.config import KEY_BLOCK
from freqopt.kernels import chunked, reference
from freqopt.kernels.chunked import Orders
from freqopt.kernels.content_order import content_order
from freqopt.kernels.layout import Inputs, TokenLayout

BASE = Orders(None, None)


@dataclass(frozen=True)
class Case:
    """One problem.

    chunk: of the content order, 0 for the grid's. queries: grid of queries that are other tokens
    than the keys, with text of their own.
    """

    grid: tuple[int, int, int]
    dim: int = 32
    heads: int = 2
    kv_heads: int = 2
    batch: int = 2
    before: int = 0
    after: int = 0
    masked: bool = False
    chunk: int = 0
    queries: tuple[int, int, int] | None = None
    query_before: int = 0
    query_after: int = 0

    @property
    def length(self) -> int:
        t, h, w = self.grid
        return t * h * w + self.before + self.after

    @property
    def sequence(self) -> TokenLayout:
        return TokenLayout(self.grid, self.before, self.after)

    @property
    def query_layout(self) -> TokenLayout | None:
        if self.queries is None:
            return None
        return TokenLayout(self.queries, self.query_before, self.query_after)

    @property
    def query_side(self) -> TokenLayout:
        return self.query_layout or self.sequence

    def op_layout(self) -> list[int] | None:
        """The op's argument for queries that are other tokens."""
        layout = self.query_layout
        return None if layout is None else [*layout.grid, layout.text_before, layout.text_after]

    def inputs(
        self, tensors: tuple[Tensor, ...], threshold: Tensor, orders: Orders = BASE
    ) -> Inputs:
        """The call's tensors, given the orders of `orders_of`."""
        query, key, value, mask = tensors
        of_queries = None if self.queries is None else orders.query
        return Inputs(
            query,
            key,
            value,
            threshold,
            mask,
            self.sequence,
            self.query_layout,
            key_order=orders.key,
            query_order=of_queries,
        )


CASES = [
    Case((3, 6, 10)),
    Case((5, 7, 9), before=3, after=5, masked=True),
    Case((1, 17, 23), dim=24, batch=1, after=7),
    Case((4, 8, 8), heads=4, kv_heads=2),
    Case((5, 9, 11), dim=40, batch=1, before=9, masked=True),
    Case((1, 1, 333), batch=1, dim=16),
    Case((6, 8, 11), batch=1, dim=64),
]

CONTENT_CASES = [
    Case((5, 7, 9), heads=4, before=3, after=5, masked=True, chunk=256),
    Case((1, 1, 300), dim=40, heads=2, kv_heads=1, batch=1, chunk=512),
]

RECTANGULAR_CASES = [
    Case((5, 7, 9), heads=4, before=3, after=5, masked=True, queries=(2, 5, 7)),
    Case((2, 5, 7), dim=24, batch=1, queries=(5, 7, 9), query_before=2, query_after=70),
    Case((1, 1, 400), heads=2, kv_heads=1, batch=1, chunk=256, queries=(1, 1, 150)),
    Case((1, 1, 1), batch=1, queries=(3, 6, 10)),
    Case((3, 6, 10), batch=1, after=1, queries=(1, 1, 1)),
]


def smooth_field(
    layout: TokenLayout, batch: int, heads: int, dim: int, generator: torch.Generator
) -> Tensor:
    """(B, heads, N, D) of low-frequency content over the lattice plus noise; text is noise."""
    t, h, w = layout.grid
    axes = torch.cartesian_prod(*[torch.linspace(0, 1, n) for n in (t, h, w)])
    waves = torch.randn(batch, heads, 3, dim, generator=generator) * 3
    phase = torch.randn(batch, heads, 1, dim, generator=generator) * 3
    video = 2 * torch.sin(axes @ waves + phase)
    video = video + 0.3 * torch.randn(video.shape, generator=generator)
    text = torch.randn(batch, heads, layout.text, dim, generator=generator)
    before = layout.text_before
    return torch.cat([text[:, :, :before], video, text[:, :, before:]], 2)


def make_tensors(case: Case, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """query, key, value (as views of (B, N, H, D) storage) and the key mask, float32 on the CPU."""
    generator = torch.Generator().manual_seed(seed)

    def stored(layout: TokenLayout, heads: int) -> Tensor:
        field = smooth_field(layout, case.batch, heads, case.dim, generator)
        return field.transpose(1, 2).contiguous().transpose(1, 2)

    query = stored(case.query_side, case.heads)
    key, value = stored(case.sequence, case.kv_heads), stored(case.sequence, case.kv_heads)
    mask = None
    if case.masked:
        mask = torch.ones(case.batch, case.length, dtype=torch.bool)
        mask[0, case.length - case.after + 1 :] = False
        mask[-1, : case.before // 2] = False
    return query, key + 0.5, value, mask


def clustered(tokens: int, dim: int = 24, heads: int = 2, clusters: int = 12) -> Tensor:
    """(1, H, T, D) tokens of a few kinds, scattered over the sequence."""
    generator = torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(heads, clusters, dim, generator=generator)
    kind = torch.randint(clusters, (heads, tokens), generator=generator)
    noise = 0.3 * torch.randn(heads, tokens, dim, generator=generator)
    return (centres.gather(1, kind[..., None].expand(-1, -1, dim)) + noise)[None]


def orders_of(case: Case, tensors: tuple[Tensor, ...]) -> Orders:
    """The orders of the keys (B, Hkv, T) and the queries (B, H, Tq) by the definition."""
    if not case.chunk:
        return Orders(None, None)
    query, key = tensors[:2]

    def made(x: Tensor, layout: TokenLayout) -> Tensor:
        tokens = x[:, :, layout.text_before : layout.text_before + layout.tokens]
        chunks = torch.full((x.shape[1],), case.chunk)
        return content_order(tokens, layout.base_order(x.device), chunks)

    of_keys = made(key, case.sequence)
    if case.query_layout is None:
        return Orders(of_keys, of_keys.repeat_interleave(case.heads // case.kv_heads, 1))
    return Orders(of_keys, made(query, case.query_layout))


def scores_of(case: Case, tensors: tuple[Tensor, ...]) -> Tensor:
    """The definition's routing scores (B, H, tiles, blocks), given the orders of `orders_of`."""
    orders = orders_of(case, tensors)
    tokens = chunked.take_apart(case.inputs(tensors, torch.zeros(case.heads), orders), orders)
    summary = reference.summarise(tokens.key, tokens.value, 64)
    return reference.score_pairs(tokens.query, summary, case.dim**-0.5, tensors[0].dtype).score


def budget_for(case: Case, tensors: tuple[Tensor, ...], density: float) -> Tensor:
    """(H,) thresholds that fall into a wide gap between two routing scores near a density.

    Implementations round differently; with no score close to the threshold their routes must agree
    exactly.
    """
    per_head = scores_of(case, tensors).transpose(0, 1).flatten(1).sort(-1).values.clamp(min=1e-20)
    if per_head.shape[1] == 1:
        return 0.5 * per_head[:, 0]
    at = min(int((1 - density) * per_head.shape[1]), per_head.shape[1] - 2)
    window = per_head[:, max(at - 3, 0) : at + 5]
    gaps = window[:, 1:] / window[:, :-1]
    best = gaps.argmax(-1, keepdim=True)
    return (window.gather(1, best) * window.gather(1, best + 1)).sqrt().squeeze(1)


def h_bar_of(case: Case, tensors: tuple[Tensor, ...]) -> Tensor:
    """H-bar (B, H, D, D) of the low band, in the definition's order."""
    orders = orders_of(case, tensors)
    tokens = chunked.take_apart(case.inputs(tensors, torch.zeros(case.heads), orders), orders)
    return reference.summarise(tokens.key, tokens.value, KEY_BLOCK).h_bar


def reference_split(
    case: Case,
    tensors: tuple[Tensor, ...],
    threshold: Tensor,
    probes: int = 64,
    density: float = 0.0,
) -> tuple[Tensor, reference.Split]:
    """The definition's result in the model's order, with its findings."""
    orders = orders_of(case, tensors)
    tokens = chunked.take_apart(case.inputs(tensors, threshold, orders), orders)
    split = reference.split_tokens(
        tokens.query,
        tokens.key,
        tokens.value,
        tokens.text_key,
        tokens.text_value,
        tokens.text_bias,
        threshold,
        scale=case.dim**-0.5,
        density=density,
        probes=probes,
        dtype=tensors[0].dtype,
        own=case.queries is None,
    )
    out = torch.full_like(tensors[0], torch.nan)
    layout = case.query_side
    layout.store(out, split.out, layout.text_of(dense(case, tensors)), orders.query)
    return out, split


def reference_log_sums(case: Case, tensors: tuple[Tensor, ...], split: reference.Split) -> Tensor:
    """The definition's log sums (B, H, Nq) as the model numbers its queries."""
    out = torch.full((*tensors[0].shape[:3], 1), torch.nan)
    layout, orders = case.query_side, orders_of(case, tensors)
    text = layout.text_of(logits_of(case, tensors).logsumexp(-1)[..., None])
    layout.store(out, split.log_sum[..., None], text, orders.query)
    return out[..., 0]


def logits_of(case: Case, tensors: tuple[Tensor, ...]) -> Tensor:
    """Logits (B, H, Nq, Nk) in float32, video keys always attended."""
    query, key, _, mask = tensors
    key = key.repeat_interleave(case.heads // case.kv_heads, 1)
    logits = query.float() @ key.float().mT * case.dim**-0.5
    whole = case.sequence.sequence_mask(mask)
    return logits if whole is None else logits.masked_fill(~whole[:, None, None], -torch.inf)


def dense(case: Case, tensors: tuple[Tensor, ...]) -> Tensor:
    """Dense attention in float32, video keys always attended."""
    value = tensors[2].repeat_interleave(case.heads // case.kv_heads, 1)
    return logits_of(case, tensors).softmax(-1) @ value.float()


def relative(out: Tensor, truth: Tensor) -> float:
    """Relative L2 distance; NaN anywhere gives NaN, which no bound accepts."""
    return float((out.float() - truth.float()).norm() / truth.float().norm())
