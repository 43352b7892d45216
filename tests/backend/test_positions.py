"""Tokens packed into one axis: their grid from the table of positions they meet in the graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from model_cases import load_all
from passes_toys import WIDTH, Attention, sites_of
from torch import Tensor, fx, nn

from freqopt.backend import freqopt_backend
from freqopt.passes.find import find_sites

Table = Callable[[int, int, int], Tensor]
GRID = (3, 6, 10)


def waves(*axes: Tensor) -> Tensor:
    """(N, 1) from the positions along each axis."""
    places = torch.stack([axis.flatten() for axis in axes], -1)
    return torch.cos(places * torch.arange(1.0, len(axes) + 1)).sum(-1, keepdim=True)


def three_ranges(t: int, h: int, w: int) -> Tensor:
    axes = [torch.arange(float(extent)) for extent in (t, h, w)]
    return waves(*torch.meshgrid(*axes, indexing="ij"))


def ranges_in_a_list(t: int, h: int, w: int) -> Tensor:
    axes = [torch.arange(float(extent)) for extent in (t, h, w)]
    return waves(*torch.meshgrid(axes, indexing="ij"))


def rows_before_frames(t: int, h: int, w: int) -> Tensor:
    axes = [torch.arange(float(extent)) for extent in (t, h, w)]
    return waves(*torch.meshgrid(*axes, indexing="xy"))


def two_axes(t: int, h: int, w: int) -> Tensor:
    """One number per frame, the same for all of its tokens: the rows of a frame do not show."""
    return torch.arange(float(t))[:, None].expand(t, h * w).reshape(-1, 1).cos()


def one_range(t: int, h: int, w: int) -> Tensor:
    return torch.arange(float(t * h * w)).view(t, h, w).flatten()[:, None].cos()


class Packed(nn.Module):
    """Tokens of one axis, times a table, attending."""

    def __init__(self, *tables: Table) -> None:
        super().__init__()
        self.tables, self.block = tables, Attention()

    def forward(self, x: Tensor, t: int, h: int, w: int) -> Tensor:
        for table in self.tables:
            x = x * table(t, h, w)
        return self.block(x)


def tokens() -> Tensor:
    return torch.randn(2, GRID[0] * GRID[1] * GRID[2], WIDTH)


@pytest.mark.parametrize(
    ("table", "grid"),
    [
        (three_ranges, (3, 6, 10)),
        (ranges_in_a_list, (3, 6, 10)),
        (rows_before_frames, (6, 3, 10)),
    ],
)
def test_a_table_of_three_ranges_tells_the_grid(table: Table, grid: tuple[int, ...]) -> None:
    (site,) = sites_of(Packed(table), tokens(), *GRID)
    assert site.eligible, site.reason
    assert (site.kind, site.grid) == ("self", grid)


@pytest.mark.parametrize("table", [two_axes, one_range])
def test_other_tables_tell_nothing(table: Table) -> None:
    (site,) = sites_of(Packed(table), tokens(), *GRID)
    assert not site.eligible and "pass grid=" in site.reason


def test_tables_that_disagree_tell_nothing() -> None:
    (site,) = sites_of(Packed(three_ranges, rows_before_frames), tokens(), *GRID)
    assert not site.eligible and "pass grid=" in site.reason


def test_a_table_of_another_length_tells_nothing() -> None:
    """Text of as many tokens as the table has is not the video: only what meets it is."""
    model = Packed(lambda t, h, w: three_ranges(t, h, w)[: t * h * w - 1])
    (site,) = sites_of(model, tokens()[:, 1:], *GRID)
    assert not site.eligible


def test_ints_that_change_are_read_at_run_time() -> None:
    """Under dynamic shapes the grid of a packed model is made of its arguments, in one graph."""
    case, graphs = load_all()["ltx"], 0

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        assert sum(site.eligible for site in find_sites(gm)) == 2
        options = {"threshold": 0.0, "min_tokens": 1, "strict": True, "inner": "eager"}
        return freqopt_backend(gm, example_inputs, options=options)

    model, _ = case.make(GRID, 2)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, dynamic=True)
    for grid in ((5, 6, 9), (3, 7, 10), (4, 5, 8)):
        _, inputs = case.make(grid, 2)
        with torch.no_grad():
            expected, got = model(**inputs)[0], compiled(**inputs)[0]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert graphs == 1
