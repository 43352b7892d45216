"""What nodes write in place, whoever wrote them: methods, operators, flags, `out=`, schemas.

An operation that nobody knows does what its name says; see `memory` for whose memory that is.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import fx

from freqopt.passes.nodes import operation, raw_name, tensor

OPERATORS = {
    "setitem",
    "iadd",
    "isub",
    "imul",
    "itruediv",
    "ifloordiv",
    "imod",
    "ipow",
    "imatmul",
    "iand",
    "ior",
    "ixor",
    "ilshift",
    "irshift",
    "iconcat",
}
"""`x[i] = y`, `x &= y` and so on. All others that write in place end in an underscore."""

NO_WRITES = {"and_", "or_", "not_", "is_"}
"""Functions of `operator` whose names end in an underscore because Python has words for them."""


def written_by(node: fx.Node) -> list[fx.Node]:
    """The tensors that a node writes into; most often its first argument, or none."""
    target = node.target
    if node.op == "call_module":
        return [] if _only_asserts(node) else node.all_input_nodes
    if node.op not in ("call_function", "call_method"):
        return []
    if isinstance(target, torch._ops.OpOverload):
        return nodes_in(_mutable(node, target._schema))
    found = nodes_in(node.kwargs.get("out"))
    if _writes_first(node):
        first = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))
        found += nodes_in(first)
    return found


def _only_asserts(node: fx.Node) -> bool:
    """Whether a module is the one that torch.export checks the inputs of a program with."""
    owner = node.graph.owning_module
    module = None if owner is None else owner.get_submodule(str(node.target))
    return type(module).__name__ == "GuardsFn" and not node.users


def _writes_first(node: fx.Node) -> bool:
    name = raw_name(node)
    if name.startswith("__") and name.endswith("__"):
        name = name.strip("_")
    return (
        name in OPERATORS
        or (name.endswith("_") and name not in NO_WRITES)
        or _is_set(node, "inplace")
    )


def _is_set(node: fx.Node, flag: str) -> bool:
    """Whether a flag of a Python function is True, by its name or by its place."""
    if flag in node.kwargs or not inspect.isfunction(node.target):
        return bool(node.kwargs.get(flag, False))
    place = _places(node.target).get(flag, len(node.args))
    return place < len(node.args) and bool(node.args[place])


@functools.lru_cache(maxsize=512)
def _places(function: Any) -> dict[str, int]:
    """Places of a function's arguments by name; none where it wraps what is not Python's."""
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:
        return {}
    return {name: place for place, name in enumerate(parameters)}


def _mutable(node: fx.Node, schema: torch.FunctionSchema) -> list[Any]:
    """The arguments that an operator's schema says it writes into."""
    found = []
    for place, argument in enumerate(schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        if argument.name in node.kwargs:
            found.append(node.kwargs[argument.name])
        elif place < len(node.args):
            found.append(node.args[place])
    return found


def nodes_in(argument: Any) -> list[fx.Node]:
    """The nodes in an argument, which may be a list."""
    found: list[fx.Node] = []
    fx.node.map_arg(argument, found.append)
    return found


def is_idle(node: fx.Node, steps: int = 4) -> bool:
    """Whether nothing is lost without a node: it asserts what a dtype is, or leads nowhere.

    torch.export keeps the mean of attention weights, say, that nobody has asked for. steps: after
    how many at most it ends.
    """
    if node.op not in ("call_function", "call_method") or steps == 0:
        return False
    if operation(node) == "_assert_tensor_metadata":
        return not node.users
    makes = tensor(node) is not None and not written_by(node)
    return makes and all(is_idle(user, steps - 1) for user in node.users)
