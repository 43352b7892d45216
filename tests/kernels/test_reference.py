"""The definition against first principles: dense attention, identities, the probe's promises."""

from __future__ import annotations

import math

import pytest
import torch
from attention_cases import (
    BASE,
    CASES,
    Case,
    budget_for,
    dense,
    make_tensors,
    reference_split,
    relative,
)

from freqopt.kernels import chunked, reference


@pytest.mark.parametrize("case", CASES, ids=str)
def test_threshold_zero_is_dense_attention(case: Case) -> None:
    tensors = make_tensors(case)
    out, split = reference_split(case, tensors, torch.zeros(case.heads))
    assert relative(out, dense(case, tensors)) < 2e-6
    assert torch.equal(split.density, torch.ones_like(split.density))
    assert split.probe.error.max() < 1e-5


@pytest.mark.smoke
def test_summaries_count_the_ragged_block() -> None:
    key, value = torch.randn(1, 1, 70, 4), torch.randn(1, 1, 70, 4)
    summary = reference.summarise(key, value, 64)
    assert summary.counts.tolist() == [64, 6]
    assert torch.allclose(summary.key_mean[0, 0, 1], key[0, 0, 64:].mean(0), atol=1e-6)
    expected = key[0, 0, 64:].var(0, unbiased=False)
    assert torch.allclose(summary.key_var[0, 0, 1], expected, atol=1e-6)
    offset = key - summary.key_mean.repeat_interleave(64, 2)[:, :, :70]
    assert torch.allclose(summary.first_order, value.mT @ offset / 70, atol=1e-6)


def test_constant_blocks_are_served_exactly_by_their_means() -> None:
    case = Case((4, 8, 8), batch=1)
    query, key, value, _ = make_tensors(case)
    order = case.sequence.video_of(torch.arange(case.length).float().view(1, 1, -1, 1)).long()
    block = torch.empty(case.length, dtype=torch.long)
    block[order.flatten()] = torch.arange(case.length) // 64
    key, value = key[:, :, :4][:, :, block], value[:, :, :4][:, :, block]
    tensors = (query, key, value, None)
    out, split = reference_split(case, tensors, torch.full((case.heads,), torch.inf))
    assert split.density.max() < 0.6
    assert relative(out, dense(case, tensors)) < 1e-5


def test_second_order_mass_takes_most_of_the_bias_of_means_alone() -> None:
    case = Case((6, 16, 16), batch=1, dim=32)
    query, key, value, _ = make_tensors(case)
    tensors = (query * 0.3, key, value, None)
    tokens = chunked.take_apart(case.inputs(tensors, torch.zeros(case.heads)), BASE)
    summary = reference.summarise(tokens.key, tokens.value, 64)
    scores = reference.score_pairs(tokens.query, summary, case.dim**-0.5)
    logits = tokens.query @ tokens.key.mT * case.dim**-0.5
    true_mass = logits.exp().unflatten(-1, (-1, 64)).sum(-1).log()
    plain = tokens.query @ summary.key_mean.mT * case.dim**-0.5 + math.log(64)
    term = scores.mass_term.repeat_interleave(128, 2)
    missed, left = plain - true_mass, plain + term - true_mass
    assert left.abs().mean() < 0.7 * missed.abs().mean()
    assert missed.mean() < -0.05 and left.mean().abs() < 0.3 * missed.mean().abs()


def test_probe_unbiases_the_mass_and_measures_the_error() -> None:
    case = Case((6, 16, 16), batch=1, dim=32)
    tensors = make_tensors(case)
    budget = budget_for(case, tensors, 0.3)
    out, split = reference_split(case, tensors, budget, probes=512)
    plain, _ = reference_split(case, tensors, budget, probes=0)
    truth = dense(case, tensors)
    assert relative(out, truth) < relative(plain, truth)
    error = ((out - truth).square().sum((2, 3)) / truth.square().sum((2, 3))).sqrt()
    assert torch.allclose(split.probe.error, error, rtol=0.1)


def test_density_resolves_to_that_share_of_pairs() -> None:
    score = torch.rand(2, 3, 10, 20)
    for density in (0.1, 0.37, 1.0):
        threshold = reference.threshold_for_density(score, density)
        route = reference.route_pairs(score, threshold, threshold)
        kept = math.ceil(density * 200)
        assert torch.equal((route == reference.EXACT).sum((2, 3)), torch.full((2, 3), kept))


def test_scores_have_no_units() -> None:
    case = CASES[0]
    query, key, value, _ = make_tensors(case)

    def score(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        summary = reference.summarise(k, v, 64)
        return reference.score_pairs(q, summary, case.dim**-0.5).score

    base = score(query, key, value)
    assert torch.allclose(score(query * 4, key / 4, value * 100 + 7), base, rtol=1e-3)
    assert torch.allclose(score(query, key + 3, value), base, rtol=1e-2)
