"""The operands of the op in the place of an attention: tensors (B, H, N, D), mask and layout."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from freqopt.passes.axes.dimensions import same
from freqopt.passes.nodes import shape, value
from freqopt.passes.rewrite.adding import add_function, faking, site_method
from freqopt.passes.rewrite.extents import (
    argument_node,
    pads_of,
    rest_of,
    size_of,
    standing,
    sum_of,
    times,
)
from freqopt.passes.site import Rest, Site


def site_operands(site: Site) -> tuple[Any, ...]:
    """(query, key, value, key_mask, grid, text_before, text_after, scale) as graph arguments.

    Must be called with the graph inserting right before the site's node.
    """
    tensors = [_prepared(site, node) for node in _four_dimensional(site)]
    grid = tuple(argument_node(site, argument) for argument in site.grid_arguments)
    if site.kept is not None:
        grid = (times(site, site.kept, grid[0]), *grid[1:])
    if Rest() in site.text_before_arguments:
        after = sum_of(site, site.text_after_arguments)
        before = rest_of(site, tensors[0], grid, after)
    else:
        before = sum_of(site, site.text_before_arguments)
        rest = Rest() in site.text_after_arguments
        after = (
            rest_of(site, tensors[0], grid, before)
            if rest
            else sum_of(site, site.text_after_arguments)
        )
    return (*tensors, _key_mask(site), grid, before, after, site.scale)


def _four_dimensional(site: Site) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Query, key and value as (B, H, N, D): keys upright, heads out of the batch."""
    found = site.attention
    query, key, values = (standing(node) for node in (found.query, found.key, found.value))
    if found.key_transposed:
        key = site_method(site, "transpose", key, -2, -1)
    if len(shape(query)) == 3:
        query = site_method(site, "unflatten", query, 0, (-1, site.heads))
        key, values = (
            site_method(site, "unflatten", n, 0, (-1, site.kv_heads)) for n in (key, values)
        )
    if site.pieces:
        query, key, values = (joined(site, x, site.pieces) for x in (query, key, values))
    if pads_queries(site):
        query = add_function(site.node.meta, F.pad, query, (0, 0, *pads_of(site)))
    return query, key, values


def pads_queries(site: Site) -> bool:
    """Whether there are keys without queries, which the op gets queries of zeros for."""
    return bool(site.pad_before_arguments or site.pad_after_arguments)


def joined(site: Site, node: fx.Node, pieces: Sequence[tuple[int, int]]) -> fx.Node:
    """Pieces (start, length) of a tensor (B, H, N, D), one after the other."""
    parts = [site_method(site, "narrow", node, 2, start, length) for start, length in pieces]
    graph = node.graph
    with faking(graph):
        example = torch.cat([value(part) for part in parts], 2)
    joined = graph.call_function(torch.cat, (parts, 2))
    joined.meta = dict(site.node.meta, example_value=example)
    return joined


def _prepared(site: Site, node: fx.Node) -> fx.Node:
    """An operand in the dtype that the attention runs in, with unit stride along head_dim.

    Under autocast `scaled_dot_product_attention` casts its operands itself; its replacement does
    not.
    """
    graph, example = site.node.graph, value(node)
    if example.dtype != site.dtype:
        node = graph.call_method("to", (node, site.dtype))
        example = example.to(site.dtype)
        node.meta = dict(site.node.meta, example_value=example)
    if not same(example.stride(-1), 1):
        node = graph.call_method("contiguous", (node,))
        node.meta = dict(site.node.meta, example_value=example.contiguous())
    return node


def _key_mask(site: Site) -> fx.Node | None:
    """The mask (B or 1, 1, 1, N) of a site as (B, N)."""
    mask = site.attention.mask
    if mask is None:
        return None
    graph, batch = site.node.graph, shape(site.attention.query)[0]
    example = value(mask)[:, 0, 0]
    node = graph.call_function(operator.getitem, (mask, (slice(None), 0, 0)))
    node.meta = dict(site.node.meta, example_value=example)
    if same(example.shape[0], batch):
        return node
    sizes = (size_of(site, site.attention.query, 0), -1)
    expanded = graph.call_method("expand", (node, *sizes))
    expanded.meta = dict(site.node.meta, example_value=example.expand(batch, -1))
    return expanded
