"""A call of attention in eager mode: what it reads, what it computes, and a graph of it alone.

It is one function, or the last of several by hand that were put off (`by_hand.py`).
"""

from __future__ import annotations

import contextlib
import logging
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from freqopt.capture.eager import node_of
from freqopt.eager.by_hand import PutOff, Step, chain_of, computed, tensors_in
from freqopt.passes.axes.foreign import RULED, namespace_of
from freqopt.passes.decision import Decision
from freqopt.passes.find import Grids
from freqopt.passes.manager import rewrite
from freqopt.passes.site import Site
from freqopt.passes.spellings.schemas import PYTORCHS_OWN, read_call

FUNCTIONS = {"scaled_dot_product_attention", "multi_head_attention_forward"}
"""PyTorch's public functions that compute attention in one call."""

Function = Callable[..., Any]

QUERY_KEY_VALUE = 3
"""Tensors that attention takes at least."""

logger = logging.getLogger(__name__)


def may_be_attention(function: Any) -> bool:
    """Whether a function may be attention in one call, by what it is; shapes have to tell more."""
    if isinstance(function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        name = function.__name__.partition(".")[0]
        return namespace_of(function) not in RULED or PYTORCHS_OWN.match(name) is not None
    return getattr(function, "__name__", "") in FUNCTIONS


class Asked:
    """A call of attention. function: one that computes it, or the last of several by hand.

    form: what calls have in common that one graph serves. tensors: what it reads, in a fixed order.
    queries, keys: how many tokens of each it has.
    """

    def __init__(self, function: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self.function, self.args, self.kwargs = function, args, kwargs
        self.form = form_of_call(function, args, kwargs)
        self.tensors = tensors_in(args, kwargs)

    @property
    def queries(self) -> int:
        """Tokens."""
        return self.tensors[0].shape[-2]

    @property
    def keys(self) -> int:
        """Tokens."""
        return self.tensors[1].shape[-2]

    def is_attention(self) -> bool:
        """Whether it is, by the shapes and names of its arguments."""
        if getattr(self.function, "__name__", "") in FUNCTIONS:
            return True
        if len(self.tensors) < QUERY_KEY_VALUE:
            return False  # and it may do something, such as write down a time
        try:
            with faking() as mode:
                gm, _ = self.graph(mode, 1)
        except Exception as error:  # an operator need not work on tensors without values
            logger.info("%s is taken for no attention: %s", self.function, error)
            return False
        return any(read_call(node) for node in gm.graph.nodes if node.op == "call_function")

    def example(self) -> Any:
        """What it returns, without values."""
        return example_of(self.function, self.args, self.kwargs)

    def plainly(self) -> Any:
        """What it returns without the op."""
        return self.function(*self.args, **self.kwargs)

    def graph(self, mode: FakeTensorMode, heads: int) -> tuple[fx.GraphModule, fx.Node]:
        """A graph of the call, of its tensors and, as the last input, the budget (2, heads)."""
        graph = fx.Graph()
        leaves, tree = pytree.tree_flatten((tuple(self.args), dict(self.kwargs)))
        places = iter(_inputs(graph, mode, self.tensors))
        given = [next(places) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        budget = _budget(graph, heads, self.tensors)
        arguments, options = pytree.tree_unflatten(given, tree)
        node = graph.call_function(self.function, arguments, options)
        arguments, options = pytree.tree_unflatten(list(map(_example, given)), tree)
        example = node.meta["example_value"] = self.function(*arguments, **options)
        if isinstance(example, Tensor):
            graph.output(node)
        else:
            graph.output(tuple(_part(graph, node, i, each) for i, each in enumerate(example)))
        return fx.GraphModule(nn.Module(), graph), budget


class AskedByHand(Asked):
    """A product with values, and the calls before it that were put off."""

    def __init__(self, function: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self.function, self.args, self.kwargs = function, args, kwargs
        self.steps = chain_of(Step(function, args, kwargs))
        self.results = {
            id(t): t.step for step in self.steps for t in step.read if isinstance(t, PutOff)
        }
        read = {id(t): t for step in self.steps for t in step.read if not isinstance(t, PutOff)}
        self.tensors = list(read.values())
        numbers = {key: i for i, key in enumerate(read)}
        numbers |= {key: -1 - self.steps.index(s) for key, s in self.results.items() if s}
        self.form = tuple(
            (form_of_call(s.function, s.args, s.kwargs), tuple(numbers[id(t)] for t in s.read))
            for s in self.steps
        )

    @property
    def queries(self) -> int:
        """Rows of the weights."""
        return self._weights.shape[-2]

    @property
    def keys(self) -> int:
        """Columns of the weights."""
        return self._weights.shape[-1]

    @property
    def _weights(self) -> Tensor:
        return next(t for t in self.steps[-1].read if isinstance(t, PutOff))

    def is_attention(self) -> bool:
        """Whether the passes find one, by what it computes."""
        found: list[Site] = []

        def look(sites: Sequence[Site]) -> list[Decision]:
            found.extend(sites)
            return [Decision(site, False, site.why) for site in sites]

        with faking() as mode:
            gm, _ = self.graph(mode, 1)
            rewrite(gm, look, None, Grids())
        return len(found) == 1

    def plainly(self) -> Any:
        """See `Asked`."""
        return self.function(*computed(self.args), **computed(self.kwargs))

    def graph(self, mode: FakeTensorMode, heads: int) -> tuple[fx.GraphModule, fx.Node]:
        """See `Asked`."""
        graph = fx.Graph()
        known = dict(zip(map(id, self.tensors), _inputs(graph, mode, self.tensors), strict=True))
        budget = _budget(graph, heads, self.tensors)
        made: dict[Step, fx.Node] = {}
        for step in self.steps:
            here = {id(t): made[t.step] for t in step.read if isinstance(t, PutOff) and t.step}
            made[step] = _call_in(graph, step.function, (step.args, step.kwargs), known | here)
        graph.output(made[self.steps[-1]])
        return fx.GraphModule(nn.Module(), graph), budget


def form_of_call(function: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> object:
    """What calls have in common that return tensors of one form."""
    leaves, tree = pytree.tree_flatten((tuple(args), dict(kwargs)))
    shown = tuple(
        (leaf.shape, leaf.stride(), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf
        for leaf in leaves
    )
    device = next((leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)), "cpu")
    autocast = casts(device) and torch.get_autocast_dtype(device)
    return function, tree, shown, autocast


def casts(device: str) -> bool:
    """Whether autocast is on for a kind of device; of some, such as meta, it cannot be asked."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def example_of(function: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a call returns, without values; the very tensor that it is given where it returns it."""
    with faking() as fake:
        like, made = _like(fake), dict[int, tuple[Tensor, Tensor]]()

        def known(tensor: Tensor) -> Tensor:
            return made.setdefault(id(tensor), (like(tensor), tensor))[0]

        given = pytree.tree_map_only(Tensor, known, (tuple(args), dict(kwargs)))
        example = function(*given[0], **given[1])
    return next((tensor for fake, tensor in made.values() if fake is example), example)


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """What examples save for a backward pass is none of a checkpoint's around the call."""
    with saved_tensors_hooks(_as_it_is, _as_it_is):
        yield


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


@contextlib.contextmanager
def faking() -> Iterator[FakeTensorMode]:
    """Tensors have no values in the body."""
    with apart(), FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()) as mode:
        yield mode


def _like(mode: FakeTensorMode) -> Callable[[Tensor], Tensor]:
    def like(tensor: Tensor) -> Tensor:
        made = torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
        )
        return made.requires_grad_(tensor.requires_grad and torch.is_grad_enabled())

    return like


def _inputs(graph: fx.Graph, mode: FakeTensorMode, tensors: Sequence[Tensor]) -> list[fx.Node]:
    """An input for each tensor."""
    places = [graph.placeholder(f"argument_{index}") for index in range(len(tensors))]
    for place, tensor in zip(places, tensors, strict=True):
        place.meta["example_value"] = _like(mode)(tensor)
    return places


def _example(item: Any) -> Any:
    return item.meta["example_value"] if isinstance(item, fx.Node) else item


def _budget(graph: fx.Graph, heads: int, tensors: Sequence[Tensor]) -> fx.Node:
    """The last input, (2, heads)."""
    budget = graph.placeholder("budget")
    budget.meta["example_value"] = torch.zeros(
        2, heads, device=tensors[0].device, dtype=torch.float32
    )
    return budget


def _call_in(
    graph: fx.Graph, function: Function, arguments: Any, nodes: Mapping[int, fx.Node]
) -> fx.Node:
    """A call at the end of a graph, of nodes for tensors."""
    given = pytree.tree_map_only(
        Tensor, lambda tensor: nodes[id(tensor)], (tuple(arguments[0]), dict(arguments[1]))
    )
    made = node_of(graph, function, *given)
    examples = pytree.tree_map(_example, given)
    made.meta["example_value"] = function(*examples[0], **examples[1])
    return made


def _part(graph: fx.Graph, node: fx.Node, index: int, example: Any) -> fx.Node | None:
    if not isinstance(example, Tensor):
        return None
    part = graph.call_function(operator.getitem, (node, index))
    part.meta["example_value"] = example
    return part
