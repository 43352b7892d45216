"""Numbers of tokens as arguments of the op: constants, sizes read once, what is made of them."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from freqopt.passes.bodies import bring
from freqopt.passes.nodes import shape, value
from freqopt.passes.site import Argument, Product, Rest, Site, Size, Total, Value

READ_SIZE = "freqopt_read_size"
"""Marks the nodes that read sizes, so that all sites share them."""

REPLACED_BY = "freqopt_replaced_by"
"""Marks the node of an attention that was replaced with what stands in its place: another site,
described before, may have it among its operands."""


def standing(node: fx.Node) -> fx.Node:
    """What stands in the place of a node, if it was replaced."""
    while REPLACED_BY in node.meta:
        node = node.meta[REPLACED_BY]
    return node


def argument_node(site: Site, argument: Argument) -> int | fx.Node:
    """An extent as a graph argument; sizes are read where the tensor is made, once."""
    if isinstance(argument, Total):
        return sum_of(site, argument.parts)
    if isinstance(argument, Product):
        return _combined(site, argument.parts, operator.mul, 1)
    if isinstance(argument, Value):
        return bring(argument.node, site.node.graph)
    if not isinstance(argument, Size):
        assert isinstance(argument, int), argument
        return argument
    measured = standing(argument.node)
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


def rest_of(
    site: Site, query: fx.Node, grid: Sequence[int | fx.Node], others: int | fx.Node
) -> int | fx.Node:
    """How many tokens of a query (B, H, N, D) there are beside a grid and those on one side."""
    taken = functools.reduce(functools.partial(_computed, site, operator.mul), grid)
    taken = _computed(site, operator.add, taken, others)
    return _computed(site, operator.sub, size_of(site, query, 2), taken)


def pads_of(site: Site) -> tuple[int | fx.Node, int | fx.Node]:
    """How many keys lie before and after those of the queries."""
    before, after = (
        _more_keys(site) if Rest() in arguments else sum_of(site, arguments)
        for arguments in (site.pad_before_arguments, site.pad_after_arguments)
    )
    return before, after


def _more_keys(site: Site) -> int | fx.Node:
    """How many more keys there are than queries."""
    found = site.attention
    keys = size_of(site, found.key, -1 if found.key_transposed else -2)
    return _computed(site, operator.sub, keys, size_of(site, found.query, -2))


def sum_of(site: Site, parts: Sequence[Argument]) -> int | fx.Node:
    """The sum of extents."""
    return _combined(site, parts, operator.add, 0)


def times(site: Site, argument: Argument, number: int | fx.Node) -> int | fx.Node:
    """The product of an extent and a number that the graph has."""
    return _computed(site, operator.mul, argument_node(site, argument), number)


def _combined(
    site: Site, parts: Sequence[Argument], combine: Callable[[Any, Any], Any], neutral: int
) -> int | fx.Node:
    """The sum or the product of extents, constants without nodes of their own."""
    total: int | fx.Node = neutral
    for part in parts:
        argument = argument_node(site, part)
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


def size_of(site: Site, node: fx.Node, dim: int) -> int | fx.Node:
    """A size of a tensor."""
    size = shape(node)[dim]
    return (
        size if isinstance(size, int) else argument_node(site, Size(node, dim % len(shape(node))))
    )
