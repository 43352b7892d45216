"""Reads grids from lists of extents among a call's arguments, such as Qwen-Image's `img_shapes`.

The compiler takes ints for constants, which it guards, or makes them inputs of the graph once they
change. Either way the graph's grid is that of the call; what it does not guard is not believed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from freqopt.passes.axes.dimensions import has, hint
from freqopt.passes.axes.told import Told
from freqopt.passes.nodes import value
from freqopt.passes.site import Argument, Extent, Product, Total, Value

ENTRY = re.compile(r"(.*)\[(\d+)\]")
CONSTANTS = ("CONSTANT_MATCH", "EQUALS_MATCH")

Number = int | Value


class Extents(NamedTuple):
    """Three extents (t, h, w): what they are in this call, and how the graph gets them."""

    sizes: tuple[Extent, Extent, Extent]
    arguments: tuple[Number, Number, Number]

    @property
    def tokens(self) -> int:
        """Number of tokens in this call."""
        return math.prod(hint(size) or 0 for size in self.sizes)


def told_by_shapes(inputs: Sequence[fx.Node]) -> list[Told]:
    """What lists of extents tell about tokens that lie in one axis, one grid after the other."""
    numbers = _known_ints(inputs)
    if not numbers or not inputs:
        return []
    triples: dict[str, dict[int, Extents]] = {}
    for parent in dict.fromkeys(name for name, _ in numbers):
        entry = ENTRY.fullmatch(parent)
        keys = [(parent, i) for i in range(3)]
        if entry is None or (parent, 3) in numbers or any(key not in numbers for key in keys):
            continue
        (a, b, c), (x, y, z) = zip(*(numbers[key] for key in keys), strict=True)
        found = Extents((a, b, c), (x, y, z))
        if found.tokens:
            triples.setdefault(entry[1], {})[int(entry[2])] = found
    lists = {name: [items[i] for i in sorted(items)] for name, items in triples.items()}
    first = next(iter(lists.values()), [])
    # Those of other batch items hold the same, and guards keep it so.
    others = {name: items for name, items in lists.items() if not _alike(items, first)}
    kept = {name: items for name, items in lists.items() if items is first} | others
    made = [_told(inputs[0], name, items) for name, items in kept.items()]
    return [told for told in made if told is not None]


def told_by_lists(source: fx.Node, named: Mapping[str, Any]) -> list[Told]:
    """What lists of extents among a call's arguments tell, where nothing is compiled or guarded.

    Of a list for each batch item the first counts, if all are alike.
    """
    found: list[Told] = []
    for name, item in named.items():
        items = _triples(item)
        if not items and isinstance(item, (tuple, list)) and item:
            each = [_triples(inner) for inner in item]
            items = each[0] if all(other == each[0] for other in each) else []
        if items:
            extents = [Extents((t, h, w), (t, h, w)) for t, h, w in items]
            told = _told(source, name, extents)
            found += [] if told is None else [told]
    return found


def _triples(item: object) -> list[tuple[int, int, int]]:
    """Lists of three positive ints as such, of a list that holds nothing else."""
    if not isinstance(item, (tuple, list)) or not item:
        return []
    rows = [tuple(row) if isinstance(row, (tuple, list)) else () for row in item]
    if any(len(row) != 3 or any(type(n) is not int or n < 1 for n in row) for row in rows):
        return []
    return [(row[0], row[1], row[2]) for row in rows]


def _alike(items: Sequence[Extents], others: Sequence[Extents]) -> bool:
    """Whether two lists hold the same extents, in this call and by guards in all."""
    return len(items) == len(others) and all(
        has(a, b)
        for item, other in zip(items, others, strict=True)
        for a, b in zip(item.sizes, other.sizes, strict=True)
    )


def _told(source: fx.Node, name: str, items: Sequence[Extents]) -> Told | None:
    """The main grid of several, and how many tokens lie before and after it."""
    main = max(range(len(items)), key=lambda i: items[i].tokens)
    total = sum(item.tokens for item in items)
    if 2 * items[main].tokens <= total:
        return None
    before = sum(item.tokens for item in items[:main])
    parts = tuple(Product(item.arguments) for item in items[:main])
    grid = tuple(hint(size) or 0 for size in items[main].sizes)
    rows: Extent = 0
    for item in items:
        rows = rows + item.sizes[0] * item.sizes[1] * item.sizes[2]
    first: Argument = Total(parts) if parts else 0
    label = re.findall(r"\w+", re.sub(r"\[\d+\]", "", name))[-1]
    return Told(
        source,
        label,
        rows,
        before,
        (grid[0], grid[1], grid[2]),
        total - before - items[main].tokens,
        arguments=(first, *items[main].arguments),
    )


def _known_ints(inputs: Sequence[fx.Node]) -> dict[tuple[str, int], tuple[Extent, Number]]:
    """Ints in lists among the arguments by (list, place): their sizes, and how to get them."""
    from torch._dynamo.symbolic_convert import InstructionTranslator
    from torch._guards import TracingContext

    context = TracingContext.try_get()
    if context is None:
        return {}
    found: dict[tuple[str, int], tuple[Extent, Number]] = {}
    try:
        scope = InstructionTranslator.current_tx().output.local_scope
    except AttributeError:
        return {}
    for guard in context.guards_context.dynamo_guards:
        entry = ENTRY.fullmatch(guard.name)
        if entry is None or guard.create_fn_name() not in CONSTANTS:
            continue
        held = _held(guard.name, scope)
        if isinstance(held, int) and not isinstance(held, bool) and held > 0:
            found[entry[1], int(entry[2])] = (held, held)
    for node in inputs:
        source = getattr(node.meta.get("grapharg"), "source", None)
        name = getattr(source, "name", "")
        entry = ENTRY.fullmatch(name() if callable(name) else name)
        if entry is not None and isinstance(value(node), torch.SymInt):
            found[entry[1], int(entry[2])] = (value(node), Value(node))
    return found


def _held(name: str, scope: dict[str, Any]) -> object:
    """What an argument holds at L['images'][0][1] and the like; None for any other name."""
    path = re.fullmatch(r"L((?:\[(?:'\w+'|\d+)\])+)", name)
    if path is None:
        return None
    held: Any = scope
    for key, place in re.findall(r"\[(?:'(\w+)'|(\d+))\]", path[1]):
        held = held[key] if key else held[int(place)]
    return held
