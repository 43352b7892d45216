"""Input at the edges, forward and backward, queries of the keys' own tokens or others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import clustered
from torch import Tensor

import freqopt
from freqopt.errors import InputError

EITHER = pytest.mark.parametrize("other", [False, True], ids=["own", "other"])
HEADS, DIM = 2, 24


def made(queries: int, keys: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of two heads."""
    generator = torch.Generator().manual_seed(seed)
    key = clustered(keys, DIM, HEADS) / 2
    query = torch.randn(1, HEADS, queries, DIM, generator=generator)
    return query, key, torch.randn(1, HEADS, keys, DIM, generator=generator)


def run(
    tensors: tuple[Tensor, ...], *, other: bool, **options: Any
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Output, log sums, and gradients of query, key and value, of the weighted sum of both."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    grid = {"query_grid": (1, 1, tensors[0].shape[2])} if other else {}
    out, log_sum = freqopt.split_attention(*leaves, return_lse=True, **grid, **options)
    weights(out, log_sum).backward()
    grads = [x.grad for x in leaves]
    assert all(grad is not None for grad in grads)
    return out.detach(), log_sum.detach(), [grad for grad in grads if grad is not None]


def weights(out: Tensor, log_sum: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(out.shape, generator=generator)
    return (out * weight).sum() + log_sum.sum() / 3


def dense(tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The same of dense attention."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    query, key, value = leaves
    logits = query @ key.mT * DIM**-0.5
    out, log_sum = logits.softmax(-1) @ value, logits.logsumexp(-1)
    weights(out, log_sum).backward()
    grads = [x.grad for x in leaves if x.grad is not None]
    return out.detach(), log_sum.detach(), grads


def assert_dense(found: tuple[Any, ...], wanted: tuple[Any, ...]) -> None:
    for mine, theirs in zip((*found[:2], *found[2]), (*wanted[:2], *wanted[2]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{"threshold": 0.0, "chunk": 256}, {"density": 1.0, "chunk": "all"}], ids=str
)
@EITHER
@pytest.mark.parametrize("keys", [1, 63, 255])
def test_fewer_tokens_than_a_chunk(keys: int, other: bool, options: dict[str, Any]) -> None:
    tensors = made(90 if other else keys, keys)
    found = run(tensors, other=other, order="content", **options)
    assert_dense(found, dense(tensors))


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 500), (500, 1), (1, 64), (129, 65)])
@pytest.mark.parametrize("order", ["grid", "content"])
def test_a_single_query_or_key(queries: int, keys: int, order: str) -> None:
    tensors = made(queries, keys)
    assert_dense(run(tensors, other=True, order=order, threshold=0.0), dense(tensors))
    for options in ({"threshold": 2.0}, {"density": 0.3}):
        out, log_sum, grads = run(tensors, other=True, order=order, **options)
        assert all(x.isfinite().all() for x in (out, log_sum, *grads))
        if keys <= 64:  # one block, and a tile's best block is exact
            assert_dense((out, log_sum, grads), dense(tensors))


@EITHER
def test_constant_keys(other: bool) -> None:
    """All ties: the order is the base order, and every mean is exact."""
    query, key, value = made(450 if not other else 200, 450)
    key = torch.full_like(key, 0.7)
    tensors = (query, key, value)
    _, stats = freqopt.split_attention(*tensors, order="content", return_stats=True)
    assert torch.equal(stats.key_order.long(), torch.arange(450).expand(1, HEADS, -1))
    out, log_sum, grads = run(tensors, other=other, order="content", chunk="all", density=0.1)
    wanted = dense(tensors)
    torch.testing.assert_close(log_sum, wanted[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out, wanted[0], rtol=1e-3, atol=1e-4)
    assert all(grad.isfinite().all() for grad in grads)
    assert_dense(run(tensors, other=other, order="content", chunk="all", threshold=0.0), wanted)


@pytest.mark.parametrize("options", [{"threshold": 1.0}, {"density": 0.2}])
@pytest.mark.parametrize("order", ["grid", "content"])
@EITHER
def test_keys_that_are_no_numbers_spoil_their_own_head(
    other: bool, order: str, options: dict[str, float]
) -> None:
    """As in dense attention: every query of the head, its gradients, and nothing else."""
    clean = made(300 if not other else 140, 300)
    spoilt = tuple(x.clone() for x in clean)
    spoilt[1][0, 0, 17], spoilt[1][0, 0, 250, 3] = torch.nan, torch.inf
    found, whole = (
        run(tensors, other=other, order=order, chunk="all", **options)
        if order == "content"
        else run(tensors, other=other, order=order, **options)
        for tensors in (spoilt, clean)
    )
    for mine, theirs, truth in zip(
        (*found[:2], *found[2]),
        (*whole[:2], *whole[2]),
        (lambda d: (*d[:2], *d[2]))(dense(spoilt)),
        strict=True,
    ):
        assert theirs.isfinite().all()
        # Tiles with as many blocks go together, over all heads: rounding may differ.
        torch.testing.assert_close(mine[:, 1], theirs[:, 1], rtol=1e-4, atol=1e-5)
        assert not (mine[:, 0].isfinite() & ~truth[:, 0].isfinite()).any()


@EITHER
def test_orders_that_are_no_permutations(other: bool) -> None:
    tensors = made(70 if other else 100, 100)
    layout = {"query_grid": (1, 1, 70)} if other else {}
    right = torch.arange(100).expand(1, HEADS, -1)
    wrong = [right.clone() for _ in range(3)]
    wrong[0][0, 1, 5] = 6  # one twice
    wrong[1][0, 0, 0] = 100  # none of the tokens
    wrong[2][0, 0, 3] = -1
    for order in wrong:
        with pytest.raises(InputError, match=r"no permutation of 0\.\.99"):
            freqopt.split_attention(*tensors, order=order, **layout)
    if other:
        turned = torch.arange(70).flip(0).expand(1, HEADS, -1).clone()
        out = freqopt.split_attention(*tensors, query_order=turned, threshold=0.0, **layout)
        torch.testing.assert_close(out, dense(tensors)[0], rtol=1e-4, atol=1e-5)
        turned[0, 0, 0] = 3
        with pytest.raises(InputError, match=r"query_order is no permutation of 0\.\.69"):
            freqopt.split_attention(*tensors, query_order=turned, **layout)


def test_a_traced_call_is_not_asked_for_its_order() -> None:
    """The check reads the device, which a traced call must not: it passed before, or is wrong."""
    tensors = made(100, 100)
    order = torch.arange(99, -1, -1).expand(1, HEADS, -1).contiguous()

    def call(*given: Tensor) -> Tensor:
        out = freqopt.split_attention(*given[:3], order=given[3], threshold=0.0)
        assert isinstance(out, Tensor)
        return out

    torch._dynamo.reset()
    out = torch.compile(call, backend="eager", fullgraph=True)(*tensors, order)
    torch.testing.assert_close(out, dense(tensors)[0], rtol=1e-4, atol=1e-5)
