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
from operator import attrgetter
from typing import Any

from torch import Tensor, fx
from torch.fx.node import map_arg
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
    """What is wanted of a call: to end it before the graph runs, or what the graph returns.

    graphs: that ran in the call.
    """

    ends: bool
    returned: list[Any] = field(default_factory=list)
    graphs: int = 0


class Staged:
    """A graph with cuts. names: of the site that a node is, None of one that is none.

    usable: whether what is run from a cut is what the whole gives; None until that was tried.
    places: of the model's output tensors among what the graph returns.
    """

    def __init__(self, gm: fx.GraphModule, names: Callable[[fx.Node], str | None]) -> None:
        self.gm, self.names = gm, names
        self.usable: bool | None = None
        self.places: list[int] = []

    def __call__(self, tape: Tape | None, *arguments: Any) -> Any:
        """Run the graph whole, or as far as is wanted."""
        if tape is None:
            return self.gm.forward(*arguments)
        if tape.ends:
            raise Captured(self, arguments)
        tape.graphs += 1
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

    @cached_property
    def dying(self) -> list[list[fx.Node]]:
        """Of each node those whose values it is the last to use."""
        place = {node: i for i, node in enumerate(self.nodes)}
        found: list[list[fx.Node]] = [[] for _ in self.nodes]
        for node in self.nodes:
            last = _last_use(node, place)
            if node.op not in _GIVEN and last >= 0:
                found[last].append(node)
        return found

    def run(self, values: Values, first: int, last: int) -> Any:
        """Run the nodes from one to before another; what the last of them gives.

        values: of all that they use, to which theirs are added; those used no more are taken out.
        """
        result: Any = None
        for at in range(first, last):
            node = self.nodes[at]
            if node.op == "placeholder":
                continue
            result = values[node] = self._value(node, values)
            for dead in self.dying[at]:
                values.pop(dead, None)
            if not node.users:
                del values[node]
        return result

    def _value(self, node: fx.Node, values: Values) -> Any:
        args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
        if node.op == "call_function":
            assert callable(node.target)
            return node.target(*args, **kwargs)
        if node.op == "output":
            return args[0]
        assert isinstance(node.target, str)
        if node.op == "call_method":
            return getattr(args[0], node.target)(*args[1:], **kwargs)
        found = attrgetter(node.target)(self.gm)
        return found if node.op == "get_attr" else found(*args, **kwargs)

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
        if cut <= self.at:
            return
        values = self.inputs | self.values
        self.values = {}
        self.staged.run(values, self.at, cut)
        self.values = {n: x for n, x in values.items() if n not in self.inputs}
        self.at = cut

    def finish(self) -> list[Tensor]:
        """The model's output tensors, run from here."""
        before = self._versions()
        values = self.inputs | self.values
        returned = self.staged.run(values, self.at, len(self.staged.nodes))
        self.spoiled = self.spoiled or before != self._versions()
        return [returned[place] for place in self.staged.places]

    def _versions(self) -> list[int]:
        leaves = pytree.tree_leaves(list(self.values.values()))
        return [x._version for x in leaves if isinstance(x, Tensor) and not x.is_inference()]


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
