"""Puts something else in the place of a site's attention.

The new node goes right before the attention's own, never right after its operands: rotary positions
are often written into those in place after they were made.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode

from freqopt.errors import SiteError
from freqopt.passes.nodes import shape, value
from freqopt.passes.dimensions import same
from freqopt.passes.site import Argument, Site, Size


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
        raise SiteError(f"attention at {site.name}: {site.reason}; it cannot be replaced")
    graph, node = site.node.graph, site.node
    with graph.inserting_before(node):
        operands = site_operands(site)
        new = graph.call_function(target, (*operands, *extra_args))
        new.meta = dict(node.meta)
    _take_over(site, new)
    return new


def insert_split(
    gm: fx.GraphModule,
    site: Site,
    budget: Tensor,
    *,
    mid_band: bool,
    density: float,
    probes: int,
) -> fx.Node:
    """Put the op `freqopt::split_attention` in place of the attention of an eligible site.

    Args:
        budget: (2, H) float32 thresholds of the exact and the mid band; kept with the graph as a
            constant on the site's device.
        mid_band, density, probes: as the op takes them.

    Returns:
        The node of the op's output (B, H, N, D), which has taken all uses of the old one.
    """
    if not site.eligible:
        raise SiteError(f"attention at {site.name}: {site.reason}; it cannot be replaced")
    import freqopt.kernels.op  # noqa: F401  registers the op

    graph, node = site.node.graph, site.node
    owner = graph.owning_module
    assert owner is not None
    constant = add_constant(owner, graph, f"freqopt_budget_{site.name}", budget.to(site.device))
    with graph.inserting_before(node):
        query, key, values, key_mask, grid, before, after, scale = site_operands(site)
        arguments = (
            query, key, values, constant, key_mask, list(grid), before, after, scale, density,
            mid_band, probes,
        )  # fmt: skip
        call = graph.call_function(torch.ops.freqopt.split_attention.default, arguments)
        call.meta = _meta_of_call(node, call)
        new = graph.call_function(operator.getitem, (call, 0))
        new.meta = dict(node.meta)
        if "example_value" in node.meta and "example_value" in call.meta:
            new.meta["example_value"] = call.meta["example_value"][0]
    _take_over(site, new)
    return new


def add_constant(owner: fx.GraphModule, graph: fx.Graph, name: str, tensor: Tensor) -> fx.Node:
    """A node for a tensor that is kept with the module, made ahead of all computation."""
    attribute = re.sub(r"\W", "_", name)
    while hasattr(owner, attribute):
        attribute += "_"
    owner.register_buffer(attribute, tensor, persistent=False)
    first = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(first):
        node = graph.get_attr(attribute)
    mode = _fake_mode(graph)
    node.meta["example_value"] = tensor if mode is None else mode.from_tensor(tensor)
    return node


def site_operands(site: Site) -> tuple[Any, ...]:
    """(query, key, value, key_mask, grid, text_before, text_after, scale) as graph arguments.

    Must be called with the graph inserting right before the site's node.
    """
    found = site.attention
    grid = tuple(_argument(site, argument) for argument in site.grid_arguments)
    before = _sum(site, site.text_before_arguments)
    after = _sum(site, site.text_after_arguments)
    return found.query, found.key, found.value, _key_mask(site), grid, before, after, site.scale


def _argument(site: Site, argument: Argument) -> int | fx.Node:
    """An extent as a graph argument; sizes are read where the tensor is made, once."""
    if not isinstance(argument, Size):
        return argument
    for user in argument.node.users:
        if user.op == "call_method" and user.target == "size" and user.args[1:] == (argument.dim,):
            return user
    graph = site.node.graph
    place = argument.node
    while place.next.op == "placeholder":
        place = place.next
    with graph.inserting_after(place):
        node = graph.call_method("size", (argument.node, argument.dim))
    node.meta = {k: v for k, v in place.meta.items() if k in ("stack_trace", "nn_module_stack")}
    node.meta["example_value"] = shape(argument.node)[argument.dim]
    return node


def _sum(site: Site, parts: Sequence[Argument]) -> int | fx.Node:
    total: int | fx.Node = 0
    for part in parts:
        argument = _argument(site, part)
        if isinstance(total, int) and isinstance(argument, int):
            total += argument
        elif isinstance(total, int) and total == 0:
            total = argument
        else:
            graph = site.node.graph
            example = value(total) + value(argument)
            total = graph.call_function(operator.add, (total, argument))
            total.meta = dict(site.node.meta, example_value=example)
    return total


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
    sizes = (_size_of_batch(site), -1)
    expanded = graph.call_method("expand", (node, *sizes))
    expanded.meta = dict(site.node.meta, example_value=example.expand(batch, -1))
    return expanded


def _size_of_batch(site: Site) -> int | fx.Node:
    size = shape(site.attention.query)[0]
    return size if isinstance(size, int) else _argument(site, Size(site.attention.query, 0))


def _take_over(site: Site, new: fx.Node) -> None:
    old = site.node
    old.replace_all_uses_with(new)
    graph = old.graph
    for node in reversed(site.attention.nodes):
        if not node.users:
            graph.erase_node(node)


def _fake_mode(graph: fx.Graph) -> Any:
    return detect_fake_mode([value(node) for node in graph.nodes if node.op == "placeholder"])


def _meta_of_call(old: fx.Node, call: fx.Node) -> dict[str, Any]:
    """Meta of the op's node: that of the attention, with example values of all its outputs."""
    meta = dict(old.meta)
    mode = _fake_mode(old.graph)
    assert callable(call.target)
    if mode is not None:
        arguments = torch.fx.node.map_arg(call.args, value)
        with mode:
            meta["example_value"] = call.target(*arguments)
    return meta
