"""What dense attention spoils is spoiled, and no more: one NaN is one row's or channel's matter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from attention_cases import relative
from torch import Tensor

import freqopt

GRID = (3, 6, 10)
BAD = (float("nan"), float("inf"), -float("inf"))


def call(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
    out = freqopt.split_attention(q, k, v, grid=GRID, **options)  # type: ignore[arg-type]
    assert isinstance(out, Tensor)
    return out


@pytest.mark.parametrize("options", [{"threshold": 1.0}, {"density": 0.4}], ids=str)
@pytest.mark.parametrize("bad", BAD, ids=str)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_no_more_is_spoiled_than_by_dense_attention(
    which: int, bad: float, options: dict[str, float]
) -> None:
    tensors = [torch.randn(1, 2, 180, 8) for _ in range(3)]
    for position in (7, 178):  # inside, and in the last ragged tile; 7 may well be a probe
        given = [x.clone() for x in tensors]
        given[which][0, 1, position, 3] = bad
        found = call(*given, **options)
        dense = F.scaled_dot_product_attention(*given)
        spoiled = ~dense.isfinite()
        assert not (~found.isfinite() & ~spoiled).any(), "more than dense attention spoils"
        assert spoiled.any() or which == 1, "the case must show"
        clean = call(*tensors, **options)
        assert torch.equal(found[:, 0], clean[:, 0]), "another head"
        if which == 0:
            rows = torch.arange(180) != position
            assert relative(found[:, 1, rows], dense[:, 1, rows]) < 0.6


def test_a_probe_that_is_no_number_leaves_the_others_be() -> None:
    """The probes' scalars hold for a whole head."""
    q, k, v = (torch.randn(1, 1, 180, 8) for _ in range(3))
    q[0, 0, :64:7] = torch.nan
    out = call(q, k, v, threshold=2.0, probes=64)
    rows = q.isfinite().all(-1)
    assert out[rows].isfinite().all() and not out[~rows].isfinite().any()


def test_a_fit_on_nothing_is_none() -> None:
    """One probe, values that are all the same and one key that takes nearly all: only rounding."""
    q, k = (torch.randn(1, 1, 180, 8) for _ in range(2))
    k[0, 0, 100] = 60 * q[0, 0, 90] / q[0, 0, 90].norm()
    v = torch.ones(1, 1, 180, 8)
    out, stats = freqopt.split_attention(
        q, k, v, grid=GRID, threshold=1.0, probes=1, return_stats=True
    )
    assert isinstance(out, Tensor)
    assert relative(out, v) < 1e-3
    assert stats.fitted.dtype == torch.bool and stats.fitted.shape == (1, 1)
    ordinary = [torch.randn(1, 1, 180, 8) for _ in range(3)]
    far = float("inf")  # so that all that is not local is approximated
    _, stats = freqopt.split_attention(*ordinary, grid=GRID, threshold=far, return_stats=True)
    assert stats.fitted.all()


def test_probes_whose_bands_have_next_to_nothing_say_so() -> None:
    """Logits in the thousands: means are e^-1000 of the sum, and what the fit divides by is 0."""
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, 2, 180, 8, generator=generator) for _ in range(3))
    far = float("inf")
    out, stats = freqopt.split_attention(900 * q, k, v, grid=GRID, threshold=far, return_stats=True)
    assert isinstance(out, Tensor) and out.isfinite().all()
    assert ((stats.probe_error > 0.3) & (stats.probe_error < 1.5)).all()


@pytest.mark.parametrize("type_", [torch.bfloat16, torch.float16])
def test_autocast_does_not_reach_into_the_op(type_: torch.dtype) -> None:
    tensors = [torch.randn(1, 2, 180, 8, requires_grad=True) for _ in range(3)]
    found = []
    for cast in (False, True):
        with torch.autocast("cpu", type_, enabled=cast):
            out = call(*tensors, density=0.5, order="content", chunk=256)
            assert out.dtype == torch.float32
            grads = torch.autograd.grad(out.float().square().sum(), tensors)
        found.append([out, *grads])
    for plain, under in zip(*found, strict=True):
        assert torch.equal(plain, under)
