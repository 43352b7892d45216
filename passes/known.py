"""Layouts that calibration saw, for sites whose part of the graph does not show one.

After a graph break, or in a block compiled by itself, queries and keys come from nowhere. What was
proven of the same site in the whole model is believed where the numbers of tokens agree.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import NamedTuple

from freqopt.passes.axes.dimensions import has, same
from freqopt.passes.axes.layout import many_keys
from freqopt.passes.axes.operands import Operands, heads_of, scale_of, settled_heads
from freqopt.passes.axes.told import Told
from freqopt.passes.masks.calibrated import settle_mask
from freqopt.passes.masks.ready_made import comes_ready_made
from freqopt.passes.reasons import UNTRACED, Reason
from freqopt.passes.site import Argument, Extent, Known, Rest, Side, Site

UNSHOWN = UNTRACED | {Reason.CACHE}
"""Reasons that say that a graph is silent about a site, not that it speaks against a split."""

BY_MASK = {
    Reason.MASK_NO_TENSOR,
    Reason.MASK_ADDED,
    Reason.MASK_PAIRS,
    Reason.MASK_BATCH,
    Reason.MASK_UNPROVEN,
}
"""Reasons that a mask has, whatever the lengths."""

MASKED = {Reason.MASK_UNPROVEN, Reason.MASK_PAIRS}
"""Reasons that say so where the mask comes into a graph ready-made. Of a mask that is made in it
the graph has the word, and not calibration, which may have seen calls with another."""


def believe(
    site: Site,
    layouts: Sequence[Known],
    totals: Collection[int] = (),
    told: Sequence[Told] = (),
    *,
    called: bool = False,
    sides: Collection[Side] = (),
    asked: bool = False,
) -> None:
    """Make a site eligible that has the tokens of one of the layouts, where its graph is silent.

    Symbolic lengths and heads are guarded to be what they are in this call. totals: further lengths
    to guard against, those of other sites that may come to run in this graph. told: what the call
    of the model around tells, which goes before the grids of the layouts, and needs no guards where
    all such sites have text on one side. sides: see `Model`. called: whether such a call is known:
    numbers that it lacks are then not taken to be the calibrated. asked: see `settle_mask`.
    """
    lengths = (site.query_length, site.key_length)
    if not _is_silent(site, asked) or not (site.heads or (layouts and _settle_heads(site))):
        return
    if totals and not same(*lengths):  # others, where they are as many, get a graph of their own
        bool(site.query_length == site.key_length)
    heard = [(k, t) for k in layouts for t in told if k.sources == t.sources]
    if heard and _hear(site, heard, sides, asked):
        if not site.eligible and site.why.reason not in BY_MASK:
            _hold(site)
        return
    if called and (numbers := dict.fromkeys(n for k in layouts for n in k.numbers)):
        site.why = Reason.CALL_UNTOLD(arguments=", ".join(numbers))
        return
    fitting = [k for k in layouts if _fits(k, lengths)]
    grids = dict.fromkeys(known.grid for known in fitting)
    if len(grids) > 1:
        site.why = Reason.GRIDS_ALIKE(grids=", ".join(map(str, grids)))
        _hold(site)
        return
    known = fitting[0] if fitting else None
    if known is None:
        for total in totals:
            _is(site.key_length, total)
        _keep_out(site, layouts)
        if any(_may_fit(known, lengths) for known in layouts):
            site.why = Reason.TEXT_UNTOLD(tokens=_hint(site.key_length))
        return
    queries, keys = (_hint(length) for length in lengths)
    assert queries is not None and keys is not None
    if not (_is(site.query_length, queries) and _is(site.key_length, keys)):
        return
    before, after = known.around_keys(queries, keys) or (0, 0)
    many = many_keys(keys - queries, math.prod(known.grid))
    if problem := many or settle_mask(site, known, before, fixed=True, asked=asked):
        site.why = problem
        return
    site.grid, site.grid_arguments = known.grid, known.grid
    _place(site, before, after, (before,), (after,))
    if queries != keys:
        _pad(site, (before,), (after,))
    site.why = Reason.FITS(remark="; the graph does not show it, calibration did")


def _hold(site: Site) -> None:
    """Keep a verdict to the lengths of this call: others, which may fit, get a graph of their own.

    Dynamo makes a symbol of a length that changes, so that a graph that is dense for the length of
    one call would otherwise be taken for all lengths.
    """
    for length in (site.query_length, site.key_length):
        if (number := _hint(length)) is not None:
            _is(length, number)


def _keep_out(site: Site, layouts: Sequence[Known]) -> None:
    """Keep a dense graph from lengths that a layout fits, without holding it to those of this call.

    What `_fits` asks of numbers is asked of the symbols here.
    """
    queries, keys = site.query_length, site.key_length
    if not layouts or _hint(queries) is None or _hint(keys) is None:
        return
    for known in layouts:
        video = math.prod(known.grid)
        bool(queries == keys)
        bool(queries == video)
        bool(keys == known.before + video + known.after)
        if known.before or known.after:
            bool(keys < video)


def _is_silent(site: Site, asked: bool) -> bool:
    """Whether a graph says nothing about a site. asked: the values of its mask would tell."""
    if site.why.reason in UNSHOWN:
        return True
    mask = site.attention.mask
    shown = mask is None or not asked or not comes_ready_made(mask)
    return site.why.reason in MASKED and not shown


def _settle_heads(site: Site) -> bool:
    """Take symbols of heads for the numbers that they are in this call; whether there are any."""
    found = heads_of(site.attention, Operands(None, None, None))
    if found is None:
        return False
    site.heads, site.kv_heads, site.head_dim = settled_heads(found)
    site.scale = scale_of(site.attention, site.head_dim)
    return True


def _place(
    site: Site,
    before: int,
    after: int,
    before_arguments: tuple[Argument, ...],
    after_arguments: tuple[Argument, ...],
) -> None:
    """Put text around the grid of a site whose queries and keys are the same tokens."""
    site.kind = "joint" if before or after else "self"
    site.text_before, site.text_after = before, after
    site.text_before_arguments, site.text_after_arguments = before_arguments, after_arguments
    site.pad_before_arguments = site.pad_after_arguments = ()


def _pad(site: Site, before: tuple[Argument, ...], after: tuple[Argument, ...]) -> None:
    """Note that some tokens around the queries' own are in the keys only."""
    site.kind = "text in keys"
    site.pad_before_arguments, site.pad_after_arguments = before, after


def _hear(
    site: Site, heard: Sequence[tuple[Known, Told]], sides: Collection[Side], asked: bool
) -> bool:
    """Make a site eligible whose grid the call of the model around tells.

    heard: layouts that calibration saw, each with what is told of such. Returns whether that is all
    there is to say: sizes may be those of other tokens (of one rank's), and the site have just
    those that calibration saw.
    """
    queries, keys = _hint(site.query_length), _hint(site.key_length)
    if queries is None or keys is None:
        return True
    texts = [(k, t, _text(k, t, queries, keys, sides)) for k, t in heard]
    fitting = [(k, t, text) for k, t, text in texts if text is not None]
    by_sizes = [known for known, _ in heard if not known.numbers]
    if not fitting and any(_fits(known, (queries, keys)) for known in by_sizes):
        return False
    if not fitting and queries != keys:
        return True
    if len({(t.grid, text.before) for _, t, text in fitting}) != 1:
        grids = ", ".join(dict.fromkeys("x".join(map(str, t.grid)) for _, t in heard))
        site.why = Reason.CALL_MISFIT(grids=grids, tokens=keys)
        return True
    known, told, text = fitting[0]
    if has(site.query_length, site.key_length) != (queries == keys):
        return True
    if len(sides) > 1 or (True, True) in sides:
        _is(site.key_length, keys)  # a sequence of another length may have its text elsewhere
    many = many_keys(keys - queries, math.prod(told.grid))
    here, fixed = replace(known, grid=told.grid), _is_fixed(site, told, text)
    if problem := many or settle_mask(site, here, text.before, fixed=fixed, asked=asked):
        site.why = problem
        return True
    site.grid, site.grid_arguments = told.grid, told.arguments[1:]
    _place(site, text.before, text.after, (text.before_argument,), (text.after_argument,))
    if queries != keys:
        _pad(site, *text.pads)
    site.why = Reason.FITS(remark=f"; it is read from {told.name} at every call of the model")
    return True


class _Text(NamedTuple):
    """Tokens around a grid in this call, and how the graph gets them.

    pads: how it gets those before and after that are text, which the keys alone may have.
    """

    before: int
    after: int
    before_argument: Argument
    after_argument: Argument
    pads: tuple[tuple[Argument, ...], tuple[Argument, ...]]


def _is_fixed(site: Site, told: Told, text: _Text) -> bool:
    """Whether a site's grid and what lies around it are the same at all calls."""
    around = (text.before_argument, text.after_argument)
    numbers = [a for a in (*told.arguments, *around) if not isinstance(a, Rest)]
    return all(isinstance(n, int) for n in (*numbers, site.key_length))


def _text(
    known: Known, told: Told, queries: int, keys: int, sides: Collection[Side]
) -> _Text | None:
    """What lies around the grid that is told, in a sequence of so many keys; None if unclear.

    What is in the grid's own axis is told; the rest is text, on the side where calibration saw any,
    or would be, where this site has none: the same graph may come to run for one that has. Queries
    are all of the sequence, or all of it but the text.
    """
    others = told.before + told.after
    text = keys - math.prod(told.grid) - others
    first, last = told.arguments[0], told.after_argument
    assert last is not None
    if text < 0 or queries not in (keys, keys - text):
        return None
    if known.before and known.after and not others:
        if text != known.before + known.after:
            return None
        pads = (known.before,), (known.after,)
        return _Text(known.before, known.after, known.before, Rest(), pads)
    behind = known.before and not (known.after and told.before)
    if behind if text else set(sides) == {(True, False)}:
        return _Text(told.before + text, told.after, Rest(), last, ((Rest(),), ()))
    if text and not known.after:
        return None
    return _Text(told.before, told.after + text, first, Rest(), ((), (Rest(),)))


def _fits(known: Known, lengths: tuple[Extent, Extent]) -> bool:
    """Whether tokens are those of a layout, of a call that tells no grid.

    Another number of tokens may be that of another grid, with as much text as ever or less. Where
    the queries are the video alone, the text is known apart; where sizes tell a grid, they are not
    those of this call.
    """
    queries, keys = (_hint(length) for length in lengths)
    if queries is None or keys is None or known.around_keys(queries, keys) is None:
        return False
    apart = queries != keys and not known.sources
    return apart or keys == known.before + math.prod(known.grid) + known.after


def _may_fit(known: Known, lengths: tuple[Extent, Extent]) -> bool:
    """Whether tokens could be those of a layout, with another number of text tokens."""
    queries, keys = (_hint(length) for length in lengths)
    return queries is not None and keys is not None and bool(known.around_keys(queries, keys))


def _hint(length: Extent) -> int | None:
    """A length in this call, None if it depends on data."""
    if isinstance(length, int):
        return length
    return int(length.node.hint) if length.node.has_hint() else None


def _is(length: Extent, number: int) -> bool:
    """Whether a length is a number; guarded where it is symbolic, so that others compile anew."""
    return bool(length == number) if _hint(length) is not None else False
