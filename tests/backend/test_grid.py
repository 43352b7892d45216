"""Token order: a permutation for every grid, compact, and the identity on sequences."""

from __future__ import annotations

import pytest
import torch

from freqopt.errors import InputError
from freqopt.grid import check_grid, hilbert_index, token_order

CPU = torch.device("cpu")
GRIDS = [(1, 1, 1), (3, 6, 10), (5, 7, 9), (1, 9, 31), (2, 1, 50), (21, 15, 26)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.smoke
def test_order_visits_every_token_once(grid: tuple[int, int, int]) -> None:
    order = token_order(grid, CPU)
    assert torch.equal(order.sort().values, torch.arange(order.numel(), dtype=torch.int32))


@pytest.mark.parametrize("dims", [2, 3])
def test_curve_takes_unit_steps(dims: int) -> None:
    points = torch.cartesian_prod(*[torch.arange(8)] * dims)
    path = points[hilbert_index(points, 3).argsort()]
    assert torch.equal((path[1:] - path[:-1]).abs().sum(1), torch.ones(8**dims - 1).long())


def test_aligned_blocks_of_64_are_cubes() -> None:
    order = token_order((8, 8, 8), CPU).long()
    points = torch.stack([order // 64, order // 8 % 8, order % 8], 1).unflatten(0, (8, 64))
    extents = points.amax(1) - points.amin(1) + 1
    assert torch.equal(extents, torch.full_like(extents, 4))


def test_blocks_are_more_compact_than_raster_on_an_odd_grid() -> None:
    t, h, w = grid = (21, 15, 26)

    def mean_spread(order: torch.Tensor) -> float:
        order = order[: order.numel() // 64 * 64].long()
        points = torch.stack([order // (h * w), order // w % h, order % w], 1).float()
        return float(points.unflatten(0, (-1, 64)).var(1).sum(1).mean())

    assert mean_spread(token_order(grid, CPU)) < 0.2 * mean_spread(torch.arange(t * h * w))


def test_a_sequence_keeps_its_order() -> None:
    assert torch.equal(token_order((1, 1, 77), CPU), torch.arange(77, dtype=torch.int32))
    assert torch.equal(token_order((77, 1, 1), CPU), torch.arange(77, dtype=torch.int32))


@pytest.mark.parametrize(
    ("grid", "tokens", "said"),
    [((3, 4), 12, "three"), ((3, 4, 0), 12, "positive"), ((3, 4, 5), 61, "60 tokens")],
)
def test_wrong_grids_are_refused(grid: tuple[int, ...], tokens: int, said: str) -> None:
    with pytest.raises(InputError, match=said):
        check_grid(grid, tokens)
