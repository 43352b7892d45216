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
    assert torch.allclose(summary.h_bar, value.mT @ offset / 70, atol=1e-6)


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


def fitted_update(
    probes: int = 64, dim: int = 8, planted: float = 0.3, noise: float = 0.0
) -> tuple[torch.Tensor, ...]:
    """Terms F and G of random probes of two heads, H-bar, what is left, and the planted matrix."""
    generator = torch.Generator().manual_seed(probes + dim)
    f = torch.randn(1, 2, probes, dim, generator=generator)
    h_bar = torch.randn(1, 2, dim, dim, generator=generator)
    matrix = planted * torch.randn(1, 2, dim, dim, generator=generator)
    left = f @ matrix.mT + noise * torch.randn(1, 2, probes, dim, generator=generator)
    return f, f @ h_bar.mT, h_bar, left, matrix


FITS = torch.ones(1, 2, dtype=torch.bool)


def test_the_update_is_the_matrix_that_the_probes_lack() -> None:
    *given, matrix = fitted_update()
    update, after = reference.fit_update(*given, FITS)
    taken = reference.UPDATE_SHARE * matrix
    assert ((update - taken).norm(dim=(2, 3)) < 0.15 * taken.norm(dim=(2, 3))).all()
    assert after.norm() < 0.6 * given[3].norm()
    others = torch.randn(1, 2, 500, 8, generator=torch.Generator().manual_seed(1))
    assert relative(others @ update.mT, others @ taken.mT) < 0.15


@pytest.mark.parametrize("probes", [5, 64])
def test_each_probe_is_predicted_from_all_others(probes: int) -> None:
    """What is left of a probe: by the regression without it, in so many words."""
    f, g, h_bar, left, _ = fitted_update(probes, dim=16, noise=0.5)
    _, after = reference.fit_update(f, g, h_bar, left, FITS)
    kernel = sum(x @ x.mT / x.square().sum((2, 3), keepdim=True) for x in (f, g))
    told = torch.empty_like(left)
    for probe in range(probes):
        rest = [i for i in range(probes) if i != probe]
        seen = kernel[:, :, rest][..., rest] + reference.RIDGE * torch.eye(probes - 1)
        row = kernel[:, :, probe : probe + 1, rest]
        told[:, :, probe] = (row @ seen.inverse() @ left[:, :, rest])[:, :, 0]
    # One factor a head, which a probe's own energy decides on.
    factor = ((left - after) * told).sum((2, 3)) / told.square().sum((2, 3))
    assert ((factor > 0.01) & (factor < 1.001 * reference.UPDATE_SHARE)).all()
    assert relative(left - after, factor[..., None, None] * told) < 1e-3


def test_noise_is_not_fitted() -> None:
    """A matrix that predicts no other probe is drawn back: other queries get little of it."""
    f, g, h_bar, noise, _ = fitted_update(dim=64, planted=0.0, noise=1.0)
    update, after = reference.fit_update(f, g, h_bar, noise, FITS)
    whole = f @ (noise.mT @ f / f.square().sum()).mT
    assert (f @ update.mT).norm() < 0.25 * whole.norm() + 0.25 * noise.norm()
    assert after.norm() < 1.01 * noise.norm()


def test_the_update_is_bounded_by_the_terms_of_the_mean_matrix() -> None:
    f, g, h_bar, left, _ = fitted_update(planted=1.0)
    update, _ = reference.fit_update(f, g, h_bar, left, FITS)
    terms = (f @ update.mT).norm(dim=(2, 3))
    most = reference.UPDATE_SHARE * reference.UPDATE_MAX * g.norm(dim=(2, 3))
    torch.testing.assert_close(terms, most, rtol=1e-2, atol=0)
    # And where they are small by what is left, the error comes from elsewhere.
    small, _ = reference.fit_update(f, g / 100, h_bar / 100, left, FITS)
    assert not small.any()


def test_one_probe_and_heads_that_do_not_fit_have_no_update() -> None:
    *given, _ = fitted_update(1)
    update, after = reference.fit_update(*given, FITS)
    assert not update.any() and torch.equal(after, given[3])
    *given, _ = fitted_update()
    update, after = reference.fit_update(*given, torch.tensor([[True, False]]))
    assert update[:, 0].any() and not update[:, 1].any()
    assert torch.equal(after[:, 1], given[3][:, 1])


def test_more_probes_than_it_is_fitted_to_are_predicted_as_they_are() -> None:
    f, g, h_bar, left, _ = fitted_update(200, noise=0.2)
    update, after = reference.fit_update(f, g, h_bar, left, FITS)
    chosen = reference.probe_positions(200, reference.RIDGE_PROBES, f.device)
    fewer = (x[:, :, chosen] for x in (f, g))
    alone, seen = reference.fit_update(*fewer, h_bar, left[:, :, chosen], FITS)
    torch.testing.assert_close(alone, update)
    torch.testing.assert_close(seen, after[:, :, chosen])
    others = torch.ones(200, dtype=torch.bool).index_fill(0, chosen, False)
    torch.testing.assert_close(after[:, :, others], (left - f @ update.mT)[:, :, others])


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
