"""How split attention is spelt in ONNX: bare nodes while exporting, bodies and shared orders after.

The exporter inlines functions it is given, so a site is emitted as a node of an unknown operator
with an explicit schema, and the function body is attached when the model is complete.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import values
from onnxscript.onnx_opset import opset18

import onnx
from freqopt.exporters.onnx.body import (
    ATTRIBUTES,
    DOMAIN,
    INPUTS,
    OP_NAME,
    OP_VERSION,
    ORDER_NAME,
    split_function,
)
from freqopt.exporters.onnx.content import (
    CONTENT_INPUTS,
    CONTENT_NAME,
    content_function,
)
from freqopt.exporters.onnx.order import order_function
from freqopt.exporters.problems import ExportError
from freqopt.grid import token_order

ORDER_PREFIX = "freqopt.order."
BUDGET_INPUT = INPUTS.index("budget")
CHUNKS_INPUT = CONTENT_INPUTS.index("chunks")
_OPSET = values.Opset(DOMAIN, OP_VERSION)


def _split_schema() -> onnx.defs.OpSchema:
    schema = onnx.defs.OpSchema
    parameter = schema.FormalParameter
    kinds = {"scale": schema.AttrType.FLOAT, "density": schema.AttrType.FLOAT}
    return schema(
        OP_NAME,
        DOMAIN,
        OP_VERSION,
        "Frequency-split attention.",
        inputs=[
            *(parameter(name, "T") for name in ("query", "key", "value")),
            parameter("budget", "tensor(float)"),
            parameter("key_mask", "tensor(bool)"),
            *(parameter(name, "tensor(int64)") for name in INPUTS[BUDGET_INPUT + 2 :]),
        ],
        outputs=[parameter("out", "T")],
        type_constraints=[
            ("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "any float")
        ],
        attributes=[
            schema.Attribute(name, kinds.get(name, schema.AttrType.INT), "", required=True)
            for name in ATTRIBUTES
        ],
    )


def _order_schema() -> onnx.defs.OpSchema:
    parameter = onnx.defs.OpSchema.FormalParameter
    return onnx.defs.OpSchema(
        ORDER_NAME,
        DOMAIN,
        OP_VERSION,
        "Hilbert order of a grid's tokens.",
        inputs=[parameter("grid", "tensor(int64)")],
        outputs=[parameter("order", "tensor(int64)")],
    )


def _content_schema() -> onnx.defs.OpSchema:
    schema = onnx.defs.OpSchema
    parameter = schema.FormalParameter
    return schema(
        CONTENT_NAME,
        DOMAIN,
        OP_VERSION,
        "Each head's order of its tokens, by content.",
        inputs=[
            parameter("tokens", "T"),
            parameter("base", "tensor(int64)"),
            parameter("chunks", "tensor(int32)"),
            parameter("text_before", "tensor(int64)"),
        ],
        outputs=[parameter("order", "tensor(int64)")],
        type_constraints=[
            ("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "any float")
        ],
        attributes=[schema.Attribute("largest_chunk", schema.AttrType.INT, "", required=True)],
    )


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What `torch.onnx.export` needs to emit our nodes."""
    import freqopt.kernels.op  # noqa: F401  registers the operator

    split = values.Op(_OPSET, OP_NAME, _split_schema())
    order = values.Op(_OPSET, ORDER_NAME, _order_schema())
    content = values.Op(_OPSET, CONTENT_NAME, _content_schema())

    def vector(*sizes: Any) -> Any:
        """int64 vector of sizes, a constant if they all are."""
        if all(isinstance(size, int) for size in sizes):
            return opset18.Constant(value=onnx.numpy_helper.from_array(np.array(sizes, np.int64)))
        parts = [
            vector(size) if isinstance(size, int) else opset18.Reshape(size, vector(1))
            for size in sizes
        ]
        return parts[0] if len(parts) == 1 else opset18.Concat(*parts, axis=0)

    def translate(
        query: Any,
        key: Any,
        value: Any,
        budget: Any,
        key_mask: Any,
        grid: Any,
        text_before: Any,
        text_after: Any,
        scale: float,
        density: float,
        probes: int,
        chunks: Any = None,
        largest_chunk: int = 0,
        key_order: Any = None,
        query_order: Any = None,
        query_layout: Any = None,
        log_sum: bool = False,
    ) -> list[Any]:
        """The site's nodes; only the op's first output, its result, is ever used in a model.

        A rewritten site is given no orders and asked for no sums.
        """
        assert key_order is None and query_order is None and not log_sum
        if key_mask is None:
            whole = onnx.numpy_helper.from_array(np.ones((1, 1), np.bool_))
            key_mask = opset18.Constant(value=whole)
        before = query_before = vector(text_before)
        of_keys = of_queries = order(vector(*grid))
        other = query_layout is not None
        if other:
            of_queries, query_before = order(vector(*query_layout[:3])), vector(query_layout[3])
        if chunks is not None and largest_chunk:
            most = {"largest_chunk": int(largest_chunk)}
            base = of_queries
            of_keys = content(key, of_keys, chunks, before, **most)
            of_queries = of_keys
            if other:
                of_queries = content(query, base, chunks, query_before, **most)
        return [
            split(
                query,
                key,
                value,
                budget,
                key_mask,
                of_keys,
                before,
                of_queries,
                query_before,
                scale=float(scale),
                density=float(density),
                probes=int(probes),
                own=int(not other),
            )
        ]

    return {torch.ops.freqopt.split_attention.default: translate}


def name_budgets(model: ir.Model, names: list[str], chunk_names: list[str | None]) -> None:
    """Give each split node a budget initialiser (H,) of its own, in graph order.

    The exporter merges equal initialisers; a plan could then not be exchanged site by site.
    chunk_names: of the initialisers (Hkv,) with the chunks of orders by content, None without.
    """
    graph = model.graph
    nodes = [n for n in graph if (n.domain, n.op_type) == (DOMAIN, OP_NAME)]
    if len(nodes) != len(names):
        raise ExportError(f"{len(names)} sites were split and {len(nodes)} nodes were written")
    _name_inputs(
        graph, [(node, BUDGET_INPUT, name) for node, name in zip(nodes, names, strict=True)]
    )
    chunks = [
        (order, CHUNKS_INPUT, name)
        for node, name in zip(nodes, chunk_names, strict=True)
        if name is not None
        for order in orders_of(node)
    ]
    _name_inputs(graph, chunks)


def orders_of(node: ir.Node) -> list[ir.Node]:
    """The nodes that make a split node's orders by content: the keys', then the queries' own."""
    producers = [None if value is None else value.producer() for value in node.inputs]
    found = (p for p in producers if p is not None)
    return list(dict.fromkeys(p for p in found if (p.domain, p.op_type) == (DOMAIN, CONTENT_NAME)))


def _name_inputs(graph: ir.Graph, places: list[tuple[ir.Node, int, str]]) -> None:
    """Give inputs (node, number) initialisers of the given names, with the content they had."""
    found = []
    for node, at, name in places:
        value = node.inputs[at]
        assert value is not None and value.const_value is not None
        found.append((node, at, name, value, value.const_value.numpy().copy()))
    for node, at, *_ in found:
        node.replace_input_with(at, None)
    for value in {id(value): value for *_, value, _ in found}.values():
        if value.name and not value.uses():
            del graph.initializers[value.name]
    for node, at, name, _, content in found:
        named = graph.initializers.get(name)
        node.replace_input_with(at, _initialiser(graph, name, content) if named is None else named)


def avoid_boolean_where(model: ir.Model) -> None:
    """Spell a Where on booleans with And and Or: onnxruntime has no kernel for it."""
    for node in list(model.graph):
        if node.op_type != "Where" or node.outputs[0].dtype != ir.DataType.BOOL:
            continue
        condition, yes, no = node.inputs
        kept = ir.node("And", [condition, yes])
        inverse = ir.node("Not", [condition])
        other = ir.node("And", [inverse.outputs[0], no])
        both = ir.node("Or", [kept.outputs[0], other.outputs[0]])
        both.outputs[0].shape, both.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
        model.graph.insert_before(node, [kept, inverse, other, both])
        ir.convenience.replace_all_uses_with(
            node.outputs[0], both.outputs[0], replace_graph_outputs=True
        )
        model.graph.remove(node, safe=True)


def share_orders(model: ir.Model) -> None:
    """One token order per grid: an initialiser where the grid is constant, else one node."""
    graph = model.graph
    dynamic: dict[Any, ir.Value] = {}
    for node in list(graph):
        if (node.domain, node.op_type) != (DOMAIN, ORDER_NAME):
            continue
        source, output = node.inputs[0], node.outputs[0]
        assert source is not None
        constant = ir.convenience.get_const_tensor(source)
        if constant is not None:
            t, h, w = (int(extent) for extent in constant.numpy())
            shared = _order_initialiser(graph, (t, h, w))
        else:
            shared = dynamic.setdefault(_origin(source), output)
        if shared is not output:
            ir.convenience.replace_all_uses_with(output, shared)
            graph.remove(node, safe=True)
    _remove_unused(graph)


def _origin(value: ir.Value) -> Any:
    """What a grid is made of, so that equal grids of different sites are recognised."""
    node = value.producer()
    if node is None:
        return value.name
    constant = ir.convenience.get_const_tensor(value)
    if constant is not None:
        return tuple(constant.numpy().reshape(-1).tolist())
    if node.op_type in ("Concat", "Reshape", "Shape", "Squeeze", "Gather", "Slice", "Unsqueeze"):
        attributes = tuple(sorted((k, str(a.value)) for k, a in node.attributes.items()))
        return (node.op_type, attributes, *(_origin(v) for v in node.inputs if v is not None))
    return value.name


def _order_initialiser(graph: ir.Graph, grid: tuple[int, int, int]) -> ir.Value:
    name = ORDER_PREFIX + "x".join(map(str, grid))
    if name not in graph.initializers:
        _initialiser(graph, name, token_order(grid, torch.device("cpu")).long().numpy())
    return graph.initializers[name]


def _initialiser(graph: ir.Graph, name: str, content: np.ndarray[Any, Any]) -> ir.Value:
    tensor = ir.tensor(content, name=name)
    kind = ir.TensorType(tensor.dtype)
    value = ir.Value(name=name, type=kind, shape=ir.Shape(content.shape), const_value=tensor)
    graph.register_initializer(value)
    return value


def _remove_unused(graph: ir.Graph) -> None:
    for node in reversed(list(graph)):
        outputs = node.outputs
        if not any(v.uses() or v.is_graph_output() for v in outputs):
            graph.remove(node, safe=True)


def attach_bodies(model: ir.Model) -> None:
    """Add the function bodies that the model's nodes need, at the model's own opset."""
    used = {node.op_type for node in model.graph.all_nodes() if node.domain == DOMAIN}
    opset = model.opset_imports[""]
    every = {OP_NAME: split_function, ORDER_NAME: order_function, CONTENT_NAME: content_function}
    for name, build in every.items():
        if name in used:
            function = ir.serde.deserialize_function(build(opset))
            model.functions[function.identifier()] = function
    if used:
        model.opset_imports[DOMAIN] = OP_VERSION


def strip_metadata(model: ir.Model) -> None:
    """Remove what names source files and the exporting machine."""
    model.metadata_props.clear()
    model.doc_string = None
    for graph in (model.graph, *(f.graph for f in model.functions.values())):
        graph.metadata_props.clear()
        graph.doc_string = None
        for value in (*graph.inputs, *graph.initializers.values()):
            value.metadata_props.clear()
        for node in graph.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
