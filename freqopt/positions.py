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

    ids: (N, axes) or (B, N, axes) of any dtype, each axis of even steps; axes of one value only
    are left out, and missing ones have extent 1. None for all else: other orders, several grids,
    a grid of one axis (a text's positions look the same), and batch items that differ.
    """
    if not isinstance(ids, torch.Tensor) or ids.dim() not in (2, 3) or not 2 <= ids.shape[-1] <= 4:
        return None
    if ids.dim() == 3 and not bool((ids == ids[:1]).all()):
        return None
    table = (ids[0] if ids.dim() == 3 else ids).cpu()
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
