"""Adds nodes to a graph, each with an example of its value, and constants that it keeps."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from freqopt.passes.nodes import value
from freqopt.passes.site import Site


def add_method(meta: Mapping[str, Any], name: str, node: fx.Node, *arguments: Any) -> fx.Node:
    """A call of a tensor method, where the graph inserts, with its example value beside `meta`."""
    with faking(node.graph):
        example = getattr(value(node), name)(*fx.node.map_arg(arguments, value))
    made = node.graph.call_method(name, (node, *arguments))
    made.meta = dict(meta, example_value=example)
    return made


def add_function(
    meta: Mapping[str, Any], function: Callable[..., Any], *arguments: Any, **options: Any
) -> fx.Node:
    """A call of a function on nodes, where the graph inserts, as `add_method`."""
    graph = next(a for a in arguments if isinstance(a, fx.Node)).graph
    with faking(graph):
        example = function(*fx.node.map_arg(arguments, value), **fx.node.map_arg(options, value))
    made = graph.call_function(function, arguments, options)
    made.meta = dict(meta, example_value=example)
    return made


def site_method(site: Site, name: str, node: fx.Node, *arguments: Any) -> fx.Node:
    """As `add_method`, with what else the attention's node has in its meta."""
    return add_method(site.node.meta, name, node, *arguments)


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


@contextmanager
def faking(graph: fx.Graph) -> Iterator[None]:
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


def meta_of_call(old: fx.Node, call: fx.Node) -> dict[str, Any]:
    """Meta of the op's node: that of the attention, with example values of all its outputs."""
    meta = dict(old.meta)
    mode = fake_mode(old.graph)
    assert callable(call.target)
    if mode is not None:
        arguments = torch.fx.node.map_arg(call.args, value)
        with mode:
            meta["example_value"] = call.target(*arguments)
    return meta
