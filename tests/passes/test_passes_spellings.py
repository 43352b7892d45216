"""Attention written out by hand: every spelling found and replaced, every look-alike left alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freqopt.passes.find import find_sites
from freqopt.passes.rewrite.rewrite import insert_split
from freqopt.passes.site import Site
from freqopt.passes.spellings.packed import packed_opened

GRID = (3, 6, 10)
HEADS, DIM = 2, 16
Mixer = Callable[[Tensor, Tensor, Tensor], Tensor]


class Toy(nn.Module):
    """Patchify, one attention over (B, H, N, D) by `mix`, and out: enough for a grid to show."""

    def __init__(self, mix: Mixer, *, folded: bool = False) -> None:
        super().__init__()
        self.mix, self.folded = mix, folded
        self.patchify = nn.Conv3d(3, HEADS * DIM, (1, 2, 2), stride=(1, 2, 2))
        self.qkv = nn.Linear(HEADS * DIM, 3 * HEADS * DIM)
        self.out = nn.Linear(HEADS * DIM, 5)

    def forward(self, video: Tensor) -> Tensor:
        x = self.patchify(video).flatten(2).transpose(1, 2)
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, HEADS, DIM).permute(2, 0, 3, 1, 4)
        if self.folded:
            q, k, v = (y.reshape(batch * HEADS, tokens, DIM) for y in (q, k, v))
        mixed = self.mix(q, k, v)
        if self.folded:
            mixed = mixed.reshape(batch, HEADS, tokens, DIM)
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, HEADS * DIM))


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.transpose(-2, -1)) * DIM**-0.5).softmax(-1) @ v


def divided(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(2, 3)) / DIM**0.5
    return torch.matmul(F.softmax(scores, dim=-1), v)


def scaled_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax((q * DIM**-0.5) @ k.mT, -1) @ v


def both_scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q * DIM**-0.25) @ (k * DIM**-0.25).transpose(-1, -2)).softmax(dim=-1) @ v


def key_kept_transposed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    key = k.permute(0, 1, 3, 2).contiguous()
    return (q @ key * DIM**-0.5).softmax(-1) @ v


def float_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = F.softmax(q @ k.transpose(-1, -2) * DIM**-0.5, dim=-1, dtype=torch.float32)
    return F.dropout(weights.to(q.dtype), p=0.0, training=False) @ v


def by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (torch.einsum("bhid,bhjd->bhij", q, k) * DIM**-0.5).softmax(-1)
    return torch.einsum("bhij,bhjd->bhid", weights, v)


def einsum_of_tokens_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As it is written where heads stay behind the tokens."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) * DIM**-0.5).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).transpose(1, 2)


def einsum_with_ellipsis(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (torch.einsum("... i d, ... j d -> ... i j", q, k) * DIM**-0.5).softmax(-1)
    return torch.einsum("...ij,...jd->...id", weights, v)


def einsum_of_key_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bhjd,bhid->bhij", k, q).mul(DIM**-0.5).softmax(-1)
    return torch.einsum("bhjd,bhij->bhid", v, weights)


def einsum_and_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bnhd,bmhd->bhnm", q.transpose(1, 2), k.transpose(1, 2)).softmax(-1)
    return weights @ v


def no_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


def batched_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.bmm(F.softmax(torch.bmm(q, k.transpose(1, 2)) * DIM**-0.5, -1), v)


def legacy_baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    empty = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype)
    scores = torch.baddbmm(empty, q, k.transpose(-1, -2), beta=0, alpha=DIM**-0.5)
    return torch.bmm(scores.softmax(dim=-1), v)


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query=q, key=k, value=v, scale=0.2)


SPELLINGS = [
    plain,
    divided,
    scaled_query,
    both_scaled,
    key_kept_transposed,
    float_softmax,
    by_einsum,
    no_scale,
    fused,
    einsum_of_tokens_first,
    einsum_with_ellipsis,
    einsum_of_key_first,
    einsum_and_product,
]
FOLDED = [batched_products, legacy_baddbmm]


def capture(model: nn.Module, video: Tensor, *, split: bool) -> tuple[Tensor, list[Site]]:
    """The model's output compiled, with every eligible site replaced at threshold 0 if `split`."""
    found: list[Site] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        before = str(gm.graph)
        with packed_opened(gm):
            found.extend(find_sites(gm))
            for site in found if split else []:
                if site.eligible:
                    insert_split(gm, site, torch.zeros(2, site.heads), density=0.0, probes=8)
        assert split or str(gm.graph) == before
        gm.graph.lint()
        gm.recompile()
        names = [str(node.target) for node in gm.graph.nodes]
        eligible = sum(site.eligible for site in found) if split else 0
        assert sum("split_attention" in name for name in names) == eligible
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(model, backend=backend, fullgraph=True)(video), found


def toy(mix: Mixer, *, folded: bool = False) -> Toy:
    torch.manual_seed(0)
    return Toy(mix, folded=folded).eval()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("mix", SPELLINGS + FOLDED, ids=lambda m: m.__name__)
def test_every_spelling_is_found_and_replaced(mix: Mixer, batch: int) -> None:
    model = toy(mix, folded=mix in FOLDED)
    video = torch.randn(batch, 3, GRID[0], 2 * GRID[1], 2 * GRID[2])
    out, found = capture(model, video, split=True)
    assert [(s.kind, s.eligible, s.grid, s.heads, s.head_dim) for s in found] == [
        ("self", True, GRID, HEADS, DIM)
    ], found
    with torch.no_grad():
        assert torch.allclose(out, model(video), atol=2e-5)


def over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 0.25).softmax(-2) @ v


def over_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 0.25).softmax(1) @ v


def not_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT * 0.25).softmax(-1)
    return weights.mean(-1, keepdim=True) * v


def no_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 0.25).relu() @ v


def gated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT).sigmoid() * 0.25).softmax(-1) @ v


def scaled_by_data(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT) * q.abs().mean()).softmax(-1) @ v


def reversed_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT * 0.25).softmax(-1)
    return (v.mT @ weights).mT


def einsum_over_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bhid,bgid->bihg", q, k).softmax(-1)
    return torch.einsum("bihg,bgid->bhid", weights, v)


def einsum_with_other_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The weights meet the tokens of the query."""
    weights = torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1)
    return torch.einsum("bhij,bhid->bhjd", weights, v)


LOOK_ALIKES = [
    einsum_over_heads,
    einsum_with_other_values,
    over_queries,
    over_heads,
    not_values,
    no_softmax,
    gated,
    scaled_by_data,
    reversed_product,
]


@pytest.mark.parametrize("mix", LOOK_ALIKES, ids=lambda m: m.__name__)
def test_look_alikes_are_not_attention(mix: Mixer) -> None:
    video = torch.randn(1, 3, GRID[0], 2 * GRID[1], 2 * GRID[2])
    out, found = capture(toy(mix), video, split=True)
    assert not any(site.eligible for site in found)
    with torch.no_grad():
        assert torch.allclose(out, toy(mix)(video), atol=1e-6)


def weights_used_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT * 0.25).softmax(-1)
    return weights @ v + weights.amax(-1, keepdim=True)


def causal_by_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    tokens = q.shape[-2]
    hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    return (q @ k.mT * 0.25).masked_fill(hidden, float("-inf")).softmax(-1) @ v


def biased(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    position = torch.arange(q.shape[-2], dtype=q.dtype)
    bias = -(position[:, None] - position).abs()
    return (q @ k.mT * 0.25 + bias).softmax(-1) @ v


def causal_fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def with_dropout(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout((q @ k.mT * 0.25).softmax(-1), p=0.1, training=True) @ v


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (20 * torch.tanh(q @ k.mT / 20)).softmax(-1) @ v


@pytest.mark.parametrize(
    ("mix", "said"),
    [
        (capped, "tanh"),
        (gated, "sigmoid"),
        (scaled_by_data, "mul"),
        (weights_used_twice, "used elsewhere"),
        (causal_by_mask, "mask"),
        (biased, "mask"),
        (causal_fused, "causal"),
        (with_dropout, "dropout"),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_attention_that_must_stay_dense_says_why(mix: Mixer, said: str) -> None:
    video = torch.randn(1, 3, GRID[0], 2 * GRID[1], 2 * GRID[2])
    _, found = capture(toy(mix), video, split=True)
    assert len(found) == 1 and not found[0].eligible
    assert said in found[0].reason
