"""Masks over pairs that are outer products of a key mask, and those that only look so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from passes_toys import Attention, conv3d_tokens, sites_of, video
from torch import Tensor, fx, nn

import freqopt
from freqopt.backend import freqopt_backend
from freqopt.passes.find import find_sites

GRID = (3, 6, 10)
TOKENS = 180
Square = Callable[[Tensor], Tensor]


def repeated(keys: Tensor) -> Tensor:
    rows = keys.view(keys.shape[0], 1, 1, -1).repeat(1, 1, keys.shape[1], 1)
    return (rows & rows.transpose(2, 3)).bool()


def broadcast(keys: Tensor) -> Tensor:
    return keys[:, None, None, :] & keys[:, None, :, None]


def expanded(keys: Tensor) -> Tensor:
    rows = keys[:, None, None].expand(-1, 1, keys.shape[1], -1)
    return torch.logical_and(rows.transpose(-1, -2), rows)


def places(keys: Tensor) -> Tensor:
    """As transformers makes a mask of every pair where torch cannot map a function over pairs."""
    rows = torch.arange(keys.shape[1], device=keys.device) + 0
    return (rows[None, None, :, None] >= 0).expand(keys.shape[0], -1, -1, keys.shape[1])


def numbers_first(keys: Tensor) -> Tensor:
    rows = torch.arange(3, 3 + keys.shape[1])
    return torch.logical_and((rows > 2)[None, None, :, None], ~(rows <= 2)[None, None, None])


def all_but_one(keys: Tensor) -> Tensor:
    rows = torch.arange(keys.shape[1])
    return (rows[None, None, :, None] >= 1).expand(keys.shape[0], -1, -1, keys.shape[1])


def from_below(keys: Tensor) -> Tensor:
    rows = torch.arange(keys.shape[1]) - 1
    return (rows[None, None, :, None] >= 0).expand(keys.shape[0], -1, -1, keys.shape[1])


def one_way(keys: Tensor) -> Tensor:
    rows = keys[:, None, None].expand(-1, 1, keys.shape[1], -1)
    return rows & rows.flip(-1).transpose(-1, -2)


def united(keys: Tensor) -> Tensor:
    rows = keys[:, None, None].expand(-1, 1, keys.shape[1], -1)
    return rows | rows.transpose(-1, -2)


def moved(keys: Tensor) -> Tensor:
    rows = keys[:, None, None].expand(-1, 1, keys.shape[1], -1)
    return rows & rows.roll(1, -1).transpose(-1, -2)


class Masked(nn.Module):
    """Video, then text of which part is padding, under a mask over pairs."""

    def __init__(self, square: Square) -> None:
        super().__init__()
        self.square, self.block = square, Attention(self.attend)
        self.weight = nn.Parameter(torch.randn(16, 3, 1, 2, 2))
        self.mask: Tensor | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)

    def forward(self, frames: Tensor, text: Tensor, padding: Tensor) -> Tensor:
        x = torch.cat([conv3d_tokens(frames, self.weight), text], 1)
        keys = F.pad(padding, (x.shape[1] - padding.shape[1], 0), value=True)
        self.mask = self.square(keys)
        return self.block(x)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    padding = torch.tensor([[True, True, True, False, False], [True, False, True, False, True]])
    return video(GRID, 2), torch.randn(2, 5, 16), padding


@pytest.mark.parametrize("square", [repeated, broadcast, expanded])
@pytest.mark.parametrize("dynamic", [False, True])
def test_outer_products_are_honoured(square: Square, dynamic: bool) -> None:
    """Padding is hidden from the video, and its own rows are zero as in dense attention."""
    torch.manual_seed(0)
    model, given = Masked(square), inputs()
    found: list[bool] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        found.extend(site.eligible for site in find_sites(gm))
        options = {"threshold": 0.0, "min_tokens": 1, "strict": True, "inner": "eager"}
        return freqopt_backend(gm, example_inputs, options=options)

    with torch.no_grad():
        expected = model(*given)
        got = torch.compile(model, backend=backend, dynamic=dynamic)(*given)
    assert found == [True]
    assert not expected[0, -1].isnan().any()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[0, -2:], got[1, -2:-1].expand(2, -1))


@pytest.mark.parametrize("square", [places, numbers_first])
@pytest.mark.parametrize("dynamic", [False, True])
def test_pairs_that_are_provably_all_there_are_no_mask(square: Square, dynamic: bool) -> None:
    model, given = Masked(square), inputs()
    (site,) = sites_of(model, *given, dynamic=dynamic)
    assert site.eligible and site.attention.mask is None
    options = {"inner": "eager", "min_tokens": 1, "threshold": 0.0, "strict": True}
    compiled = torch.compile(model, backend=freqopt_backend, options=options, dynamic=dynamic)  # type: ignore[call-overload]
    with torch.no_grad():
        torch.testing.assert_close(compiled(*given), model(*given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("square", [one_way, united, moved, all_but_one, from_below])
def test_other_masks_over_pairs_are_not(square: Square) -> None:
    with torch.no_grad():
        (site,) = sites_of(Masked(square), *inputs())
    assert not site.eligible and "mask" in site.reason


def test_padding_of_the_video_is_not_honoured() -> None:
    """Padded with False, or on the other side, a mask hides video tokens."""

    class Hidden(Masked):
        def forward(self, frames: Tensor, text: Tensor, padding: Tensor) -> Tensor:
            x = torch.cat([conv3d_tokens(frames, self.weight), text], 1)
            self.mask = repeated(F.pad(padding, (0, x.shape[1] - padding.shape[1]), value=True))
            return self.block(x)

    class Blind(Masked):
        def forward(self, frames: Tensor, text: Tensor, padding: Tensor) -> Tensor:
            x = torch.cat([conv3d_tokens(frames, self.weight), text], 1)
            keys = F.pad(padding, (x.shape[1] - padding.shape[1], 0), value=False)
            self.mask = repeated(keys)
            return self.block(x)

    for kind in (Hidden, Blind):
        with torch.no_grad():
            (site,) = sites_of(kind(repeated), *inputs())
        assert not site.eligible and "mask" in site.reason


def every_row(keys: Tensor) -> Tensor:
    """One key mask, repeated for every head and query."""
    return keys[:, None, None].expand(-1, 2, keys.shape[1], -1)


def added(keys: Tensor) -> Tensor:
    """The outer product as numbers, which are added to the scores."""
    return broadcast(keys).to(torch.float32)


def test_a_key_mask_repeated_for_every_query_is_that_key_mask() -> None:
    torch.manual_seed(0)
    model, given = Masked(every_row).eval(), inputs()
    options = {"threshold": 0.0, "min_tokens": 1, "strict": True, "inner": "eager"}
    torch._dynamo.reset()
    freqopt.reset_counters()
    with torch.no_grad():
        out = torch.compile(model, backend=freqopt_backend, options=options)(*given)
        torch.testing.assert_close(out, model(*given), rtol=1e-4, atol=1e-5)
    assert (freqopt.counters().split, freqopt.counters().dense) == (1, 0)


def test_pairs_as_numbers_are_no_mask() -> None:
    (site,) = sites_of(Masked(added).eval(), *inputs())
    assert not site.eligible and "added to the scores" in site.reason
