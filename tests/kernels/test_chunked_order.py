"""The order by content as a CPU makes it is the definition's, whatever the sizes and the ties."""

from __future__ import annotations

import pytest
import torch
from attention_cases import Case, clustered, make_tensors
from torch import Tensor

from freqopt.config import ALL, KEY_BLOCK
from freqopt.kernels import chunked_order, content_order
from freqopt.kernels.chunked_order import halved, order_by_content

SIZES = [
    ((1, 1, 1), [256, ALL]),
    ((3, 6, 10), [256, ALL]),
    ((5, 7, 9), [256, 512]),
    ((5, 7, 9), [0, ALL]),
    ((1, 17, 23), [0, 0]),
    ((7, 11, 15), [ALL, 512]),
    ((4, 16, 16), [1024, 256]),
    ((5, 19, 27), [ALL, ALL]),
]


def blocks_of(order: Tensor) -> Tensor:
    """(B, H, T): the block that each token stands in."""
    at = torch.arange(order.shape[-1]).expand(order.shape) // KEY_BLOCK
    return torch.zeros_like(at).scatter_(-1, order.long(), at)


@pytest.mark.parametrize(("grid", "chunks"), SIZES, ids=str)
@pytest.mark.parametrize("dim", [24, 64])
def test_it_is_the_definitions(
    grid: tuple[int, int, int], chunks: list[int], dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(grid, dim=dim)
    keys = make_tensors(case)[1]
    base, sizes = case.sequence.base_order(keys.device), torch.tensor(chunks)
    monkeypatch.setattr(chunked_order, "PROJECTED_BYTES", 4 * 4 * dim * 100)
    order = order_by_content(keys, base, sizes)
    wanted = content_order.content_order(keys, base, sizes)
    assert order.dtype == wanted.dtype and order.shape == wanted.shape
    assert torch.equal(order.sort(-1).values, wanted.sort(-1).values)
    # Within rounding of a border a token may stand on either side of it.
    assert (blocks_of(order) == blocks_of(wanted)).float().mean() > 0.995
    if case.length > KEY_BLOCK:
        left, least = (content_order.spread(keys, x) for x in (order, wanted))
        torch.testing.assert_close(left, least, rtol=1e-3, atol=0)


def test_tokens_that_are_equal_keep_their_order() -> None:
    kinds = torch.randn(5, 16, generator=torch.Generator().manual_seed(3))
    which = torch.randint(5, (2, 777), generator=torch.Generator().manual_seed(4))
    keys = kinds[which][None]
    base, sizes = torch.arange(777).flip(0), torch.tensor([ALL, 256])
    wanted = content_order.content_order(keys, base, sizes)
    assert torch.equal(order_by_content(keys, base, sizes), wanted)
    assert not torch.equal(wanted[0, 0], base.int())


def test_large_segments_are_told_apart_on_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (chunked_order, content_order):
        monkeypatch.setattr(module, "SEGMENT_SAMPLES", 128)
    keys, base, sizes = clustered(1500), torch.randperm(1500), torch.tensor([ALL, 512])
    wanted = content_order.content_order(keys, base, sizes)
    order = order_by_content(keys, base, sizes)
    assert (blocks_of(order) == blocks_of(wanted)).float().mean() > 0.995


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_types_and_layouts(dtype: torch.dtype) -> None:
    keys = clustered(700, heads=3).to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
    base, sizes = torch.arange(700), torch.tensor([256, 0, ALL])
    wanted = content_order.content_order(keys, base, sizes)
    order = order_by_content(keys, base, sizes)
    assert (blocks_of(order) == blocks_of(wanted)).float().mean() > 0.995
    alone = order_by_content(keys[:, 2:], base, torch.tensor([ALL]))
    assert torch.equal(order[:, 2:], alone) and torch.equal(order[0, 1], base.int())


def test_halves_are_those_of_a_stable_sort() -> None:
    generator = torch.Generator().manual_seed(5)
    values = torch.randint(6, (40, 16), generator=generator).float()
    values[::3, 9:], values[1] = torch.inf, 2.0
    values[2] = torch.randn(16, generator=generator)
    ranks = values.sort(dim=1, stable=True).indices
    halves = ranks.view(40, 2, 8).sort(-1).values.flatten(1)
    wanted = halves + torch.arange(40)[:, None] * 16
    assert torch.equal(halved(values).view(40, 16), wanted)
