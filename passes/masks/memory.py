"""Which tensors may lie in the same memory, and whether anything is written there.

Two tensors may share memory unless the operation between them is known to make new memory, and an
operator whose body nobody can enter counts as one that writes. What is not written is what its
maker says, for as long as the graph runs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import fx

from freqopt.passes.masks.writes import written_by
from freqopt.passes.nodes import is_pointwise, operation, tensor, value

CONVERSIONS = {
    "to",
    "type",
    "type_as",
    "bool",
    "int",
    "long",
    "half",
    "float",
    "double",
    "bfloat16",
}
"""Return the tensor itself where there is nothing to convert."""

COPIES = {
    "clone",
    "_to_copy",
    "cat",
    "stack",
    "repeat",
    "repeat_interleave",
    "tile",
    "roll",
    "flip",
    "pad",
    "constant_pad_nd",
    "index_select",
    "index_copy",
    "gather",
    "embedding",
    "tril",
    "triu",
    "cumsum",
    "matmul",
    "mm",
    "bmm",
    "addmm",
    "baddbmm",
    "linear",
    "conv1d",
    "conv2d",
    "conv3d",
    "softmax",
    "layer_norm",
    "rms_norm",
    "group_norm",
    "scaled_dot_product_attention",
    "arange",
    "zeros",
    "zeros_like",
    "new_zeros",
    "ones",
    "ones_like",
    "new_ones",
    "full",
    "full_like",
    "new_full",
    "empty",
    "empty_like",
    "new_empty",
    "sum",
    "mean",
    "any",
    "all",
    "amax",
    "amin",
    "max",
    "min",
    "argmax",
    "argmin",
    "prod",
    "std",
    "var",
    "norm",
    "logsumexp",
}
"""Make new memory, as do all operations that PyTorch tags as elementwise."""


def may_share(node: fx.Node, source: fx.Node) -> bool:
    """Whether what a node makes may lie in the memory of `source`, one of its arguments."""
    if node.op not in ("call_function", "call_method", "call_module"):
        return False
    if written := written_by(node):
        return source in written or operation(node) == "set"
    made = value(node)
    if made is not None and not isinstance(made, (torch.Tensor, tuple, list)):
        return False
    name, before = operation(node), tensor(source)
    if name in CONVERSIONS and isinstance(made, torch.Tensor) and before is not None:
        return made.dtype == before.dtype
    return not (name in COPIES or makes_memory(name) or _is_declared(node))


@functools.lru_cache(maxsize=4096)
def makes_memory(name: str) -> bool:
    """Whether an operation is elementwise, and no form of it returns a view."""
    if not is_pointwise(name):
        return False
    packet = getattr(torch.ops.aten, name)
    schemas = [getattr(packet, overload)._schema for overload in packet.overloads()]
    aliases = [result.alias_info for schema in schemas for result in schema.returns]
    return all(alias is None or alias.is_write for alias in aliases)


def _is_declared(node: fx.Node) -> bool:
    """Whether a custom operator declares its results to be new; PyTorch's own do not always."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace in ("aten", "prims"):
        return False
    return all(result.alias_info is None for result in target._schema.returns)


def writers(node: fx.Node) -> Iterator[fx.Node]:
    """All that may write into a tensor or a view of it. Views that it was made from are not asked.

    Whoever follows a tensor back to where it was made has to ask at every step.
    """
    seen, pending = {node}, [node]
    while pending:
        source = pending.pop()
        for user in source.users:
            shared = [user] if may_share(user, source) else []
            if isinstance(user.target, torch._ops.HigherOrderOperator):
                inside = _in_body(user, source)
                shared += inside
                if not inside:
                    yield user
            elif source in written_by(user):
                yield user
            pending += [each for each in shared if each not in seen]
            seen.update(shared)


def _in_body(node: fx.Node, source: fx.Node) -> list[fx.Node]:
    """An operand of a higher-order operator in its body; none where that cannot be told."""
    first, owner = node.args[0] if node.args else None, node.graph.owning_module
    if not isinstance(first, fx.Node) or first.op != "get_attr" or owner is None:
        return []
    body = getattr(owner, str(first.target), None)
    if not isinstance(body, fx.GraphModule):
        return []
    places = body.graph.find_nodes(op="placeholder")
    if len(places) != len(node.args) - 1:
        return []
    return [place for place, given in zip(places, node.args[1:], strict=True) if given is source]


def is_written(node: fx.Node) -> bool:
    """Whether anything may write into a tensor or a view of it; see `writers`."""
    return next(writers(node), None) is not None


def is_overwritten_last(copy: fx.Node) -> bool:
    """Whether what `copy_` puts into a tensor stays: nobody writes there later, by whatever view.

    An input, or a view of something that is, may be written through it.
    """
    target = copy.args[0]
    if not isinstance(target, fx.Node) or not target.op.startswith("call"):
        return False
    if any(may_share(target, source) for source in target.all_input_nodes):
        return False
    return all(writer.graph is copy.graph and writer <= copy for writer in writers(target))


def is_written_between(node: fx.Node, start: fx.Node, stop: fx.Node) -> bool:
    """Whether anything may write into a tensor's memory after one node and before another.

    Through the tensors that it is a view of, too. Of what happens inside a body nobody knows when.
    """
    seen, pending = {node}, [node]
    while pending:
        view = pending.pop()
        for writer in writers(view):
            if writer.graph is not start.graph or start < writer < stop:
                return True
        sources = [source for source in view.all_input_nodes if may_share(view, source)]
        pending += [source for source in sources if source not in seen]
        seen.update(sources)
    return False
