"""Puts something else in the place of a site's attention.

The new node goes right before the attention's own, never right after its operands: rotary positions
are often written into those in place after they were made.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from freqopt.errors import SiteError
from freqopt.passes.bodies import bring
from freqopt.passes.decision import Decision
from freqopt.passes.masks.writes import is_idle
from freqopt.passes.nodes import operation, shape, value
from freqopt.passes.rewrite.adding import (
    add_constant,
    add_function,
    add_method,
    faking,
    meta_of_call,
    site_method,
)
from freqopt.passes.rewrite.extents import REPLACED_BY, argument_node, pads_of, size_of
from freqopt.passes.rewrite.operands import joined, pads_queries, site_operands
from freqopt.passes.site import Site


def replace_site(
    gm: fx.GraphModule,
    site: Site,
    target: Callable[..., Any],
    extra_args: Sequence[Any] = (),
) -> fx.Node:
    """Call `target` in place of the attention of an eligible site.

    Args:
        gm: the graph the site was found in; call `gm.recompile()` when done.
        target: called as ``target(query, key, value, key_mask, grid, text_before, text_after,
            scale, *extra_args)`` with query (B, H, N, D), key and value (B, Hkv, N, D), key_mask
            (B, N) bool or None, grid (t, h, w) and returning (B, H, N, D).
        extra_args: more arguments, constants or nodes of the graph.

    Returns:
        The new node, which has taken all uses of the old one.

    Raises:
        SiteError: the site is not eligible.
    """
    if not site.eligible:
        raise SiteError(f"attention at {site.name}: {site.why}; it cannot be replaced")
    graph, node = site.node.graph, site.node
    with graph.inserting_before(node):
        operands = site_operands(site)
        new = graph.call_function(target, (*operands, *extra_args))
        new.meta = dict(node.meta, example_value=_example_of_result(site, operands[0]))
    _take_over(site, new)
    return new


class Inserted(NamedTuple):
    """Nodes of the op that stands where an attention was: its call, and its output (B, H, N, D)."""

    call: fx.Node
    output: fx.Node


def split_as_decided(gm: fx.GraphModule, decision: Decision) -> Inserted:
    """Put the op in the place of a site, with the budget that was decided on."""
    assert decision.budget is not None
    return insert_split(
        gm,
        decision.site,
        decision.budget,
        density=decision.density,
        probes=decision.probes,
        largest_chunk=decision.largest_chunk,
    )


def insert_split(
    gm: fx.GraphModule,
    site: Site,
    budget: Tensor | fx.Node,
    *,
    density: float,
    probes: int,
    largest_chunk: int = 0,
) -> Inserted:
    """Put the op `freqopt::split_attention` in place of the attention of an eligible site.

    Args:
        budget: (2, H) float32, the heads' thresholds and the chunks of their orders: a tensor, kept
            with the graph as constants on the site's device, or a node of the graph.
        density, probes: as the op takes them.
        largest_chunk: at least the largest of the chunks, 0 where all are in the grid's order.

    Returns:
        The op's nodes; the output has taken all uses of the attention.

    Raises:
        SiteError: the site is not eligible.
    """
    if not site.eligible:
        raise SiteError(f"attention at {site.name}: {site.why}; it cannot be replaced")
    import freqopt.kernels.at_call  # noqa: F401  registers this op and the other

    graph, node = site.node.graph, site.node
    threshold, chunks = _rows_of_budget(gm, site, budget, largest_chunk)
    ordering: tuple[Any, ...] = () if chunks is None else (chunks, largest_chunk)
    with graph.inserting_before(node):
        query, key, values, key_mask, grid, before, after, scale = site_operands(site)
        if site.query_arguments:
            layout = [argument_node(site, argument) for argument in site.query_arguments]
            ordering = (*(ordering or (None, 0)), None, None, layout)
        elif site.kept is not None and site.believed is not None and site.attention.masks_queries:
            ordering = (*(ordering or (None, 0)), site.believed.mask)
        arguments = (
            query,
            key,
            values,
            threshold,
            key_mask,
            list(grid),
            before,
            after,
            scale,
            density,
            probes,
            *ordering,
        )
        ops = torch.ops.freqopt
        op = ops.split_attention_at_call if site.at_call else ops.split_attention
        call = graph.call_function(op.default, arguments)
        call.meta = meta_of_call(node, call)
        new = graph.call_function(operator.getitem, (call, 0))
        new.meta = dict(node.meta)
        if "example_value" in call.meta:
            new.meta["example_value"] = call.meta["example_value"][0]
        if not pads_queries(site) and any(operation(user) == "view" for user in node.users):
            # The op's output is (B, N, H, D) in memory, which not every view can start from.
            new = site_method(site, "contiguous", new)
    _take_over(site, new)
    return Inserted(call, new)


def _rows_of_budget(
    gm: fx.GraphModule, site: Site, budget: Tensor | fx.Node, largest_chunk: int
) -> tuple[fx.Node, fx.Node | None]:
    """Nodes for the thresholds (H,) float32 and the key heads' chunks (Hkv,) int32, if any."""
    graph, share = site.node.graph, site.heads // site.kv_heads
    if isinstance(budget, fx.Node):  # a module's mark may stand around the body that it attends in
        budget = bring(budget, graph)
    budget = _of_own_heads(site, budget)
    if isinstance(budget, Tensor):
        name = f"freqopt_budget_{site.name}"
        threshold = add_constant(gm, graph, name, budget[0].to(site.device))
        if not largest_chunk:
            return threshold, None
        chunks = budget[1, ::share].to(site.device, torch.int32)
        return threshold, add_constant(gm, graph, f"freqopt_chunks_{site.name}", chunks)
    with graph.inserting_before(site.node):
        threshold = add_function(site.node.meta, torch.select, budget, 0, 0)
        if not largest_chunk:
            return threshold, None
        row = add_function(site.node.meta, torch.select, budget, 0, 1)
        first = add_method(site.node.meta, "unflatten", row, 0, (-1, share))
        first = add_method(site.node.meta, "select", first, 1, 0)
        return threshold, add_method(site.node.meta, "to", first, torch.int32)


def _of_own_heads(site: Site, budget: Tensor | fx.Node) -> Tensor | fx.Node:
    """A budget (2, H) of the heads that this process has, out of one for all of the model's."""
    sizes = shape(budget) if isinstance(budget, fx.Node) else tuple(budget.shape)
    if site.share is None or not site.share.heads or sizes[-1:] != (site.share.heads,):
        return budget
    numbers = site.share.numbers
    if isinstance(budget, Tensor):
        return budget[..., list(numbers)]
    first = numbers[0]
    with site.node.graph.inserting_before(site.node):
        if numbers == tuple(range(first, first + len(numbers))):
            return add_method(site.node.meta, "narrow", budget, 1, first, len(numbers))
        parts = [add_method(site.node.meta, "narrow", budget, 1, i, 1) for i in numbers]
        joined = site.node.graph.call_function(torch.cat, (parts, 1))
    with faking(site.node.graph):
        example = torch.cat([value(part) for part in parts], 1)
    joined.meta = dict(site.node.meta, example_value=example)
    return joined


def _example_of_result(site: Site, query: fx.Node) -> Any:
    """What attention over a query (B, H, N, D) makes."""
    example = value(query)
    return value(site.node) if example is None else example.to(site.dtype)


def _zero_hidden(site: Site, new: fx.Node) -> fx.Node:
    """The result with zeros for queries that the mask hides, (B, H, N, D).

    Of a mask that is not as it is believed to be no query is hidden: dense attention had it whole.
    """
    mask, graph = site.attention.mask, site.node.graph
    assert mask is not None
    with graph.inserting_before(new.next):
        shown = site_method(site, "transpose", mask, -2, -1)
        hidden = site_method(site, "logical_not", shown)
        if site.kept is not None:
            number = site_method(site, "mul", hidden, argument_node(site, site.kept))
            hidden = site_method(site, "bool", number)
        return site_method(site, "masked_fill", new, hidden, 0.0)


def _in_old_form(site: Site, new: fx.Node) -> fx.Node:
    """The result without the queries that were added, and with heads folded where they were."""
    if site.attention.masks_queries:
        new = _zero_hidden(site, new)
    if pads_queries(site):
        with site.node.graph.inserting_before(new.next):
            new = _cut(site, new)
    if site.pieces:
        with site.node.graph.inserting_before(new.next):
            new = joined(site, new, _in_place(site.pieces))
    if len(shape(site.node)) != 3:
        return new
    with site.node.graph.inserting_after(new):
        folded = site.node.graph.call_method("flatten", (new, 0, 1))
    folded.meta = dict(site.node.meta)
    return folded


def _in_place(pieces: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The pieces of what was put together, in the order that puts them back."""
    starts, at = {}, 0
    for start, length in pieces:
        starts[start] = at, length
        at += length
    return [starts[start] for start in sorted(starts)]


def _cut(site: Site, new: fx.Node) -> fx.Node:
    """The result at the queries of the model, (B, H, N, D)."""
    length = shape(site.attention.query)[-2]
    count = length if isinstance(length, int) else size_of(site, site.attention.query, -2)
    start, _ = pads_of(site)
    cut = site_method(site, "narrow", new, 2, start, count)
    if any(operation(user) == "view" for user in site.node.users):
        cut = site_method(site, "contiguous", cut)
    return cut


def _take_over(site: Site, new: fx.Node) -> None:
    old = site.node
    result = _in_old_form(site, new)
    old.replace_all_uses_with(result)
    old.meta[REPLACED_BY] = result
    graph = old.graph
    for node in reversed(site.attention.nodes):
        for user in [user for user in node.users if is_idle(user)]:
            _erase_idle(user)
        if not node.users:
            graph.erase_node(node)


def _erase_idle(node: fx.Node) -> None:
    for user in list(node.users):
        _erase_idle(user)
    node.graph.erase_node(node)
