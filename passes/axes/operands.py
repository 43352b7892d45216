"""Brings an attention's operands into one form, (batch, heads, tokens, head_dim), on paper.

Hand-written attention may fold heads into the batch and keep keys transposed. The axes are
regrouped here for reading; `rewrite` does the same to the tensors.
"""

from __future__ import annotations

from typing import NamedTuple

from freqopt.passes.axes.dimensions import Axis, Shape, axis_size, hint
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


def heads_of(attention: Attention, operands: Operands) -> tuple[Extent, Extent, Extent] | None:
    """(heads, key heads, head_dim), None if the operands have another form or heads are not known.

    They are symbols where one graph may serve modules of several numbers of heads.
    """
    sizes = [shape(n) for n in (attention.query, attention.key, attention.value)]
    if len({len(s) for s in sizes}) != 1 or len(sizes[0]) not in (3, 4):
        return None
    if len(sizes[0]) == 4:
        found = (sizes[0][1], sizes[1][1], sizes[0][3])
    elif operands.query is None or operands.key is None:
        return None
    else:
        heads, kv_heads = (axis_size(x[1]) for x in (operands.query, operands.key))
        found = (heads, kv_heads, sizes[0][-1])
    return None if any(hint(size) is None for size in found) else found


def settled_heads(found: tuple[Extent, Extent, Extent]) -> tuple[int, int, int]:
    """Heads as numbers. Guards keep symbols so: a module of others compiles anew."""
    heads, kv_heads, head_dim = map(int, found)
    return heads, kv_heads, head_dim


def scale_of(attention: Attention, head_dim: int) -> float:
    """The factor of the logits; 1 where nothing is known of the heads."""
    if attention.scale is not None:
        return attention.scale
    return float(head_dim) ** -0.5 if head_dim else 1.0


def length_of_keys(attention: Attention) -> Extent:
    """Number of keys."""
    return shape(attention.key)[-1 if attention.key_transposed else -2]
