"""Puts something else in the place of a site's attention.

The new node goes right before the attention's own, never right after its operands: rotary positions
are often written into those in place after they were made.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from freqopt.errors import SiteError
from freqopt.passes.axes.dimensions import same
from freqopt.passes.bodies import bring
from freqopt.passes.decision import Decision
from freqopt.passes.masks.writes import is_idle
from freqopt.passes.nodes import operation, shape, value
from freqopt.passes.site import Argument, Product, Rest, Site, Size, Total, Value

READ_SIZE = "freqopt_read_size"
"""Marks the nodes that read sizes, so that all sites share them."""

REPLACED_BY = "freqopt_replaced_by"
"""Marks the node of an attention that was replaced with what stands in its place: another site,
described before, may have it among its operands."""


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
            layout = [_argument(site, argument) for argument in site.query_arguments]
            ordering = (*(ordering or (None, 0)), None, None, layout)
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
        call.meta = _meta_of_call(node, call)
        new = graph.call_function(operator.getitem, (call, 0))
        new.meta = dict(node.meta)
        if "example_value" in call.meta:
            new.meta["example_value"] = call.meta["example_value"][0]
        if not pads_queries(site) and any(operation(user) == "view" for user in node.users):
            # The op's output is (B, N, H, D) in memory, which not every view can start from.
            new = _method(site, "contiguous", new)
    _take_over(site, new)
    return Inserted(call, new)


def _rows_of_budget(
    gm: fx.GraphModule, site: Site, budget: Tensor | fx.Node, largest_chunk: int
) -> tuple[fx.Node, fx.Node | None]:
    """Nodes for the thresholds (H,) float32 and the key heads' chunks (Hkv,) int32, if any."""
    graph, share = site.node.graph, site.heads // site.kv_heads
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
    with _faking(site.node.graph):
        example = torch.cat([value(part) for part in parts], 1)
    joined.meta = dict(site.node.meta, example_value=example)
    return joined


def add_constant(gm: fx.GraphModule, graph: fx.Graph, name: str, tensor: Tensor) -> fx.Node:
    """A node for a tensor that is kept with the module, made ahead of all computation.

    gm: the graph module that the backend was given; `graph` may be that of a body inside it.
    """
    owner = graph.owning_module
    assert owner is not None
    attribute = re.sub(r"\W", "_", name)
    while hasattr(owner, attribute):
        attribute += "_"
    # Persistent: the names of the others are a set, whose order differs from process to process,
    # and with it the key of AOTAutograd's cache.
    owner.register_buffer(attribute, tensor)
    _declare_source(gm, owner, attribute)
    first = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(first):
        node = graph.get_attr(attribute)
    mode = fake_mode(graph)
    node.meta["example_value"] = tensor if mode is None else mode.from_tensor(tensor)
    return node


def _declare_source(gm: fx.GraphModule, owner: fx.GraphModule, attribute: str) -> None:
    """Tell AOTAutograd where a buffer comes from, which it demands of Dynamo's graphs."""
    sources = getattr(gm, "_param_name_to_source", None)
    if sources is None:
        return
    from torch._dynamo.source import ConstantSource

    prefix = next((name for name, module in gm.named_modules() if module is owner), "")
    name = f"{prefix}.{attribute}" if prefix else attribute
    sources[name] = ConstantSource(source_name=name)


def site_operands(site: Site) -> tuple[Any, ...]:
    """(query, key, value, key_mask, grid, text_before, text_after, scale) as graph arguments.

    Must be called with the graph inserting right before the site's node.
    """
    tensors = [_prepared(site, node) for node in _four_dimensional(site)]
    grid = tuple(_argument(site, argument) for argument in site.grid_arguments)
    if Rest() in site.text_before_arguments:
        after = _sum(site, site.text_after_arguments)
        before = _rest(site, tensors[0], grid, after)
    else:
        before = _sum(site, site.text_before_arguments)
        rest = Rest() in site.text_after_arguments
        after = (
            _rest(site, tensors[0], grid, before) if rest else _sum(site, site.text_after_arguments)
        )
    return (*tensors, _key_mask(site), grid, before, after, site.scale)


def _four_dimensional(site: Site) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Query, key and value as (B, H, N, D): keys upright, heads out of the batch."""
    found = site.attention
    query, key, values = (_standing(node) for node in (found.query, found.key, found.value))
    if found.key_transposed:
        key = _method(site, "transpose", key, -2, -1)
    if len(shape(query)) == 3:
        query = _method(site, "unflatten", query, 0, (-1, site.heads))
        key, values = (_method(site, "unflatten", n, 0, (-1, site.kv_heads)) for n in (key, values))
    if site.pieces:
        query, key, values = (_joined(site, x, site.pieces) for x in (query, key, values))
    if pads_queries(site):
        before, after = _sum(site, site.pad_before_arguments), _sum(site, site.pad_after_arguments)
        query = add_function(site.node.meta, F.pad, query, (0, 0, before, after))
    return query, key, values


def _standing(node: fx.Node) -> fx.Node:
    """What stands in the place of a node, if it was replaced."""
    while REPLACED_BY in node.meta:
        node = node.meta[REPLACED_BY]
    return node


def pads_queries(site: Site) -> bool:
    """Whether there are keys without queries, which the op gets queries of zeros for."""
    return bool(site.pad_before_arguments or site.pad_after_arguments)


def _example_of_result(site: Site, query: fx.Node) -> Any:
    """What attention over a query (B, H, N, D) makes."""
    example = value(query)
    return value(site.node) if example is None else example.to(site.dtype)


def _method(site: Site, name: str, node: fx.Node, *arguments: Any) -> fx.Node:
    return add_method(site.node.meta, name, node, *arguments)


def add_method(meta: Mapping[str, Any], name: str, node: fx.Node, *arguments: Any) -> fx.Node:
    """A call of a tensor method, where the graph inserts, with its example value beside `meta`."""
    with _faking(node.graph):
        example = getattr(value(node), name)(*fx.node.map_arg(arguments, value))
    made = node.graph.call_method(name, (node, *arguments))
    made.meta = dict(meta, example_value=example)
    return made


def add_function(
    meta: Mapping[str, Any], function: Callable[..., Any], *arguments: Any, **options: Any
) -> fx.Node:
    """A call of a function on nodes, where the graph inserts, as `add_method`."""
    graph = next(a for a in arguments if isinstance(a, fx.Node)).graph
    with _faking(graph):
        example = function(*fx.node.map_arg(arguments, value), **fx.node.map_arg(options, value))
    made = graph.call_function(function, arguments, options)
    made.meta = dict(meta, example_value=example)
    return made


def _zero_hidden(site: Site, new: fx.Node) -> fx.Node:
    """The result with zeros for queries that the mask hides, (B, H, N, D)."""
    mask, graph = site.attention.mask, site.node.graph
    assert mask is not None
    with graph.inserting_before(new.next):
        shown = _method(site, "transpose", mask, -2, -1)
        hidden = _method(site, "logical_not", shown)
        return _method(site, "masked_fill", new, hidden, 0.0)


def _in_old_form(site: Site, new: fx.Node) -> fx.Node:
    """The result without the queries that were added, and with heads folded where they were."""
    if site.attention.masks_queries:
        new = _zero_hidden(site, new)
    if pads_queries(site):
        with site.node.graph.inserting_before(new.next):
            new = _cut(site, new)
    if site.pieces:
        with site.node.graph.inserting_before(new.next):
            new = _joined(site, new, _in_place(site.pieces))
    if len(shape(site.node)) != 3:
        return new
    with site.node.graph.inserting_after(new):
        folded = site.node.graph.call_method("flatten", (new, 0, 1))
    folded.meta = dict(site.node.meta)
    return folded


def _joined(site: Site, node: fx.Node, pieces: Sequence[tuple[int, int]]) -> fx.Node:
    """Pieces (start, length) of a tensor (B, H, N, D), one after the other."""
    parts = [_method(site, "narrow", node, 2, start, length) for start, length in pieces]
    graph = node.graph
    with _faking(graph):
        example = torch.cat([value(part) for part in parts], 2)
    joined = graph.call_function(torch.cat, (parts, 2))
    joined.meta = dict(site.node.meta, example_value=example)
    return joined


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
    count = length if isinstance(length, int) else _size_of(site, site.attention.query, -2)
    start = _sum(site, site.pad_before_arguments)
    cut = _method(site, "narrow", new, 2, start, count)
    if any(operation(user) == "view" for user in site.node.users):
        cut = _method(site, "contiguous", cut)
    return cut


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


def _argument(site: Site, argument: Argument) -> int | fx.Node:
    """An extent as a graph argument; sizes are read where the tensor is made, once."""
    if isinstance(argument, Total):
        return _sum(site, argument.parts)
    if isinstance(argument, Product):
        return _combined(site, argument.parts, operator.mul, 1)
    if isinstance(argument, Value):
        return bring(argument.node, site.node.graph)
    if not isinstance(argument, Size):
        assert isinstance(argument, int), argument
        return argument
    measured = _standing(argument.node)
    for user in measured.users:
        if user.meta.get(READ_SIZE) == argument.dim:
            return bring(user, site.node.graph)
    graph = measured.graph
    place = measured
    while place.next.op == "placeholder":
        place = place.next
    with graph.inserting_after(place):
        node = graph.call_method("size", (measured, argument.dim))
    node.meta = {k: v for k, v in place.meta.items() if k in ("stack_trace", "nn_module_stack")}
    node.meta["example_value"] = shape(measured)[argument.dim]
    node.meta[READ_SIZE] = argument.dim
    return bring(node, site.node.graph)


def _rest(
    site: Site, query: fx.Node, grid: Sequence[int | fx.Node], others: int | fx.Node
) -> int | fx.Node:
    """How many tokens of a query (B, H, N, D) there are beside a grid and those on one side."""
    taken = functools.reduce(functools.partial(_computed, site, operator.mul), grid)
    taken = _computed(site, operator.add, taken, others)
    return _computed(site, operator.sub, _size_of(site, query, 2), taken)


def _sum(site: Site, parts: Sequence[Argument]) -> int | fx.Node:
    return _combined(site, parts, operator.add, 0)


def _combined(
    site: Site, parts: Sequence[Argument], combine: Callable[[Any, Any], Any], neutral: int
) -> int | fx.Node:
    """The sum or the product of extents, constants without nodes of their own."""
    total: int | fx.Node = neutral
    for part in parts:
        argument = _argument(site, part)
        if isinstance(total, int) and isinstance(argument, int):
            total = combine(total, argument)
        elif isinstance(total, int) and total == neutral:
            total = argument
        else:
            total = _computed(site, combine, total, argument)
    return total


def _computed(
    site: Site, combine: Callable[[Any, Any], Any], first: int | fx.Node, second: int | fx.Node
) -> int | fx.Node:
    """What a function makes of two extents, by a node unless both are constants."""
    example = combine(value(first), value(second))
    if isinstance(first, int) and isinstance(second, int):
        return int(example)
    made = site.node.graph.call_function(combine, (first, second))
    made.meta = dict(site.node.meta, example_value=example)
    return made


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
    sizes = (_size_of(site, site.attention.query, 0), -1)
    expanded = graph.call_method("expand", (node, *sizes))
    expanded.meta = dict(site.node.meta, example_value=example.expand(batch, -1))
    return expanded


def _size_of(site: Site, node: fx.Node, dim: int) -> int | fx.Node:
    size = shape(node)[dim]
    return size if isinstance(size, int) else _argument(site, Size(node, dim % len(shape(node))))


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


@contextmanager
def _faking(graph: fx.Graph) -> Iterator[None]:
    """Operations on example values make example values, of symbolic sizes too."""
    mode = fake_mode(graph)
    if mode is None:
        yield
        return
    with enable_python_dispatcher(), mode:
        yield


def fake_mode(graph: fx.Graph) -> FakeTensorMode | None:
    """The mode that made the example values.

    Not the tracing context's: that is already the mode of the backend to come.
    """
    for node in graph.nodes:
        found = value(node)
        if isinstance(found, FakeTensor):
            return found.fake_mode
    return None


def _meta_of_call(old: fx.Node, call: fx.Node) -> dict[str, Any]:
    """Meta of the op's node: that of the attention, with example values of all its outputs."""
    meta = dict(old.meta)
    mode = fake_mode(old.graph)
    assert callable(call.target)
    if mode is not None:
        arguments = torch.fx.node.map_arg(call.args, value)
        with mode:
            meta["example_value"] = call.target(*arguments)
    return meta
