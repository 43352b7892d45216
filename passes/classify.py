"""What kind of attention a site is, on which grid, and whether its kind and mask allow a split.

The answer comes from the token axes of queries and keys, never from their lengths.
"""

from __future__ import annotations

import torch
from torch import fx

from freqopt.passes.axes.dimensions import Axis, axis_size, hint, product, same
from freqopt.passes.axes.graph_axes import Dimensions
from freqopt.passes.axes.grid import Said, infer_layout
from freqopt.passes.axes.layout import Layout, many_keys, pad_queries
from freqopt.passes.axes.operands import length_of_keys, operands_of
from freqopt.passes.axes.parts import together
from freqopt.passes.axes.provenance import (
    alike,
    is_lost,
    is_projection,
    kind_of_axes,
    place_in,
    same_lattices,
    split_batch,
)
from freqopt.passes.masks.added import shown_by
from freqopt.passes.masks.masks import hides_nothing, mask_problem
from freqopt.passes.masks.square import key_mask_of, repeated_row_of
from freqopt.passes.nodes import VIEWS, operation, shape, tensor
from freqopt.passes.reasons import Reason, Why
from freqopt.passes.site import Attention, Extent, Kind

PLACING = {
    *("cat", "concat", "concatenate", "stack", "setitem", "copy_", "where", "roll", "clone"),
    *(
        "index_copy",
        "index_copy_",
        "index_put",
        "index_put_",
        "scatter",
        "scatter_",
        "index_select",
    ),
    *("slice_scatter", "select_scatter", "contiguous", "to", "repeat", "expand"),
}
"""Operations that put tensors together, or copies of them elsewhere."""

OF_OTHERS = {Reason.CROSS, Reason.OTHER_KEYS, Reason.OTHER_VALUES, Reason.LENGTHS}
"""Reasons that a cache has among its keys, where the queries' own tokens are among them too."""


def came_ready_made(node: fx.Node) -> bool:
    """Whether a tensor was projected outside the graph, and at most normed and turned in it."""
    seen, pending = {node}, [node]
    while pending:
        reached = pending.pop()
        if is_projection(reached):
            return False
        sources = [source for source in reached.all_input_nodes if source not in seen]
        seen.update(sources)
        pending += sources
    return any(each.op == "placeholder" for each in seen)


def holds_ready_made(node: fx.Node) -> bool:
    """Whether a tensor is put together of others, some of which enter the graph as they are."""
    seen, pending = {node}, [node]
    while pending:
        reached = pending.pop()
        if reached.op == "placeholder":
            held = tensor(reached)
            if held is not None and held.dim() > 2 and not isinstance(held, torch.nn.Parameter):
                return True
        elif operation(reached) in VIEWS or operation(reached) in PLACING:
            sources = [source for source in reached.all_input_nodes if source not in seen]
            seen.update(sources)
            pending += sources
    return False


def classify(
    attention: Attention, dimensions: Dimensions, said: Said
) -> tuple[Kind, Layout, Why | None]:
    """Kind and layout of an attention, and why it has to stay dense (None if it has not)."""
    kind, layout, why_not = _classify(attention, dimensions, said)
    if why_not is not None and why_not.reason in OF_OTHERS:
        lengths = shape(attention.query)[-2], length_of_keys(attention)
        if not same(*lengths) and holds_ready_made(attention.key):
            return "cross", Layout(), Reason.CACHE()
    return kind, layout, why_not


def _classify(
    attention: Attention, dimensions: Dimensions, said: Said
) -> tuple[Kind, Layout, Why | None]:
    query, key, values = operands_of(attention, dimensions)
    if query is None or key is None or values is None:
        return "other", Layout(), Reason.NO_AXES()
    tokens = query[-2]
    lost = is_lost(tokens) or is_lost(key[-2])
    if lost and not alike(tokens, key[-2]):
        kind = dimensions.provenance().kind(attention.query, attention.key)
    else:
        kind = kind_of_axes(tokens, key[-2])
    if kind == "cross":
        if all(came_ready_made(node) for node in (attention.query, attention.key)):
            return "other", Layout(), Reason.READY_MADE()
        if came_ready_made(attention.key):
            return kind, Layout(), Reason.CACHE()
        return kind, Layout(), Reason.CROSS()
    slices = [atom for batch in query[:-3] for atom in split_batch(batch, tokens)]
    if slices:
        axes = " x ".join(str(atom.size) for atom in slices)
        return "other", Layout(), Reason.SLICES(axes=axes)
    if kind == "other":
        kind, layout, why_not = _text_in_keys(tokens, key[-2], said, attention, dimensions)
    else:
        apart = together(tokens) if attention.mask is None and alike(tokens, key[-2]) else None
        if apart is not None:
            tokens = apart[0]
        layout = infer_layout(tokens, said, attention.node.graph, dimensions.positions)
        layout.pieces = () if apart is None else apart[1]
        why_not = layout.problem
        counts = axis_size(tokens), axis_size(key[-2])
        if not same(*counts):
            return "other", Layout(), Reason.LENGTHS(queries=counts[0], keys=counts[1])
        if said.grid is None and apart is None and not same_lattices(tokens, key[-2]):
            return "other", Layout(), Reason.KEY_ORDER()
        if layout.grid is not None:
            kind = "self" if layout.segments == (0, len(tokens)) else "joint"
    believed = is_lost(values[-2]) or (said.grid is not None and is_lost(key[-2]))
    if kind != "other" and not (alike(values[-2], key[-2]) or believed):
        return "other", Layout(), Reason.OTHER_VALUES()
    if why_not is None and layout.grid is not None and attention.mask is not None:
        shown = layout.shown or (layout.text_before, product(layout.grid))
        why_not = _settle_mask(attention, *shown)
    return kind, layout, why_not


def _text_in_keys(
    tokens: Axis,
    keys: Axis,
    said: Said,
    attention: Attention,
    dimensions: Dimensions,
) -> tuple[Kind, Layout, Why | None]:
    """Keys that are the queries' tokens and others: the op then gets queries of zeros for these."""
    start, graph = place_in(tokens, keys), attention.node.graph
    if start is None:
        return "other", Layout(), Reason.OTHER_KEYS()
    layout = infer_layout(keys, said, graph, dimensions.positions)
    if layout.problem is not None or layout.grid is None:
        return "text in keys", layout, layout.problem
    stop = start + len(tokens)
    if not start <= layout.segments[0] < layout.segments[1] <= stop:
        return "other", Layout(), Reason.OTHER_KEYS()
    pad_queries(layout, keys, start, stop, graph)
    others = hint(axis_size(keys) - axis_size(tokens))
    layout.problem = layout.problem or many_keys(others, hint(product(layout.grid)))
    return "text in keys", layout, layout.problem


def _settle_mask(attention: Attention, before: Extent, video: Extent) -> Why | None:
    """Bring a mask into the form that the op takes, or drop it; why that cannot be done."""
    mask = attention.mask
    assert mask is not None
    if hides_nothing(mask):
        attention.mask = None
        return None
    attention.mask = mask = shown_by(attention) or mask
    if (row := key_mask_of(mask)) is not None:
        attention.mask, attention.masks_queries = row, True
    elif (row := repeated_row_of(mask)) is not None:
        attention.mask = row
    return mask_problem(attention.mask or mask, before, video, shape(attention.query)[0])
