"""The experiment on first-order matrices: one group is the op's own term, many are means of it."""

from __future__ import annotations

import pytest
import torch

from benchmarks.first_order import block_matrices, equal_cost, grouped, with_matrices
from benchmarks.split_case import make_case
from benchmarks.tensors import Attention
from freqopt.kernels import reference as ref


def test_one_group_is_the_ops_own_term() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 300, 16) for _ in "qkv")
    attention = Attention(query, key, value, (3, 10, 10))
    case, matrices = make_case(attention, 0.3), block_matrices(attention)
    counts = ref.block_counts(300, 64, query.device)
    whole = with_matrices(case, grouped(matrices, counts, len(counts)), len(counts))
    at = ref.probe_positions(300, 16, query.device)
    # The op scales its term with the band's mass in the call, the experiment with its share.
    mass = (case.bands.estimate.logit + case.bands.estimate.term).softmax(-1).sum(-1)
    assert float(mass.min()) == pytest.approx(1.0, abs=1e-5)
    torch.testing.assert_close(
        whole.attend(whole.probe(at)), case.attend(case.probe(at)), atol=1e-4, rtol=1e-4
    )


def test_groups_are_means_weighted_by_tokens() -> None:
    matrices, counts = torch.randn(1, 2, 5, 4, 4), torch.tensor([64.0, 64, 64, 64, 16])
    found = grouped(matrices, counts, 2)
    assert found.shape == (1, 2, 3, 4, 4)
    torch.testing.assert_close(found[:, :, 2], matrices[:, :, 4])
    torch.testing.assert_close(found[:, :, 0], matrices[:, :, :2].mean(2))
    assert equal_cost(128) == 1 / 16
