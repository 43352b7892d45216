"""Operators that no rule knows: rotary positions, norms and quantised products of others' kernels.

Where the shapes tell that rows stay rows, the axes stay: an output has all dimensions but the last
of one of its operands, or as many rows in fewer dimensions. Operators whose names say that they
move tokens are not followed; nor are PyTorch's own, which have rules where they keep rows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import fx

from freqopt.passes.axes.dimensions import Axis, Shape, product, rank, same
from freqopt.passes.axes.distribute import distribute, regroup
from freqopt.passes.axes.graph_axes import Dimensions
from freqopt.passes.axes.rules import unreadable
from freqopt.passes.nodes import raw_name, shape, tensor, value
from freqopt.passes.site import Extent

RULED = (
    "aten",
    "prims",
    "prim",
    "freqopt",
    "_c10d_functional",
    "_c10d_functional_autograd",
    "c10d",
    "c10d_functional",
    "symm_mem",
    "_dtensor",
)
"""Namespaces of operators that have a rule if they keep rows, or are no computation of a model."""

KEEP_ROWS = {
    "_scaled_mm",
    "_int_mm",
    "_weight_int8pack_mm",
    "_weight_int4pack_mm",
    "_weight_norm",
    "_addmm_activation",
    "_fused_rms_norm",
    "_fused_dropout",
    "_dyn_quant_matmul_4bit",
    "_weight_int4pack_mm_for_cpu",
    "_mixed_dtypes_linear",
    "_sparse_semi_structured_linear",
    "fake_quantize_per_tensor_affine",
    "fake_quantize_per_channel_affine",
}
"""PyTorch's own products and norms without a rule of their own; rows of the first stay rows."""

MOVERS = re.compile(
    r"(sort|shuffle|permut|gather|scatter|index|roll|window|partition|reorder|dispatch|all2all|"
    r"alltoall|all_to_all|exchange|flip|swap|topk|compress|select|ring|rearrange|transpose)"
)
"""Names of operators that move tokens."""


def is_foreign(node: fx.Node) -> bool:
    """Whether a node calls an operator that somebody else made, or a product without a rule."""
    target = node.target
    if node.op != "call_function":
        return False
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return namespace_of(target) not in RULED or raw_name(node) in KEEP_ROWS
    module = getattr(target, "__module__", None) or "torch"
    return module.split(".")[0] not in ("torch", "_operator", "builtins", "operator", "math")


def namespace_of(target: torch._ops.OpOverload | torch._ops.OpOverloadPacket) -> str:
    """The library that an operator is of: flash_attn of torch.ops.flash_attn.forward."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[0]
    return str(getattr(target, "_qualified_op_name", "")).split("::")[0]


def foreign_axes(dimensions: Dimensions, node: fx.Node) -> Sequence[Axis | None] | None:
    """Axes of what an operator makes out of one of its operands, row by row."""
    if MOVERS.search(raw_name(node).lower()):
        return None
    return _by_rows(dimensions, node, shape(node), 0)


def foreign_several(dimensions: Dimensions, node: fx.Node) -> list[Shape | None]:
    """The same for each of several outputs, such as queries and keys of one kernel."""
    outputs = value(node)
    if MOVERS.search(raw_name(node).lower()):
        return [None] * len(outputs)
    result: list[Shape | None] = []
    for place, output in enumerate(outputs):
        sizes = tuple(output.shape) if isinstance(output, torch.Tensor) else ()
        axes = _by_rows(dimensions, node, sizes, place) if sizes else None
        result.append(None if axes is None else tuple(_apart(axis, node) for axis in axes))
    return result


def _apart(axis: Axis | None, node: fx.Node) -> Axis:
    """An axis of one of several outputs; one that is not known gets a size that fits none."""
    if axis is None:
        return ((),)
    return tuple(tuple(unreadable(atom, node) for atom in segment) for segment in axis)


def _by_rows(
    dimensions: Dimensions, node: fx.Node, sizes: Sequence[Extent], place: int
) -> list[Axis | None] | None:
    """Axes of an output with these sizes; `place`, its number, counts among equal operands."""
    operands = [n for n in node.all_input_nodes if tensor(n) is not None and dimensions.of(n)]
    rows = sizes[:-1]
    fitting = [n for n in operands if _same_sizes(shape(n)[:-1], rows) and len(shape(n)) > 1]
    if fitting and rows:
        alike = [n for n in fitting if same(shape(n)[-1], sizes[-1])] or fitting
        told = [sum(rank(axis)[0] for axis in dimensions.axes[n][:-1]) for n in alike]
        best = [n for n, score in zip(alike, told, strict=True) if score == max(told)]
        chosen = best[place] if place < len(best) else best[0]
        axes = dimensions.axes[chosen]
        return [*axes[:-1], axes[-1] if same(shape(chosen)[-1], sizes[-1]) else None]
    for source in operands:
        before = shape(source)
        if len(before) > 1 and same(product(before[:-1]), product(rows)) and rows:
            return _regrouped(dimensions.axes[source], before[:-1], rows, node)
    return None


def _same_sizes(first: Sequence[Extent], second: Sequence[Extent]) -> bool:
    return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second, strict=True))


def _regrouped(
    axes: Shape, before: Sequence[Extent], after: Sequence[Extent], node: fx.Node
) -> list[Axis | None]:
    """Axes of rows that an operator gives other dimensions, as a view does, and of a last one."""
    result: list[Axis | None] = [None] * (len(after) + 1)
    for left, right in regroup(before, after) or ():
        sizes = after[right.start : right.stop]
        found = distribute(axes[left.start : left.stop], sizes, node, right.start)
        if found is not None:
            result[right.start : right.stop] = found
    return result
