"""Which rows and columns of a model's weights are whose head's, read off the graph of one call.

Heads are numbered along the head axis of queries, keys, values and output. From there the numbers
are carried back through views and elementwise operations to the weights that made them, and forward
to the weights that take them. An operation that is not known to keep heads apart ends it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from freqopt.capture.eager import TENSOR
from freqopt.passes.nodes import argument, is_pointwise, operation, shape
from freqopt.passes.site import Site

NONE = -1
"""No head's."""

RESHAPES = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as"}
PERMUTES = {"transpose", "permute", "movedim", "t", "T", "mT"}
PARTS = {"getitem", "select", "narrow", "slice", "chunk", "split", "unbind", "split_with_sizes"}
KEEPS = {
    "to",
    "float",
    "half",
    "bfloat16",
    "double",
    "type_as",
    "clone",
    "contiguous",
    "detach",
    "dropout",
    "alias",
}
MADE = {"empty", "zeros", "new_empty", "new_zeros", "empty_like", "zeros_like"}
NORMS = {"rms_norm": (2,), "layer_norm": (2, 3)}
"""Norms over last dimensions, and where their weight and bias stand."""


Numbered = tuple[fx.Node, Tensor]
"""A node, and numbers of heads for all entries of its tensor."""


class Untraceable(Exception):
    """Heads cannot be followed; says where."""


@dataclass
class Rows:
    """Numbers of heads along dimensions of tensors that the model keeps.

    found: by (`id` of the tensor, dimension) and kind of head ("query" or "key"): for each entry
    the number of its head, NONE for those of no head.
    """

    found: dict[tuple[int, int], dict[str, Tensor]] = field(default_factory=dict)

    def note(self, tensor: int, dim: int, kind: str, numbers: Tensor, place: str) -> None:
        """Take in numbers (n,) of heads along a dimension."""
        known = self.found.setdefault((tensor, dim), {})
        for other, earlier in known.items():
            both = (earlier != NONE) & (numbers != NONE)
            alike = other == kind and torch.equal(earlier[both], numbers[both])
            if bool(both.any()) and not alike:
                raise Untraceable(f"{place}: one weight serves several kinds of heads")
        if kind in known:
            numbers = torch.where(numbers == NONE, known[kind], numbers)
        known[kind] = numbers


def rows_of_site(site: Site) -> Rows:
    """Rows and columns of the heads of a site.

    Raises:
        Untraceable: they cannot be told.
    """
    attention, rows = site.attention, Rows()
    sizes = [shape(n) for n in (attention.query, attention.key, attention.value, attention.node)]
    if any(len(s) != 4 or not all(isinstance(x, int) for x in s) for s in sizes):
        raise Untraceable(f"{site.name}: its tensors are not (batch, heads, tokens, head_dim)")
    if attention.key_transposed:
        raise Untraceable(f"{site.name}: its keys are transposed")
    walk = _Walk(rows)
    for node, kind in (
        (attention.query, "query"),
        (attention.key, "key"),
        (attention.value, "key"),
    ):
        walk.back(node, _numbered(_sizes(node)), kind)
    walk.forward(site.node, _numbered(_sizes(site.node)), "query")
    return rows


def _numbered(sizes: tuple[int, ...]) -> Tensor:
    """Numbers of heads for all entries of (B, H, N, D)."""
    return torch.arange(sizes[1], dtype=torch.int16)[None, :, None, None].expand(sizes)


class _Walk:
    """Carries numbers of heads, tensors int16 as large as those of the nodes, through a graph."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.met: set[tuple[fx.Node, str, str]] = set()

    def back(self, node: fx.Node, label: Tensor, kind: str) -> None:
        """To what made a tensor whose entries have these numbers."""
        pending = [(node, label)]
        while pending:
            at, numbers = pending.pop()
            pending += self._before(at, numbers, kind)

    def _before(self, node: fx.Node, label: Tensor, kind: str) -> Iterator[Numbered]:
        if not _varies(label):
            return
        if node.op in ("placeholder", "get_attr"):
            self._keep(node, label, kind)
        elif operation(node) == "linear":
            self._linear(node, label, kind)
        else:
            yield from self._through(node, label)

    def _through(self, node: fx.Node, label: Tensor) -> Iterator[Numbered]:
        """The tensors that an operation keeps heads apart of, with their numbers."""
        name = operation(node)
        source = node.args[0] if node.args else node.kwargs.get("input")
        if name in RESHAPES:
            yield _node(source), label.reshape(_sizes(source))
        elif name in PERMUTES or name in PARTS:
            yield from _scattered(node, label)
        elif name in ("cat", "stack"):
            yield from _taken_apart(node, label)
        elif name in NORMS:
            yield _node(source), label
            for place in NORMS[name]:
                weight = argument(node, place, "weight" if place == 2 else "bias")
                if isinstance(weight, fx.Node):
                    yield from _broadcast(weight, label)
        elif name in KEEPS:
            yield from self._writes(node, label)
            yield _node(source), label
        elif name in ("view_as_complex", "view_as_real"):
            yield _node(source), _of_pairs(name, label)
        elif is_pointwise(name):
            for operand in node.all_input_nodes:
                yield from _broadcast(operand, label)
        elif name in MADE:
            yield from self._writes(node, label)
        else:
            raise Untraceable(f"{node.name}: {name} is not known to keep heads apart")

    def _writes(self, node: fx.Node, label: Tensor) -> Iterator[Numbered]:
        """What was written into a tensor: x[..., 0::2] = ..."""
        for user in node.users:
            if operation(user) == "setitem" and user.args[0] is node:
                written, index = user.args[2], user.args[1]
                if isinstance(written, fx.Node):
                    yield from _broadcast(written, label[index])  # type: ignore[index]

    def _keep(self, node: fx.Node, label: Tensor, kind: str) -> None:
        """A tensor that the graph was given: of the model, or of the call."""
        if TENSOR not in node.meta:
            raise Untraceable(f"the input {node.name} differs from head to head")
        for dim in range(label.dim()):
            along = label.movedim(dim, 0).reshape(label.shape[dim], -1)
            if bool((along == along[:1]).all()):
                continue
            self.rows.note(node.meta[TENSOR], dim, kind, _one(along, node), node.name)

    def _linear(self, node: fx.Node, label: Tensor, kind: str) -> None:
        numbers = _one(label.movedim(-1, 0).reshape(label.shape[-1], -1), node)
        for place, name in ((1, "weight"), (2, "bias")):
            weight = argument(node, place, name)
            if weight is None:
                continue
            if not isinstance(weight, fx.Node) or TENSOR not in weight.meta:
                raise Untraceable(f"{node.name}: its {name} is computed")
            self.rows.note(weight.meta[TENSOR], 0, kind, numbers, node.name)

    def forward(self, node: fx.Node, label: Tensor, kind: str) -> None:
        """To what takes a tensor whose entries have these numbers."""
        pending = [(node, label)]
        while pending:
            at, numbers = pending.pop()
            for user in list(at.users):
                if user.op != "output" and (user, at.name, kind) not in self.met:
                    self.met.add((user, at.name, kind))
                    pending += self._after(user, at, numbers, kind)
                elif user.op == "output":
                    raise Untraceable(f"{at.name}: heads reach the output of the model")

    def _after(self, node: fx.Node, at: fx.Node, label: Tensor, kind: str) -> Iterator[Numbered]:
        name = operation(node)
        if name == "linear":
            weight = argument(node, 1, "weight")
            if argument(node, 0, "input") is not at or TENSOR not in weight.meta:
                raise Untraceable(f"{node.name}: its weight is computed")
            numbers = _one(label.movedim(-1, 0).reshape(label.shape[-1], -1), node)
            self.rows.note(weight.meta[TENSOR], 1, kind, numbers, node.name)
        elif name in RESHAPES:
            yield node, label.reshape(_sizes(node))
        elif name in PERMUTES or name in PARTS:
            if isinstance(node.meta.get("example_value"), (tuple, list)):
                for part in node.users:
                    yield part, _moved(part, node, label)
            else:
                yield node, _called(node, label)
        elif name == "cat":
            dim = argument(node, 1, "dim", "axis", default=0)
            parts = [
                label if each is at else torch.full(_sizes(each), NONE, dtype=label.dtype)
                for each in argument(node, 0, "tensors")
            ]
            yield node, torch.cat(parts, dim)
        elif name in KEEPS:
            yield node, label
        elif is_pointwise(name):
            whole = label.expand(_sizes(node))
            for operand in node.all_input_nodes:
                if operand is not at:
                    for source, numbers in _broadcast(operand, whole):
                        self.back(source, numbers, kind)
            yield node, whole
        else:
            raise Untraceable(f"{node.name}: {name} is not known to keep heads apart")


def _varies(label: Tensor) -> bool:
    return bool((label != label.flatten()[0]).any()) if label.numel() else False


def _one(along: Tensor, node: fx.Node) -> Tensor:
    """The one number (n,) of rows (n, others) that all have one."""
    if not bool((along == along[:, :1]).all()):
        raise Untraceable(f"{node.name}: entries of a weight serve several heads")
    return along[:, 0].clone()


def _node(item: Any) -> fx.Node:
    if not isinstance(item, fx.Node):
        raise Untraceable(f"{item}: not a tensor of the graph")
    return item


def _sizes(item: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in shape(_node(item)))


def _broadcast(operand: fx.Node, label: Tensor) -> Iterator[Numbered]:
    """An operand of an elementwise operation, with its numbers; nothing where heads share it."""
    sizes = _sizes(operand)
    if not sizes or len(sizes) > label.dim():
        return
    lead = label.dim() - len(sizes)
    shared = [*range(lead), *(lead + d for d, size in enumerate(sizes) if size == 1)]
    numbers = label
    for dim in shared:
        high = numbers.amax(dim, keepdim=True)
        if bool(((numbers != NONE) & (numbers != high)).any()):
            return
        numbers = high
    yield operand, numbers.reshape(sizes)


def _scattered(node: fx.Node, label: Tensor) -> Iterator[Numbered]:
    """The tensor that a node moved or took a part of, with numbers where the part was."""
    chain, whole = node, _node(node.args[0])
    outer = whole
    if isinstance(whole.meta.get("example_value"), (tuple, list)):
        outer = _node(whole.args[0])
    place = torch.arange(_count(_sizes(outer)), dtype=torch.int64).reshape(_sizes(outer))
    moved = _moved(chain, whole, place) if outer is not whole else _called(chain, place)
    numbers = torch.full((place.numel(),), NONE, dtype=label.dtype)
    numbers[moved.reshape(-1)] = label.reshape(-1)
    yield outer, numbers.reshape(_sizes(outer))


def _count(sizes: Sequence[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def _moved(part: fx.Node, node: fx.Node, x: Tensor) -> Tensor:
    """The part of one of several outputs: chunk(...)[i]."""
    if operation(part) != "getitem" or not isinstance(part.args[1], int):
        raise Untraceable(f"{part.name}: parts of {node.name} are taken in an unknown way")
    several = _called(node, x)
    found: Tensor = several[part.args[1]]
    return found


def _called(node: fx.Node, x: Tensor) -> Any:
    """What a node that only moves entries makes of a tensor in the place of its first."""
    rest = node.args[1:]
    if any(isinstance(each, fx.Node) for each in (*rest, *node.kwargs.values())):
        raise Untraceable(f"{node.name}: it moves entries by numbers that are computed")
    if node.op == "call_method":
        return getattr(x, str(node.target))(*rest, **node.kwargs)
    assert callable(node.target)
    return node.target(x, *rest, **{k: v for k, v in node.kwargs.items() if k != "input"})


def _taken_apart(node: fx.Node, label: Tensor) -> Iterator[Numbered]:
    tensors = argument(node, 0, "tensors")
    dim = argument(node, 1, "dim", "axis", default=0)
    if operation(node) == "stack":
        for each, numbers in zip(tensors, label.unbind(dim), strict=True):
            yield _node(each), numbers
        return
    lengths = [_sizes(each)[dim] for each in tensors]
    for each, numbers in zip(tensors, label.split(lengths, dim), strict=True):
        yield _node(each), numbers


def _of_pairs(name: str, label: Tensor) -> Tensor:
    if name == "view_as_complex":
        return label[..., None].expand(*label.shape, 2)
    return label[..., 0]
