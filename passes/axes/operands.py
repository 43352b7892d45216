"""Brings an attention's operands into one form, (batch, heads, tokens, head_dim), on paper.

Hand-written attention may fold heads into the batch and keep keys transposed. The axes are
regrouped here for reading; `rewrite` does the same to the tensors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from freqopt.passes.axes.dimensions import Axis, Shape, axis_size
from freqopt.passes.axes.graph_axes import Dimensions
from freqopt.passes.nodes import shape
from freqopt.passes.site import Attention, Extent


class Operands(NamedTuple):
    """Axes of query, key and value, four each; None where they are not known."""

    query: Shape | None
    key: Shape | None
    value: Shape | None


def operands_of(attention: Attention, dimensions: Dimensions) -> Operands:
    """Axes of the operands of an attention as (batch, heads, tokens, head_dim)."""
    query, key, value = (
        dimensions.of(n) for n in (attention.query, attention.key, attention.value)
    )
    if key is not None and attention.key_transposed:
        key = (*key[:-2], key[-1], key[-2])
    return Operands(*(unfold_heads(x) for x in (query, key, value)))


def unfold_heads(axes: Shape | None) -> Shape | None:
    """(batch * heads, tokens, head_dim) as four axes; four axes as they are."""
    if axes is None or len(axes) == 4:
        return axes
    if len(axes) != 3:
        return None
    batch, heads = split_heads(axes[0])
    return (batch, heads, *axes[1:])


def split_heads(folded: Axis) -> tuple[Axis, Axis]:
    """Batch and heads of a folded axis: heads are its last atom if that is static and no batch."""
    if len(folded) != 1 or not folded[0]:
        return folded, ()
    last = folded[0][-1]
    if not isinstance(last.size, int) or (last.origin == "data" and last.root[1] == 0):
        return folded, ()
    return (folded[0][:-1],), (folded[0][-1:],)


def heads_of(attention: Attention, operands: Operands) -> tuple[int, int, int] | None:
    """(heads, key heads, head_dim), None if the operands have another form or dynamic heads."""
    sizes = [shape(n) for n in (attention.query, attention.key, attention.value)]
    if len({len(s) for s in sizes}) != 1 or len(sizes[0]) not in (3, 4):
        return None
    if len(sizes[0]) == 4:
        found = [sizes[0][1], sizes[1][1], sizes[0][3]]
    elif operands.query is None or operands.key is None:
        return None
    else:
        heads = [axis_size(x[1]) for x in (operands.query, operands.key)]
        found = [*heads, sizes[0][-1]]
    if any(isinstance(size, torch.SymInt) for size in found):
        return None
    return int(found[0]), int(found[1]), int(found[2])


def length_of_keys(attention: Attention) -> Extent:
    """Number of keys."""
    return shape(attention.key)[-1 if attention.key_transposed else -2]
