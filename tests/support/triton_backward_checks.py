"""The Triton backward against autograd of the reference; run by test_triton_backward.py.

On a GPU if there is one, else in Triton's interpreter (float32 and float16).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from attention_cases import (
    CASES,
    CONTENT_CASES,
    RECTANGULAR_CASES,
    Case,
    budget_for,
    make_tensors,
    orders_of,
    reference_log_sums,
    reference_split,
    relative,
)
from interpreted import prepare_interpreter

import freqopt
from benchmarks.backward import gradient_errors, prepare
from benchmarks.tensors import Attention
from freqopt.kernels import chunked
from freqopt.kernels.backward.launch import Forward, split_backward
from freqopt.kernels.layout import Inputs, Settings

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
TOLERANCE = {
    torch.float32: 5e-4 if ON_GPU else 2e-4,  # tensor cores split float32 in three
    torch.float16: 5e-3,
    torch.bfloat16: 2e-2,
}
if not ON_GPU:
    prepare_interpreter()

ODD = [
    *CASES,
    Case((5, 9, 11), dim=40, heads=4, kv_heads=2, batch=1, before=9, after=70, masked=True),
    Case((1, 1, 60), dim=32, heads=3, kv_heads=1),
]
# All cases in one type, one in the others: every type and head dim is compiled or interpreted anew.
FIRST, *OTHERS = (
    [torch.bfloat16, torch.float32, torch.float16] if ON_GPU else [torch.float32, torch.float16]
)
PROBLEMS = [*((case, FIRST) for case in ODD), *((ODD[3], dtype) for dtype in OTHERS)]

GIVEN_CASES = [CONTENT_CASES[0], *RECTANGULAR_CASES[:3]]
if not ON_GPU:  # each pair of a batch item and a head takes the interpreter seconds
    CONTENT = dataclasses.replace(CONTENT_CASES[0], heads=2)
    RECTANGULAR = dataclasses.replace(RECTANGULAR_CASES[0], batch=1, heads=2, kv_heads=1)
    GIVEN_CASES = [CONTENT, RECTANGULAR, *RECTANGULAR_CASES[1:3]]


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN: what a kernel forgets to write shows."""
    plain = torch.empty

    def poisoned(*size: int, **options: object) -> torch.Tensor:
        fresh: torch.Tensor = plain(*size, **options)  # type: ignore[call-overload]
        return fresh.fill_(torch.nan if fresh.is_floating_point() else 77)

    monkeypatch.setattr(torch, "empty", poisoned)


def gradients(
    case: Case, tensors: tuple, budget: torch.Tensor, *, log_sum: bool = False
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Ours, and those of the reference in float32 on the same (rounded) tensors.

    log_sum: with a gradient of the softmax sums' logarithms, too.
    """
    query, scale = tensors[0], case.dim**-0.5
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(query.shape, generator=generator).to(query.dtype)
    sums_grad = torch.randn(query.shape[:3], generator=generator) if log_sum else None
    orders = orders_of(case, tensors)
    leaves = [x.detach().float().requires_grad_() for x in tensors[:3]]
    wide = (*leaves, tensors[3])
    expected, split = reference_split(case, wide, budget)
    total = (expected * grad.float()).sum()
    if sums_grad is not None:
        total = total + (reference_log_sums(case, wide, split) * sums_grad).sum()
    total.backward()
    inputs = case.inputs(tensors, budget, orders)
    forward = chunked.split_forward(inputs, Settings(scale, 0.0, 64))
    probe = forward.split.probe
    found = split_backward(
        on_device(grad),
        on_device(sums_grad),
        Inputs(*map(on_device, inputs)),
        Forward(
            *map(on_device, (forward.out, forward.split.route)),
            *map(on_device, (torch.stack([probe.c, probe.g], -1), forward.matrix)),
        ),
        scale,
    )
    return tuple(x.cpu() for x in found), tuple(x.grad for x in leaves)


def on_device(x: Any) -> Any:
    return x.to(DEVICE) if isinstance(x, torch.Tensor) else x


def cast(tensors: tuple, dtype: torch.dtype) -> tuple:
    return (*(x.to(dtype) for x in tensors[:3]), tensors[3])


def compare(case: Case, dtype: torch.dtype, budget: torch.Tensor | None = None) -> None:
    tensors = cast(make_tensors(case), dtype)
    found, expected = gradients(
        case, tensors, budget_for(case, tensors, 0.3) if budget is None else budget
    )
    for mine, truth, given in zip(found, expected, tensors[:3], strict=True):
        assert mine.dtype == dtype and mine.shape == given.shape
        assert relative(mine.float(), truth) < TOLERANCE[dtype]


@pytest.mark.parametrize(("case", "dtype"), PROBLEMS, ids=str)
def test_gradients_are_those_of_the_reference(case: Case, dtype: torch.dtype) -> None:
    compare(case, dtype)


@pytest.mark.parametrize("case", GIVEN_CASES, ids=str)
def test_gradients_given_orders_and_of_other_queries(case: Case) -> None:
    tensors = make_tensors(case)
    found, expected = gradients(case, tensors, budget_for(case, tensors, 0.3), log_sum=True)
    for mine, truth in zip(found, expected, strict=True):
        assert relative(mine, truth) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("threshold", [0.0, torch.inf])
def test_gradients_of_dense_and_of_local_routes(threshold: float) -> None:
    case = ODD[0]
    compare(case, torch.float32, torch.full((case.heads,), threshold))


def test_same_input_same_bits() -> None:
    case = ODD[-1]
    tensors = make_tensors(case)
    budget = budget_for(case, tensors, 0.3)
    first, second = (gradients(case, tensors, budget)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_benchmark_compares_with_the_definition() -> None:
    given = torch.randn(4, 1, 2, 180, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    attention = Attention(given[0], given[1], given[2], (3, 6, 10))
    prepared = prepare(attention, given[3], 3.0)
    assert set(prepared.route.unique().tolist()) == {0, 2}
    errors = gradient_errors(attention, given[3], prepared)
    assert max(errors.values()) < TOLERANCE[torch.float32]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dim", "dtype"),
    [
        (64, torch.bfloat16),
        (96, torch.float16),
        (128, torch.bfloat16),
        (128, torch.float32),
        (256, torch.bfloat16),
        (256, torch.float32),
    ],
    ids=str,
)
def test_gradients_of_every_head_dim_on_the_gpu(dim: int, dtype: torch.dtype) -> None:
    compare(Case((7, 13, 17), dim=dim, heads=4, kv_heads=2, batch=1, after=21, masked=True), dtype)


@pytest.mark.gpu
def test_a_graph_of_forward_and_backward_replays_with_other_content() -> None:
    case = Case((7, 13, 17), dim=64)
    held = [x.cuda().half().requires_grad_() for x in make_tensors(case)[:3]]

    def both(*leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = freqopt.split_attention(*leaves, grid=case.grid, threshold=0.7)
        return torch.autograd.grad(out, leaves, torch.ones_like(out))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        both(*held)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both(*held)
    other = [x.cuda().half().requires_grad_() for x in make_tensors(case, 1)[:3]]
    with torch.no_grad():
        for mine, new in zip(held, other, strict=True):
            mine.copy_(new)
    graph.replay()
    for mine, expected in zip(captured, both(*other), strict=True):
        assert torch.equal(mine, expected)
