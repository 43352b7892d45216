"""One-node ONNX models of split attention, and their onnxruntime sessions, for the export tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from attention_cases import BASE, Case
from onnx import TensorProto, helper
from torch import Tensor

from freqopt.exporters.onnx.body import DOMAIN, INPUTS, OP_NAME, OP_VERSION, split_function
from freqopt.exporters.onnx.content import CONTENT_INPUTS, CONTENT_NAME, content_function
from freqopt.exporters.onnx.order import order_function
from freqopt.kernels.chunked import Orders

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
    """grid -> TokenOrder -> SplitAttention, all extents free.

    takes_order: orders of any rank are inputs, of the queries too, and where their video begins.
    """
    kind = KINDS[dtype]
    free = [None] * 4
    inputs = [helper.make_tensor_value_info(name, kind, free) for name in INPUTS[:3]]
    inputs += [
        helper.make_tensor_value_info("budget", TensorProto.FLOAT, [None]),
        helper.make_tensor_value_info("key_mask", TensorProto.BOOL, [None, None]),
        helper.make_tensor_value_info("text_before", TensorProto.INT64, [1]),
    ]
    names = list(INPUTS)
    if takes_order:
        inputs += [
            helper.make_tensor_value_info("order", TensorProto.INT64, None),
            helper.make_tensor_value_info("query_order", TensorProto.INT64, None),
            helper.make_tensor_value_info("query_text_before", TensorProto.INT64, [1]),
        ]
    else:
        inputs.append(helper.make_tensor_value_info("grid", TensorProto.INT64, [3]))
        names[-2:] = "order", "text_before"
    kinds = {"out": kind, "route": TensorProto.INT64}
    order = helper.make_node("TokenOrder", ["grid"], ["order"], domain=DOMAIN)
    graph = helper.make_graph(
        [
            *([] if takes_order else [order]),
            helper.make_node(
                OP_NAME, names, list(outputs), domain=DOMAIN, **{"own": 1, **attributes}
            ),
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


def order_model(opset: int, dtype: torch.dtype, *, largest_chunk: int = 1 << 30) -> onnx.ModelProto:
    """One ContentOrder, all extents free."""
    kinds = dict(
        zip(
            CONTENT_INPUTS,
            [(KINDS[dtype], 4), (TensorProto.INT64, 1), (TensorProto.INT32, 1)],
            strict=False,
        )
    )
    node = helper.make_node(
        CONTENT_NAME, list(CONTENT_INPUTS), ["order"], domain=DOMAIN, largest_chunk=largest_chunk
    )
    graph = helper.make_graph(
        [node],
        "order",
        [
            *(
                helper.make_tensor_value_info(name, kind, [None] * rank)
                for name, (kind, rank) in kinds.items()
            ),
            helper.make_tensor_value_info("text_before", TensorProto.INT64, [1]),
        ],
        [helper.make_tensor_value_info("order", TensorProto.INT64, [None] * 3)],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, OP_VERSION)]
    functions = [content_function(opset)]
    return helper.make_model(graph, opset_imports=imports, functions=functions, ir_version=10)


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


def feed(
    case: Case, tensors: Sequence[Tensor | None], budget: Tensor, orders: Orders = BASE
) -> dict[str, np.ndarray]:
    """onnxruntime inputs of a case; budget: (H,) thresholds.

    orders: those of the case by content, or where its queries are other tokens; for a model that
    takes orders.
    """
    query, key, value, mask = tensors
    assert query is not None and key is not None and value is not None
    whole = mask if mask is not None else torch.ones(1, 1, dtype=torch.bool)
    layouts = {"": case.sequence, "query_": case.query_side}
    placed = {}
    if case.chunk or case.queries:
        for (prefix, layout), order in zip(layouts.items(), orders, strict=True):
            index = layout.base_order(torch.device("cpu")) if order is None else order
            placed[f"{prefix}order"] = index.long().numpy()
        placed["query_text_before"] = np.array([case.query_side.text_before])
    else:
        placed["grid"] = np.array(case.grid)
    return {
        **placed,
        "query": query.contiguous().numpy(),
        "key": key.contiguous().numpy(),
        "value": value.contiguous().numpy(),
        "budget": budget.numpy(),
        "key_mask": whole.numpy(),
        "text_before": np.array([case.before]),
    }
