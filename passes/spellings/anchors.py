"""Where attention is in a graph: one function per spelling, each recognising it by one anchor node.

An anchor returns the attention in one form (query, key, value, mask, scale), with an objection if
this spelling computes something that split attention never can.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from freqopt.passes.nodes import constant, operation
from freqopt.passes.reasons import Reason, Why
from freqopt.passes.site import Attention
from freqopt.passes.spellings.flex import match_flex
from freqopt.passes.spellings.opaque import match_opaque
from freqopt.passes.spellings.packed import FORWARD, is_opened, packed_problem
from freqopt.passes.spellings.softmax import match_softmax

SDPA_PARAMETERS = (
    "query",
    "key",
    "value",
    "attn_mask",
    "dropout_p",
    "is_causal",
    "scale",
    "enable_gqa",
)

PACKED = {FORWARD: 3, "_native_multi_head_attention": 3, "_transformer_encoder_layer_fwd": 1}
"""Nodes that hold attention and its projections, and how many of their arguments are tokens."""


def match_sdpa(node: fx.Node) -> Attention | None:
    """`scaled_dot_product_attention`, positional or by keyword, as a function or aten operator."""
    if operation(node) != "scaled_dot_product_attention":
        return None
    given: dict[str, Any] = dict(zip(SDPA_PARAMETERS, node.args, strict=False))
    given.update(node.kwargs)
    query, key, values = (given.get(name) for name in SDPA_PARAMETERS[:3])
    if not (
        isinstance(query, fx.Node) and isinstance(key, fx.Node) and isinstance(values, fx.Node)
    ):
        return None
    mask = given.get("attn_mask")
    scale = constant(given.get("scale"))
    objection: Why | None = None
    if is_set(given.get("is_causal", False)):
        objection = Reason.CAUSAL()
    elif is_set(given.get("dropout_p", 0.0)):
        objection = Reason.DROPOUT(sign="dropout_p > 0")
    elif scale is not None and not isinstance(scale, (int, float)):
        objection = Reason.RUNTIME_SCALE()
    return Attention(
        node=node,
        query=query,
        key=key,
        value=values,
        mask=mask if isinstance(mask, fx.Node) else None,
        scale=float(scale) if isinstance(scale, (int, float)) else None,
        objection=objection,
        nodes=(node,),
    )


def is_set(item: Any) -> bool:
    """Whether a flag or a probability is, or may be at run time, other than False or 0."""
    found = constant(item)
    if isinstance(found, (bool, int, float)):
        return bool(found)
    return found is not None


def match_packed(node: fx.Node) -> Attention | None:
    """`nn.MultiheadAttention` where it was not opened (see `packed`), or cannot be."""
    name = operation(node)
    if name not in PACKED or is_opened(node) or len(node.args) < PACKED[name]:
        return None
    query, key, values = node.args[:3] if PACKED[name] == 3 else (node.args[0],) * 3
    if not (
        isinstance(query, fx.Node) and isinstance(key, fx.Node) and isinstance(values, fx.Node)
    ):
        return None
    if name == FORWARD:
        objection = packed_problem(node) or Reason.PACKED()
    else:
        objection = Reason.FAST_PATH(operation=name)
    return Attention(node, query, key, values, objection=objection, nodes=(node,))


ANCHORS: tuple[Callable[[fx.Node], Attention | None], ...] = (
    match_sdpa,
    match_packed,
    match_flex,
    match_softmax,
    match_opaque,
)


def find_attention(graph: fx.Graph) -> list[Attention]:
    """All attention of a graph, in the order of execution."""
    found: list[Attention] = []
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        for anchor in ANCHORS:
            attention = anchor(node)
            if attention is not None:
                found.append(attention)
                break
    return found
