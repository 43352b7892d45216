"""Masks that were shared out among ranks and gathered again: what they were before that.

What a gathered mask is made of is moved about only, so it is done once more with the numbers of
the entries in their places: where these come out in their order, the mask is the one from before.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

from freqopt.passes.axes.heads import GATHERS, rank_of
from freqopt.passes.masks.memory import is_overwritten_last, is_written
from freqopt.passes.nodes import argument, is_plain_index, known_int, operation, shape, value

KEEPS = {
    *("wait_tensor", "_wrap_tensor_autograd", "contiguous", "clone", "detach"),
    *("to", "bool", "int", "long"),
}
"""Operations that keep every entry, as far as it is true or not."""

CUTS = {"chunk", "split", "tensor_split"}
MOVES = {
    *("cat", "stack", "getitem", "view", "reshape", "flatten", "unflatten", "movedim", "permute"),
    *("transpose", "squeeze", "unsqueeze", "unbind", "select", "narrow", *CUTS),
}
"""Operations that put entries elsewhere, and are done again with their numbers."""


class Gathered(NamedTuple):
    """A collective that brings parts together, and this rank's part of the whole that it came from.

    cut: the node that cut the whole into the parts of all ranks, of which `part` takes one.
    """

    collective: fx.Node
    cut: fx.Node
    part: fx.Node


def whole_of(node: fx.Node) -> fx.Node | None:
    """Of equal parts that all ranks had of one tensor, joined in their order, that tensor.

    As `all_gather_tensor(x.chunk(P, dim)[rank], dim)` is written, or gathering into one tensor that
    is turned around then, or into a list. None for all else, and where sizes are symbols.
    """
    found = _gathered(node) if operation(node) in MOVES else None
    if found is None:
        return None
    whole = found.cut.args[0]
    ranks, rank = rank_of(found.collective)
    if not isinstance(whole, fx.Node) or shape(whole) != shape(node):
        return None
    if len(value(found.cut)) != ranks or known_int(found.part.args[1]) != rank:
        return None
    sizes = [size for size in shape(whole) if isinstance(size, int)]
    if len(sizes) != len(shape(whole)):
        return None
    with unset_fake_temporarily(), torch.device("cpu"):
        numbers = torch.arange(math.prod(sizes)).reshape(sizes)
        moved = _Moving(found, numbers).of(node)
        return whole if isinstance(moved, Tensor) and torch.equal(moved, numbers) else None


def _gathered(node: fx.Node) -> Gathered | None:
    collective = _reached(node, lambda each: operation(each) in GATHERS)
    part = None if collective is None else _reached(collective.args[0], _is_part)
    if collective is None or part is None:
        return None
    cut = part.args[0]
    return Gathered(collective, cut, part) if isinstance(cut, fx.Node) else None


def _is_part(node: fx.Node) -> bool:
    cut = node.args[0] if operation(node) == "getitem" else None
    return isinstance(cut, fx.Node) and operation(cut) in CUTS


def _reached(node: Any, wanted: Callable[[fx.Node], bool]) -> fx.Node | None:
    """The one node of some kind that a tensor comes from by operations that move or keep entries.

    None where there are several, or something else happens to the entries on the way.
    """
    found: set[fx.Node] = set()
    seen, pending = {node}, [node]
    while pending:
        reached = pending.pop()
        if not isinstance(reached, fx.Node) or not _stays(reached):
            return None
        if wanted(reached):
            found.add(reached)
            continue
        sources = _sources(reached)
        if not sources:
            return None
        pending += [source for source in sources if source not in seen]
        seen.update(sources)
    return found.pop() if len(found) == 1 else None


def _stays(node: fx.Node) -> bool:
    """Whether nothing writes into what a node makes, after the copy that it may be."""
    if operation(node) == "copy_":
        return is_overwritten_last(node)
    return not is_written(node)


def _sources(node: fx.Node) -> list[Any]:
    """What the entries of a tensor come from; empty where that is not known."""
    name = operation(node)
    if name == "copy_":
        source = argument(node, 1, "src", "other")
        return [source] if shape(source) == shape(node) else []
    if name in ("cat", "stack"):
        return list(argument(node, 0, "tensors"))
    if name == "getitem" and not is_plain_index(node.args[1]):
        return []
    if name == "view" and isinstance(argument(node, 1, "dtype"), torch.dtype):
        return []  # other entries, of the same bytes
    return [node.args[0]] if node.args and name in MOVES | KEEPS else []


class _Moving:
    """Does what moved entries about once more, with the numbers of the entries of the whole."""

    def __init__(self, gathered: Gathered, numbers: Tensor) -> None:
        self.gathered = gathered
        self.parts = self._done(gathered.cut, numbers)
        self.part: Tensor | None = None

    def of(self, node: fx.Node) -> Any:
        """The numbers of what is in the places of a tensor, or of several."""
        if node is self.gathered.part:
            return self.part
        if node is self.gathered.collective:
            return torch.cat([self._sent(node, part) for part in self.parts])
        sources = [self.of(source) for source in _sources(node)]
        if operation(node) in KEEPS or operation(node) == "copy_":
            return sources[0]
        listed = operation(node) in ("cat", "stack")
        return self._done(node, sources if listed else sources[0])

    def _sent(self, collective: fx.Node, part: Tensor) -> Any:
        """What a rank puts into the collective, whose part of the whole is this one."""
        self.part = part
        return self.of(collective.args[0])  # type: ignore[arg-type]

    def _done(self, node: fx.Node, first: Any) -> Any:
        named = {name: value(each) for name, each in node.kwargs.items() if name != "tensors"}
        arguments = fx.node.map_arg(node.args[1:], value)
        if isinstance(node.target, str):
            return getattr(first, node.target)(*arguments, **named)
        assert callable(node.target)
        return node.target(first, *arguments, **named)
