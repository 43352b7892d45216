"""FlexAttention: a site like any other where its score function and block mask do nothing.

Both are bodies of code of their own; that they do nothing has to follow from these.
"""

from __future__ import annotations

from typing import Any, Final

from torch import fx

from freqopt.passes.axes.dimensions import at_most
from freqopt.passes.nodes import constant, operation, shape
from freqopt.passes.reasons import Reason, Why
from freqopt.passes.site import Attention, Extent

NAMES: Final = ("flex_attention", "flex_attention_hop")


def match_flex(node: fx.Node) -> Attention | None:
    """A `flex_attention` node, with an objection unless it is plain attention.

    Its arguments: query (B, H, N, D), key and value (B, Hkv, M, D), a score function, the parts of
    a block mask, the scale. Its outputs: the attention's, logsumexp, largest scores.
    """
    if operation(node) not in NAMES or len(node.args) < 6:
        return None
    query, key, values, score, block_mask, scale = node.args[:6]
    if not (
        isinstance(query, fx.Node) and isinstance(key, fx.Node) and isinstance(values, fx.Node)
    ):
        return None
    scale = constant(scale)
    outputs = [user for user in node.users if operation(user) == "getitem"]
    first = next((user for user in outputs if user.args[1] == 0), None)
    unused = [user for user in outputs if user is not first and not user.users]
    objection: Why | None = None
    if first is None or len(unused) + 1 < len(node.users):
        objection = Reason.FLEX_OUTPUTS()
    elif not _keeps_scores(_body(node, score)):
        objection = Reason.FLEX_SCORES()
    elif not _hides_nothing(node, block_mask, shape(query)[-2], shape(key)[-2]):
        objection = Reason.FLEX_BLOCKS()
    elif not isinstance(scale, (int, float)):
        objection = Reason.RUNTIME_SCALE()
    return Attention(
        node=node if first is None else first,
        query=query,
        key=key,
        value=values,
        scale=float(scale) if isinstance(scale, (int, float)) else None,
        objection=objection,
        nodes=(node, *unused, *([first] if first is not None else [])),
    )


def _body(node: fx.Node, function: Any) -> fx.Graph | None:
    """The graph of a function that a higher-order operator was given."""
    owner = node.graph.owning_module
    if not isinstance(function, fx.Node) or function.op != "get_attr" or owner is None:
        return None
    body = getattr(owner, str(function.target), None)
    return body.graph if isinstance(body, fx.GraphModule) else None


def _returned(graph: fx.Graph) -> Any:
    result = next(node for node in reversed(graph.nodes) if node.op == "output").args[0]
    return result[0] if isinstance(result, (tuple, list)) and len(result) == 1 else result


def _keeps_scores(graph: fx.Graph | None) -> bool:
    """Whether a score function returns the score that it was given."""
    if graph is None:
        return False
    return _returned(graph) is next((n for n in graph.nodes if n.op == "placeholder"), None)


def _hides_nothing(node: fx.Node, block_mask: Any, queries: Extent, keys: Extent) -> bool:
    """Whether a block mask is the one that FlexAttention makes where none is given.

    It has one block, larger than the sequence, and a mask function that is always true. A mask of
    several blocks lists those to attend in tensors, so that its function alone says nothing.
    """
    if not isinstance(block_mask, (tuple, list)) or len(block_mask) < 5:
        return False
    # The lengths it was made for, numbers and indices of partial blocks, ..., block sizes, function
    count, *_, query_block, key_block, function = block_mask[2:]
    one_block = at_most(queries, query_block) and at_most(keys, key_block)
    if not one_block or not isinstance(count, fx.Node) or operation(count) != "ones":
        return False
    graph = _body(node, function)
    result = None if graph is None else _returned(graph)
    return isinstance(result, fx.Node) and operation(result) in ("new_ones", "ones", "ones_like")
