"""Opens `nn.MultiheadAttention`, which Dynamo leaves as one node, projections included.

`packed_opened` puts the same computation beside the node, as projections around a
`scaled_dot_product_attention` that is a site like any other, and in the end keeps the one or the
other, so that a node whose attention stays dense stays the node it was.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import fx

from freqopt.passes.masks.memory import is_written
from freqopt.passes.nodes import argument, operation, shape, tensor
from freqopt.passes.reasons import Reason, Why
from freqopt.passes.rewrite.adding import add_function, add_method
from freqopt.passes.spellings.einsums import einsums_in_order
from freqopt.passes.spellings.opaque import opaque_opened

FORWARD: Final = "multi_head_attention_forward"
OPENED: Final = "freqopt_opened"
"""On a packed node: the output of what stands beside it; on its attention: the packed node."""

PARAMETERS: Final = inspect.signature(F.multi_head_attention_forward)


def packed_arguments(node: fx.Node) -> Mapping[str, Any]:
    """Arguments of a `multi_head_attention_forward` node by name, defaults included."""
    bound = PARAMETERS.bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return bound.arguments


def is_opened(node: fx.Node) -> bool:
    """Whether a packed node's attention stands beside it."""
    return OPENED in node.meta and operation(node) == FORWARD


def packed_problem(node: fx.Node) -> Why | None:
    """Why a `multi_head_attention_forward` node cannot be opened, None if it can."""
    given = packed_arguments(node)
    if given["dropout_p"] and given["training"]:
        return Reason.DROPOUT(sign="training")
    if given["attn_mask"] is not None or given["is_causal"]:
        return Reason.PACKED_MASK()
    if given["bias_k"] is not None or given["bias_v"] is not None or given["add_zero_attn"]:
        return Reason.PACKED_KEYS()
    if given["static_k"] is not None or given["static_v"] is not None:
        return Reason.PACKED_STATIC()
    if given["key_padding_mask"] is not None and _padding(given["key_padding_mask"]) is None:
        return Reason.PACKED_PADDING()
    if len(shape(given["query"])) != 3:
        return Reason.PACKED_BATCH(shape=shape(given["query"]))
    if any(operation(u) != "getitem" or (u.args[1] != 0 and u.users) for u in node.users):
        return Reason.PACKED_WEIGHTS()
    return None


@contextmanager
def packed_opened(gm: fx.GraphModule) -> Iterator[None]:
    """Open every packed node of a graph for as long as sites are found and replaced.

    Its attention stands beside it, without users. Where that was replaced in the meantime it takes
    the node's place; elsewhere it is taken out again. As long, einsums are in order, see `einsums`,
    and attention operators of others are open, see `opaque`. Call `gm.recompile()` afterwards only.
    """
    for graph in _graphs(gm):
        for node in list(graph.nodes):
            if node.op == "call_function" and operation(node) == FORWARD:
                if packed_problem(node) is None:
                    with graph.inserting_before(node):
                        node.meta[OPENED] = _open(node)
    try:
        with ExitStack() as stack:
            for graph in _graphs(gm):
                stack.enter_context(opaque_opened(graph))
                stack.enter_context(einsums_in_order(graph))
            yield
    finally:
        for graph in _graphs(gm):
            _settle(graph)


def _settle(graph: fx.Graph) -> None:
    kept = {node.meta[OPENED] for node in graph.nodes if _is_attention(node)}
    for node in [node for node in graph.nodes if is_opened(node)]:
        result = node.meta.pop(OPENED)
        if node in kept:
            _erase(result)
            continue
        for user in list(node.users):
            user.replace_all_uses_with(result)
            graph.erase_node(user)
        graph.erase_node(node)


def _padding(mask: fx.Node) -> fx.Node | None:
    """The bool mask (B, S), True where padding is, behind a `key_padding_mask`.

    The module passes on zeros that were filled with -inf where the user's mask is True.
    """
    found = tensor(mask)
    if found is not None and found.dtype == torch.bool:
        return mask
    if (
        operation(mask) not in ("masked_fill", "masked_fill_")
        or argument(mask, 2, "value") != -math.inf
    ):
        return None
    zeros, filled = argument(mask, 0, "input"), argument(mask, 1, "mask")
    made_here = operation(zeros) in ("zeros_like", "zeros") and set(zeros.users) == {mask}
    return filled if made_here and shape(filled) == shape(mask) and not is_written(mask) else None


def _graphs(gm: fx.GraphModule) -> list[fx.Graph]:
    """The graph and the bodies of higher-order operators inside it."""
    return [m.graph for m in gm.modules() if isinstance(m, fx.GraphModule)]


def _is_attention(node: fx.Node) -> bool:
    return OPENED in node.meta and operation(node) == "scaled_dot_product_attention"


def _erase(result: fx.Node) -> None:
    """Erase a node that has no users, and what only it used."""
    pending = [result]
    while pending:
        node = pending.pop()
        if node.users or node.op in ("placeholder", "get_attr") or node._erased:
            continue
        sources = node.all_input_nodes
        node.graph.erase_node(node)
        pending += sources


def _open(node: fx.Node) -> fx.Node:
    """Projections, attention and the projection of its result, (N, B, width)."""
    given = packed_arguments(node)
    meta = {k: v for k, v in node.meta.items() if k in ("stack_trace", "nn_module_stack")}

    def method(name: str, source: fx.Node, *arguments: Any) -> fx.Node:
        return add_method(meta, name, source, *arguments)

    heads = given["num_heads"]
    operands = []
    for source, weight, bias in zip(
        (given["query"], given["key"], given["value"]), *_projections(given, meta), strict=True
    ):
        projected = add_function(meta, F.linear, source, weight, bias)
        split = method("unflatten", projected, 2, (heads, -1))
        operands.append(method("permute", split, 1, 2, 0, 3))
    mask = None
    if given["key_padding_mask"] is not None:
        padding = _padding(given["key_padding_mask"])
        assert padding is not None
        mask = method("logical_not", padding)
        mask = method("unsqueeze", method("unsqueeze", mask, 1), 1)
    attention = add_function(meta, F.scaled_dot_product_attention, *operands, attn_mask=mask)
    attention.meta[OPENED] = node
    joined = method("flatten", method("permute", attention, 2, 0, 1, 3), 2)
    weight, bias = given["out_proj_weight"], given["out_proj_bias"]
    return add_function(meta, F.linear, joined, weight, bias)


def _projections(
    given: Mapping[str, Any], meta: Mapping[str, Any]
) -> tuple[list[fx.Node], list[fx.Node | None]]:
    """Weights and biases of queries, keys and values, of one packed tensor or one each."""
    names, bias = ("q_proj_weight", "k_proj_weight", "v_proj_weight"), given["in_proj_bias"]
    if given["use_separate_proj_weight"]:
        weights = [given[name] for name in names]
    else:
        weights = _thirds(given["in_proj_weight"], meta)
    return weights, [None] * 3 if bias is None else [*_thirds(bias, meta)]


def _thirds(packed: fx.Node, meta: Mapping[str, Any]) -> list[fx.Node]:
    chunks = add_method(meta, "chunk", packed, 3)
    return [add_function(meta, operator.getitem, chunks, i) for i in range(3)]
