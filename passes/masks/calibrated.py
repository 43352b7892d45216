"""Masks of sites whose graph does not show how their tokens lie, where calibration saw that.

What was proven of the mask in the whole model is believed of one that has the same form, if its
values can be asked at every call whether it is as then.
"""

from __future__ import annotations

import torch
from torch import fx

from freqopt.passes.axes.dimensions import same
from freqopt.passes.masks.added import LOW, shown_by
from freqopt.passes.masks.masks import Range, hides_nothing
from freqopt.passes.masks.square import key_mask_of, repeated_row_of
from freqopt.passes.nodes import shape, tensor
from freqopt.passes.reasons import Reason, Why
from freqopt.passes.rewrite.adding import add_method
from freqopt.passes.site import Believed, Known, Site

NOTHING, KEYS, PAIRS = 0, 1, 2
"""Masks of a `Known`."""


def settle_mask(
    site: Site,
    known: Known,
    before: int,
    *,
    proven: bool = False,
    fixed: bool = False,
    asked: bool = False,
) -> Why | None:
    """Bring the mask into the form that the op takes, as calibration did; why that cannot be.

    proven: what is known of the mask was read from the graph of this very call, and not seen by
    calibration, so that its form does not matter, and its numbers are 0 or as good as -inf. fixed:
    the grid and what is before it are these numbers at all calls. asked: a mask's values are asked
    at every call, as `Site.believed` says.
    """
    found = site.attention
    mask = found.mask
    if mask is None or hides_nothing(mask):
        found.mask = None
        return None
    found.mask = mask = shown_by(found) or mask
    values, sizes = tensor(mask), shape(mask)
    if values is None:
        return Reason.MASK_NO_TENSOR()
    if values.dtype != torch.bool and not (proven and values.is_floating_point()):
        return Reason.MASK_ADDED(dtype=values.dtype)
    if values.dtype != torch.bool:
        with site.node.graph.inserting_before(site.node):
            found.mask = mask = add_method(site.node.meta, "gt", mask, LOW)
    if len(sizes) != 4 or not same(sizes[-1], site.key_length):
        return Reason.MASK_PAIRS(shape=sizes)
    row, shown = _row_of(site, mask, known.mask, before, proven)
    if row is None:
        return Reason.MASK_UNPROVEN()
    tokens = known.grid[0] * known.grid[1] * known.grid[2]
    if not (proven or (shown and fixed and Range(before, before + tokens).true(row))):
        if not asked:
            return Reason.MASK_UNPROVEN()
        site.believed = Believed(mask, known.mask)
    found.mask, found.masks_queries = row, known.mask == PAIRS
    return None


def _row_of(
    site: Site, mask: fx.Node, kind: int, before: int, proven: bool
) -> tuple[fx.Node | None, bool]:
    """The mask over keys that a mask of a kind comes to, and whether the graph shows that."""
    if kind == PAIRS:
        row = key_mask_of(mask)
        return (row, True) if row is not None else (_row(site, mask, before), False)
    if kind == KEYS:
        row = repeated_row_of(mask)
        values = tensor(mask)
        if row is None and values is not None and (proven or _is_one_row(values)):
            return _first_row(site, mask), False
        return row, True
    return None, False


def _row(site: Site, mask: fx.Node, at: int) -> fx.Node | None:
    """The mask over keys that a mask over pairs has for its first video token."""
    sizes = shape(mask)
    if not (same(sizes[1], 1) and same(sizes[2], sizes[3])):
        return None
    with site.node.graph.inserting_before(site.node):
        return add_method(site.node.meta, "narrow", mask, 2, at, 1)


def _is_one_row(mask: torch.Tensor) -> bool:
    """Whether all heads and queries read a mask (B, H, Q, K) from the same memory."""
    strides, sizes = mask.stride(), mask.shape
    return all(same(sizes[dim], 1) or same(strides[dim], 0) for dim in (1, 2))


def _first_row(site: Site, mask: fx.Node) -> fx.Node:
    """The mask over keys that a mask repeats for every head and query."""
    with site.node.graph.inserting_before(site.node):
        of_head = add_method(site.node.meta, "narrow", mask, 1, 0, 1)
        return add_method(site.node.meta, "narrow", of_head, 2, 0, 1)
