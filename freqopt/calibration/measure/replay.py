"""A model's graph cut before its sites, so that what lies behind one can be run again alone.

A cut is where least is alive between two sites: in a transformer that is the hidden state between
two blocks, whatever the modules are called. What is alive there is held, and the rest of the graph
runs from it as often as wanted, with the same operations in the same order as in the whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

Values = dict[fx.Node, Any]
"""Values of nodes of a graph."""

_GIVEN = ("placeholder", "get_attr")


class Captured(BaseException):
    """Ends a call of the model where its graph would run. staged, arguments: what would run."""

    def __init__(self, staged: Staged, arguments: Sequence[Any]) -> None:
        self.staged, self.arguments = staged, list(arguments)


@dataclass
class Tape:
    """What is wanted of a call: to end it before the graph runs, or what the graph returns."""

    ends: bool
    returned: list[Any] = field(default_factory=list)


class Staged:
    """A graph with cuts. names: of the site that a node is, None of one that is none.

    usable: whether what is run from a cut is what the whole gives; None until that was tried.
    places: of the model's output tensors among what the graph returns.
    """

    def __init__(self, gm: fx.GraphModule, names: Callable[[fx.Node], str | None]) -> None:
        self.gm, self.names = gm, names
        self.usable: bool | None = None
        self.places: list[int] = []
        self._pieces: dict[tuple[int, int], _Piece] = {}

    def __call__(self, tape: Tape | None, *arguments: Any) -> Any:
        """Run the graph whole, or as far as is wanted."""
        if tape is None:
            return self.gm.forward(*arguments)
        if tape.ends:
            raise Captured(self, arguments)
        tape.returned = list(self.gm.forward(*arguments))
        return tuple(tape.returned)

    @cached_property
    def nodes(self) -> list[fx.Node]:
        """Of the graph, in order."""
        return list(self.gm.graph.nodes)

    @cached_property
    def cuts(self) -> dict[str, int]:
        """Index of the node that is the first behind the cut before each site."""
        return cuts_before(self.nodes, self.names)

    def share(self, site: str) -> float:
        """Share of the graph that lies behind the cut before a site; 1 where there is none."""
        return self.share_behind(self.cuts.get(site, 0))

    def share_behind(self, cut: int) -> float:
        """Share of the graph's sites that are behind a cut: of its time, about."""
        return sum(cut <= at for at in self.cuts.values()) / len(self.cuts)

    def piece(self, first: int, last: int) -> _Piece:
        """The part of the graph from one cut to another, or to its end."""
        if (first, last) not in self._pieces:
            self._pieces[first, last] = _Piece(self.gm, self.nodes, first, last)
        return self._pieces[first, last]

    def find_outputs(self, output: Sequence[Tensor], returned: Sequence[Any]) -> bool:
        """Find the model's output tensors among what the graph returned; whether all are there."""
        places = [next((i for i, x in enumerate(returned) if _same(x, y)), None) for y in output]
        self.places = [place for place in places if place is not None]
        return len(self.places) == len(output) > 0


class Held:
    """What is alive at a cut of a graph; goes on to later cuts, and to the end any number of times.

    spoiled: something was written into what is held; what was run before that still counts.
    """

    def __init__(self, staged: Staged, arguments: Sequence[Any]) -> None:
        self.staged, self.at = staged, 0
        inputs = [node for node in staged.nodes if node.op == "placeholder"]
        self.inputs: Values = dict(zip(inputs, arguments, strict=True))
        self.values: Values = {}
        self.spoiled = False

    def advance(self, cut: int) -> None:
        """Go on to a later cut, as the model runs at the moment."""
        if cut > self.at:
            self.values = self.staged.piece(self.at, cut).run(self.inputs, self.values)
            self.at = cut

    def finish(self) -> list[Tensor]:
        """The model's output tensors, run from here."""
        before = self._versions()
        piece = self.staged.piece(self.at, len(self.staged.nodes))
        returned = piece.end(self.inputs, self.values)
        self.spoiled = self.spoiled or before != self._versions()
        return [returned[place] for place in self.staged.places]

    def _versions(self) -> list[int]:
        leaves = pytree.tree_leaves(list(self.values.values()))
        return [x._version for x in leaves if isinstance(x, Tensor) and not x.is_inference()]


class _Piece:
    """Nodes of a graph from one to before another, as a function of what they need of the rest."""

    def __init__(self, gm: fx.GraphModule, nodes: list[fx.Node], first: int, last: int) -> None:
        body = [node for node in nodes[first:last] if node.op not in _GIVEN]
        own, place = set(body), {node: i for i, node in enumerate(nodes)}
        used = dict.fromkeys(node for each in body for node in each.all_input_nodes)
        outside = [node for node in used if node not in own]
        self.needed = [node for node in outside if node.op != "get_attr"]
        alive = [n for n in nodes[:last] if n.op not in _GIVEN and _last_use(n, place) >= last]
        self.passed = [node for node in alive if node not in own]
        self.made = [node for node in alive if node in own]
        graph = fx.Graph()
        copies = {node: graph.placeholder(node.name) for node in self.needed}
        for node in (*(n for n in outside if n.op == "get_attr"), *body):
            copies[node] = graph.node_copy(node, lambda n: copies[n])
        if last < len(nodes):
            graph.output(tuple(copies[node] for node in self.made))
        self.call = fx.GraphModule(gm, graph).forward

    def run(self, inputs: Values, values: Values) -> Values:
        """Values that are alive behind it."""
        made = self.call(*self._arguments(inputs, values))
        kept = {node: values[node] for node in self.passed}
        return {**kept, **dict(zip(self.made, made, strict=True))}

    def end(self, inputs: Values, values: Values) -> Sequence[Any]:
        """What the graph returns, of a piece that goes to its end."""
        found: Sequence[Any] = self.call(*self._arguments(inputs, values))
        return found

    def _arguments(self, inputs: Values, values: Values) -> list[Any]:
        return [inputs[node] if node in inputs else values[node] for node in self.needed]


def cuts_before(nodes: Sequence[fx.Node], names: Callable[[fx.Node], str | None]) -> dict[str, int]:
    """Before each site, where least is alive since the site before it; none where that is unknown.

    Inside a context, such as autocast, nothing is cut, as it would not be entered again.
    """
    alive = _bytes_alive(nodes)
    found: dict[str, int] = {}
    start = next((i for i, node in enumerate(nodes) if node.op not in _GIVEN), 0)
    for at, node in enumerate(nodes):
        name = names(node)
        if name is None:
            continue
        best = min(range(start, at + 1), key=lambda i: (alive[i], -i))
        if name not in found and math.isfinite(alive[best]):
            found[name] = best
        start = at + 1
    return found


def _bytes_alive(nodes: Sequence[fx.Node]) -> list[float]:
    """Bytes of the values that a cut before each node has to hold; infinite where none may be."""
    place = {node: i for i, node in enumerate(nodes)}
    ending: dict[int, float] = {}
    alive, depth, found = 0.0, 0, []
    unknown: list[int] = []
    for at, node in enumerate(nodes):
        alive -= ending.pop(at, 0.0)
        unknown = [last for last in unknown if last >= at]
        found.append(math.inf if depth or unknown else alive)
        if node.op in (*_GIVEN, "output"):
            continue
        target = getattr(node.target, "__name__", "")
        depth += target.startswith("_enter_") - target.startswith("_exit_")
        last = _last_use(node, place)
        if last <= at:
            continue
        size = _bytes_of(node)
        if size is None:
            unknown.append(last)
        else:
            alive += size
            ending[last + 1] = ending.get(last + 1, 0.0) + size
    return found


def _last_use(node: fx.Node, place: dict[fx.Node, int]) -> int:
    return max((place[user] for user in node.users), default=-1)


def _bytes_of(node: fx.Node) -> float | None:
    """Bytes of the tensors that a node gives; None where that is not known."""
    if "example_value" not in node.meta:
        return None
    leaves = pytree.tree_leaves(node.meta["example_value"])
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    sizes = [x.numel() for x in tensors]
    if not all(isinstance(size, int) for size in sizes):
        return None
    return float(sum(n * x.element_size() for n, x in zip(sizes, tensors, strict=True)))


def _same(x: Any, y: Tensor) -> bool:
    return x is y or (
        isinstance(x, Tensor)
        and x.data_ptr() == y.data_ptr() != 0
        and (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)
    )
