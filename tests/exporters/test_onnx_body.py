"""The ONNX function bodies compute the split itself: same bands, same route, same probe fit."""

from __future__ import annotations

import pytest
import torch

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import numpy as np
import onnxruntime
from attention_cases import CASES, Case, budget_for, make_tensors, relative
from onnx import TensorProto, helper
from onnx_cases import feed, session, split_model

import freqopt.kernels.op  # noqa: F401
from freqopt.exporters.onnx.body import DOMAIN
from freqopt.exporters.onnx.order import order_function
from freqopt.exporters.runner import _to_tensor
from freqopt.grid import token_order

ALL = ("out", "route", "coefficients", "probe_error")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("opset", [18, 20, 23])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_body_is_the_op(case: Case, opset: int, dtype: torch.dtype) -> None:
    tensors = make_tensors(case)
    budget = budget_for(case, tensors, 0.3)
    query, key, value = (x.to(dtype) for x in tensors[:3])
    scale = case.dim**-0.5
    model = split_model(opset, dtype, ALL, scale=scale, density=0.0, probes=64)
    onnx.checker.check_model(model, full_check=True)
    found = session(model).run(None, feed(case, (query, key, value, tensors[3]), budget))
    out, _, error, route, coefficients, *_ = torch.ops.freqopt.split_attention(
        query,
        key,
        value,
        budget,
        tensors[3],
        list(case.grid),
        case.before,
        case.after,
        scale,
        0.0,
        64,
    )
    assert set(route.unique().tolist()) >= {0, 2}
    assert torch.equal(torch.from_numpy(found[1]), route.long())
    assert relative(torch.from_numpy(found[0]), out) < TOLERANCE[dtype]
    torch.testing.assert_close(torch.from_numpy(found[2]), coefficients, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(torch.from_numpy(found[3]), error, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("density", "probes"), [(0.25, 0), (0.1, 16)])
def test_density_and_probe_attributes(density: float, probes: int) -> None:
    case = Case((4, 8, 9), after=4)
    tensors = make_tensors(case)
    budget = torch.zeros(case.heads)
    model = split_model(20, torch.float32, ALL, scale=0.2, density=density, probes=probes)
    found = session(model).run(None, feed(case, tensors, budget))
    out, _, error, route, coefficients, *_ = torch.ops.freqopt.split_attention(
        *tensors[:3], budget, None, list(case.grid), 0, case.after, 0.2, density, probes
    )
    assert torch.equal(torch.from_numpy(found[1]), route.long())
    assert relative(torch.from_numpy(found[0]), out) < 1e-5
    torch.testing.assert_close(torch.from_numpy(found[2]), coefficients, rtol=1e-3, atol=1e-4)
    assert bool(error.isnan().all()) == (probes == 0)
    torch.testing.assert_close(
        torch.from_numpy(found[3]), error, rtol=1e-3, atol=1e-5, equal_nan=True
    )


@pytest.mark.smoke
def test_bfloat16() -> None:
    case = CASES[1]
    tensors = make_tensors(case)
    budget = budget_for(case, tensors, 0.3)
    halves = {
        name: x.bfloat16() for name, x in zip(("query", "key", "value"), tensors[:3], strict=True)
    }
    runner = session(split_model(20, torch.bfloat16, scale=0.2, density=0.0, probes=64))
    value = onnxruntime.OrtValue
    inputs = {k: value.ortvalue_from_numpy(v) for k, v in feed(case, tensors, budget).items()}
    for name, x in halves.items():
        raw = x.contiguous().view(torch.uint16).numpy()
        inputs[name] = value.ortvalue_from_numpy_with_onnx_type(raw, TensorProto.BFLOAT16)
    found = _to_tensor(runner.run_with_ort_values(None, inputs)[0])
    out = torch.ops.freqopt.split_attention(
        *halves.values(), budget, tensors[3], list(case.grid), case.before, case.after, 0.2, 0.0, 64
    )[0]
    assert found.dtype == torch.bfloat16
    assert relative(found, out) < 1e-2


def test_one_session_serves_two_token_counts() -> None:
    runner = session(split_model(20, torch.float32, scale=0.18, density=0.0, probes=64))
    for case in (Case((3, 6, 10), batch=1), Case((5, 7, 9), before=3, after=2)):
        tensors = make_tensors(case)
        budget = budget_for(case, tensors, 0.3)
        found = runner.run(None, feed(case, tensors, budget))[0]
        out = torch.ops.freqopt.split_attention(
            *tensors[:3], budget, None, list(case.grid), case.before, case.after, 0.18, 0.0, 64
        )[0]
        assert relative(torch.from_numpy(found), out) < 1e-5


def test_order_function_is_the_hilbert_order() -> None:
    graph = helper.make_graph(
        [helper.make_node("TokenOrder", ["grid"], ["order"], domain=DOMAIN)],
        "order",
        [helper.make_tensor_value_info("grid", TensorProto.INT64, [3])],
        [helper.make_tensor_value_info("order", TensorProto.INT64, [None])],
    )
    runner = session(
        helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)],
            functions=[order_function(18)],
            ir_version=10,
        )
    )
    grids = [(1, 1, 1), (1, 1, 9), (1, 7, 1), (2, 1, 1), (1, 5, 6), (4, 1, 3), (2, 2, 2)]
    grids += [(3, 6, 10), (5, 7, 9), (8, 8, 8), (1, 16, 16), (2, 17, 33), (21, 30, 52)]
    for grid in grids:
        order = runner.run(None, {"grid": np.array(grid)})[0]
        expected = token_order(grid, torch.device("cpu")).long()
        assert torch.equal(torch.from_numpy(order), expected), grid
