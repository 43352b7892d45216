"""Attention in operators of others: flash-attn, SageAttention, xformers, kernels of vendors.

Recognised by what the operator declares, never by an import: three tensors shaped like queries,
keys and values, and the names of its arguments. While sites are found, one that is plain attention
has a `scaled_dot_product_attention` of the same operands beside it, which is a site like any other;
where that was replaced it takes the operator's place. Any other is a site that stays dense.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx

from freqopt.passes.masks.writes import is_idle
from freqopt.passes.nodes import operation, value
from freqopt.passes.reasons import Reason
from freqopt.passes.rewrite.adding import add_function, add_method
from freqopt.passes.site import Attention
from freqopt.passes.spellings.schemas import Call, read_call

OPENED: Final = "freqopt_opaque_opened"
"""Marks an operator that has attention of the same operands beside it."""


def match_opaque(node: fx.Node) -> Attention | None:
    """An operator that is attention and was not opened, with the reason."""
    if OPENED in node.meta or node.op != "call_function":
        return None
    call = read_call(node)
    if call is None:
        return None
    objection = call.objection or outputs_problem(node)
    why = objection or Reason.OPAQUE(operation=call.name, problem="it was not opened")
    return Attention(
        node, call.query, call.key, call.value, objection=why, nodes=(node,), sizes=call.sizes
    )


def outputs_problem(node: fx.Node) -> Any:
    """Why an operator cannot be replaced for what else of its results is used; None if it can."""
    call = read_call(node)
    assert call is not None
    if not call.several:
        return None
    others = [user for user in node.users if operation(user) != "getitem" or user.args[1] != 0]
    if any(user.users and not is_idle(user) for user in others):
        return Reason.OPAQUE(operation=call.name, problem="its log-sum-exp is used too")
    return None


@contextmanager
def opaque_opened(graph: fx.Graph) -> Iterator[None]:
    """Put attention beside every operator that is plain attention, while sites are found."""
    opened: list[_Opened] = []
    for node in list(graph.nodes):
        call = read_call(node) if node.op == "call_function" else None
        if call is not None and call.objection is None and outputs_problem(node) is None:
            with graph.inserting_before(node):
                opened.append(_open(node, call))
            node.meta[OPENED] = True
    try:
        yield
    finally:
        for each in opened:
            each.node.meta.pop(OPENED)
            _settle(each)


class _Opened(NamedTuple):
    """An operator, the attention that stands beside it, and all added nodes, the result last."""

    node: fx.Node
    attention: fx.Node
    added: list[fx.Node]


def _open(node: fx.Node, call: Call) -> _Opened:
    """Attention on an operator's operands, in the operator's layout."""
    meta = {k: v for k, v in node.meta.items() if k in ("stack_trace", "nn_module_stack")}
    added: list[fx.Node] = []

    def method(name: str, source: fx.Node, *arguments: Any) -> fx.Node:
        added.append(add_method(meta, name, source, *arguments))
        return added[-1]

    def forth(source: fx.Node) -> fx.Node:
        if call.packed:
            source = method("unsqueeze", source, 0)
        return method("transpose", source, 1, 2) if call.tokens_first else source

    operands = [forth(source) for source in (call.query, call.key, call.value)]
    attention = add_function(meta, F.scaled_dot_product_attention, *operands, scale=call.scale)
    added.append(attention)
    result = method("transpose", attention, 1, 2) if call.tokens_first else attention
    if call.packed:
        result = method("squeeze", result, 0)
    # Operators return new memory in this layout, and views of it are taken for granted.
    method("contiguous", result)
    return _Opened(node, attention, added)


def _settle(opened: _Opened) -> None:
    """Keep the operator, or what has taken its place."""
    node, graph, result = opened.node, opened.node.graph, opened.added[-1]
    if not opened.attention._erased:
        for added in reversed(opened.added):
            graph.erase_node(added)
        return
    for user in list(node.users):
        if isinstance(value(node), torch.Tensor):
            break
        if user.args[1] == 0:
            user.replace_all_uses_with(result)
        _erase_with_users(user)
    if node.users:
        node.replace_all_uses_with(result)
    graph.erase_node(node)


def _erase_with_users(node: fx.Node) -> None:
    for user in list(node.users):
        _erase_with_users(user)
    node.graph.erase_node(node)
