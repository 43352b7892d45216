"""One-node ONNX models of split attention, and their onnxruntime sessions, for the export tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from attention_cases import Case
from onnx import TensorProto, helper
from torch import Tensor

from freqopt.exporters.onnx.body import DOMAIN, INPUTS, OP_NAME, OP_VERSION, split_function
from freqopt.exporters.onnx.order import order_function

KINDS = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
}
OUT_RANK = {"out": 4, "route": 4, "coefficients": 3, "probe_error": 2}


def split_model(
    opset: int,
    dtype: torch.dtype,
    outputs: Sequence[str] = ("out",),
    *,
    takes_order: bool = False,
    **attributes: Any,
) -> onnx.ModelProto:
    """grid -> TokenOrder -> SplitAttention, all extents free; `takes_order`: order is an input."""
    kind = KINDS[dtype]
    free = [None] * 4
    inputs = [helper.make_tensor_value_info(name, kind, free) for name in INPUTS[:3]]
    inputs += [
        helper.make_tensor_value_info("budget", TensorProto.FLOAT, [None]),
        helper.make_tensor_value_info("key_mask", TensorProto.BOOL, [None, None]),
        helper.make_tensor_value_info("order", TensorProto.INT64, [None])
        if takes_order
        else helper.make_tensor_value_info("grid", TensorProto.INT64, [3]),
        helper.make_tensor_value_info("text_before", TensorProto.INT64, [1]),
    ]
    kinds = {"out": kind, "route": TensorProto.INT64}
    order = helper.make_node("TokenOrder", ["grid"], ["order"], domain=DOMAIN)
    graph = helper.make_graph(
        [
            *([] if takes_order else [order]),
            helper.make_node(OP_NAME, list(INPUTS), list(outputs), domain=DOMAIN, **attributes),
        ],
        "split",
        inputs,
        [
            helper.make_tensor_value_info(
                name, kinds.get(name, TensorProto.FLOAT), [None] * OUT_RANK[name]
            )
            for name in outputs
        ],
    )
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, OP_VERSION)],
        functions=[split_function(opset, tuple(outputs)), order_function(opset)],
        ir_version=10,
    )


def session(model: onnx.ModelProto, library: str | None = None) -> onnxruntime.InferenceSession:
    """A single-threaded CPU session, with a custom-op library if one is given."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if library:
        options.register_custom_ops_library(library)
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def feed(case: Case, tensors: Sequence[Tensor | None], budget: Tensor) -> dict[str, np.ndarray]:
    """onnxruntime inputs of a case; budget: (H,) thresholds."""
    query, key, value, mask = tensors
    assert query is not None and key is not None and value is not None
    whole = mask if mask is not None else torch.ones(1, 1, dtype=torch.bool)
    return {
        "query": query.contiguous().numpy(),
        "key": key.contiguous().numpy(),
        "value": value.contiguous().numpy(),
        "budget": budget.numpy(),
        "key_mask": whole.numpy(),
        "grid": np.array(case.grid),
        "text_before": np.array([case.before]),
    }
