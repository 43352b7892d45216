"""Softmax written out by hand, what looks like it and is not, and masks that do nothing."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from passes_toys import DIM, Attention, conv3d_tokens, dense, rewritten, sites_of, video
from torch import Tensor, nn

from freqopt.passes.find import find_sites
from freqopt.passes.rewrite.rewrite import insert_split

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT / DIM**0.5


def largest_subtracted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    x = scores(q, k)
    return (x - x.amax(-1, keepdim=True).detach()).softmax(-1) @ v


def quotient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    x = scores(q, k)
    weights = (x - x.max(dim=-1, keepdim=True).values).exp()
    return (weights / weights.sum(-1, keepdim=True)) @ v


def divided_at_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores(q, k).exp()
    return (weights @ v) / weights.sum(-1, True)


def by_log_of_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    x = scores(q, k)
    return (x - x.logsumexp(-1, keepdim=True)).exp() @ v


def by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))
    x = torch.einsum("bqhd,bkhd->bhqk", q, k) * DIM**-0.5
    weights = torch.exp(x - x.amax(-1, keepdim=True))
    weights = weights / weights.sum(-1, keepdim=True)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).transpose(1, 2)


def in_place_in_float(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q.float() @ k.float().mT).div_(DIM**0.5).softmax(-1).to(v.dtype) @ v


class Model(nn.Module):
    """A video made into tokens and one attention."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attention, self.weight = Attention(attend), nn.Parameter(torch.randn(16, 3, 1, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(conv3d_tokens(x, self.weight))


def to_the_base_2(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    x = scores(q, k) / math.log(2)
    weights = torch.exp2(x - x.amax(-1, keepdim=True))
    return weights @ v / weights.sum(-1, keepdim=True)


def moved_by_numbers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Which no softmax knows of."""
    return (3.0 + (scores(q, k) - 2.0) + 1).softmax(-1) @ v


def operands_by_name(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    x = torch.mul(input=torch.matmul(input=q, other=k.mT), other=DIM**-0.5)
    weights = torch.exp(input=torch.sub(x, other=torch.amax(input=x, dim=-1, keepdim=True)))
    total = torch.sum(input=weights, dim=-1, keepdim=True)
    return torch.matmul(input=torch.div(input=weights, other=total), other=v)


def log_of_sum_by_name(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    x = scores(q, k)
    shift = torch.logsumexp(input=x, dim=-1, keepdim=True)
    return torch.exp(input=x.sub(other=shift)) @ v


FORMS = [
    *(largest_subtracted, quotient, divided_at_last, by_log_of_sum),
    *(by_einsum, in_place_in_float, to_the_base_2),
    *(moved_by_numbers, operands_by_name, log_of_sum_by_name),
]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("attend", FORMS)
def test_softmax_written_out_is_found(attend: Attend, dynamic: bool) -> None:
    model, inputs = Model(attend), (video(batch=2),)
    (site,) = sites_of(model, *inputs)
    assert site.eligible, site.reason
    assert site.scale == pytest.approx(DIM**-0.5)
    with torch.no_grad():
        expected = model(*inputs)
    got = rewritten(model, dense, inputs, dynamic=dynamic)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attend", FORMS)
def test_nothing_of_it_is_left_in_an_exported_program(attend: Attend) -> None:
    model, x = Model(attend).eval(), video(batch=2)
    gm = torch.export.export(model, (x,)).module()
    from freqopt.passes.spellings.packed import packed_opened

    with packed_opened(gm):
        (site,) = find_sites(gm)
        insert_split(gm, site, torch.zeros(2, 2), density=0.0, probes=0)
    gm.recompile()
    names = " ".join(str(node.target) for node in gm.graph.nodes)
    assert "split_attention" in names
    assert not any(word in names for word in ("softmax", "exp.", "matmul", "einsum"))
    torch.testing.assert_close(gm(x), model(x), rtol=1e-4, atol=1e-5)


def sum_over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores(q, k).exp()
    return (weights / weights.sum(-2, keepdim=True)) @ v


def sum_plus_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores(q, k).exp()
    return (weights / (weights.sum(-1, keepdim=True) + 1)) @ v


def sum_of_others(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (scores(q, k).exp() / scores(k, q).exp().sum(-1, keepdim=True)) @ v


def shift_of_columns(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    x = scores(q, k)
    return (x - x.amax(-2, keepdim=True)).softmax(-1) @ v


def scores_used(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    x = scores(q, k)
    return x.softmax(-1) @ v + x.mean()


def largest_used(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    x = scores(q, k)
    top = x.amax(-1, keepdim=True)
    return (x - top).softmax(-1) @ v + top


def rounded_quotient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.div(q @ k.mT, DIM**0.5, rounding_mode="floor").softmax(-1) @ v


def weighed_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.zeros(k.shape[2]).index_fill(0, torch.arange(9), 4.0)
    return torch.add(scores(q, k), hidden, alpha=-0.5).softmax(-1) @ v


def weighed_log_of_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    x = scores(q, k)
    return torch.sub(x, x.logsumexp(-1, keepdim=True), alpha=0.5).exp() @ v


def rounded_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores(q, k).exp()
    return torch.div(weights, weights.sum(-1, keepdim=True), rounding_mode="trunc") @ v


def taken_from_a_number(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (2.0 - scores(q, k)).softmax(-1) @ v


def number_and_weighed_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.add(2.0, scores(q, k), alpha=3).softmax(-1) @ v


@pytest.mark.parametrize(
    "attend",
    [
        *(weighed_log_of_sum, rounded_weights, taken_from_a_number, number_and_weighed_scores),
        *(sum_over_queries, sum_plus_one, sum_of_others, shift_of_columns),
        *(scores_used, largest_used, rounded_quotient, weighed_mask),
    ],
)
def test_look_alikes_stay_as_they_are(attend: Attend) -> None:
    assert not any(site.eligible for site in sites_of(Model(attend), video(batch=2)))


def with_a_sink(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A column more, which takes its part of every row."""
    x = scores(q, k)
    sink = torch.zeros(1, 1, 1, 1).expand(*x.shape[:3], 1)
    return torch.cat([x, sink], -1).softmax(-1)[..., :-1] @ v


def padded_by_a_sink(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    x = F.pad(scores(q, k), (1, 0)).softmax(-1)
    return x.narrow(-1, 1, k.shape[2]).to(v.dtype) @ v


def gated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (scores(q, k).softmax(-1) * torch.linspace(0, 1, k.shape[2])) @ v


def scaled_behind_a_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT + torch.linspace(0, 1, k.shape[2])) / DIM**0.5).softmax(-1) @ v


def to_the_base_2_behind_a_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.exp2(scores(q, k) + torch.linspace(0, 1, k.shape[2]))
    return (weights / weights.sum(-1, keepdim=True)) @ v


LISTED: list[tuple[Attend, str]] = [
    (sum_plus_one, "weights go through add"),
    (with_a_sink, "weights go through getitem"),
    (padded_by_a_sink, "weights go through narrow"),
    (gated, "weights go through mul"),
    (scaled_behind_a_mask, "scores go through div"),
    (to_the_base_2_behind_a_mask, "scores go through exp2"),
]


@pytest.mark.parametrize(("attend", "words"), LISTED)
def test_attention_that_is_not_plain_is_listed_with_the_reason(attend: Attend, words: str) -> None:
    """It used to be passed over, as if there were none."""
    (site,) = sites_of(Model(attend), video(batch=2))
    assert not site.eligible and words in site.reason
    assert site.grid == (3, 6, 10)


def scaled_by_a_length(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Which is no number while sizes are free."""
    q, k, v = (y.flatten(0, 1) for y in (q, k, v))
    x = torch.baddbmm(q.new_zeros(1), q, k.mT, beta=0, alpha=math.log(k.shape[1]) / DIM)
    return (x.softmax(-1) @ v).unflatten(0, (2, -1))


def test_what_cannot_be_read_leaves_the_rest_of_the_graph_alone() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Model(quotient), Attention(scaled_by_a_length)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    model, x = Two(), video(batch=2)
    (site, *_) = sites_of(model, x, dynamic=True)
    assert site.eligible, site.reason


def all_true(n: int, batch: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool)


def all_zero(n: int, batch: int) -> Tensor:
    return torch.zeros(batch, 1, n, n)


def one_minus_ones(n: int, batch: int) -> Tensor:
    kept = torch.ones(batch, n, dtype=torch.bool)
    return (1 - kept[:, None, None].to(torch.float32)) * -10000.0


def filled_nowhere(n: int, batch: int) -> Tensor:
    hidden = ~torch.ones(batch, 1, 1, n, dtype=torch.bool)
    return torch.zeros(batch, 1, 1, n).masked_fill(hidden, -torch.inf)


def chosen(n: int, batch: int) -> Tensor:
    return torch.where(torch.arange(n) < n, 0.0, -torch.inf).expand(batch, 1, n, n)


@pytest.mark.parametrize("make", [all_true, all_zero, one_minus_ones, filled_nowhere, chosen])
def test_masks_that_hide_nothing_fold_away(make: Callable[[int, int], Tensor]) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = make(q.shape[2], q.shape[0])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    model, inputs = Model(attend), (video(batch=2),)
    (site,) = sites_of(model, *inputs)
    assert site.eligible and site.attention.mask is None, site.reason
    with torch.no_grad():
        expected = model(*inputs)
    torch.testing.assert_close(rewritten(model, dense, inputs), expected, rtol=1e-4, atol=1e-5)


def causal_zeros(n: int, batch: int) -> Tensor:
    return torch.zeros(n, n).masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)


def written_zeros(n: int, batch: int) -> Tensor:
    mask = torch.zeros(n, n)
    mask[:, 3:9] = -1
    return mask


def lower_ones(n: int, batch: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


def small_bias(n: int, batch: int) -> Tensor:
    return torch.full((n, n), 0.5) * torch.linspace(0, 1, n)


def other_half(n: int, batch: int) -> Tensor:
    return torch.where(torch.arange(n) < n - 1, 0.0, -torch.inf).expand(n, n)


def not_a_number(n: int, batch: int) -> Tensor:
    return torch.zeros(n, n) * -torch.inf


@pytest.mark.parametrize(
    "make", [causal_zeros, written_zeros, lower_ones, small_bias, other_half, not_a_number]
)
def test_masks_that_hide_something_do_not(make: Callable[[int, int], Tensor]) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = make(q.shape[2], q.shape[0])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    (site,) = sites_of(Model(attend), video(batch=2))
    assert not site.eligible and "mask" in site.reason
