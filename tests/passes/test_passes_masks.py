"""Key masks: those over text are honoured, those that may hide video leave a site dense."""

from __future__ import annotations

from typing import Any

import passes_toys as toys
import pytest
import torch
import torch.nn.functional as F
from passes_toys import TEXT, WIDTH, dense, heads, rewritten, sites_of, text, video
from torch import Tensor, fx, nn

from freqopt.passes.find import find_sites
from freqopt.passes.site import Site


def length_mask(x: Tensor, context: Tensor, kept: Tensor) -> Tensor:
    """As HunyuanVideo makes it: text after the video, padded at its end."""
    tokens, length = x.shape[1], x.shape[1] + context.shape[1]
    allowed = torch.ones(x.shape[0], length, dtype=torch.bool)
    lengths = tokens + kept.sum(dim=1, dtype=torch.int)
    hidden = torch.arange(length)[None] >= lengths.unsqueeze(1)
    return allowed.masked_fill(hidden, False)[:, None, None]


def compared_mask(x: Tensor, context: Tensor, kept: Tensor) -> Tensor:
    length = x.shape[1] + context.shape[1]
    lengths = x.shape[1] + kept.sum(1)
    return (torch.arange(length) < lengths[:, None]).view(x.shape[0], 1, 1, length)


def joined_mask(x: Tensor, context: Tensor, kept: Tensor) -> Tensor:
    seen = torch.ones(x.shape[:2], dtype=torch.bool)
    return torch.cat([seen, kept.bool()], 1)[:, None, None, :]


def written_mask(x: Tensor, context: Tensor, kept: Tensor) -> Tensor:
    mask = torch.cat([torch.ones(x.shape[:2], dtype=torch.bool), kept.bool()], 1)
    mask[:, 3] = False
    return mask[:, None, None, :]


def short_mask(x: Tensor, context: Tensor, kept: Tensor) -> Tensor:
    length = x.shape[1] + context.shape[1]
    lengths = x.shape[1] - 1 + kept.sum(1)
    return (torch.arange(length) < lengths[:, None])[:, None, None]


def negative_mask(x: Tensor, context: Tensor, kept: Tensor) -> Tensor:
    length = x.shape[1] + context.shape[1]
    lengths = x.shape[1] + (kept - 2).sum(1)
    return (torch.arange(length) < lengths[:, None])[:, None, None]


class Masked(nn.Module):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make
        self.weight = nn.Parameter(torch.randn(WIDTH, 3, 1, 2, 2))
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, video: Tensor, context: Tensor, kept: Tensor) -> Tensor:
        x = toys.conv3d_tokens(video, self.weight)
        mask = self.make(x, context, kept)
        q, k, v = (heads(y) for y in self.qkv(torch.cat([x, context], 1)).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def converted_mask(x: Tensor, context: Tensor, kept: Tensor) -> Tensor:
    """Numbers until the end."""
    return torch.cat([kept.new_ones(x.shape[:2]), kept], 1)[:, None, None].bool()


def filled_rows(x: Tensor, context: Tensor, kept: Tensor) -> Tensor:
    """One item of the batch after the other."""
    seen = torch.zeros(x.shape[:2])
    for i in range(x.shape[0]):
        seen[i, : x.shape[1]] = 1.0
    return torch.cat([seen, kept], 1)[:, None, None].bool()


def filled_at_once(x: Tensor, context: Tensor, kept: Tensor) -> Tensor:
    seen = torch.zeros(x.shape[0], x.shape[1] + context.shape[1], dtype=torch.bool)
    seen[:, : x.shape[1]] = True
    return torch.logical_or(seen, F.pad(kept.bool(), (x.shape[1], 0)))[:, None, None]


def filled_through_views(x: Tensor, context: Tensor, kept: Tensor) -> Tensor:
    seen = torch.zeros(x.shape[0], x.shape[1] + context.shape[1], dtype=torch.bool)
    seen[0][: x.shape[1]].fill_(True)
    seen.select(0, 1)[: x.shape[1]] = True
    seen[1, x.shape[1] + 3 :] = True
    return (seen | F.pad(kept.bool(), (x.shape[1], 0)))[:, None, None]


HONOURED = [
    length_mask,
    compared_mask,
    joined_mask,
    converted_mask,
    filled_rows,
    filled_at_once,
    filled_through_views,
]


def exported_sites(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Site]:
    graph = torch.export.export(model, inputs).module()
    assert isinstance(graph, fx.GraphModule)
    return find_sites(graph)


@pytest.mark.parametrize("make", HONOURED)
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bool])
def test_masks_over_text_are_honoured(make: Any, dtype: torch.dtype) -> None:
    kept = torch.ones(2, TEXT)
    kept[0, 4:] = kept[1, 6:] = 0
    inputs = (video(batch=2), text(batch=2), kept.to(dtype))
    model = Masked(make)
    for (site,) in (sites_of(model, *inputs), exported_sites(model, inputs)):
        assert site.eligible, site.reason
    with torch.no_grad():
        expected = model(*inputs)
    torch.testing.assert_close(rewritten(model, dense, inputs), expected)
    unmasked = rewritten(model, lambda q, k, v, mask, *rest: dense(q, k, v, None, *rest), inputs)
    assert not torch.allclose(unmasked, expected, atol=1e-3)


def filled_in_part(x: Tensor, context: Tensor, kept: Tensor) -> Tensor:
    """The second item lacks a token."""
    seen = torch.zeros(x.shape[:2])
    seen[0, :] = seen[1, : x.shape[1] - 1] = 1.0
    return torch.cat([seen, kept], 1)[:, None, None].bool()


def filled_in_one_row(x: Tensor, context: Tensor, kept: Tensor) -> Tensor:
    seen = torch.zeros(x.shape[:2])
    seen[0, :] = 1.0
    return torch.cat([seen, kept], 1)[:, None, None].bool()


def filled_too_late(x: Tensor, context: Tensor, kept: Tensor) -> Tensor:
    seen = torch.zeros(x.shape[:2])
    mask = torch.cat([seen, kept], 1)[:, None, None].bool()
    seen[:, :] = 1.0
    return mask | (seen.sum() < 0)


def filled_then_cleared(x: Tensor, context: Tensor, kept: Tensor) -> Tensor:
    seen = torch.zeros(x.shape[:2])
    seen[:, :] = 1.0
    seen[:, 5] = 0.0
    return torch.cat([seen, kept], 1)[:, None, None].bool()


def cleared_through_a_view(x: Tensor, context: Tensor, kept: Tensor) -> Tensor:
    seen = torch.ones(x.shape[:2], dtype=torch.bool)
    row = seen[0]
    row[3] = False
    return torch.cat([seen, kept.bool()], 1)[:, None, None]


def length_in_bfloat16(x: Tensor, context: Tensor, kept: Tensor) -> Tensor:
    """In which 7 + 180 + 90 is 276."""
    lengths = (kept.sum(1) + x.shape[1] + 90).to(torch.bfloat16) - 90
    return (torch.arange(x.shape[1] + context.shape[1]) < lengths[:, None])[:, None, None]


def sum_in_bfloat16(x: Tensor, context: Tensor, kept: Tensor) -> Tensor:
    """The tokens of a video that is longer than bfloat16 has integers for."""
    length = x.shape[1] + context.shape[1]
    lengths = kept.sum(1, dtype=torch.bfloat16) + x.shape[1] + 100
    return (torch.arange(100, length + 100) < lengths[:, None])[:, None, None]


def index_in_bfloat16(x: Tensor, context: Tensor, kept: Tensor) -> Tensor:
    place = torch.arange(x.shape[1] + context.shape[1]).to(torch.bfloat16)
    return (place < (x.shape[1] + kept.sum(1))[:, None])[:, None, None]


def narrow_length(x: Tensor, context: Tensor, kept: Tensor) -> Tensor:
    lengths = (x.shape[1] + kept.sum(1)).to(torch.int8)
    return (torch.arange(x.shape[1] + context.shape[1]) < lengths[:, None])[:, None, None]


def length_as_bits(x: Tensor, context: Tensor, kept: Tensor) -> Tensor:
    lengths = (x.shape[1] + kept.sum(1)).view(torch.float64).long()
    return (torch.arange(x.shape[1] + context.shape[1]) < lengths[:, None])[:, None, None]


def weighed_length(x: Tensor, context: Tensor, kept: Tensor) -> Tensor:
    lengths = torch.add(torch.tensor(x.shape[1]), kept.sum(1), alpha=-1)
    return (torch.arange(x.shape[1] + context.shape[1]) < lengths[:, None])[:, None, None]


def narrow_index(x: Tensor, context: Tensor, kept: Tensor) -> Tensor:
    length = x.shape[1] + context.shape[1]
    places = torch.arange(1, 2 * length + 1).to(torch.uint8)[-length:]
    return (places > 0).expand(x.shape[0], length)[:, None, None]


def filled_and_read_between(x: Tensor, context: Tensor, kept: Tensor) -> Tensor:
    seen = torch.zeros(x.shape[:2])
    seen[0][:] = 1.0
    row = seen[1]
    row.fill_(1.0)
    row.mul_(kept.sum() < 0)
    return torch.cat([seen, kept], 1)[:, None, None].bool()


def filled_in_part_of_a_part(x: Tensor, context: Tensor, kept: Tensor) -> Tensor:
    seen = torch.zeros(x.shape[:2])
    seen[:, 10:][:, : x.shape[1]].fill_(1.0)
    return torch.cat([seen, kept], 1)[:, None, None].bool()


def filled_with_what_is_given(x: Tensor, context: Tensor, kept: Tensor) -> Tensor:
    seen = torch.zeros(x.shape[:2])
    seen[:, :] = kept[0, 0]
    return torch.cat([seen, kept], 1)[:, None, None].bool()


def filled_by_stripes(x: Tensor, context: Tensor, kept: Tensor) -> Tensor:
    seen = torch.zeros(x.shape[:2])
    seen[:, ::2] = 1.0
    return torch.cat([seen, kept], 1)[:, None, None].bool()


def complement_of_ones(x: Tensor, context: Tensor, kept: Tensor) -> Tensor:
    """~1 is -2, which is true as well, but the complement of no mask."""
    hidden = ~torch.ones(x.shape[:2], dtype=torch.int64) + 2
    return torch.cat([hidden, kept], 1)[:, None, None].bool()


@pytest.mark.parametrize(
    "make",
    [
        written_mask,
        short_mask,
        negative_mask,
        filled_in_part,
        filled_in_one_row,
        filled_too_late,
        filled_then_cleared,
        cleared_through_a_view,
        complement_of_ones,
        length_in_bfloat16,
        sum_in_bfloat16,
        index_in_bfloat16,
        narrow_length,
        length_as_bits,
        weighed_length,
        narrow_index,
        filled_and_read_between,
        filled_in_part_of_a_part,
        filled_with_what_is_given,
        filled_by_stripes,
    ],
)
def test_masks_that_may_hide_video_stay_dense(make: Any) -> None:
    kept = torch.ones(2, TEXT, dtype=torch.int64)
    inputs = (video(batch=2), text(batch=2), kept)
    for (site,) in (sites_of(Masked(make), *inputs), exported_sites(Masked(make), inputs)):
        assert not site.eligible and "may hide video tokens" in site.reason
        assert site.grid == (3, 6, 10)


def test_one_mask_for_the_whole_batch() -> None:
    def make(x: Tensor, context: Tensor, kept: Tensor) -> Tensor:
        return joined_mask(x[:1], context[:1], kept[:1])

    inputs = (video(batch=2), text(batch=2), torch.tensor([[1, 1, 1, 0, 0, 0, 0]] * 2))
    model = Masked(make)
    with torch.no_grad():
        expected = model(*inputs)
    for dynamic in (False, True):
        torch.testing.assert_close(rewritten(model, dense, inputs, dynamic=dynamic), expected)
