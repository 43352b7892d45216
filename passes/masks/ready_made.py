"""How a graph makes a mask of its inputs, as a small graph that whoever runs it can ask at a call.

Where a graph does not show what a mask is of, calibration's word for it holds for the calls that it
saw. What the mask is in this call only its values tell.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx, nn

from freqopt.passes.axes.dimensions import same
from freqopt.passes.bodies import outside
from freqopt.passes.masks.masks import PASS, adds_dimensions
from freqopt.passes.masks.memory import is_written
from freqopt.passes.nodes import operation, value

MOST_NODES = 32
"""Operations from a graph's inputs to a mask; what takes more is no mask that was handed over."""


KEEPS = PASS | {"logical_not", "bitwise_not"}
"""What is done to a mask that was handed over, so that it is one of another form."""


class Program(NamedTuple):
    """What makes a mask. inputs: of the graph around, in the order of the program's own."""

    module: fx.GraphModule
    inputs: tuple[fx.Node, ...]


def comes_ready_made(mask: fx.Node) -> bool:
    """Whether a graph is handed a mask and only gives it another form or dtype."""
    node: Any = mask
    while isinstance(node, fx.Node) and not is_written(node):
        if node.op in ("placeholder", "get_attr"):
            return True
        if operation(node) not in KEEPS and not adds_dimensions(node):
            return False
        node = node.args[0] if node.args else None
    return False


def program_of(mask: fx.Node, outer: fx.Graph) -> Program | None:
    """How a mask is made of the inputs of a graph, in which or in a body of which it is.

    None where that takes more than a few operations, or something may write into it on the way.
    """
    maker = _Maker(outer)
    try:
        maker.graph.output(maker.copy(mask))
    except _UnknownError:
        return None
    return Program(fx.GraphModule(nn.Module(), maker.graph), tuple(maker.inputs))


class _UnknownError(Exception):
    """A mask that depends on more than can be asked for."""


class _Maker:
    """Copies what a mask is made of. inputs: of the graph around that it needs."""

    def __init__(self, outer: fx.Graph) -> None:
        self.outer, self.graph = outer, fx.Graph()
        self.inputs: list[fx.Node] = []
        self._made: dict[fx.Node, fx.Node] = {}
        self._places = outer.find_nodes(op="placeholder")

    def copy(self, node: fx.Node) -> Any:
        """The same in the new graph; a number where it is one."""
        node = outside(node, self.outer)
        example = value(node)
        if isinstance(example, (bool, int, float)):
            return example
        if isinstance(example, torch.SymInt):  # read from whatever tensor: an input has it too
            node = next((p for p in self._places if _is_same_number(p, example)), node)
        if node not in self._made:
            self._made[node] = self._copied(node)
        return self._made[node]

    def _copied(self, node: fx.Node) -> fx.Node:
        if is_written(node) or len(self._made) >= MOST_NODES:
            raise _UnknownError
        if node.op == "placeholder" and node.graph is self.outer:
            self.inputs.append(node)
            return self.graph.placeholder(f"given_{len(self.inputs)}")
        if node.op not in ("call_function", "call_method") or _is_random(node):
            raise _UnknownError
        args = fx.node.map_arg(node.args, self.copy)
        kwargs = fx.node.map_arg(node.kwargs, self.copy)
        return self.graph.create_node(node.op, node.target, args, kwargs)


def _is_same_number(place: fx.Node, number: torch.SymInt) -> bool:
    found = value(place)
    return isinstance(found, torch.SymInt) and same(found, number)


def _is_random(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags or operation(node).startswith(
        ("rand", "bernoulli", "dropout", "multinomial", "empty")
    )
