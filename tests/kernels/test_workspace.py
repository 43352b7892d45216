"""Which heads and tiles go together, and the packed form of a route."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

import freqopt.kernels.op  # noqa: F401
from freqopt.kernels import workspace
from freqopt.kernels.layout import pack_route, unpack_route


@pytest.mark.parametrize("blocks", [1, 4, 7, 33])
def test_a_packed_route_is_that_route(blocks: int) -> None:
    route = torch.randint(0, 3, (2, 3, 5, blocks), dtype=torch.int8)
    packed = pack_route(route)
    assert packed.dtype == torch.uint8 and packed.shape[-1] == -(-blocks // 4)
    assert int(packed[0, 0, 0, 0]) & 3 == int(route[0, 0, 0, 0])
    tokens = blocks * 64 - 63
    assert torch.equal(unpack_route(packed, tokens), route)
    assert unpack_route(route, tokens) is route


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("processors", [1, 132])
def test_a_chunk_of_a_long_sequence_takes_its_share(group: int, processors: int) -> None:
    tokens, keys_and_values = 2**20, 2 * 2**20 * 128 * 2
    tiles = workspace.chunk_tiles(tokens, tokens, 128, 2, group, processors)
    held = tiles * group * 2**20 // 64 * workspace.LONG_PAIR_BYTES
    assert 0.8 * workspace.CHUNK_SHARE < held / keys_and_values <= workspace.CHUNK_SHARE
    assert tiles % processors == 0
    # A short or narrow sequence has fewer tiles than fit, and few at least.
    assert workspace.chunk_tiles(1000, 1000, 128, 2, 1, 132) == 8
    assert workspace.chunk_tiles(tokens, tokens, 8, 2, 64) >= 1


def test_what_long_sequences_hold_does_not_grow_faster_than_they_do() -> None:
    held = [workspace.bytes_per_key_head(n, n, 128, 2, 1) for n in (2**17, 2**18, 2**20, 2**22)]
    assert held[2] == pytest.approx(4 * held[1]) and held[3] == pytest.approx(16 * held[1])
    ordered = 2 * 2**17 * 128 * 2
    of_few_queries = workspace.bytes_per_key_head(2**17, 2**10, 128, 2, 1)
    assert ordered < of_few_queries < 1.01 * ordered < held[0]
    assert workspace.is_long(2**18) and not workspace.is_long(2**18 - 1)


def test_long_routes_are_packed_on_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a trace expects is what runs, and gradients see the same route."""
    op = torch.ops.freqopt.split_attention
    query, key, value = (torch.randn(1, 2, 315, 16, requires_grad=True) for _ in range(3))
    budget = torch.full((2,), 0.7)
    constants = ([5, 7, 9], 0, 0, 0.25, 0.0, 16)
    results = []
    for limit in (workspace.LONG_TOKENS, 1):
        monkeypatch.setattr(workspace, "LONG_TOKENS", limit)
        found = op(query, key, value, budget, None, *constants)
        gradient = torch.autograd.grad(found[0].square().sum(), (query, key, value))
        given = [x.detach() for x in (query, key, value, budget)]
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(x) for x in given]
            expected = op(*fakes, None, *constants)
        for real, fake in zip(found, expected, strict=True):
            assert (real.shape, real.dtype, real.stride()) == (
                fake.shape,
                fake.dtype,
                fake.stride(),
            )
        results.append((found, gradient))
    (plain, wanted), (packed, gradient) = results
    assert packed[3].dtype == torch.uint8 and torch.equal(pack_route(plain[3]), packed[3])
    assert all(torch.equal(x, y) for x, y in zip(gradient, wanted, strict=True))
