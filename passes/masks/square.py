"""Masks over pairs that say no more than one mask over keys: m & m^T, an outer product.

Padding is hidden from all queries, and queries that are padding see nothing, so that their output
is zero. A key mask together with zeros in these rows is therefore the same attention.
"""

from __future__ import annotations

import torch
from torch import fx

from freqopt.passes.axes.dimensions import product, same
from freqopt.passes.masks.memory import is_written
from freqopt.passes.nodes import argument, is_plain_index, known_int, operation, shape, tensor

KEEPS = {"bool", "to", "contiguous", "clone", "detach", "alias"}
SHAPES = {"view", "reshape", "unsqueeze", "getitem"}
SPREADS = {"expand", "repeat", "expand_as"}


def key_mask_of(mask: fx.Node) -> fx.Node | None:
    """The (B or 1, 1, 1, S) mask m of a (B or 1, 1, S, S) mask m & m^T, None for all others."""
    node = _unconverted(mask)
    sizes = shape(mask)
    if not _is_bool(mask):
        return None
    if node is None or len(sizes) != 4 or not same(sizes[1], 1) or not same(sizes[2], sizes[3]):
        return None
    if operation(node) not in ("bitwise_and", "logical_and", "mul") or len(node.args) < 2:
        return None
    for keys, queries in (node.args[:2], node.args[1::-1]):
        if not (isinstance(keys, fx.Node) and isinstance(queries, fx.Node)):
            return None
        source = _single_row(keys)
        if source is not None and _is_bool(source) and _is_column_of(queries, keys, source):
            return source
    return None


def repeated_row_of(mask: fx.Node) -> fx.Node | None:
    """The bool (B or 1, 1, 1, S) mask that a mask repeats for every head and query, or None."""
    node = _unconverted(mask)
    row = _single_row(node) if node is not None and _is_bool(mask) else None
    return row if row is not None and _is_bool(row) else None


def _is_bool(mask: fx.Node) -> bool:
    """Whether True means to attend; the same pairs as numbers would be added to the scores."""
    found = tensor(mask)
    return found is not None and found.dtype == torch.bool


def _unconverted(node: fx.Node) -> fx.Node | None:
    """The mask that was converted or copied; None if it was written to in one of its forms."""
    while not is_written(node):
        if operation(node) not in KEEPS or not isinstance(node.args[0], fx.Node):
            return node
        node = node.args[0]
    return None


def _single_row(node: fx.Node) -> fx.Node | None:
    """The (.., 1, 1, S) tensor that `node` repeats for every query."""
    if is_written(node):
        return None
    sizes = shape(node)
    if len(sizes) == 4 and same(sizes[1], 1) and same(sizes[2], 1):
        return node
    source = node.args[0] if operation(node) in SPREADS else None
    if not isinstance(source, fx.Node) or not same(shape(source)[-1], sizes[-1]):
        return None
    return _single_row(source)


def _is_column_of(queries: fx.Node, keys: fx.Node, row: fx.Node) -> bool:
    """Whether `queries` is the transpose of `keys`, or the same numbers along the other axis."""
    if is_written(queries):
        return False
    if operation(queries) in ("transpose", "swapaxes", "mT"):
        dims = [known_int(argument(queries, i + 1, f"dim{i}", default=i - 2)) for i in range(2)]
        if any(dim is None for dim in dims) or sorted(d % 4 for d in dims if d is not None) != [
            2,
            3,
        ]:
            return False
        return queries.args[0] in (keys, row)
    sizes = shape(queries)
    upright = len(sizes) == 4 and same(sizes[1], 1) and same(sizes[3], 1)
    return upright and _flat(queries) is _flat(row) and same(product(sizes), product(shape(row)))


def _flat(node: fx.Node) -> fx.Node:
    """The tensor that a node only gives another shape."""
    while not is_written(node) and (source := _unreshaped(node)) is not None:
        node = source
    return node


def _unreshaped(node: fx.Node) -> fx.Node | None:
    """The tensor whose entries a node gives another shape, in their order; None if it does more."""
    source = node.args[0] if operation(node) in SHAPES else None
    if not isinstance(source, fx.Node) or not same(product(shape(node)), product(shape(source))):
        return None
    return source if operation(node) != "getitem" or is_plain_index(node.args[1]) else None
