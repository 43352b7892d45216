"""Reads from the data of a call's inputs what no graph can show: positions, such as img_ids.

The numbers become int inputs of the graph, so that one graph serves landscape and portrait, and any
number of resolutions. What tensors hold is read once, not at every call that is given them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar
from weakref import ref

import torch
from torch import fx

from freqopt.capture.call_shapes import told_by_shapes
from freqopt.errors import SiteError
from freqopt.passes.axes.layout import readable_input
from freqopt.passes.axes.told import Told
from freqopt.passes.masks.memory import is_written
from freqopt.passes.nodes import operation, shape, tensor
from freqopt.passes.site import Argument, Extent, Value
from freqopt.positions import Layout, layout_of_positions

logger = logging.getLogger(__name__)

NUMBERS = ("before", "t", "h", "w")

Read = TypeVar("Read")


class OneCall:
    """What the inputs of a graph tell about the one call that it was captured for, as constants."""

    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        self.gm = gm
        self.inputs = gm.graph.find_nodes(op="placeholder")
        self.examples = list(example_inputs)
        self.told = [self._told(table) for table in tables_of(self.inputs, example_inputs)]
        self.told += told_by_shapes(self.inputs)

    def _told(self, table: Table) -> Told:
        layout = table.layout
        return Told(
            self.inputs[table.place],
            table.name,
            table.rows,
            *layout,
            arguments=(layout.before, *layout.grid),
        )

    def order_of(self, indices: tuple[fx.Node, ...]) -> Argument | None:
        """1 if tokens put in their places by these indices lie in the order of writing."""
        return None if self._places(indices) is None else 1

    def _places(self, indices: tuple[fx.Node, ...]) -> tuple[int, ...] | None:
        """The inputs that indices are, if these go one after the other through all places."""
        known = {node: i for i, node in enumerate(self.inputs)}
        sources = [_unconverted(node) for node in indices]
        if any(source not in known for source in sources):
            return None
        places = tuple(known[source] for source in sources)
        held = [self.examples[i] for i in places]
        if any(not isinstance(t, torch.Tensor) or _is_fake(t) for t in held):
            return None
        return places if goes_through(held) else None


class CallGrids(OneCall):
    """What the inputs of a graph tell at every call.

    Makes int inputs for it, takes back those that no site uses (`settle`), and gives the others
    their numbers at every call (`reading`). gm: the graph to go on with, which is a copy where it
    may get inputs: its maker counts on the inputs of the one that it made. numbers: examples of
    the int inputs in use. strict: a later call that tells nothing is an error.
    """

    def __init__(
        self, gm: fx.GraphModule, example_inputs: Sequence[Any], *, strict: bool = False
    ) -> None:
        self.strict = strict
        self._made: list[tuple[tuple[int, ...], str, list[fx.Node]]] = []
        self._orders: dict[tuple[fx.Node, ...], Argument | None] = {}
        self.numbers: list[Any] = []
        super().__init__(copied(gm) if _may_tell(gm, example_inputs) else gm, example_inputs)

    def _told(self, table: Table) -> Told:
        node, layout = self.inputs[table.place], table.layout
        made = self._make_inputs(
            node, dict(zip(NUMBERS, (layout.before, *layout.grid), strict=True))
        )
        self._made.append(((table.place,), table.name, made))
        first, second, third, fourth = (Value(place) for place in made)
        arguments = (first, second, third, fourth)
        return Told(node, table.name, table.rows, *layout, arguments=arguments)

    def order_of(self, indices: tuple[fx.Node, ...]) -> Argument | None:
        """An input that is 1 at calls where the indices go one after the other, and 0 at others."""
        if indices not in self._orders:
            places = self._places(indices)
            if places is None:
                self._orders[indices] = None
            else:
                node = self.inputs[places[0]]
                made = self._make_inputs(node, {"in_order": 1})
                names = ", ".join(readable_input(self.inputs[i].name) for i in places)
                self._made.append((places, names, made))
                self._orders[indices] = Value(made[0])
        return self._orders[indices]

    def _make_inputs(self, source: fx.Node, numbers: Mapping[str, int]) -> list[fx.Node]:
        """Int inputs of the graph for what one of its inputs tells."""
        return int_inputs(self.gm, [source], source.name, numbers)

    def settle(self) -> None:
        """Take int inputs that nothing uses out of the graph."""
        used = []
        for made in self._made:
            if any(place.users for place in made[2]):
                used.append(made)
                self.numbers += [place.meta["example_value"] for place in made[2]]
                continue
            for place in made[2]:
                self.gm.graph.erase_node(place)
        if self._made:
            self.gm.recompile()
        self._made = used

    def reading(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """`compiled`, given the numbers of each call after the inputs of the graph."""
        if not self._made:
            return compiled
        order = {node.name: i for i, node in enumerate(self.gm.graph.find_nodes(op="placeholder"))}
        made = sorted(self._made, key=lambda each: order[each[2][0].name])
        readers = [
            (places, Reader(name, len(nodes), strict=self.strict)) for places, name, nodes in made
        ]

        def run(*arguments: Any) -> Any:
            numbers = [
                number
                for places, reader in readers
                for number in reader.read([arguments[i] for i in places])
            ]
            return compiled(*arguments, *numbers)

        return run


def int_inputs(
    gm: fx.GraphModule, inputs: Sequence[fx.Node], label: str, numbers: Mapping[str, int]
) -> list[fx.Node]:
    """New int inputs of a graph, behind the others; none where its sizes cannot be symbols.

    inputs: of the graph, whose example values tell. numbers: by name, those of this call.
    """
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    modes = (getattr(tensor(node), "fake_mode", None) for node in inputs)
    shape_env = next((mode.shape_env for mode in modes if mode is not None), None)
    if shape_env is None:
        return []
    graph, made = gm.graph, []
    for name, number in numbers.items():
        with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
            place = graph.placeholder(f"freqopt_{label}_{name}")
        origin = ConstantSource(place.name)
        symbol = shape_env.create_unspecified_symbol(
            number, source=origin, dynamic_dim=DimDynamic.DYNAMIC
        )
        example = shape_env.create_symintnode(symbol, hint=number, source=origin)
        place.meta["example_value"] = example
        place._dynamo_source = origin
        made.append(place)
    return made


class Table(NamedTuple):
    """An input that holds positions: its place and name, number of tokens, and what they tell."""

    place: int
    name: str
    rows: Extent
    layout: Layout


def tables_of(inputs: Sequence[fx.Node], example_inputs: Sequence[Any]) -> list[Table]:
    """The inputs of a graph that hold positions of a grid."""
    found = []
    for index, (node, example) in enumerate(zip(inputs, example_inputs, strict=False)):
        if not _is_data(node, example) or example.dim() not in (2, 3, 4):
            continue
        layout = layout_of_positions(example)
        if layout is not None:
            count = layout.before + layout.after + math.prod(layout.grid)
            sizes = zip(shape(node), example.shape, strict=True)
            rows = next(size for size, known in sizes if known == count)
            found.append(Table(index, readable_input(node.name), rows, layout))
    return found


def goes_through(indices: Sequence[torch.Tensor]) -> bool:
    """Whether indices name all places from 0 on, one after the other."""
    if any(t.dim() != 1 or t.dtype.is_floating_point or t.dtype == torch.bool for t in indices):
        return False
    named = torch.cat([t.detach().long() for t in indices])
    return torch.equal(named, torch.arange(len(named), device=named.device))


def _may_tell(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> bool:
    """Whether an input is a table of positions, or may be an index."""
    inputs = gm.graph.find_nodes(op="placeholder")
    pairs = [(n, e) for n, e in zip(inputs, example_inputs, strict=False) if _is_data(n, e)]
    if any(e.dim() == 1 and e.dtype in (torch.int32, torch.int64) and len(e) > 1 for _, e in pairs):
        return True
    return bool(tables_of(inputs, example_inputs))


def _is_data(node: fx.Node, example: Any) -> bool:
    """Whether an input is a tensor that can be read, with shapes that may be symbolic."""
    if not isinstance(example, torch.Tensor) or isinstance(example, torch.nn.Parameter):
        return False
    mode = getattr(tensor(node), "fake_mode", None)
    return mode is not None and mode.shape_env is not None and not _is_fake(example)


def _is_fake(example: torch.Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(example, FakeTensor) or example.is_meta


def _unconverted(node: fx.Node) -> fx.Node:
    """The tensor that a node only converts or moves to another device."""
    while operation(node) in ("to", "long", "int", "contiguous") and not is_written(node):
        if not node.args or not isinstance(node.args[0], fx.Node):
            break
        node = node.args[0]
    return node


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph module with a graph of its own, and parameters, bodies and all else shared."""
    graph = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(gm.graph, nodes))
    for node, copy in nodes.items():
        if hasattr(node, "_dynamo_source"):
            copy._dynamo_source = node._dynamo_source
    made = fx.GraphModule(gm, graph, type(gm).__name__)
    for name, item in vars(gm).items():
        if name not in vars(made):
            made.__dict__[name] = dict(item) if isinstance(item, dict) else item
    made.meta = gm.meta
    return made


class Reader:
    """Reads what tensors tell, once for as long as the same are given and nobody writes into them.

    count: of numbers: 4 of a table of positions (before, t, h, w), 1 of indices.
    """

    def __init__(self, name: str, count: int, *, strict: bool = False) -> None:
        self.name, self.count, self.strict = name, count, strict
        self._known: dict[tuple[int, ...], Seen[tuple[int, ...]]] = {}
        self._said = False

    def read(self, given: Sequence[torch.Tensor]) -> tuple[int, ...]:
        """The numbers; zeros, and a warning once, where there is no grid or no order.

        Raises:
            SiteError: there is none, under `strict`.
        """
        key = tuple(map(id, given))
        known = self._known.get(key)
        if known is not None and known.is_of(given):
            return known.value
        numbers = self._numbers(given)
        if not any(numbers) and (self.strict or not self._said):
            self._said = True
            seen = "positions of a grid in raster order" if self.count > 1 else "places in order"
            say_untold(f"{self.name}: no {seen}", strict=self.strict)
        if len(self._known) >= MOST_KNOWN:
            self._known.clear()
        self._known[key] = Seen(given, numbers)
        return numbers

    def _numbers(self, given: Sequence[torch.Tensor]) -> tuple[int, ...]:
        if self.count == 1:
            return (int(goes_through(given)),)
        layout = layout_of_positions(given[0])
        return (0, 0, 0, 0) if layout is None else (layout.before, *layout.grid)


def say_untold(what: str, *, strict: bool) -> None:
    """Say that a call does not tell how its tokens lie, and what it tells.

    Raises:
        SiteError: under `strict`.
    """
    text = (
        f"{what} in this call, unlike the one it was compiled for: attention is dense in such calls"
    )
    if strict:
        raise SiteError(text)
    logger.warning("%s", text)


class Seen(Generic[Read]):
    """Tensors that were read, and the value that they had.

    PyTorch counts what is written into a tensor, but not through its `.data` or a NumPy array of
    it; that `.data` is another tensor's shows in where the entries lie.
    """

    def __init__(self, given: Sequence[torch.Tensor], value: Read) -> None:
        self.given, self.value = [ref(t) for t in given], value
        # Inference tensors do not count the writes into them.
        self.copies = [t.clone() if t.is_inference() else None for t in given]
        self.states = [None if t.is_inference() else _state(t) for t in given]

    def is_of(self, given: Sequence[torch.Tensor]) -> bool:
        """Whether tensors are those that were read, with nothing written into them since."""
        return all(
            known() is t and (_state(t) == state if copy is None else torch.equal(copy, t))
            for known, t, state, copy in zip(
                self.given, given, self.states, self.copies, strict=True
            )
        )


def _state(tensor: torch.Tensor) -> tuple[int, int]:
    """What changes where a tensor gets other entries: its version, and where they lie."""
    return tensor._version, place_of(tensor)


def place_of(tensor: torch.Tensor) -> int:
    """Where in memory a tensor begins; 0 of what has no memory of its own."""
    return tensor.data_ptr() if type(tensor) in (torch.Tensor, torch.nn.Parameter) else 0


MOST_KNOWN = 64
"""Sets of tensors that a reader remembers."""
