"""Grids that only data holds: positions of packed tokens, such as the img_ids of image models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from freqopt.grid import Grid


def grids_of_positions(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Grid]:
    """The grids that arguments of a call hold the positions of, by the arguments' names."""
    given = {f"argument {i}": item for i, item in enumerate(args)} | dict(kwargs)
    found = {name: grid_of_positions(item) for name, item in given.items()}
    return {name: grid for name, grid in found.items() if grid is not None}


def grid_of_positions(ids: object) -> Grid | None:
    """The grid (t, h, w) of tokens whose positions a tensor holds, in raster order.

    ids: (N, axes) or (B, N, axes) of any dtype, or with the axes first, each axis of even steps;
    axes of one value only are left out, and missing ones have extent 1. Rows of one number each
    (text, whose axes count together) may come before and after. None for all else: other orders,
    several grids, a grid of one axis (a text's positions look the same), batch items that differ.
    """
    if not isinstance(ids, torch.Tensor) or ids.dim() not in (2, 3):
        return None
    if not 2 <= ids.shape[-1] <= 4:
        if not 2 <= ids.shape[0] <= 4:
            return None
        ids = ids.movedim(0, -1)
    if ids.dim() == 3 and not bool((ids == ids[:1]).all()):
        return None
    table = (ids[0] if ids.dim() == 3 else ids).cpu()
    found = _raster_of(table)
    if found is not None:
        return found
    text = (table == table[:, :1]).all(1).tolist()
    first, last = _run(text), _run(text[::-1])
    for start in {first, max(first - 1, 0)}:
        for stop in {last, max(last - 1, 0)}:
            found = _raster_of(table[start : len(table) - stop])
            if found is not None:
                return found
    return None


def _run(flags: Sequence[bool]) -> int:
    """How many flags at the beginning are set."""
    return next((i for i, flag in enumerate(flags) if not flag), len(flags))


def _raster_of(table: torch.Tensor) -> Grid | None:
    """The grid whose positions all rows of a table (N, axes) are, in order."""
    values = [column.unique() for column in table.unbind(-1)]
    axes = [i for i, found in enumerate(values) if len(found) > 1]
    if not 2 <= len(axes) <= 3:
        return None
    extents = [len(values[i]) for i in axes]
    if math.prod(extents) != table.shape[0]:
        return None
    raster = torch.cartesian_prod(*(values[i] for i in axes))
    steps = [values[i].diff() for i in axes]
    if not torch.equal(raster, table[:, axes]) or any((s != s[0]).any() for s in steps):
        return None
    t, h, w = [1] * (3 - len(axes)) + extents
    return t, h, w
