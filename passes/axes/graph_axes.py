"""What is known about the axes of every tensor of a graph (see `dimensions`); no rules are here.

Every axis is checked against the tensor's real sizes, and one that does not provably fit becomes a
fresh atom, which tells nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from freqopt.passes.axes.dimensions import (
    Atom,
    Axis,
    Origin,
    Segment,
    Shape,
    axis_size,
    rank,
    same,
)
from freqopt.passes.axes.provenance import Provenance
from freqopt.passes.nodes import shape, value


class Dimensions:
    """Axes of the tensors of a graph, as far as `propagate` has come.

    several: of nodes that make several tensors. bodies: of higher-order operators, entered.
    positions: lattices of the tables of positions that packed tokens meet. placed: pieces that were
    written into a tensor by index: their tokens, themselves, and the index. dealt: what processes
    share out among them: the atom that ranks took the place of, and the collective that did it.
    collectives: nodes after which processes have other parts than before. filled: tensors in whose
    memory collectives put something that is not followed.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.axes: dict[fx.Node, Shape] = {}
        self.several: dict[fx.Node, list[Shape | None]] = {}
        self.bodies: dict[fx.Node, tuple[fx.GraphModule, Dimensions]] = {}
        self.positions: dict[Atom, list[Segment]] = {}
        self.placed: dict[fx.Node, tuple[tuple[Axis, fx.Node, fx.Node], ...]] = {}
        self.dealt: list[tuple[Atom, fx.Node]] = []
        self.collectives: set[fx.Node] = set()
        self.filled: set[fx.Node] = set()
        self.graph = graph
        self.arrival = {node.name: i for i, node in enumerate(graph.find_nodes(op="placeholder"))}
        self._provenance: Provenance | None = None

    def of(self, node: Any) -> Shape | None:
        """Axes of the tensor that a node makes."""
        return self.axes.get(node) if isinstance(node, fx.Node) else None

    def provenance(self) -> Provenance:
        """What tensors were computed from; made when it is first asked for."""
        if self._provenance is None:
            self._provenance = Provenance(self.graph)
        return self._provenance

    def checked(self, node: fx.Node, axes: Sequence[Axis | None] | None) -> Shape:
        """The axes, with a fresh atom for each dimension that they do not provably fit."""
        sizes = shape(node)
        if axes is None or len(axes) != len(sizes):
            return self.fresh(node, "made")
        return tuple(
            axis if axis is not None and same(axis_size(axis), size) else self.new_axis(node, dim)
            for dim, (axis, size) in enumerate(zip(axes, sizes, strict=True))
        )

    def fresh(self, node: fx.Node, origin: Origin) -> Shape:
        """Axes of one new atom each."""
        return tuple(self.new_axis(node, dim, origin) for dim in range(len(shape(node))))

    def new_axis(self, node: fx.Node, dim: int, origin: Origin = "made") -> Axis:
        """An axis of one new atom."""
        return ((Atom(shape(node)[dim], origin, (node.name, dim), node, dim),),)

    def broadcast(self, node: fx.Node) -> list[Axis | None]:
        """Axes of an elementwise operation: per dimension, the operand that tells most.

        Of axes that tell as much, that of the tensor with more axes of data before its channels
        (tokens have all those of a video, a time step per frame only one), then that of the input
        which came first: tokens are projected before the tables of positions that are multiplied
        with them come in. Heads and channels of such a table are no axes of data, though they came
        with the call: those of the tokens beside them were made in the graph.
        """
        rank_out = len(shape(node))
        result: list[Axis | None] = [None] * rank_out
        believed = [((0, 0, 0), 0, 0)] * rank_out
        made = self._made(node.all_input_nodes)
        for operand in node.all_input_nodes:
            axes, sizes = self.of(operand), shape(operand)
            if axes is None:
                continue
            count = len(axes)
            whole = data_extents(axes[d] for d in range(count - 1) if count - d not in made)
            for back in range(1, min(rank_out, len(axes)) + 1):
                axis, known, out = axes[-back], result[-back], shape(node)[-back]
                if axis is known or (same(sizes[-back], 1) and not same(out, 1)):
                    continue
                if known is not None:
                    self._note_positions(axis, known)
                told = rank(axis), whole, -self._arrival(axis)
                if known is None or told > believed[-back]:
                    result[-back], believed[-back] = axis, told
        return result

    def _made(self, operands: Sequence[fx.Node]) -> set[int]:
        """Dimensions, counted from the back, which one of some operands has, but not from data."""
        return {
            back
            for operand in operands
            for back, axis in enumerate(reversed(self.of(operand) or ()), 1)
            if not data_extents((axis,)) and not same(axis_size(axis), 1)
        }

    def _note_positions(self, first: Axis, second: Axis) -> None:
        """Remember the lattice of a table of positions that packed tokens meet element by element.

        Rotary tables made in the graph from three ranges tell how tokens lie that came in one axis.
        """
        if len(first) != len(second):
            return
        for a, b in zip(first, second, strict=True):
            for tokens, table in ((a, b), (b, a)):
                if len(tokens) == 1 and tokens[0].origin == "data" and is_table(table):
                    if same(tokens[0].size, axis_size((table,))):
                        self.positions.setdefault(tokens[0], []).append(table)

    def _arrival(self, axis: Axis) -> int:
        names = [atom.root[0] for segment in axis for atom in segment if atom.origin == "data"]
        return min((self.arrival.get(name, 0) for name in names), default=0)


def data_extents(axes: Iterable[Axis]) -> int:
    """How many dimensions of inputs these axes are made of."""
    return len({a.root for axis in axes for segment in axis for a in segment if a.origin == "data"})


def is_table(segment: Segment) -> bool:
    """Whether a segment is a lattice of three axes, none of which came with the data."""
    return len(segment) == 3 and all(a.origin != "data" and a.parent is None for a in segment)


def origin_of(node: fx.Node) -> Origin:
    """Whether a graph input is kept with a module (weights, tables), or data of this call."""
    found = value(node)
    if isinstance(found, torch.nn.Parameter):
        return "parameter"
    argument_of_graph = node.meta.get("grapharg")
    source = getattr(argument_of_graph, "source", None)
    guard = getattr(source, "guard_source", None)
    if "NN_MODULE" in getattr(guard() if callable(guard) else guard, "name", ""):
        return "parameter"
    while source is not None:
        if "ParamBuffer" in type(source).__name__:
            return "parameter"
        source = getattr(source, "base", None)
    name = str(node.target)
    if "_parameters_" in name or "_buffers_" in name or name.startswith(("p_", "b_", "c_")):
        return "parameter"
    return "data"
