"""What queries and keys were computed from, and whether the two are the same tokens.

The first answer comes from the token axes (see `dimensions`). Where those are lost in an operation
nobody knows, the inputs of the projections behind q and k are compared, in-place writes included.
"""

from __future__ import annotations

import networkx as nx
import torch
from torch import fx

from freqopt.passes.axes.dimensions import Atom, Axis, atoms_of, same
from freqopt.passes.masks.memory import is_written
from freqopt.passes.masks.writes import written_by
from freqopt.passes.nodes import VIEWS, operation, tensor
from freqopt.passes.site import Kind

PROJECTIONS = {"linear", "addmm", "conv1d", "conv2d", "conv3d"}
CASTS = {"to", "float", "half", "bfloat16", "type_as", "_to_copy", "dropout"}
PRODUCTS = {"matmul", "mm", "bmm", "einsum"}


def alike(first: Axis, second: Axis) -> bool:
    """Whether two axes are the same tokens in the same order."""
    return len(first) == len(second) and all(
        len(a) == len(b) and all(same_atom(x, y) for x, y in zip(a, b, strict=True))
        for a, b in zip(first, second, strict=True)
    )


def same_atom(a: Atom | None, b: Atom | None) -> bool:
    """Whether two atoms are the same extent of the same input, however they were reached."""
    if a is b:
        return True
    if a is None or b is None or a.root != b.root or a.origin != b.origin or a.order != b.order:
        return False
    if not same(a.size, b.size) or a.part != b.part or a.parts != b.parts:
        return False
    if a.bundle is not None or b.bundle is not None:
        if a.bundle is None or b.bundle is None or len(a.bundle) != len(b.bundle):
            return False
        if not all(alike(x, y) for x, y in zip(a.bundle, b.bundle, strict=True)):
            return False
    if a.cut is not None or b.cut is not None:
        if a.cut is None or b.cut is None:
            return False
        if not alike((a.cut[0],), (b.cut[0],)) or not same(a.cut[1], b.cut[1]):
            return False
    return same_atom(a.parent, b.parent)


def place_in(query: Axis, key: Axis) -> int | None:
    """The segment of `key` where the segments of `query` begin; None if they are not there once."""
    extra = len(key) - len(query)
    if extra < 1 or not query:
        return None
    found = [i for i in range(extra + 1) if alike(query, key[i : i + len(query)])]
    return found[0] if len(found) == 1 else None


def same_lattices(first: Axis, second: Axis) -> bool:
    """Whether two axes agree in all segments of several atoms; others (text) need not."""
    return len(first) == len(second) and all(
        (len(a) < 2 and len(b) < 2) or alike((a,), (b,)) for a, b in zip(first, second, strict=True)
    )


def is_lost(axis: Axis) -> bool:
    """Whether an axis begins in the middle of the graph, so that it tells nothing."""
    return any(atom.origin == "made" for atom in atoms_of(axis))


def kind_of_axes(query: Axis, key: Axis) -> Kind:
    """Kind of an attention from its token axes (neither of them lost)."""
    if alike(query, key):
        return "joint" if len(query) > 1 else "self"
    inputs = [{atom.root[0] for atom in atoms_of(axis)} for axis in (query, key)]
    return "other" if inputs[0] & inputs[1] else "cross"


class Provenance:
    """Answers which projection inputs a tensor was computed from."""

    def __init__(self, graph: fx.Graph) -> None:
        self.edges: nx.DiGraph[fx.Node] = nx.DiGraph()
        order = {node: i for i, node in enumerate(graph.nodes)}
        base: dict[fx.Node, fx.Node] = {}
        last_write: dict[fx.Node, fx.Node] = {}
        for node in graph.nodes:
            self.edges.add_node(node)
            if node.op in ("placeholder", "get_attr", "output"):
                continue
            for source in node.all_input_nodes:
                if tensor(source) is None and not _makes_tensors(source):
                    continue
                gone = operation(node) == "copy_" and source is node.args[0]
                if not is_projection(node) and not gone:
                    self.edges.add_edge(source, node)
                    written = last_write.get(base.get(source, source))
                    if written is not None and order[written] < order[node]:
                        self.edges.add_edge(written, node)
            first = node.args[0] if node.args else None
            if isinstance(first, fx.Node) and operation(node) in VIEWS:
                base[node] = base.get(first, first)
            for written in written_by(node):
                base[node] = base.get(written, written)
                last_write[base[node]] = node

    def projection_inputs(self, node: fx.Node) -> frozenset[fx.Node]:
        """Inputs of the projections that a query or key was computed from.

        Parameters count for nothing. Of projections of projections, as adapters are, the first
        one's counts: rows stay rows.
        """
        reached = {node, *nx.ancestors(self.edges, node)}
        result: set[fx.Node] = set()
        for found in reached:
            if is_projection(found):
                source = found.args[0] if found.args else found.kwargs.get("input")
                if isinstance(source, fx.Node):
                    result.add(_projected(source))
        return frozenset(result)

    def kind(self, query: fx.Node, key: fx.Node) -> Kind:
        """Kind of an attention by what its query and key were computed from."""
        first, second = self.projection_inputs(query), self.projection_inputs(key)
        if first and first == second:
            return "self" if len(first) == 1 else "joint"
        return "other" if first & second or not (first and second) else "cross"


def _projected(node: fx.Node) -> fx.Node:
    """What a tensor is projected from, or is another dtype of; the tensor itself otherwise."""
    while (_keeps_rows(node) or operation(node) in CASTS) and not is_written(node):
        source = node.args[0] if node.args else node.kwargs.get("input")
        if not isinstance(source, fx.Node):
            break
        node = source
    return node


def _keeps_rows(node: fx.Node) -> bool:
    return is_projection(node) and not operation(node).startswith("conv")


def is_projection(node: fx.Node) -> bool:
    """Whether a node multiplies data with a weight."""
    name = operation(node)
    if name in PROJECTIONS:
        return True
    return name in PRODUCTS and any(_is_weight(source) for source in node.all_input_nodes)


def _is_weight(node: fx.Node) -> bool:
    found = tensor(node)
    if node.op not in ("placeholder", "get_attr") or found is None:
        return False
    return isinstance(found, torch.nn.Parameter) or (found.dim() == 2 and node.op == "get_attr")


def _makes_tensors(node: fx.Node) -> bool:
    found = node.meta.get("example_value", node.meta.get("val"))
    return isinstance(found, (tuple, list))


def split_batch(batch: Axis, tokens: Axis) -> list[Atom]:
    """Atoms of a batch axis that are axes of the video: attention within frames, or windows.

    The first axis of an input is its batch, and the second where tokens come first, (N, B, C): all
    of the first axis are then in the sequence, and none of another one of that input.
    """
    wide = [a for a in atoms_of(batch) if a.origin == "data" and not same(a.size, 1)]
    split = [atom for atom in wide if atom.root[1] != 0]
    first = all(atom.root[1] == 1 and _comes_first(atom.root[0], tokens) for atom in wide)
    return [] if first else split


def _comes_first(name: str, tokens: Axis) -> bool:
    """Whether the tokens that are of an input are whole first axes of it."""
    own = [atom for atom in atoms_of(tokens) if atom.root[0] == name]
    return bool(own) and all(atom.root[1] == 0 and atom.parent is None for atom in own)
