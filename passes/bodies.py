"""Brings values of a graph into the bodies of its higher-order operators (activation checkpoints).

A body sees what its operator hands it and nothing else. Sizes and budgets that a site in a body
needs, and the graph around it has, become further operands.
"""

from __future__ import annotations

from torch import fx


def way_into(outer: fx.Graph, graph: fx.Graph) -> list[tuple[fx.Node, fx.GraphModule]] | None:
    """The calls and bodies that lead from a graph to one inside it, the outermost first.

    Empty for the graph itself. None if there is no way, or a body on it is called more than once.
    """
    if outer is graph:
        return []
    owner = outer.owning_module
    for attribute in outer.find_nodes(op="get_attr"):
        body = getattr(owner, str(attribute.target), None)
        if not isinstance(body, fx.GraphModule):
            continue
        rest = way_into(body.graph, graph)
        if rest is None:
            continue
        calls = list(attribute.users)
        if len(calls) != 1 or not calls[0].args or calls[0].args[0] is not attribute:
            return None
        return [(calls[0], body), *rest]
    return None


def bring(node: fx.Node, graph: fx.Graph) -> fx.Node:
    """A node for the value of `node`, of a graph around `graph`, in `graph`.

    Raises:
        ValueError: there is no way, see `way_into`.
    """
    way = way_into(node.graph, graph)
    if way is None:
        raise ValueError(f"{node} is not in a graph around that of the attention")
    for call, body in way:
        node = _as_operand(node, call, body)
    return node


def outside(node: fx.Node, outer: fx.Graph) -> fx.Node:
    """What a graph hands to the body that a placeholder is of; the node itself if it is no such."""
    for call, body in reversed(way_into(outer, node.graph) or []):
        places = body.graph.find_nodes(op="placeholder")
        if node not in places:
            break
        handed = call.args[1:][places.index(node)]
        if not isinstance(handed, fx.Node):
            break
        node = handed
    return node


def _as_operand(node: fx.Node, call: fx.Node, body: fx.GraphModule) -> fx.Node:
    """The placeholder of `node` in a body, which the call is given as an operand, once."""
    places = body.graph.find_nodes(op="placeholder")
    place: fx.Node
    for operand, place in zip(call.args[1:], places, strict=True):
        if operand is node:
            return place
    with body.graph.inserting_before(next(n for n in body.graph.nodes if n.op != "placeholder")):
        place = body.graph.placeholder(f"freqopt_{node.name}")
    place.meta = {k: v for k, v in node.meta.items() if k in ("example_value", "val")}
    call.args = (*call.args, node)
    body.recompile()
    return place
