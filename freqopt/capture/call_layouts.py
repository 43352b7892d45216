"""What the model of a part was called with tells the grid of the call, at every call.

A block compiled by itself, or a piece after a graph break, does not see the model's inputs. Its
model does, and is being called: sizes of its arguments (as calibration saw that a grid comes from
them), positions and lists of extents among them tell how the tokens lie.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any

from torch import Tensor, fx

from freqopt.capture.call_grids import MOST_KNOWN, Seen
from freqopt.capture.under_way import Arguments
from freqopt.passes.axes.told import Told
from freqopt.passes.site import ITSELF, Known, Source
from freqopt.positions import Layout, layout_of_positions

NOTHING = Layout(0, (0, 0, 0), 0)
"""Of a call that tells no grid: attention is dense there."""


@dataclass(frozen=True)
class BySizes:
    """The grid is in sizes of arguments, or in ints among them."""

    sources: tuple[Source, ...]

    @property
    def name(self) -> str:
        """The first argument that it is read from."""
        return next((source.name for source in self.sources if source.name), "")

    def __call__(self, arguments: Arguments) -> Layout | None:
        """The layout in a call, None where it tells none."""
        extents = []
        for name, dim, step in self.sources:
            held = step if not name else _size(_held(arguments, name), dim)
            if held is None or held < 1 or (name and held % step):
                return None
            extents.append(held // step if name else held)
        t, h, w = extents
        return Layout(0, (t, h, w), 0)


def _size(item: Any, dim: int) -> int | None:
    if dim == ITSELF:
        return None if isinstance(item, bool) or not isinstance(item, Integral) else int(item)
    return int(item.shape[dim]) if isinstance(item, Tensor) and dim < item.dim() else None


@dataclass(frozen=True)
class ByPositions:
    """The grid is what a tensor of positions holds, which is read once for each such tensor."""

    name: str
    known: dict[int, Seen[Layout | None]] = field(default_factory=dict, compare=False)

    def __call__(self, arguments: Arguments) -> Layout | None:
        """The layout in a call, None where it tells none."""
        table = _held(arguments, self.name)
        if not isinstance(table, Tensor):
            return None
        known = self.known.get(id(table))
        if known is None or not known.is_of([table]):
            if len(self.known) >= MOST_KNOWN:
                self.known.clear()
            known = self.known[id(table)] = Seen([table], layout_of_positions(table))
        return known.value


@dataclass(frozen=True)
class ByExtents:
    """The grids, one after the other, are in a list of (t, h, w), or in one for each batch item."""

    name: str

    def __call__(self, arguments: Arguments) -> Layout | None:
        """The layout in a call, None where it tells none."""
        return layout_of_extents(_held(arguments, self.name))


def layout_of_extents(item: object) -> Layout | None:
    """The main one of the grids in a list, and how many tokens lie around it."""
    if not isinstance(item, (list, tuple)) or not item:
        return None
    if all(map(_is_extents, item)):
        sizes = [math.prod(extents) for extents in item]
        main = max(range(len(sizes)), key=lambda i: sizes[i])
        if 2 * sizes[main] <= sum(sizes):
            return None
        t, h, w = item[main]
        return Layout(sum(sizes[:main]), (t, h, w), sum(sizes[main + 1 :]))
    found = [layout_of_extents(each) for each in item]
    return found[0] if all(each == found[0] for each in found) else None


def _is_extents(item: object) -> bool:
    return (
        isinstance(item, (list, tuple))
        and len(item) == 3
        and all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in item)
    )


def _held(arguments: Arguments, name: str) -> Any:
    """An argument, or what is in one: "images_0" is the first of a list of images."""
    if name in arguments:
        return arguments[name]
    outer, _, key = name.rpartition("_")
    held = _held(arguments, outer) if outer else None
    if isinstance(held, (list, tuple)) and key.isdecimal() and int(key) < len(held):
        return held[int(key)]
    return held.get(key) if isinstance(held, Mapping) else None


Teller = BySizes | ByPositions | ByExtents


def tellers(
    arguments: Arguments, sources: Iterable[tuple[Source, ...]]
) -> Iterator[tuple[Teller, Layout]]:
    """What tells a grid in a call, and which grid.

    sources: where calibration saw that grids come from.
    """
    candidates: list[Teller] = [BySizes(each) for each in dict.fromkeys(sources) if each]
    seen: set[int] = set()
    for name, item in arguments.items():
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor) and item.dim() in (2, 3, 4) and not item.is_meta:
            candidates.append(ByPositions(name))
        elif isinstance(item, (list, tuple)):
            candidates.append(ByExtents(name))
    for teller in candidates:
        layout = teller(arguments)
        if layout is not None:
            yield teller, layout


def told_by_sizes(source: fx.Node, arguments: Arguments, layouts: Iterable[Known]) -> list[Told]:
    """What sizes and ints among a call's arguments tell, where nothing is compiled or guarded.

    source: an input of the graph. layouts: of the sites, as calibration saw them.
    """
    found = []
    for teller in (BySizes(each) for each in dict.fromkeys(k.sources for k in layouts) if each):
        layout = teller(arguments)
        if layout is not None:
            t, h, w = layout.grid
            own, numbers = teller.sources, (0, t, h, w)
            found.append(Told(source, teller.name, t * h * w, *layout, numbers, 0, own))
    return found


def in_call(known: Known, arguments: Arguments, tokens: int) -> Known | None:
    """A layout that calibration saw, on the grid that a call tells; None if it is not of these.

    Sizes may be those of one rank's tokens, as in `freqopt.passes.known`.
    """
    video = math.prod(known.grid)
    if known.sources:
        told = BySizes(known.sources)(arguments)
        if told is not None and math.prod(told.grid) == video:
            known = replace(known, grid=told.grid)
        elif known.numbers or tokens != known.before + video + known.after:
            return None
    return None if known.around(tokens) is None else known


def numbers_of_layout(layout: Layout | None) -> tuple[int, int, int, int, int]:
    """Tokens before, t, h, w and tokens after."""
    before, (t, h, w), after = layout or NOTHING
    return before, t, h, w, after
