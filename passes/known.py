"""Layouts that calibration saw, for sites whose part of the graph does not show one.

After a graph break, or in a block compiled by itself, queries and keys come from nowhere. What was
proven of the same site in the whole model is believed where the numbers of tokens agree.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import fx

from freqopt.passes.axes.dimensions import has, same
from freqopt.passes.axes.told import Told
from freqopt.passes.masks.masks import hides_nothing
from freqopt.passes.masks.square import key_mask_of, repeated_row_of
from freqopt.passes.nodes import shape, tensor
from freqopt.passes.reasons import UNTRACED, Reason, Why
from freqopt.passes.rewrite.adding import add_method
from freqopt.passes.site import Argument, Extent, Known, Rest, Side, Site

UNSHOWN = UNTRACED | {Reason.MASK_UNPROVEN, Reason.MASK_PAIRS}
"""Reasons that say that a graph is silent about a site, not that it speaks against a split."""

KEYS, PAIRS = 1, 2
"""Masks of a `Known`."""


def believe(
    site: Site,
    layouts: Sequence[Known],
    totals: Collection[int] = (),
    told: Sequence[Told] = (),
    *,
    called: bool = False,
    sides: Collection[Side] = (),
) -> None:
    """Make a site eligible that has the tokens of one of the layouts, where its graph is silent.

    Symbolic lengths are guarded to be what they are in this call. totals: further lengths to guard
    against, those of other sites that may come to run in this graph. told: what the call of the
    model around tells, which goes before the grids of the layouts, and needs no guards where all
    such sites have text on one side. sides: see `Model`. called: whether such a call is known:
    numbers that it lacks are then not taken to be the calibrated.
    """
    lengths = (site.query_length, site.key_length)
    if site.why.reason not in UNSHOWN or not site.heads:
        return
    if totals and not same(*lengths):  # others, where they are as many, get a graph of their own
        bool(site.query_length == site.key_length)
    heard = [(k, t) for k in layouts for t in told if k.sources == t.sources]
    if heard and _hear(site, heard, sides):
        return
    if called and (numbers := dict.fromkeys(n for k in layouts for n in k.numbers)):
        site.why = Reason.CALL_UNTOLD(arguments=", ".join(numbers))
        return
    fitting = [k for k in layouts if _fits(k, lengths)]
    grids = dict.fromkeys(known.grid for known in fitting)
    if len(grids) > 1:
        site.why = Reason.GRIDS_ALIKE(grids=", ".join(map(str, grids)))
        return
    known = fitting[0] if fitting else None
    if known is None:
        for total in totals:
            _is(site.key_length, total)
        return
    tokens = _hint(site.query_length)
    assert tokens is not None and known.around(tokens) is not None
    if not all(_is(length, tokens) for length in lengths):
        return
    before, after = known.around(tokens) or (0, 0)
    if problem := settle_mask(site, known, before):
        site.why = problem
        return
    site.kind = "joint" if before or after else "self"
    site.grid, site.grid_arguments = known.grid, known.grid
    site.text_before, site.text_after = before, after
    site.text_before_arguments, site.text_after_arguments = (before,), (after,)
    site.pad_before_arguments = site.pad_after_arguments = ()
    site.why = Reason.FITS(remark="; the graph does not show it, calibration did")


def _hear(site: Site, heard: Sequence[tuple[Known, Told]], sides: Collection[Side]) -> bool:
    """Make a site eligible whose grid the call of the model around tells.

    heard: layouts that calibration saw, each with what is told of such. Returns whether that is all
    there is to say: sizes may be those of other tokens (of one rank's), and the site have just
    those that calibration saw.
    """
    tokens = _hint(site.query_length)
    if tokens is None or tokens != _hint(site.key_length):
        return True
    texts = [(k, t, _text(k, t, tokens, sides)) for k, t in heard]
    fitting = [(k, t, text) for k, t, text in texts if text is not None]
    by_sizes = [known for known, _ in heard if not known.numbers]
    if not fitting and any(_fits(known, (tokens, tokens)) for known in by_sizes):
        return False
    if len({(t.grid, text.before) for _, t, text in fitting}) != 1:
        grids = ", ".join(dict.fromkeys("x".join(map(str, t.grid)) for _, t in heard))
        site.why = Reason.CALL_MISFIT(grids=grids, tokens=tokens)
        return True
    known, told, text = fitting[0]
    if not has(site.query_length, site.key_length):
        return True
    if len(sides) > 1 or (True, True) in sides:
        _is(site.query_length, tokens)  # a sequence of another length may have its text elsewhere
    if problem := settle_mask(site, known, text.before):
        site.why = problem
        return True
    site.kind = "joint" if text.before or text.after else "self"
    site.grid, site.grid_arguments = told.grid, told.arguments[1:]
    site.text_before, site.text_after = text.before, text.after
    site.text_before_arguments = (text.before_argument,)
    site.text_after_arguments = (text.after_argument,)
    site.pad_before_arguments = site.pad_after_arguments = ()
    site.why = Reason.FITS(remark=f"; it is read from {told.name} at every call of the model")
    return True


class _Text(NamedTuple):
    """Tokens around a grid in this call, and how the graph gets them."""

    before: int
    after: int
    before_argument: Argument
    after_argument: Argument


def _text(known: Known, told: Told, tokens: int, sides: Collection[Side]) -> _Text | None:
    """What lies around the grid that is told, in a sequence of so many tokens; None if unclear.

    What is in the grid's own axis is told; the rest is text, on the side where calibration saw any,
    or would be, where this site has none: the same graph may come to run for one that has.
    """
    others = told.before + told.after
    text = tokens - math.prod(told.grid) - others
    first, last = told.arguments[0], told.after_argument
    assert last is not None
    if text < 0:
        return None
    if known.before and known.after and not others:
        if text != known.before + known.after:
            return None
        return _Text(known.before, known.after, known.before, Rest())
    behind = known.before and not (known.after and told.before)
    if behind if text else set(sides) == {(True, False)}:
        return _Text(told.before + text, told.after, Rest(), last)
    if text and not known.after:
        return None
    return _Text(told.before, told.after + text, first, Rest())


def _fits(known: Known, lengths: tuple[Extent, Extent]) -> bool:
    queries, keys = (_hint(length) for length in lengths)
    if queries is None or queries != keys:
        return False
    if known.sources:  # another size has another grid, which this call does not tell
        return queries == known.before + math.prod(known.grid) + known.after
    return known.around(queries) is not None


def _hint(length: Extent) -> int | None:
    """A length in this call, None if it depends on data."""
    if isinstance(length, int):
        return length
    return int(length.node.hint) if length.node.has_hint() else None


def _is(length: Extent, number: int) -> bool:
    """Whether a length is a number; guarded where it is symbolic, so that others compile anew."""
    return bool(length == number) if _hint(length) is not None else False


def settle_mask(site: Site, known: Known, before: int) -> Why | None:
    """Bring the mask into the form that the op takes, as calibration did; why that cannot be."""
    found = site.attention
    mask = found.mask
    if mask is None or hides_nothing(mask):
        found.mask = None
        return None
    values, sizes = tensor(mask), shape(mask)
    if values is None or values.dtype != torch.bool or len(sizes) != 4:
        return Reason.MASK_ADDED(dtype=None if values is None else values.dtype)
    if known.mask == PAIRS and (row := key_mask_of(mask) or _row(site, mask, before)) is not None:
        found.mask, found.masks_queries = row, True
        return None
    row = repeated_row_of(mask)
    if known.mask == KEYS and row is not None:
        found.mask = row
        return None
    return Reason.MASK_UNPROVEN()


def _row(site: Site, mask: fx.Node, at: int) -> fx.Node | None:
    """The mask over keys that a mask over pairs has for its first video token."""
    sizes = shape(mask)
    if not (same(sizes[1], 1) and same(sizes[2], sizes[3])):
        return None
    with site.node.graph.inserting_before(site.node):
        return add_method(site.node.meta, "narrow", mask, 2, at, 1)
