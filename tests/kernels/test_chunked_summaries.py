"""Summaries, scores and probe as a CPU makes them, piece by piece, are the definition's."""

from __future__ import annotations

import pytest
import torch
from attention_cases import (
    BASE,
    CASES,
    CONTENT_CASES,
    RECTANGULAR_CASES,
    Case,
    budget_for,
    make_tensors,
    orders_of,
    reference_split,
    relative,
)
from torch import Tensor

from freqopt.config import KEY_BLOCK
from freqopt.kernels import chunked, chunked_summaries, reference
from freqopt.kernels.layout import Settings

EVERY = CASES + CONTENT_CASES + RECTANGULAR_CASES


@pytest.fixture(params=[2**19, 3 * 4 * KEY_BLOCK * 32, 1], ids=["whole", "pieces", "one by one"])
def _in_pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_summaries, "PIECE_BYTES", request.param)


@pytest.mark.usefixtures("_in_pieces")
@pytest.mark.parametrize("case", EVERY, ids=str)
def test_they_are_the_definitions(case: Case) -> None:
    tensors = make_tensors(case)
    orders = orders_of(case, tensors)
    inputs = case.inputs(tensors, torch.zeros(case.heads), orders)
    tokens, placed = chunked.take_apart(inputs, orders), chunked.place(inputs, orders)
    for own, wanted in zip(placed.tokens, tokens, strict=True):
        assert torch.equal(own, wanted)
    for x, length in ((placed.tiles, tokens.query), (placed.key_blocks, tokens.key)):
        assert not x.flatten(2, 3)[:, :, length.shape[2] :].any()
    wanted = reference.summarise(tokens.key, tokens.value, KEY_BLOCK)
    low = chunked_summaries.summarise(placed.key_blocks, placed.value_blocks, tokens.key.shape[2])
    torch.testing.assert_close(tuple(low), tuple(wanted), rtol=1e-4, atol=1e-5)
    scale = case.dim**-0.5
    found = chunked_summaries.score_pairs(
        placed.tiles, tokens.query.shape[2], wanted, scale, torch.float32
    )
    scores = reference.score_pairs(tokens.query, wanted, scale)
    torch.testing.assert_close(tuple(found), tuple(scores), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("probes", [0, 5, 64])
@pytest.mark.parametrize("case", EVERY, ids=str)
def test_so_is_the_whole_call(case: Case, probes: int) -> None:
    tensors = make_tensors(case)
    budget, orders = budget_for(case, tensors, 0.3), orders_of(case, tensors)
    expected, split = reference_split(case, tensors, budget, probes)
    inputs = case.inputs(tensors, budget, orders)
    found = chunked.split_forward(inputs, Settings(case.dim**-0.5, 0.0, probes))
    assert torch.equal(found.split.route, split.route)
    assert relative(found.out, expected) < 1e-5
    for own, wanted in zip(found.split.probe, split.probe, strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-3, atol=1e-4, equal_nan=True)
    torch.testing.assert_close(found.split.log_sum, split.log_sum, rtol=1e-4, atol=1e-4)


def test_a_tile_may_have_no_exact_block() -> None:
    """What the op never asks for, as a tile's own blocks are exact: the means alone answer."""
    case = Case((5, 7, 9), dim=16, batch=1)
    inputs = case.inputs(make_tensors(case), torch.zeros(case.heads))
    placed = chunked.place(inputs, BASE)
    query = placed.tokens.query.clone()
    low = reference.summarise(placed.tokens.key, placed.tokens.value, KEY_BLOCK)
    shape = (1, case.heads, placed.tiles.shape[2], placed.key_blocks.shape[2])
    route = torch.full(shape, reference.LOW, dtype=torch.int8)
    probe = reference.Probe.unfitted(torch.zeros(1, case.heads), case.dim)
    means = chunked.Low.of(low, torch.zeros(shape), route, probe, 0.25)
    part = chunked.attend_video(placed, means, route, 0.25)

    def flat(x: Tensor) -> Tensor:
        return x.flatten(2, 3)[:, :, : case.length]

    logits = 0.25 * query @ low.key_mean.mT + low.counts.log()
    wanted = logits.softmax(-1) @ low.value_mean + 0.25 * query @ low.h_bar.mT
    assert relative(flat(part.out), wanted) < 1e-5
    torch.testing.assert_close(flat(part.log_sum[..., None])[..., 0], logits.logsumexp(-1))
