"""The op as users and graphs call it: against the reference, its gradients, its errors."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from attention_cases import (
    CASES,
    Case,
    budget_for,
    dense,
    h_bar_of,
    make_tensors,
    reference_split,
    relative,
    scores_of,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import freqopt
from freqopt.errors import InputError
from freqopt.kernels import chunked, op


def call_op(case: Case, tensors: tuple, budget: torch.Tensor, probes: int = 64) -> tuple:
    query, key, value, mask = tensors
    return op.split_attention_op(
        query,
        key,
        value,
        budget,
        mask,
        list(case.grid),
        case.before,
        case.after,
        case.dim**-0.5,
        0.0,
        probes,
    )


@pytest.mark.parametrize("density", [0.2, 0.6])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cpu_op_is_the_reference(case: Case, density: float) -> None:
    tensors = make_tensors(case)
    budget = budget_for(case, tensors, density)
    expected, split = reference_split(case, tensors, budget)
    out, reached, error, route, coefficients, *_, matrix = call_op(case, tensors, budget)
    assert torch.equal(route, split.route)
    assert relative(matrix, split.probe.matrix(h_bar_of(case, tensors))) < 1e-4
    assert relative(out, expected) < 1e-5
    assert torch.allclose(reached, split.density)
    assert torch.allclose(error, split.probe.error, atol=1e-4)
    assert torch.allclose(coefficients[..., 0], split.probe.c, atol=1e-3)
    assert relative(out, dense(case, tensors)) < 1.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_dtype_and_layout(dtype: torch.dtype) -> None:
    case = CASES[1]
    query, key, value, mask = make_tensors(case)
    tensors = (query.to(dtype), key.to(dtype), value.to(dtype), mask)
    out = call_op(case, tensors, torch.zeros(case.heads))[0]
    assert out.dtype == dtype and out.transpose(1, 2).is_contiguous()
    assert relative(out, dense(case, tensors)) < 1e-2


@pytest.mark.parametrize("case", [CASES[1], CASES[4], CASES[3]], ids=str)
@pytest.mark.smoke
def test_gradients_are_those_of_the_reference(case: Case) -> None:
    tensors = make_tensors(case)
    budget = budget_for(case, tensors, 0.4)
    weight = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1))
    grads = []
    for run in (
        lambda t: call_op(case, t, budget)[0],
        lambda t: reference_split(case, t, budget)[0],
    ):
        leaves = [x.detach().clone().requires_grad_() for x in tensors[:3]]
        (run((*leaves, tensors[3])) * weight).sum().backward()
        grads.append([x.grad for x in leaves])
    for mine, expected in zip(*grads, strict=True):
        assert mine is not None and expected is not None
        assert relative(mine, expected) < 1e-4


def test_schema_fake_and_autograd_registrations_are_consistent() -> None:
    case = CASES[1]
    query, key, value, mask = make_tensors(case)
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
    )
    results = torch.library.opcheck(torch.ops.freqopt.split_attention.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.smoke
def test_density_and_statistics() -> None:
    case = Case((6, 16, 16), batch=2)
    query, key, value, _ = make_tensors(case)
    dense_out = dense(case, (query, key, value, None))
    errors = []
    for density in (0.2, 0.5, 1.0):
        out, stats = freqopt.split_attention(
            query, key, value, grid=case.grid, density=density, return_stats=True
        )
        assert stats.density.shape == stats.probe_error.shape == (2, case.heads)
        assert stats.key_order is None and stats.query_order is None
        assert ((stats.density - density).abs() <= 1 / 24 / 12 + 1e-6).all()
        errors.append(relative(out, dense_out))
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-5


def test_threshold_per_head_serves_each_head_its_own() -> None:
    case = Case((6, 8, 11), batch=1)
    query, key, value, _ = make_tensors(case)
    threshold = torch.tensor([0.0, torch.inf])
    _, stats = freqopt.split_attention(
        query, key, value, grid=case.grid, threshold=threshold, return_stats=True
    )
    assert stats.density[0, 0] == 1.0 and stats.density[0, 1] < 0.5


def test_scores_are_what_the_router_compares() -> None:
    case = CASES[1]
    tensors = make_tensors(case)
    score = scores_of(case, tensors)
    budget = budget_for(case, tensors, 0.3)
    route = call_op(case, tensors, budget)[3]
    lifted = score >= budget[None, :, None, None]
    assert 0 < lifted.float().mean() < 1
    assert (route == 2)[lifted].all() and (route == 2).sum() >= lifted.sum()


MEMORY = """
import torch, freqopt

def kilobytes(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))

torch.set_num_threads(1)
x = torch.randn(1, 10_080, 4, 64).transpose(1, 2)
few = x[:, :, :60]
freqopt.split_attention(few, few, few, grid=(3, 4, 5), density=0.1)  # what is loaded on first use
before = kilobytes("VmRSS")
out = freqopt.split_attention(x, x, x, grid=(10, 28, 36), density=0.1)
assert out.isfinite().all()
print(1024 * (kilobytes("VmHWM") - before))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_near_that_of_a_chunk() -> None:
    """All pairs of ten thousand tokens, held once, would be eight times as much.

    In a process of its own: the peak of this one may have been higher before.
    """
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    all_pairs = 4 * 4 * 10_080**2
    assert chunked.CHUNK_BYTES / 4 < int(done.stdout) < all_pairs / 8


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[4]
    tensors = make_tensors(case)
    budget = budget_for(case, tensors, 0.4)
    whole = call_op(case, tensors, budget)[0]
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 1)
    assert relative(call_op(case, tensors, budget)[0], whole) < 1e-6


QKV = torch.randn(1, 2, 60, 16)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"grid": (3, 4, 6)}, "72 tokens"),
        ({"grid": (3, 4, 5), "text_after": 4}, "4 text tokens"),
        ({"query": QKV.double(), "key": QKV.double(), "value": QKV.double()}, "float64"),
        ({"query": QKV.long(), "key": QKV.long(), "value": QKV.long()}, "int64"),
        ({"key": QKV[:, :, :50]}, "must agree"),
        ({"key": QKV.half()}, "dtypes differ"),
        ({"query": QKV[0]}, "expected"),
        ({"threshold": 1.0, "density": 0.1}, "one of them"),
        ({"density": 0.0}, "outside"),
        ({"density": 1.5}, "outside"),
        ({"threshold": float("nan")}, "0 \\(dense\\) or larger"),
        ({"threshold": torch.ones(3)}, "2 heads"),
        ({"mid_band": torch.ones(2)}, "mid_band"),
        ({"probes": -1}, "probes"),
        ({"key_mask": torch.ones(1, 60)}, "key_mask"),
        ({"key_mask": torch.arange(60)[None] < 57}, "leaves out 3 keys that are no text.*at 57"),
        (
            {"key_mask": torch.arange(60)[None] < 55, "grid": (5, 11, 1), "text_before": 5},
            "leaves out 5 keys that are no text.*at 55",
        ),
        (
            {"order": torch.zeros(1, 2, 60, dtype=torch.int32, device="meta")},
            "on meta; integers of shape",
        ),
        (
            {
                "key": QKV.expand(1, 2, 60, 16)[:, :1].repeat(1, 3, 1, 1),
                "value": QKV[:, :1].repeat(1, 3, 1, 1),
            },
            "not a multiple",
        ),
        ({"query": QKV.to("meta"), "key": QKV.to("meta"), "value": QKV.to("meta")}, "meta"),
    ],
)
def test_bad_input_is_refused_with_what_was_seen(change: dict, said: str) -> None:
    arguments = {"query": QKV, "key": QKV, "value": QKV, "grid": (3, 4, 5)} | change
    with pytest.raises(InputError, match=said):
        freqopt.split_attention(**arguments)


def test_text_keys_may_be_left_out_also_under_vmap() -> None:
    mask = torch.arange(60)[None] >= 7
    query, key, value = torch.randn(3, 1, 2, 60, 16, generator=torch.Generator().manual_seed(0))

    def attend(mask: Tensor) -> Tensor:
        return freqopt.split_attention(
            query, key, value, text_before=10, key_mask=mask, threshold=0.0
        )

    wanted = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None])
    torch.testing.assert_close(attend(mask), wanted, atol=1e-5, rtol=1e-5)
    both = torch.vmap(attend)(torch.stack([mask, mask | True]))
    torch.testing.assert_close(both[0], wanted, atol=1e-5, rtol=1e-5)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    grid=st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9)),
    before=st.integers(0, 5),
    after=st.integers(0, 5),
    dim=st.sampled_from([8, 16, 24]),
    groups=st.sampled_from([1, 2]),
    density=st.floats(0.05, 0.95),
    batch=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_any_shape_agrees_with_the_reference(
    grid: tuple,
    before: int,
    after: int,
    dim: int,
    groups: int,
    density: float,
    batch: int,
    seed: int,
) -> None:
    case = Case(grid, dim, 2 * groups, 2, batch, before, after, masked=before + after > 0)
    tensors = make_tensors(case, seed)
    budget = budget_for(case, tensors, density) if case.length > 128 else torch.ones(case.heads)
    expected, split = reference_split(case, tensors, budget, probes=8)
    out, _, _, route, *_ = call_op(case, tensors, budget, probes=8)
    assert torch.equal(route, split.route)
    assert relative(out, expected) < 1e-5
