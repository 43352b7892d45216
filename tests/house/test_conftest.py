"""The guards that the other tests rely on do fail when they should."""

from __future__ import annotations

import types
from functools import partial

import pytest
import torch
from conftest import Poison, allocates, poison_module

UNFINISHED = """
import torch

def split(x):
    def out(dtype):
        return torch.empty(4, dtype=dtype)
    half = x.new_empty(4)
    half[:2] = x[:2]
    return half, out(torch.int8), torch.empty_like(x)

def harmless(x):
    return x.double()
"""


def test_an_unwritten_output_is_nan() -> None:
    module = types.ModuleType("freqopt.kernels.unfinished")
    exec(compile(UNFINISHED, "unfinished.py", "exec"), module.__dict__)
    before = module.harmless
    poison_module(module)
    half, integers, like = module.split(torch.ones(4))
    assert half[:2].tolist() == [1, 1] and half[2:].isnan().all()
    assert (integers == 127).all() and like.isnan().all()
    assert module.harmless is before and not allocates(before.__code__)


SPELLINGS = [torch.empty, torch.ones(3).new_empty, partial(torch.Tensor.new_empty, torch.ones(3))]
OPERATORS = [
    partial(torch.ops.aten.empty.memory_format, device="cpu"),
    partial(torch.ops.aten.new_empty, torch.ones(3)),
]


@pytest.mark.parametrize("allocate", SPELLINGS + OPERATORS)
def test_poison_reaches_every_spelling(allocate: object) -> None:
    assert callable(allocate)
    with Poison():
        assert allocate((2, 2)).isnan().all()
        assert torch.empty_strided((2,), (1,)).isnan().all()
    assert torch.zeros(2).sum() == 0


def test_the_kernels_are_poisoned() -> None:
    import freqopt.kernels.op  # noqa: F401
    from freqopt.kernels import chunked

    poison_module(chunked)
    assert hasattr(chunked.split_forward, "_freqopt_poisoned")
