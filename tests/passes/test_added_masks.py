"""Masks that are filled into scores, or added to them: the bool masks that they stand for."""

from __future__ import annotations

from collections.abc import Callable

import passes_toys as toys
import pytest
import torch
import torch.nn.functional as F
from passes_toys import DIM, TEXT, WIDTH, dense, heads, rewritten, sites_of, text, video
from torch import Tensor, nn

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Joint(nn.Module):
    """Attention to a video and a text behind it. attend: of q, k, v and a mask (B, keys), bool."""

    def __init__(self, attend: Attend, video_shown: bool = True) -> None:
        super().__init__()
        self.attend, self.video_shown = attend, video_shown
        self.weight = nn.Parameter(torch.randn(WIDTH, 3, 1, 2, 2))
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, video: Tensor, context: Tensor, kept: Tensor) -> Tensor:
        x = toys.conv3d_tokens(video, self.weight)
        seen = torch.ones(x.shape[:2], dtype=torch.bool) if self.video_shown else kept[:, :1] > 2
        mask = torch.cat([seen.expand(x.shape[:2]), kept.bool()], 1)
        q, k, v = (heads(y) for y in self.qkv(torch.cat([x, context], 1)).chunk(3, -1))
        return self.attend(q, k, v, mask)


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT / DIM**0.5


def filled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return scores(q, k).masked_fill(~mask[:, None, None], -torch.inf).softmax(-1) @ v


def filled_where_zero(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    x = scores(q, k)
    return x.masked_fill(mask.long()[:, None, None] == 0, -1e9).softmax(-1) @ v


def filled_by_name(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    hidden = torch.logical_not(mask).view(len(mask), 1, 1, -1)
    return scores(q, k).masked_fill(mask=hidden, value=torch.finfo(q.dtype).min).softmax(-1) @ v


def filled_where_hidden(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """By a mask of another making, whose complement nothing has."""
    hidden = torch.cat(
        [torch.zeros(len(mask), mask.shape[1] - TEXT, dtype=torch.bool), ~mask[:, -TEXT:]], 1
    )
    return scores(q, k).masked_fill(hidden[:, None, None], -10000.0).softmax(-1) @ v


def chosen(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask[:, None, None], scores(q, k), -torch.inf).softmax(-1) @ v


def chosen_the_other_way(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.where(~mask[:, None, None], -1e30, scores(q, k)).softmax(-1) @ v


def zeros_filled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    added = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=added[:, None, None, :])


def zeros_chosen(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    added = torch.where(mask, 0.0, -torch.inf).unsqueeze(1).unsqueeze(1).to(q.dtype)
    return (scores(q, k) + added).softmax(-1) @ v


def zeros_expanded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    added = torch.where(mask[:, None, None], 0.0, -1e5).expand(-1, -1, mask.shape[1], -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=added)


SERVED = [
    *(filled, filled_where_zero, filled_by_name, filled_where_hidden, chosen),
    *(chosen_the_other_way, zeros_filled, zeros_chosen, zeros_expanded),
]


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    kept = torch.ones(2, TEXT)
    kept[0, 4:] = kept[1, 6:] = 0
    return video(batch=2), text(batch=2), kept


CASES = [(each, False) for each in SERVED]
CASES += [(each, True) for each in SERVED if each is not filled_where_hidden]  # of sizes in numbers


@pytest.mark.parametrize(("attend", "dynamic"), CASES)
def test_they_are_split_with_the_bool_mask(attend: Attend, dynamic: bool) -> None:
    model, given = Joint(attend), inputs()
    (site,) = sites_of(model, *given, dynamic=dynamic)
    assert site.eligible, site.reason
    with torch.no_grad():
        expected = model(*given)
    got = rewritten(model, dense, given, dynamic=dynamic)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    unmasked = rewritten(model, lambda q, k, v, mask, *rest: dense(q, k, v, None, *rest), given)
    assert not torch.allclose(unmasked, expected, atol=1e-3)


@pytest.mark.parametrize("attend", [each for each in SERVED if each is not filled_where_hidden])
def test_they_stay_dense_where_video_is_hidden(attend: Attend) -> None:
    (site,) = sites_of(Joint(attend, video_shown=False), *inputs())
    assert not site.eligible and "may hide video tokens" in site.reason


def filled_with_little(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return scores(q, k).masked_fill(~mask[:, None, None], -5.0).softmax(-1) @ v


def filled_after_a_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Zeros that are added hide nothing, and what is filled after them does."""
    x = scores(q, k) + torch.zeros(1, 1, 1, mask.shape[1])
    return x.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1) @ v


def biased(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    bias = torch.linspace(0, 1, mask.shape[1]).expand(mask.shape)
    added = bias.masked_fill(~mask, -torch.inf)[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=added)


def scaled_zeros(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    added = torch.where(mask, 0.0, -torch.inf)[:, None, None] + 0.5 * torch.linspace(
        0, 1, mask.shape[1]
    )
    return F.scaled_dot_product_attention(q, k, v, attn_mask=added)


def bias_of_pairs(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Which has an entry for each query, as scores have."""
    bias = torch.linspace(0, 1, mask.shape[1]).expand(1, 1, mask.shape[1], -1)
    added = bias.masked_fill(~mask[:, None, None], -torch.inf)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=added)


def bias_of_pairs_chosen(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    bias = torch.linspace(0, 1, mask.shape[1]).expand(1, 1, mask.shape[1], -1)
    return (scores(q, k) + torch.where(mask[:, None, None], bias, -torch.inf)).softmax(-1) @ v


def zeros_written(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    added = torch.zeros(1, 1, 1, mask.shape[1])
    added[..., 3] = 2.0
    return (scores(q, k) + added.masked_fill(~mask[:, None, None], -torch.inf)).softmax(-1) @ v


BIASED = [biased, bias_of_pairs, bias_of_pairs_chosen, zeros_written, scaled_zeros]


@pytest.mark.parametrize("attend", [*BIASED, filled_with_little, filled_after_a_mask])
def test_what_is_no_such_mask_stays_dense(attend: Attend) -> None:
    (site,) = sites_of(Joint(attend), *inputs())
    assert not site.eligible and site.grid == (3, 6, 10), site.reason
