"""Masks of sites whose graph does not show how their tokens lie, where calibration saw that.

What was proven of the mask in the whole model is believed of one that has the same form.
"""

from __future__ import annotations

import torch
from torch import fx

from freqopt.passes.axes.dimensions import same
from freqopt.passes.masks.masks import hides_nothing
from freqopt.passes.masks.square import key_mask_of, repeated_row_of
from freqopt.passes.nodes import shape, tensor
from freqopt.passes.reasons import Reason, Why
from freqopt.passes.rewrite.adding import add_method
from freqopt.passes.site import Known, Site

KEYS, PAIRS = 1, 2
"""Masks of a `Known`."""


def settle_mask(site: Site, known: Known, before: int, *, proven: bool = False) -> Why | None:
    """Bring the mask into the form that the op takes, as calibration did; why that cannot be.

    proven: what is known of the mask was read from the graph of this very call, and not seen by
    calibration, so that its form does not matter.
    """
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
    if known.mask == KEYS:
        row = repeated_row_of(mask)
        if row is None and (proven or _is_one_row(values)):
            row = _first_row(site, mask)
        if row is not None:
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


def _is_one_row(mask: torch.Tensor) -> bool:
    """Whether all heads and queries read a mask (B, H, Q, K) from the same memory."""
    strides, sizes = mask.stride(), mask.shape
    return all(same(sizes[dim], 1) or same(strides[dim], 0) for dim in (1, 2))


def _first_row(site: Site, mask: fx.Node) -> fx.Node:
    """The mask over keys that a mask repeats for every head and query."""
    with site.node.graph.inserting_before(site.node):
        of_head = add_method(site.node.meta, "narrow", mask, 1, 0, 1)
        return add_method(site.node.meta, "narrow", of_head, 2, 0, 1)
