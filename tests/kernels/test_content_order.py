"""The order by content: a permutation, aligned to blocks, that leaves less spread."""

from __future__ import annotations

import pytest
import torch
from attention_cases import clustered
from torch import Tensor

import freqopt
from freqopt.config import ALL, DEFAULT_CHUNK
from freqopt.errors import InputError
from freqopt.kernels import content_order as definition
from freqopt.kernels.content_order import content_order, spread


def is_permutation(order: Tensor) -> bool:
    return bool((order.sort(-1).values == torch.arange(order.shape[-1])).all())


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 300, 1027])
@pytest.mark.parametrize("dim", [8, 24, 40, 64])
def test_it_is_a_permutation_whatever_the_length(tokens: int, dim: int) -> None:
    keys = clustered(tokens, dim)
    order = content_order(keys, torch.randperm(tokens), torch.tensor([256, ALL]))
    assert order.shape == (1, 2, tokens) and order.dtype == torch.int32
    assert is_permutation(order)


def test_blocks_of_alike_tokens_leave_less_spread() -> None:
    keys = clustered(2048)
    base = torch.arange(2048)
    left = {
        chunk: spread(keys, content_order(keys, base, torch.tensor([chunk, chunk])))
        for chunk in (0, 256, 1024, ALL)
    }
    assert (left[0] > 0.9).all()
    assert (left[256] < 0.8 * left[0]).all() and (left[1024] < 0.8 * left[256]).all()
    assert (left[ALL] < left[1024]).all() and (left[ALL] < 0.15).all()


def test_tokens_stay_in_their_chunk_of_the_base_order() -> None:
    keys, base = clustered(1100), torch.randperm(1100, generator=torch.Generator().manual_seed(1))
    order = content_order(keys, base, torch.tensor([256, 0]))
    assert torch.equal(order[0, 1].long(), base)
    for start in range(0, 1100, 256):
        part = slice(start, start + 256)
        assert set(order[0, 0, part].tolist()) == set(base[part].tolist())
        assert not torch.equal(order[0, 0, part].long(), base[part])


def test_a_head_does_not_depend_on_the_others_and_bits_repeat() -> None:
    keys, base = clustered(700, heads=3), torch.arange(700)
    order = content_order(keys, base, torch.tensor([512, 256, ALL]))
    again = content_order(keys, base, torch.tensor([512, 256, ALL]))
    alone = content_order(keys[:, 1:2], base, torch.tensor([256]))
    assert torch.equal(order, again) and torch.equal(order[:, 1:2], alone)


def test_equal_keys_keep_the_base_order() -> None:
    base = torch.randperm(500, generator=torch.Generator().manual_seed(2))
    order = content_order(torch.full((1, 1, 500, 16), 0.7), base, torch.tensor([ALL]))
    assert torch.equal(order[0, 0].long(), base)


def test_keys_that_are_no_numbers_spoil_no_others() -> None:
    keys = clustered(600)
    clean = keys.clone()
    keys[0, 0, 17], keys[0, 0, 5, 3] = torch.nan, torch.inf
    order = content_order(keys, torch.arange(600), torch.tensor([ALL, ALL]))
    assert is_permutation(order)
    options = {"order": "content", "chunk": "all", "threshold": 2.0}
    spoilt, whole = attend(keys, **options), attend(clean, **options)
    assert not spoilt[:, 0].isfinite().any()
    assert torch.equal(spoilt[:, 1], whole[:, 1])


def test_the_sampled_direction_serves_large_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, base, chunks = clustered(2048), torch.arange(2048), torch.tensor([ALL, ALL])
    whole = spread(keys, content_order(keys, base, chunks))
    monkeypatch.setattr(definition, "SEGMENT_SAMPLES", 128)
    order = content_order(keys, base, chunks)
    assert is_permutation(order)
    assert (spread(keys, order) < 1.3 * whole).all()


def attend(keys: Tensor, **options: object) -> Tensor:
    return freqopt.split_attention(keys, keys, keys, **options)


def test_the_call_takes_every_way_to_say_an_order() -> None:
    keys, grid = clustered(600), (6, 10, 10)
    plain = attend(keys, grid=grid, density=0.3)
    assert torch.equal(plain, attend(keys, grid=grid, order="grid", density=0.3))
    assert torch.equal(plain, attend(keys, grid=grid, order=torch.tensor([0, 0]), density=0.3))
    content, stats = attend(keys, grid=grid, order="content", density=0.3, return_stats=True)
    chunks = torch.tensor([DEFAULT_CHUNK] * 2)
    assert torch.equal(content, attend(keys, grid=grid, order=chunks, density=0.3))
    assert is_permutation(stats.key_order) and stats.query_order is None
    given, same = attend(keys, grid=grid, order=stats.key_order, density=0.3, return_stats=True)
    assert torch.equal(given, content) and same.key_order is None
    mixed = attend(keys, grid=grid, order=torch.tensor([0, 1024]), density=0.3)
    assert torch.equal(mixed[:, 0], plain[:, 0]) and torch.equal(mixed[:, 1], content[:, 1])


def test_without_a_grid_tokens_are_ordered_by_content() -> None:
    keys = clustered(900)
    dense = torch.nn.functional.scaled_dot_product_attention(keys, keys, keys)
    by_content, by_number = (
        (attend(keys, order=order, density=0.25) - dense).norm() / dense.norm()
        for order in (None, "grid")
    )
    assert by_content < 0.5 * by_number
    exact = attend(keys, threshold=0.0)
    torch.testing.assert_close(exact, dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"order": "contents"}, "'grid', 'content'"),
        ({"order": "content", "chunk": 300}, "power of two"),
        ({"order": "content", "chunk": 128}, "power of two"),
        ({"order": torch.tensor([256.0, 0.0])}, "integers"),
        ({"order": torch.tensor([256])}, "integers"),
        ({"order": torch.tensor([256, 100])}, "power of two"),
        ({"order": torch.zeros(1, 2, 60, dtype=torch.int32)}, "no permutation"),
        ({"order": torch.arange(59).expand(1, 2, 59)}, "of shape"),
        ({"query_order": torch.arange(60).expand(1, 2, 60).float()}, "query_order"),
        ({"grid": None, "text_before": 60}, "leave no tokens"),
    ],
)
def test_bad_orders_are_refused(options: dict, said: str) -> None:
    keys = torch.randn(1, 2, 60, 16)
    with pytest.raises(InputError, match=said):
        freqopt.split_attention(keys, keys, keys, **({"grid": (3, 4, 5)} | options))
