"""Queries that are other tokens than the keys, log sums, and results over parts of the keys."""

from __future__ import annotations

import pytest
import torch
from attention_cases import (
    CONTENT_CASES,
    RECTANGULAR_CASES,
    Case,
    budget_for,
    dense,
    logits_of,
    make_tensors,
    orders_of,
    reference_log_sums,
    reference_split,
    relative,
)

import freqopt
from freqopt.errors import InputError
from freqopt.kernels import op


def call_op(case: Case, tensors: tuple, threshold: torch.Tensor, probes: int = 64) -> tuple:
    """The op given the definition's orders, with log sums."""
    query, key, value, mask = tensors
    orders = orders_of(case, tensors)
    return op.split_attention_op(
        query,
        key,
        value,
        threshold,
        mask,
        list(case.grid),
        case.before,
        case.after,
        case.dim**-0.5,
        0.0,
        probes,
        None,
        0,
        orders.key,
        None if case.queries is None else orders.query,
        case.op_layout(),
        True,
    )


@pytest.mark.parametrize("case", CONTENT_CASES + RECTANGULAR_CASES, ids=str)
def test_the_cpu_op_is_the_reference(case: Case) -> None:
    tensors = make_tensors(case)
    threshold = budget_for(case, tensors, 0.3)
    expected, split = reference_split(case, tensors, threshold)
    out, density, error, route, _, log_sum, *_ = call_op(case, tensors, threshold)
    assert torch.equal(route, split.route)
    assert ((route == 2).sum(-1) >= 1).all()
    assert relative(out, expected) < 1e-5
    torch.testing.assert_close(density, split.density)
    torch.testing.assert_close(error, split.probe.error, rtol=1e-3, atol=1e-4)
    sums = reference_log_sums(case, tensors, split)
    torch.testing.assert_close(log_sum, sums, rtol=1e-4, atol=1e-4)
    exact, _, _, _, _, exact_sum, *_ = call_op(case, tensors, torch.zeros(case.heads))
    assert relative(exact, dense(case, tensors)) < 1e-5
    torch.testing.assert_close(exact_sum, logits_of(case, tensors).logsumexp(-1))


@pytest.mark.parametrize("case", [CONTENT_CASES[0], *RECTANGULAR_CASES[:3]], ids=str)
def test_gradients_are_those_of_the_reference(case: Case) -> None:
    tensors = make_tensors(case)
    threshold = budget_for(case, tensors, 0.4)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(tensors[0].shape, generator=generator)
    of_sums = torch.randn(tensors[0].shape[:3], generator=generator)

    def ours(given: tuple) -> torch.Tensor:
        out, _, _, _, _, log_sum, *_ = call_op(case, given, threshold)
        return (out * weight).sum() + (log_sum * of_sums).sum()

    def theirs(given: tuple) -> torch.Tensor:
        out, split = reference_split(case, given, threshold)
        return (out * weight).sum() + (reference_log_sums(case, given, split) * of_sums).sum()

    grads = []
    for run in (ours, theirs):
        leaves = [x.detach().clone().requires_grad_() for x in tensors[:3]]
        run((*leaves, tensors[3])).backward()
        grads.append([x.grad for x in leaves])
    for mine, expected in zip(*grads, strict=True):
        assert relative(mine, expected) < 1e-4


def test_schema_fake_and_autograd_of_every_option() -> None:
    case = RECTANGULAR_CASES[0]
    query, key, value, mask = make_tensors(case)
    chunks = torch.full((case.kv_heads,), 256, dtype=torch.int32)
    arguments = (
        query.requires_grad_(),
        key.requires_grad_(),
        value.requires_grad_(),
        torch.full((case.heads,), 0.5),
        mask,
        list(case.grid),
        case.before,
        case.after,
        case.dim**-0.5,
        0.0,
        16,
        chunks,
        256,
        None,
        None,
        case.op_layout(),
        True,
    )
    results = torch.library.opcheck(torch.ops.freqopt.split_attention.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("options", [{"threshold": 0.0}, {"density": 0.6}])
def test_merged_parts_are_the_whole(options: dict) -> None:
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(2, 4, 150, 24, generator=generator)
    key, value = (torch.randn(2, 2, 430, 24, generator=generator) for _ in range(2))
    parts = [
        freqopt.split_attention(
            query, key[:, :, part], value[:, :, part], return_lse=True, **options
        )
        for part in (slice(0, 200), slice(200, 430))
    ]
    out, log_sum = freqopt.merge_attention(parts)
    whole = torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    logits = query @ key.repeat_interleave(2, 1).mT * 24**-0.5
    if "threshold" in options:
        assert relative(out, whole) < 1e-5
        torch.testing.assert_close(log_sum, logits.logsumexp(-1))
    else:
        parted = max(float((p[0] - whole).norm() / whole.norm()) for p in parts)
        assert relative(out, whole) < 0.4 < parted
        assert (log_sum - logits.logsumexp(-1)).abs().max() < 0.2


def test_a_part_without_keys_weighs_nothing() -> None:
    out, log_sum = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3)
    nothing = (torch.full_like(out, torch.nan), torch.full_like(log_sum, -torch.inf))
    merged, total = freqopt.merge_attention([(out, log_sum), nothing])
    torch.testing.assert_close(merged, out)
    torch.testing.assert_close(total, log_sum)


def test_parts_that_do_not_fit_are_refused() -> None:
    out, log_sum = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3)
    with pytest.raises(InputError, match="no parts"):
        freqopt.merge_attention([])
    with pytest.raises(InputError, match="of one shape"):
        freqopt.merge_attention([(out, log_sum), (out[:, :1], log_sum[:, :1])])


def test_as_many_queries_as_keys_are_other_tokens_where_it_is_said() -> None:
    generator = torch.Generator().manual_seed(4)
    query, key, value = (torch.randn(1, 2, 300, 16, generator=generator) for _ in range(3))
    _, same = freqopt.split_attention(query, key, value, return_stats=True)
    out, other = freqopt.split_attention(
        query, key, value, query_grid=(1, 1, 300), return_stats=True, threshold=0.0
    )
    assert same.query_order is None and other.query_order.shape == (1, 2, 300)
    whole = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(out, whole, rtol=1e-4, atol=1e-5)


def test_swapped_tokens_and_heads_are_recognised() -> None:
    by_tokens = torch.randn(1, 300, 2, 16)
    with pytest.raises(InputError, match=r"pass x\.transpose\(1, 2\)"):
        freqopt.split_attention(by_tokens, by_tokens[:, :200], by_tokens[:, :200])
