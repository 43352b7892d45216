"""Grids that only data holds: positions of packed tokens, such as the img_ids of image models.

A table of positions has a row for every token. The rows of a grid are in raster order, whatever
its steps; rows of text, and of other grids such as a reference image, may come before and after.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from freqopt.grid import Grid

Table = npt.NDArray[np.float64]
MOST_AXES = 4


class Layout(NamedTuple):
    """A grid (t, h, w) among the tokens of one axis, and how many others lie around it."""

    before: int
    grid: Grid
    after: int


class Lattice(NamedTuple):
    """Rows of a table that are a grid in raster order: the first of them, and the grid."""

    start: int
    grid: Grid

    @property
    def size(self) -> int:
        """Number of rows."""
        t, h, w = self.grid
        return t * h * w


def grids_of_positions(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Grid]:
    """The grids that arguments of a call hold the positions of, by the arguments' names."""
    given = {f"argument {i}": item for i, item in enumerate(args)} | dict(kwargs)
    found = {name: layout_of_positions(item) for name, item in given.items()}
    return {name: layout.grid for name, layout in found.items() if layout is not None}


def grid_of_positions(ids: object) -> Grid | None:
    """The main grid of `layout_of_positions`."""
    found = layout_of_positions(ids)
    return None if found is None else found.grid


def layout_of_positions(ids: object) -> Layout | None:
    """The main grid of tokens whose positions a tensor holds, and the tokens around it.

    ids: (N, axes) or (B, N, axes) of any real dtype, or with the axes before the tokens, and also
    with a pair of bounds for each; 2 to 4 axes, of any steps. Axes of one value are left out, and
    missing ones have extent 1. Of several grids the main one is that which has more tokens than all
    others together. None for all else: other orders, a grid of one axis (a text's positions look
    the same), batch items that differ.
    """
    if not isinstance(ids, torch.Tensor) or ids.dtype == torch.bool or ids.is_complex():
        return None
    if ids.is_meta:
        return None
    if ids.dim() == 4 and ids.shape[-1] == 2:
        ids = ids[..., 0]
    if ids.dim() not in (2, 3) or max(ids.shape) < 4 or not ids.numel():
        return None
    axes_last = list(_tables(ids.detach().cpu().double()))
    return next((found for table in axes_last if (found := layout_of_rows(table))), None)


def _tables(ids: torch.Tensor) -> Iterator[Table]:
    """The tables (N, axes) that a tensor may be."""
    for dim in dict.fromkeys((ids.dim() - 1, 0, 1)):
        if 2 <= ids.shape[dim] <= MOST_AXES:
            moved = ids.movedim(dim, -1)
            if moved.dim() == 2:
                yield moved.numpy()
            elif bool((moved == moved[:1]).all()):
                yield moved[0].numpy()


def layout_of_rows(table: Table) -> Layout | None:
    """The main grid of a table of positions (N, axes), one row for every token."""
    found = lattices_of(table)
    if not found:
        return None
    main = max(found, key=lambda lattice: lattice.size)
    if 2 * main.size <= sum(lattice.size for lattice in found):
        return None
    return Layout(main.start, main.grid, len(table) - main.start - main.size)


def lattices_of(table: Table) -> list[Lattice]:
    """All grids of two axes or three in a table (N, axes), from the first row to the last."""
    if len(table) < 4:
        return []
    changed, up = table[1:] != table[:-1], table[1:] > table[:-1]
    steps = (changed.sum(1) == 1) & (changed & up).any(1)
    column = np.where(steps, changed.argmax(1), -1)
    ends = np.flatnonzero(np.append(column[1:] != column[:-1], True))
    widths = ends[np.searchsorted(ends, np.arange(len(column)))] - np.arange(len(column)) + 2
    rows = np.flatnonzero(steps)
    rows = rows[rows + widths[rows] < len(table)]
    below = table[rows + widths[rows]] != table[rows]
    found: list[Lattice] = []
    stop = 0
    for row in rows[below.sum(1) == 1]:
        if row >= stop:
            lattice = _lattice_at(table, int(row), int(widths[row]))
            if lattice is not None:
                found.append(lattice)
                stop = lattice.start + lattice.size
    return found


def _lattice_at(table: Table, start: int, width: int) -> Lattice | None:
    """The largest grid that begins at a row, whose fastest axis has `width` entries."""
    height = _repeats(table[start:], width)
    if height < 2:
        return None
    return Lattice(start, (_repeats(table[start:], height * width), height, width))


def _repeats(table: Table, size: int) -> int:
    """How often the first `size` rows come again, each time further along one more axis."""
    count = len(table) // size
    blocks = table[: count * size].reshape(count, size, -1)
    inner = (blocks[0] != blocks[0, 0]).any(0)
    firsts = blocks[:, 0]
    moves = (firsts[1:] != firsts[:-1]) & ~inner
    if count < 2 or moves[0].sum() != 1:
        return 1
    axis = int(moves[0].argmax())
    same = blocks == blocks[0]
    same[:, :, axis] = blocks[:, :, axis] == firsts[:, None, axis]
    further = np.append(True, firsts[1:, axis] > firsts[:-1, axis])
    wrong = np.flatnonzero(~(same.all((1, 2)) & further))
    return int(wrong[0]) if len(wrong) else count
