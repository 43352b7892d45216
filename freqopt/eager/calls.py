"""One call of attention in eager mode, with the op in its place.

The call alone is a graph of one node. The passes put the op there as they do in a whole model's
graph, so both routes compute the same; the budget is an input, so one such graph serves all layers.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from freqopt.config import DEFAULT_PROBES
from freqopt.decisions import untold, why_not
from freqopt.eager.lay import Lay
from freqopt.passes.axes.foreign import RULED, namespace_of
from freqopt.passes.decision import Decision
from freqopt.passes.find import Grids
from freqopt.passes.known import settle_mask
from freqopt.passes.manager import rewrite
from freqopt.passes.reasons import Reason, Why
from freqopt.passes.rewrite.rewrite import Inserted, split_as_decided
from freqopt.passes.site import Site
from freqopt.passes.spellings.schemas import PYTORCHS_OWN, read_call

FUNCTIONS = {"scaled_dot_product_attention", "multi_head_attention_forward"}
"""PyTorch's public functions that compute attention in one call."""

Function = Callable[..., Any]
Served = Callable[[Sequence[Tensor], Tensor], tuple[Any, Tensor, Tensor]]
"""From the tensors among a call's arguments and a budget (2, H) to what the call returns, density
(B, H) and probe error (B, H)."""


def may_be_attention(function: Any) -> bool:
    """Whether a function may be attention in one call, by what it is; shapes have to tell more."""
    if isinstance(function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        name = function.__name__.partition(".")[0]
        return namespace_of(function) not in RULED or PYTORCHS_OWN.match(name) is not None
    return getattr(function, "__name__", "") in FUNCTIONS


def is_attention(function: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call that may be attention is, by the shapes and names of its arguments."""
    if getattr(function, "__name__", "") in FUNCTIONS:
        return True
    with _faking() as mode:
        gm, _ = _graph_of_call(mode, function, args, kwargs, 1)
    return any(read_call(node) for node in gm.graph.nodes if node.op == "call_function")


def tensors_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors among the arguments of a call, in a fixed order."""
    leaves = pytree.tree_leaves((tuple(args), dict(kwargs)))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def form_of_call(function: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> object:
    """What calls have in common that one graph serves."""
    leaves, tree = pytree.tree_flatten((tuple(args), dict(kwargs)))
    shown = tuple(
        (leaf.shape, leaf.stride(), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf
        for leaf in leaves
    )
    device = next((leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)), "cpu")
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    return function, tree, shown, autocast


def example_of(function: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a call returns, without values."""
    with _faking() as fake:
        given = pytree.tree_map_only(Tensor, _like(fake), (tuple(args), dict(kwargs)))
        return function(*given[0], **given[1])


@contextlib.contextmanager
def _faking() -> Iterator[FakeTensorMode]:
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()) as mode:
        yield mode


def _like(mode: FakeTensorMode) -> Callable[[Tensor], Tensor]:
    def like(tensor: Tensor) -> Tensor:
        made = torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
        )
        return made.requires_grad_(tensor.requires_grad and torch.is_grad_enabled())

    return like


def serve(
    function: Function,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    lay: Lay,
    heads: int,
    largest_chunk: int,
) -> Served | Why:
    """What serves calls like this one, or why they stay as they are.

    heads: of the budget. largest_chunk: of all layers.
    """
    with _faking() as mode:
        gm, budget = _graph_of_call(mode, function, args, kwargs, heads)
    outcome: list[Decision] = []
    put: list[Inserted] = []

    def decide(sites: Sequence[Site]) -> list[Decision]:
        outcome.extend(_decided(site, lay, budget, largest_chunk) for site in sites)
        return outcome

    def insert(gm: fx.GraphModule, decision: Decision) -> None:
        put.append(split_as_decided(gm, decision))

    rewrite(gm, decide, insert, Grids())
    if len(put) != 1:
        return outcome[0].why if outcome else Reason.NO_AXES()
    output = gm.graph.output_node()
    with gm.graph.inserting_before(output):
        told = [gm.graph.call_function(operator.getitem, (put[0].call, i)) for i in (1, 2)]
    output.args = ((output.args[0], *told),)
    gm.recompile()

    def run(tensors: Sequence[Tensor], budget: Tensor) -> tuple[Any, Tensor, Tensor]:
        found: tuple[Any, Tensor, Tensor] = gm.forward(*tensors, budget)
        return found

    return run


def _graph_of_call(
    mode: FakeTensorMode,
    function: Function,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    heads: int,
) -> tuple[fx.GraphModule, fx.Node]:
    """A graph of one call, and its last input, the budget (2, H)."""
    graph = fx.Graph()
    leaves, tree = pytree.tree_flatten((tuple(args), dict(kwargs)))
    given, examples = list(leaves), list(leaves)
    device = torch.device("cpu")
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            device = leaf.device
            place = graph.placeholder(f"argument_{index}")
            examples[index] = place.meta["example_value"] = _like(mode)(leaf)
            given[index] = place
    budget = graph.placeholder("budget")
    budget.meta["example_value"] = torch.zeros(2, heads, device=device, dtype=torch.float32)
    arguments, options = pytree.tree_unflatten(given, tree)
    node = graph.call_function(function, arguments, options)
    arguments, options = pytree.tree_unflatten(examples, tree)
    example = function(*arguments, **options)
    node.meta["example_value"] = example
    if isinstance(example, Tensor):
        graph.output(node)
    else:
        graph.output(tuple(_part(graph, node, i, each) for i, each in enumerate(example)))
    return fx.GraphModule(nn.Module(), graph), budget


def _part(graph: fx.Graph, node: fx.Node, index: int, example: Any) -> fx.Node | None:
    if not isinstance(example, Tensor):
        return None
    part = graph.call_function(operator.getitem, (node, index))
    part.meta["example_value"] = example
    return part


def _decided(site: Site, lay: Lay, budget: fx.Node, largest_chunk: int) -> Decision:
    """The one site of such a graph, told how its tokens lie."""
    found, mask = site.attention, lay.mask
    if found.objection is not None:
        return Decision(site, False, found.objection)
    if not mask:
        found.mask = None
    problem = settle_mask(site, lay.known, lay.before) if mask else None
    told = replace(
        site,
        kind=lay.kind,
        grid=lay.grid,
        text_before=lay.before,
        text_after=lay.after,
        why=Reason.FITS(remark=""),
        grid_arguments=lay.grid,
        text_before_arguments=(lay.before,),
        text_after_arguments=(lay.after,),
        query_arguments=lay.queries,
        pieces=lay.pieces,
        pad_before_arguments=(lay.pads[0],) if any(lay.pads) else (),
        pad_after_arguments=(lay.pads[1],) if any(lay.pads) else (),
    )
    problem = problem or why_not(told)
    held = budget.meta["example_value"].shape[1]
    if problem is None and (why := untold(site, held)) is not None:
        return Decision(site, False, why)
    if problem is None and site.heads != held:
        problem = Reason.NO_KERNEL(problem=f"it has {site.heads} heads and its budget {held}")
    if problem is not None:
        return Decision(told, False, problem)
    return Decision(
        told, True, Reason.BY_MODULE(), budget, probes=DEFAULT_PROBES, largest_chunk=largest_chunk
    )
