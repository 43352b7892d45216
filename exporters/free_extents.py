"""Extents that were asked to be free, and those of them that an exported program has fixed.

`Dim.AUTO` leaves it to torch.export what becomes of an extent, which fixes it without an error
where the example has 1 there, or the model needs one number.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from freqopt.errors import OptionError


class Asked(NamedTuple):
    """An extent that was asked to be free: dimension `dim` of `tensor`, at `path` of a call."""

    path: str
    tensor: Tensor
    dim: int


def asked_free(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], dynamic_shapes: Any
) -> list[Asked]:
    """Extents of a call that `dynamic_shapes`, as in torch.export.export, asks to be free.

    Where its form is not that of the call, torch.export says so.

    Raises:
        OptionError: a dimension that the tensor does not have.
    """
    if dynamic_shapes is None:
        return []
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    except (TypeError, ValueError):
        return []
    given = dict(bound)
    if isinstance(dynamic_shapes, Mapping):
        given |= {name: kwargs[name] for name in dynamic_shapes if name in kwargs}
    elif isinstance(dynamic_shapes, (tuple, list)):
        dynamic_shapes = dict(zip(given, dynamic_shapes, strict=False))
    found = list(_asked(given, dynamic_shapes, ""))
    for path, tensor, dim in found:
        if not 0 <= dim < tensor.dim():
            raise OptionError(
                f"dynamic_shapes names dimension {dim} of {path}, which is {tuple(tensor.shape)}: "
                f"its dimensions are 0 to {tensor.dim() - 1}"
            )
    return found


def fixed_notes(
    program: torch.export.ExportedProgram,
    asked: Sequence[Asked],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> list[str]:
    """What is to be said of extents that were asked to be free and are fixed in a program."""
    names = program.graph_signature.user_inputs
    leaves = pytree.tree_leaves((tuple(args), dict(kwargs)))
    by_tensor = {id(leaf): name for leaf, name in zip(leaves, names, strict=False)}
    shapes = {
        node.name: node.meta["val"].shape
        for node in program.graph.find_nodes(op="placeholder")
        if isinstance(node.meta.get("val"), Tensor)
    }
    notes = []
    for path, tensor, dim in asked:
        shape = shapes.get(str(by_tensor.get(id(tensor))))
        if shape is not None and _is_fixed(shape[dim]):
            notes.append(_note(f"{path}.{dim}", int(tensor.shape[dim])))
    return notes


def _note(extent: str, size: int) -> str:
    told = f"{extent} was asked to be free and is fixed at {size}"
    if size < 2:
        return f"{told}: torch.export fixes an extent of 0 or 1; give an example with 2 or more"
    return f"{told}: the model, or the way it is split, needs that number; export each one"


def _asked(given: Any, spec: Any, path: str) -> Iterator[Asked]:
    """Extents that a spec asks to be free, of what it is given for."""
    if isinstance(given, Tensor):
        hints = dict(enumerate(spec)) if isinstance(spec, (tuple, list)) else spec
        for dim, hint in hints.items() if isinstance(hints, Mapping) else ():
            if isinstance(dim, int) and _is_free(hint):
                yield Asked(path, given, dim)
    elif isinstance(given, Mapping) and isinstance(spec, Mapping):
        for name in (name for name in spec if name in given):
            yield from _asked(given[name], spec[name], f"{path}.{name}".lstrip("."))
    elif isinstance(given, (tuple, list)) and isinstance(spec, (tuple, list)):
        for place, (part, its) in enumerate(zip(given, spec, strict=False)):
            yield from _asked(part, its, f"{path}.{place}")


def _is_fixed(size: int | torch.SymInt) -> bool:
    """Whether a size is a number, or a symbol that tracing has found to be one."""
    return isinstance(size, int) or bool(size.node.expr.is_number)


def _is_free(hint: Any) -> bool:
    return not (hint is None or isinstance(hint, int) or hint == torch.export.Dim.STATIC)
