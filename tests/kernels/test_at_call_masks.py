"""Calls of the op at call that are dense and have a mask: they are SDPA, and so are gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from freqopt.kernels.at_call import split_attention_at_call
from freqopt.kernels.backward import dense

TOKENS = 150


def tensors(groups: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(2, heads, TOKENS, 16, generator=generator) for heads in (4, groups, groups)
    )
    k[:, :, 3] *= 9  # weights that are nothing like even
    return q, k, v


def keys() -> Tensor:
    mask = torch.ones(2, TOKENS, dtype=torch.bool)
    mask[0, 90:] = mask[1, :20] = False
    return mask


def pairs(batch: int, heads: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, heads, TOKENS, TOKENS, generator=generator) < 0.3


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("masks", ["keys", "pairs", "heads"])
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_of_a_dense_call(
    groups: int, masks: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "ROWS", 64)
    key_mask = keys() if masks == "keys" else None
    whole = {"keys": None, "pairs": pairs(1, 1), "heads": pairs(2, 4)}[masks]
    threshold, grid = torch.zeros(2, 4), [0, 0, 0]

    def split(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = split_attention_at_call(
            q, k, v, threshold, key_mask, grid, 0, 0, 0.3, 0.0, 8, None, 0, whole
        )
        out: Tensor = found[0]
        return out

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = keys()[:, None, None] if whole is None else whole
        return F.scaled_dot_product_attention(q, k, v, mask, scale=0.3, enable_gqa=True)

    torch._dynamo.reset()
    call = torch.compile(split, backend="aot_eager") if compiled else split
    weights = torch.randn(2, 4, TOKENS, 16, generator=torch.Generator().manual_seed(2))
    found, expected = [], []
    for function, into in ((call, found), (plain, expected)):
        given = [t.clone().requires_grad_() for t in tensors(groups)]
        out = function(*given)
        (out * weights).sum().backward()
        into += [out.detach(), *(t.grad for t in given)]
    for one, other in zip(found, expected, strict=True):
        assert other is not None and other.norm() > 0.1
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-4)


def test_a_query_that_sees_nothing_has_no_gradient() -> None:
    q, k, v = tensors(4)
    mask = keys()[:, None, None].repeat(1, 1, TOKENS, 1)
    mask[:, :, 7] = False
    grads = dense.dense_gradients(torch.ones_like(q), q, k, v, mask, 0.3)
    assert all(bool(g.isfinite().all()) for g in grads)
    assert not grads[0][:, :, 7].any() and grads[0][:, :, 8].abs().sum() > 0
