"""Carries atoms forward through a graph: the axes of every tensor (see `dimensions`).

One rule per kind of operation. A rule may be wrong about an unusual call; every axis is therefore
checked against the tensor's real sizes, and one that does not provably fit becomes a fresh atom.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import fx

import freqopt.passes.axes.rules_math
import freqopt.passes.axes.rules_pixels
import freqopt.passes.axes.rules_ranks  # noqa: F401  these register their rules
from freqopt.passes.axes.dimensions import Shape
from freqopt.passes.axes.foreign import foreign_axes, foreign_several, is_foreign
from freqopt.passes.axes.graph_axes import Dimensions, origin_of
from freqopt.passes.axes.overwritten import note_write, read_copies
from freqopt.passes.axes.placements import note_setitem
from freqopt.passes.axes.rules import RULES, SEVERAL
from freqopt.passes.nodes import is_pointwise, operation, value

logger = logging.getLogger(__name__)

SAME_AXES = {
    "to",
    "float",
    "half",
    "bfloat16",
    "double",
    "int",
    "long",
    "bool",
    "type",
    "type_as",
    "clone",
    "contiguous",
    "detach",
    "dropout",
    "native_dropout",
    "layer_norm",
    "rms_norm",
    "group_norm",
    "batch_norm",
    "instance_norm",
    "normalize",
    "softmax",
    "log_softmax",
    "_to_copy",
    "alias",
    "cuda",
    "cpu",
    "pin_memory",
    "empty_like",
    "zeros_like",
    "ones_like",
    "full_like",
    "rand_like",
    "randn_like",
    "feature_dropout",
    "cumsum",
    "nan_to_num",
    "masked_fill_",
    "fill_",
    "zero_",
    "index_put_",
    "index_fill",
    "scatter",
    "scatter_add",
    "index_add",
    "alpha_dropout",
    "requires_grad",
}
"""Operations whose output has the axes of their first argument."""


def follow_axes(graph: fx.Graph, inputs: Sequence[Shape | None] = ()) -> Dimensions:
    """Axes of every tensor of a graph.

    inputs: axes of the placeholders, for the body of a higher-order operator.
    """
    read_copies(graph)
    dimensions, given = Dimensions(graph), iter(inputs)
    for node in graph.nodes:
        if node.op == "placeholder":
            known = next(given, None)
            fresh = dimensions.fresh(node, origin_of(node)) if known is None else known
            dimensions.axes[node] = fresh
        elif node.op == "get_attr":
            dimensions.axes[node] = dimensions.fresh(node, "parameter")
        elif node.op != "output":
            _visit(dimensions, node)
            note_write(dimensions, node)
    return dimensions


def _visit(dimensions: Dimensions, node: fx.Node) -> None:
    """Carry the axes on to what a node makes."""
    if _enter_body(dimensions, node):
        return
    if not isinstance(value(node), torch.Tensor):
        if operation(node) == "setitem":
            note_setitem(dimensions, node)
        if isinstance(value(node), (tuple, list)):
            other = foreign_several if is_foreign(node) else _unknown
            dimensions.several[node] = SEVERAL.get(operation(node), other)(dimensions, node)
        return
    name = operation(node)
    found = None
    if name in RULES:
        try:
            found = RULES[name](dimensions, node)
        except Exception as error:
            # Nothing is then known of this tensor; what else is in the graph is not lost.
            logger.warning("%s: its axes cannot be followed: %r", node.format_node(), error)
    elif name in SAME_AXES:
        found = dimensions.of(node.args[0] if node.args else next(iter(node.kwargs.values()), None))
    elif is_pointwise(name) and not is_foreign(node):
        found = dimensions.broadcast(node)
    elif is_foreign(node):
        found = foreign_axes(dimensions, node)
    dimensions.axes[node] = dimensions.checked(node, found)


def _enter_body(dimensions: Dimensions, node: fx.Node) -> bool:
    """Follow the axes into the body of a higher-order operator (activation checkpointing)."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    owner = node.graph.owning_module
    first = node.args[0]
    if first.op != "get_attr" or owner is None:
        return False
    body = getattr(owner, str(first.target), None)
    if not isinstance(body, fx.GraphModule):
        return False
    inner = follow_axes(body.graph, [dimensions.of(argument) for argument in node.args[1:]])
    dimensions.bodies[node] = (body, inner)
    returned = next(n for n in reversed(body.graph.nodes) if n.op == "output").args[0]
    if isinstance(returned, fx.Node):
        dimensions.axes[node] = dimensions.checked(node, inner.of(returned))
    else:
        assert isinstance(returned, (tuple, list))
        dimensions.several[node] = [inner.of(item) for item in returned]
    return True


def _unknown(dimensions: Dimensions, node: fx.Node) -> list[Shape | None]:
    return [None] * len(value(node))
