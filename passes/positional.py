"""Gives PyTorch's functions their first operands by position, where code names them.

`torch.exp(input=x)` is `torch.exp(x)`: what reads nodes finds operands where they most often are.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import fx
from torch.overrides import get_testing_overrides

OPERANDS = frozenset(["input", "self", "other", "mat2", "batch1", "batch2", "mask", "tensors"])
"""Names of operands; options such as `dim` are found by either way."""


def make_positional(gm: fx.GraphModule) -> None:
    """Rewrite calls in a graph and its bodies whose operands are given by name; none changes."""
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                if node.kwargs and not OPERANDS.isdisjoint(node.kwargs):
                    _move(node)


def _move(node: fx.Node) -> None:
    function: Any = node.target
    if node.op == "call_method":
        function = getattr(torch.Tensor, str(node.target), None)
    names = _names(function) if node.op in ("call_function", "call_method") else ()
    args, kwargs = list(node.args), dict(node.kwargs)
    while len(args) < len(names) and names[len(args)] in OPERANDS & kwargs.keys():
        args.append(kwargs.pop(names[len(args)]))
    if len(args) > len(node.args):
        node.args, node.kwargs = tuple(args), kwargs


@functools.lru_cache(maxsize=512)
def _names(function: Any) -> tuple[str, ...]:
    """Names of what a function of PyTorch takes by position; none of any other."""
    if isinstance(function, torch._ops.OpOverload):
        return tuple(a.name for a in function._schema.arguments if not a.kwarg_only)
    known = _signatures().get(function)
    if known is None:
        return ()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in inspect.signature(known).parameters.values() if p.kind in kinds)


@functools.cache
def _signatures() -> dict[Any, Any]:
    found: dict[Any, Any] = get_testing_overrides()
    return found
