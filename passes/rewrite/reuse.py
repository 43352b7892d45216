"""Lets one order serve several calls: a graph that hands orders out, and one that is given them.

A graph has one path, so whether an order is made is decided between two graphs, by whoever calls
them. Neither keeps anything.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import fx

from freqopt.passes.nodes import value

CHUNKS, LARGEST_CHUNK, KEY_ORDER, QUERY_ORDER, QUERY_LAYOUT = 11, 12, 13, 14, 15
"""Arguments of the op that say how its tokens are ordered."""

MADE_KEY_ORDER, MADE_QUERY_ORDER = 6, 7
"""Results of the op that are the orders it made."""


class Reusing(NamedTuple):
    """Two graphs that do the same.

    making: makes orders, and returns them after its other results. given: takes them after its
    other inputs. examples: of the orders. chunks: inputs that say which heads have which orders.
    sized: inputs that say how many tokens there are.
    """

    making: fx.GraphModule
    given: fx.GraphModule
    examples: list[Any]
    chunks: tuple[int, ...]
    sized: tuple[int, ...]


def reusing(gm: fx.GraphModule) -> Reusing | None:
    """Both graphs of one that makes orders by content, the first of them `gm`; None if none can.

    Orders inside a subgraph of `gm`, or on grids that are read at every call, are made in both.
    """
    (output,) = gm.graph.find_nodes(op="output")
    op = torch.ops.freqopt.split_attention.default
    calls = [n for n in gm.graph.find_nodes(op="call_function", target=op) if _makes_orders(n)]
    if not calls or not isinstance(output.args[0], (tuple, list)):
        return None
    given, nodes = copied(gm)
    places = gm.graph.find_nodes(op="placeholder")
    first = next(node for node in given.graph.nodes if node.op != "placeholder")
    handed: list[fx.Node] = []
    examples: list[Any] = []
    for call in calls:
        arguments = [*call.args, *[None] * (QUERY_LAYOUT + 1 - len(call.args))]
        wanted = {KEY_ORDER: MADE_KEY_ORDER}
        if arguments[QUERY_LAYOUT] is not None:
            wanted[QUERY_ORDER] = MADE_QUERY_ORDER
        taking: list[Any] = list(nodes[call].args) + [None] * (len(arguments) - len(call.args))
        taking[CHUNKS], taking[LARGEST_CHUNK] = None, 0
        for argument, result in wanted.items():
            with gm.graph.inserting_before(output):
                handed.append(gm.graph.call_function(operator.getitem, (call, result)))
            with given.graph.inserting_before(first):
                taking[argument] = given.graph.placeholder(f"freqopt_order_{len(examples)}")
            taking[argument]._dynamo_source = None  # AOTAutograd asks for it: none of Dynamo's
            examples.append(value(call)[result])
            taking[argument].meta["example_value"] = examples[-1]
        nodes[call].args = tuple(taking)
    output.args = ((*output.args[0], *handed),)
    origins = (_origin(call.args[CHUNKS]) for call in calls)
    chunks = tuple(dict.fromkeys(places.index(node) for node in origins if node in places))
    for graph in (gm, given):
        graph.graph.lint()
        graph.recompile()
    symbols = set().union(*map(_symbols, examples))
    sized = tuple(i for i, node in enumerate(places) if _symbols(value(node)) & symbols)
    return Reusing(gm, given, examples, chunks, sized)


def _symbols(example: Any) -> set[Any]:
    """Symbols in the sizes of an example tensor, or in an example size."""
    sizes = example.shape if isinstance(example, torch.Tensor) else (example,)
    free = (size.node.expr.free_symbols for size in sizes if isinstance(size, torch.SymInt))
    return set().union(*free)


def copied(gm: fx.GraphModule) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """A graph module that computes the same on the same buffers, and the copies of its nodes.

    With what AOTAutograd wants to know of Dynamo's graphs.
    """
    graph = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(gm.graph, nodes))
    graph.output_node().meta = dict(gm.graph.output_node().meta)
    for node in gm.graph.find_nodes(op="placeholder"):  # AOTAutograd wants to know of each
        nodes[node]._dynamo_source = getattr(node, "_dynamo_source", None)
    made = fx.GraphModule(gm, graph)
    made.meta = dict(gm.meta)
    for name in ("_param_name_to_source", "compile_subgraph_reason"):
        if hasattr(gm, name):
            setattr(made, name, getattr(gm, name))
    return made, nodes


def _makes_orders(call: fx.Node) -> bool:
    given = [*call.args, *[None] * (QUERY_LAYOUT + 1 - len(call.args))]
    return bool(given[LARGEST_CHUNK]) and given[CHUNKS] is not None and given[KEY_ORDER] is None


def _origin(node: Any) -> Any:
    """What a node is made of by selecting and casting alone."""
    while isinstance(node, fx.Node) and node.op not in ("placeholder", "get_attr"):
        node = node.args[0]
    return node
