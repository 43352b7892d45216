"""Operators without a rule between the tokens and an attention: rotary kernels, quantised products.

Where the shapes tell that rows stay rows the tokens are followed; where a name tells that they are
moved they are not, and a grid that is given is believed if it has as many tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from passes_toys import DIM, HEADS, WIDTH, sites_of
from torch import Tensor, nn

GRID = (3, 6, 10)


@torch.library.custom_op("foreign_toys::turn", mutates_args=())
def turn(x: Tensor, table: Tensor) -> Tensor:
    return x * table


@torch.library.custom_op("foreign_toys::turn_both", mutates_args=())
def turn_both(q: Tensor, k: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    return q * table, k * table


@torch.library.custom_op("foreign_toys::int8_linear", mutates_args=())
def int8_linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x.flatten(0, -2), weight)


@torch.library.custom_op("foreign_toys::shuffle_tokens", mutates_args=())
def shuffle_tokens(x: Tensor, table: Tensor) -> Tensor:
    return (x * table).flip(1)


@turn.register_fake
def _turn(x: Tensor, table: Tensor) -> Tensor:
    return torch.empty_like(x)


@turn_both.register_fake
def _turn_both(q: Tensor, k: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k)


@int8_linear.register_fake
def _int8_linear(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.numel() // x.shape[-1], weight.shape[0])


@shuffle_tokens.register_fake
def _shuffle(x: Tensor, table: Tensor) -> Tensor:
    return torch.empty_like(x)


Turn = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
TURNS: dict[str, Turn] = {
    "one": lambda q, k, table: (turn(q, table), turn(k, table)),
    "both": lambda q, k, table: turn_both(q, k, table),
    "moved": lambda q, k, table: (shuffle_tokens(q, table), shuffle_tokens(k, table)),
}


class Video(nn.Module):
    """A patchifier and one attention, positions by `turn`."""

    def __init__(self, way: Turn, text: bool = False, quantised: bool = False) -> None:
        super().__init__()
        self.way, self.text, self.quantised = way, text, quantised
        self.patch = nn.Conv3d(4, WIDTH, (1, 2, 2), (1, 2, 2))
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def project(self, linear: nn.Linear, x: Tensor) -> Tensor:
        if self.quantised:
            made = int8_linear(x, linear.weight).view(*x.shape[:-1], -1)
        else:
            made = linear(x)
        return made.unflatten(-1, (HEADS, DIM))

    def forward(self, video: Tensor, words: Tensor) -> Tensor:
        x = self.patch(video).flatten(2).transpose(1, 2)
        if self.text:
            x = torch.cat([words, x], 1)
        q, k, v = (self.project(linear, x) for linear in self.qkv)
        table = torch.arange(x.shape[1], dtype=x.dtype).cos()[:, None, None]
        q, k = self.way(q, k, table)
        return F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v)))


def inputs() -> tuple[Tensor, Tensor]:
    t, h, w = GRID
    return torch.randn(2, 4, t, 2 * h, 2 * w), torch.randn(2, 7, WIDTH)


@pytest.mark.parametrize("way", ["one", "both"])
@pytest.mark.parametrize("text", [False, True])
def test_rows_stay_rows_in_an_operator_that_nobody_knows(way: str, text: bool) -> None:
    (site,) = sites_of(Video(TURNS[way], text), *inputs())
    assert site.eligible, site.reason
    assert (site.grid, site.text_before, site.text_after) == (GRID, 7 * text, 0)


@pytest.mark.parametrize("text", [False, True])
def test_a_quantised_product_keeps_rows_in_fewer_dimensions(text: bool) -> None:
    (site,) = sites_of(Video(TURNS["one"], text, quantised=True), *inputs())
    assert site.eligible, site.reason
    assert (site.grid, site.text_before) == (GRID, 7 * text)


def test_an_operator_that_moves_tokens_is_not_followed() -> None:
    (site,) = sites_of(Video(TURNS["moved"]), *inputs())
    assert not site.eligible and site.grid is None


def test_a_grid_that_is_given_is_believed_where_the_tokens_are_lost() -> None:
    (site,) = sites_of(Video(TURNS["moved"]), *inputs(), grid=GRID)
    assert site.eligible and site.grid == GRID, site.reason
    (site,) = sites_of(Video(TURNS["moved"]), *inputs(), grid=(3, 6, 11))
    assert not site.eligible
