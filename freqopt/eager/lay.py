"""How the tokens of an attention lie in calls of one form, in numbers that the op takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from freqopt.capture.call_layouts import BySizes, in_call
from freqopt.capture.under_way import Arguments
from freqopt.grid import Grid
from freqopt.passes.axes.layout import many_keys
from freqopt.passes.content import UNPLACED, by_content
from freqopt.passes.nodes import shape, value
from freqopt.passes.reasons import Reason, Why
from freqopt.passes.site import Argument, Known, Product, Rest, Site, Size, Total, Value
from freqopt.passes.site import Kind as Tokens

UNSEEN = -1
"""A mask where calibration saw none, and of which nothing is known."""


class Lay(NamedTuple):
    """What an eager call of an attention is told.

    grid, before, after: as in `Known`. mask: as there, 0 too where it is proven to hide nothing,
    and `UNSEEN`. pads: tokens before and after the queries that only the keys have. queries: (t, h,
    w, before, after) of queries that are other tokens. pieces: as in `Site`. folded: heads and key
    heads where they are folded into the batch, which a call by itself does not show. proven: it was
    read from the graph of such a call, and not from a plan.
    """

    kind: Tokens
    grid: Grid
    before: int
    after: int
    mask: int = 0
    pads: tuple[int, int] = (0, 0)
    queries: tuple[int, ...] = ()
    pieces: tuple[tuple[int, int], ...] = ()
    folded: tuple[int, int] = (0, 0)
    proven: bool = False

    @property
    def known(self) -> Known:
        """The same as calibration notes it."""
        return Known(self.grid, self.before, self.after, self.mask)


class Kind(NamedTuple):
    """What attentions of calls of one form have in common whose tokens lie alike.

    known, content: what the plan has of them. sizes: those of the queries, and the number of keys.
    form: see `Asked`.
    """

    known: tuple[Known, ...]
    content: bool
    sizes: tuple[int, ...]
    form: object

    def is_like(self, other: Kind) -> bool:
        """Whether another is the same attention, called in the same way or in another."""
        return self[:-1] == other[:-1]


def lay_of(site: Site, *, content: bool) -> Lay | None:
    """The numbers of a site in a graph of known sizes; None if it cannot be split.

    content: an order by content may serve it where no grid does.
    """
    if not site.eligible and content:
        site = by_content(site) or site
    if not site.eligible or site.grid is None:
        return None
    t, h, w = (_number(argument) for argument in site.grid_arguments)
    mask = 0 if site.attention.mask is None else 1 + site.attention.masks_queries
    if not t * h * w:
        return None
    return Lay(
        site.kind,
        (t, h, w),
        _hinted(site.text_before),
        _hinted(site.text_after),
        mask,
        (_pad(site, site.pad_before_arguments), _pad(site, site.pad_after_arguments)),
        tuple(_number(argument) for argument in site.query_arguments),
        site.pieces,
        (site.heads, site.kv_heads) if len(shape(site.attention.query)) == 3 else (0, 0),
        proven=site.believed is None,
    )


def believed(
    layouts: tuple[Known, ...], arguments: Arguments, queries: int, keys: int
) -> Lay | Why | None:
    """The one layout that calibration saw and that has so many tokens; None for none or several.

    Or why it stays dense all the same. arguments: of the call of the model, which may tell its own
    grid.
    """
    told = [k for each in layouts if (k := in_call(each, arguments, keys)) is not None]
    found = [(k, text) for k in told if (text := k.around_keys(queries, keys)) is not None]
    if not found or len({known.grid for known, _ in found}) > 1:
        return None
    known, text = found[0]
    if problem := many_keys(keys - queries, math.prod(known.grid)):
        return problem
    if queries != keys:
        return Lay("text in keys", known.grid, *text, known.mask or UNSEEN, pads=text)
    return Lay("joint" if any(text) else "self", known.grid, *text, known.mask or UNSEEN)


def as_others(kind: Kind, lays: Mapping[Any, Lay | Why]) -> Lay | Why | None:
    """How an attention lies that lay so whenever it was called otherwise; None if it never was.

    lays: of calls of the form, by kind. Masks are another matter, as every call's own is looked at.
    """
    found = [lay for other, lay in lays.items() if kind.is_like(other)]
    placed = [lay for lay in found if isinstance(lay, Lay)]
    if placed:
        plain = {lay._replace(mask=0, proven=False) for lay in placed}
        mask = max(lay.mask for lay in placed)
        return plain.pop()._replace(mask=mask) if len(plain) == 1 else Reason.NO_AXES()
    unplaced = [lay for lay in found if isinstance(lay, Why) and lay.reason in UNPLACED]
    return unplaced[0] if unplaced and all(lay == unplaced[0] for lay in unplaced) else None


def is_elsewhere(lay: Lay, lays: Mapping[Any, Lay | Why]) -> bool:
    """Whether calls of a form do not lie as calibration saw it, as a layout of a plan has it.

    Other attention of these calls tells: it is on a grid that calibration never saw it on, or was
    seen on this one too, and is not.
    """
    for kind, other in lays.items():
        seen = {known.grid for known in kind.known}
        if seen and isinstance(other, Lay) and other.grid != lay.grid:
            alike = lay.grid in seen and math.prod(other.grid) == math.prod(lay.grid)
            if alike or other.grid not in seen:
                return True
    return False


def is_told(lay: Lay, layouts: tuple[Known, ...], arguments: Arguments) -> bool:
    """Whether sizes or ints of this very call tell the grid of a layout of a plan."""
    own = (BySizes(known.sources)(arguments) for known in layouts if known.sources)
    return any(layout is not None and layout.grid == lay.grid for layout in own)


def _pad(site: Site, arguments: tuple[Argument, ...]) -> int:
    """How many keys lie on one side of those of the queries."""
    if Rest() in arguments:
        return _hinted(site.key_length) - _hinted(site.query_length)
    return _sum(arguments)


def _number(argument: Argument) -> int:
    """What an argument is in this call."""
    if isinstance(argument, Product):
        return math.prod(_number(part) for part in argument.parts)
    if isinstance(argument, Total):
        return _sum(argument.parts)
    if isinstance(argument, Size):
        return _hinted(shape(argument.node)[argument.dim])
    if isinstance(argument, Value):
        return int(value(argument.node))
    assert isinstance(argument, int), argument
    return argument


def _sum(arguments: tuple[Argument, ...]) -> int:
    return sum(_number(argument) for argument in arguments)


def _hinted(extent: int | torch.SymInt) -> int:
    return extent if isinstance(extent, int) else int(extent.node.hint)
