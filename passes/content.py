"""Attention that a grid cannot serve, as an order by content can: nothing is assumed of its tokens.

Where tokens come from, on which grid they lie, and whether keys are those of the queries, all that
matters for the grid's order alone. Orders by content need the tensors, and no mask that hides.
"""

from __future__ import annotations

from dataclasses import replace

from freqopt.passes.axes.dimensions import same
from freqopt.passes.masks.masks import hides_nothing
from freqopt.passes.nodes import shape
from freqopt.passes.reasons import UNTRACED, Reason
from freqopt.passes.site import Extent, Site, Size

UNPLACED = UNTRACED | {
    Reason.CROSS,
    Reason.CACHE,
    Reason.MANY_KEYS,
    Reason.SLICES,
    Reason.TILES,
    Reason.AXES,
    Reason.PADS_UNREADABLE,
}
"""Reasons that tell of where tokens lie, and of nothing else."""

OTHER_TOKENS = frozenset({Reason.CROSS, Reason.CACHE, Reason.OTHER_KEYS, Reason.MANY_KEYS})
"""Of these, those whose queries are not the keys' own tokens, even if they are as many."""


def by_content(site: Site) -> Site | None:
    """A site that stays dense for want of a grid, as an order by content serves it; None if not."""
    attention = site.attention
    if site.why.reason not in UNPLACED or not site.heads or attention.objection is not None:
        return None
    if attention.mask is not None and not hides_nothing(attention.mask):
        return None
    query, key, values = (shape(n) for n in (attention.query, attention.key, attention.value))
    if attention.key_transposed:
        key = (*key[:-2], key[-1], key[-2])
    fitting = len(query) == len(key) == len(values) and len(query) in (3, 4)
    if not fitting or not same(query[-1], key[-1]):
        return None
    if not all(same(key[i], values[i]) for i in range(len(key))):
        return None
    folded = len(query) == 3  # heads are folded into the batch
    if not folded and not (same(query[0], key[0]) and same(query[0], values[0])):
        return None
    own = same(query[-2], key[-2]) and site.why.reason not in OTHER_TOKENS
    at = -1 if attention.key_transposed else -2
    queries = _length(site.query_length, Size(attention.query, -2))
    return replace(
        site,
        kind="self" if own else "cross",
        grid=(1, 1, site.key_length),
        text_before=0,
        text_after=0,
        why=Reason.FITS_BY_CONTENT(instead=site.why.seen),
        attention=replace(attention, mask=None),
        grid_arguments=(1, 1, _length(site.key_length, Size(attention.key, at))),
        text_before_arguments=(),
        text_after_arguments=(),
        pad_before_arguments=(),
        pad_after_arguments=(),
        query_arguments=() if own else (1, 1, queries, 0, 0),
    )


def _length(length: Extent, read: Size) -> int | Size:
    """A number of tokens as a graph gets it: the number, or where it is read at run time."""
    return length if isinstance(length, int) else read
