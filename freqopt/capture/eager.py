"""A model's whole call as one graph, and its attention replaced, without the compiler.

Hooks that move or cast weights, step caches and code that depends on data break the compiler's
graph. What runs in eager mode can still be written down, call by call of torch's functions, in the
form that the passes read; and `scaled_dot_product_attention` can be answered by something else.
"""

from __future__ import annotations

import math
import operator
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from freqopt.capture.given_ints import ints_in, plain, sizes_given
from freqopt.capture.looking import looking
from freqopt.capture.modes import take_off
from freqopt.capture.modules import names_of
from freqopt.capture.reads import as_read
from freqopt.passes.axes.layout import SIZED
from freqopt.passes.naming import Numbered

ATTENTION = "scaled_dot_product_attention"

TENSOR = "freqopt_tensor"
"""Under this name nodes that nothing wrote note the `id` of their tensor, such as a weight."""

READS_DATA = "freqopt_reads_data"
"""Under this name a graph that was written says whether the call has read data."""

Answer = Callable[[str, tuple[Any, ...], dict[str, Any]], Tensor | None]
"""Attention of a site, from the arguments of `scaled_dot_product_attention`; None: as it is."""


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Look at a model as if neither it nor a module in it were compiled in place, or served."""
    found = [m for m in model.modules() if m._compiled_call_impl is not None]
    kept = [module._compiled_call_impl for module in found]
    for module in found:
        module._compiled_call_impl = None
    try:
        with looking():
            yield
    finally:
        for module, compiled in zip(found, kept, strict=True):
            module._compiled_call_impl = compiled


class _ForcedEager:
    """Without a compiler until all threads that ask for it are done.

    The stance is one of the process: the first thread sets it and the last puts back what was
    before, as each by itself could put back another's, and nothing would ever be compiled again.
    """

    def __init__(self) -> None:
        self._lock, self._count = threading.Lock(), 0
        self._stance: Any = None

    def __enter__(self) -> None:
        with self._lock:
            if not self._count:
                self._stance = torch.compiler.set_stance("force_eager")
                self._stance.__enter__()
            self._count += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._count -= 1
            if not self._count:
                self._stance.__exit__(None, None, None)


_FORCED_EAGER = _ForcedEager()


class Modules:
    """The modules that are running, outermost first, each with the number of its call."""

    def __init__(self, model: nn.Module) -> None:
        self.names = names_of(model)
        self.running: list[tuple[nn.Module, int]] = []
        self.calls: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Note what runs in this thread while the body runs."""
        own = threading.get_ident()

        def enter(module: nn.Module, args: object) -> None:
            if threading.get_ident() != own:
                return
            call = self.calls.get(module, -1) + 1
            self.calls[module] = call
            self.running.append((module, call))

        def leave(module: nn.Module, args: object, output: object) -> None:
            if threading.get_ident() == own and any(m is module for m, _ in self.running):
                while self.running.pop()[0] is not module:
                    pass

        handles = [
            register_module_forward_pre_hook(enter),
            register_module_forward_hook(leave, always_call=True),
        ]
        try:
            with _FORCED_EAGER:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def stack(self) -> dict[str, tuple[str, type[nn.Module]]]:
        """As Dynamo notes it with a node."""
        known = [(m, call) for m, call in self.running if self.names.get(id(m))]
        return {
            f"{id(m)}@{call}" if call else str(id(m)): (self.names[id(m)], type(m))
            for m, call in known
        }


class Writer(TorchFunctionMode):
    """Writes the functions that are called into a graph like Dynamo's, of this call's sizes.

    reads: whether Python was told what is in a tensor, so that the graph may depend on it.
    """

    def __init__(self, model: nn.Module, modules: Modules) -> None:
        super().__init__()
        self.graph, self.modules = fx.Graph(), modules
        self.fake = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
        self.nodes = WeakIdKeyDictionary()
        self.reads = False
        self.kept = {id(t) for m in model.modules() for t in _tensors_of(m)}

    def __exit__(self, *error: object) -> None:
        take_off(self)

    def input(self, name: str, tensor: Tensor) -> None:
        """Begin the graph with a tensor."""
        self.nodes[tensor] = self._noted(self.graph.placeholder(name), tensor)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        read = as_read(func, args, kwargs)
        self.reads = self.reads or read.reads
        before = fx.node.map_aggregate((read.args, read.kwargs), self._node)
        result = func(*args, **kwargs)
        several = isinstance(result, (tuple, list)) and any(isinstance(t, Tensor) for t in result)
        if several or isinstance(result, Tensor) or _name(func) == "__setitem__":
            given = ints_in(before)
            node = node_of(
                self.graph, func, *(fx.node.map_aggregate(before, plain) if given else before)
            )
            self.end(self._noted(node, result), result)
            if given and isinstance(result, Tensor):
                with torch._C.DisableTorchFunction():
                    node.meta[SIZED] = sizes_given(func, *before, result.shape, given)
        return result

    def begin(self, func: Any, args: Any, kwargs: Any, example: Any) -> fx.Node:
        """Write a call before it is made. example: like what it will return, real or fake."""
        before = fx.node.map_aggregate((args, kwargs), self._node)
        return self._noted(node_of(self.graph, func, *before), example)

    def end(self, node: fx.Node, result: Any) -> None:
        """Know what a written call returned by its node.

        A tensor that was returned as it is, as a conversion to its own dtype does, stays what it
        was; one that was written into is what the call made of it.
        """
        if isinstance(result, Tensor):
            if result not in self.nodes or _writes(node):
                self.nodes[result] = node
                if (inner := _wrapped(result)) is not None:
                    self.nodes[inner] = node
        elif isinstance(result, (tuple, list)):
            for index, each in enumerate(result):
                if isinstance(each, Tensor):
                    part = self.graph.call_function(operator.getitem, (node, index))
                    self.nodes[each] = self._noted(part, each)

    @contextmanager
    def closed(self) -> Iterator[fx.GraphModule]:
        """The graph so far as the passes read it, without results; its code is never run."""
        _inputs_first(self.graph)
        output = self.graph.output(())
        gm = fx.GraphModule(nn.Module(), fx.Graph())
        gm._graph = self.graph  # not every target can be written as code
        self.graph.owning_module = gm
        try:
            yield gm
        finally:
            self.graph.erase_node(output)

    def _node(self, item: Any) -> Any:
        """The node of a tensor that is an argument; a new one where nothing wrote it."""
        if not isinstance(item, Tensor):
            return item
        if item not in self.nodes:
            if isinstance(item, nn.Parameter) or id(item) in self.kept:
                node = self.graph.placeholder(f"p_{len(self.nodes)}_")
            else:
                node = self.graph.call_function(torch.empty, (tuple(item.shape),))
            self.nodes[item] = self._noted(node, item)
            node.meta[TENSOR] = id(item)
        return self.nodes[item]

    def _noted(self, node: fx.Node, result: Any) -> fx.Node:
        node.meta["nn_module_stack"] = self.modules.stack()
        if isinstance(result, Tensor):
            node.meta["example_value"] = self._example(result)
        elif isinstance(result, (tuple, list)):
            made = pytree.tree_map_only(Tensor, self._example, tuple(result))
            node.meta["example_value"] = made
        return node

    def _example(self, tensor: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            stride = tensor.stride() if tensor.layout is torch.strided else ()
            made = torch.empty_strided(
                tensor.shape, stride or _dense(tensor.shape), dtype=tensor.dtype, device="meta"
            )
            # Asking the mode for an empty tensor takes eight times as long.
            example = FakeTensor(self.fake, made, tensor.device)
            if not isinstance(tensor, nn.Parameter):
                return example
            with self.fake:
                return nn.Parameter(example, False)


def node_of(graph: fx.Graph, func: Any, args: Any, kwargs: Any) -> fx.Node:
    """A node for a call of one of torch's functions, at the end of a graph, as Dynamo has it."""
    name = _name(func)
    if name == "__get__":  # a property, such as T
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        return graph.call_function(getattr, (args[0], attribute))
    if name.startswith("__"):
        plain = name.strip("_").replace("div", "truediv").replace("truetruediv", "truediv")
        plain = plain.replace("floortruediv", "floordiv")
        swapped = getattr(operator, plain[1:], None) if plain.startswith("r") else None
        if swapped is not None and getattr(operator, plain, None) is None:
            return graph.call_function(swapped, (args[1], args[0]))
        target = getattr(operator, plain, None) or getattr(operator, f"{plain}_", None)
        if target is not None:
            return graph.call_function(target, tuple(args), kwargs)
    if getattr(torch.Tensor, name, None) is getattr(func, "__wrapped__", func):
        return graph.call_method(name, tuple(args), kwargs)
    return graph.call_function(func, tuple(args), kwargs)


def _wrapped(tensor: Tensor) -> Tensor | None:
    """The one tensor of the same shape that a wrapper holds, as of a collective under way."""
    names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else ()
    held = [getattr(tensor, name) for name in names]
    if len(held) == 1 and isinstance(held[0], Tensor) and held[0].shape == tensor.shape:
        return held[0]
    return None


def _dense(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


@contextmanager
def writing(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Writer]:
    """Write down what runs while the body runs, which is one call of a model with such arguments.

    The graph begins with the tensors among them, in order.
    """
    modules = Modules(model)
    writer = Writer(model, modules)
    for path, leaf in pytree.tree_flatten_with_path((tuple(args), dict(kwargs)))[0]:
        if isinstance(leaf, Tensor):
            name = "_".join(str(getattr(key, "key", getattr(key, "idx", ""))) for key in path[1:])
            writer.input(f"l_{name}_", leaf)
    with modules.watched(), writer:
        yield writer


def written(
    model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[fx.GraphModule, Any]:
    """The graph of one call of a model in eager mode, and what the call returned.

    Its nodes carry example values and the modules that they are in, as in Dynamo's graphs. Inside
    `torch.no_grad`.
    """
    with uncompiled(model), writing(model, args, kwargs) as writer:
        output = model(*args, **kwargs)
    results = [writer.nodes[t] for t in pytree.tree_leaves(output) if _is_known(t, writer)]
    _inputs_first(writer.graph)
    writer.graph.output(tuple(results))
    gm = fx.GraphModule(nn.Module(), fx.Graph())
    gm._graph = writer.graph  # its code is never run, and not every target can be written as code
    writer.graph.owning_module = gm
    gm.meta[READS_DATA] = writer.reads
    return gm, output


def answered(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], answer: Answer) -> Any:
    """What a model returns in eager mode where something else computes its attention."""
    modules = Modules(model)
    with uncompiled(model), modules.watched(), _Answering(modules, answer):
        return model(*args, **kwargs)


class _Answering(TorchFunctionMode):
    def __init__(self, modules: Modules, answer: Answer) -> None:
        super().__init__()
        self.modules, self.answer = modules, answer
        self.numbered = Numbered(modules.names)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _name(func) == ATTENTION:
            name = self.numbered.of(self.modules.stack())
            with torch._C.DisableTorchFunction():
                found = self.answer(name, args, kwargs)
            if found is not None:
                return found
        return func(*args, **kwargs)


def _is_known(item: Any, writer: Writer) -> bool:
    return isinstance(item, Tensor) and item in writer.nodes


def _name(func: Any) -> str:
    return str(getattr(func, "__name__", ""))


def _writes(node: fx.Node) -> bool:
    """Whether a call that returns one of its arguments has written into it."""
    name = node.target if isinstance(node.target, str) else _name(node.target)
    return name.endswith("_") or hasattr(operator, f"__{name}__") or "out" in node.kwargs


def _tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Tensors that a module keeps, registered or not."""
    for item in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
        for each in item if isinstance(item, (tuple, list)) else (item,):
            if isinstance(each, Tensor):
                yield each


def _inputs_first(graph: fx.Graph) -> None:
    """Move weights, which are met on the way, to the other inputs of the graph."""
    first = next((node for node in graph.nodes if node.op != "placeholder"), None)
    if first is None:
        return
    for node in graph.find_nodes(op="placeholder"):
        if first < node:
            first.prepend(node)
