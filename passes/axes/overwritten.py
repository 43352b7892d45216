"""Tensors that are filled after they were made: whose tokens they hold from then on.

In a graph `dist.all_to_all_single(out, x)` is a functional collective and `out.copy_(...)`. Readers
of a tensor that was wholly overwritten read the copy; where collectives bring other tokens than
were thought to be there into a part, or a view, nothing is known of any tensor in that memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from freqopt.passes.axes.dimensions import Axis, Shape, at_most, axis_size, same, take
from freqopt.passes.axes.foreign import namespace_of
from freqopt.passes.axes.graph_axes import Dimensions
from freqopt.passes.axes.heads import last_collectives
from freqopt.passes.axes.parts import of_one_rank
from freqopt.passes.axes.provenance import alike, is_projection
from freqopt.passes.axes.rules import at_index, rule
from freqopt.passes.masks.memory import may_share
from freqopt.passes.masks.writes import written_by
from freqopt.passes.nodes import argument, operation, shape, tensor, value
from freqopt.passes.site import Extent

COLLECTIVES = {"_c10d_functional", "c10d_functional", "c10d", "symm_mem"}
"""Namespaces of operators between ranks."""

RECEIVES = {"irecv", "batch_p2p_ops"}
"""Operators of these that fill what they are handed, although their schemas do not say so."""


def read_copies(graph: fx.Graph) -> None:
    """Let readers of a tensor that was wholly overwritten read the copy, which is that tensor.

    The graph does what it did: `x.copy_(y)` returns x.
    """
    copies = [node for node in graph.nodes if operation(node) == "copy_"]
    for copy in copies:
        overwritten = copy.args[0]
        if not isinstance(overwritten, fx.Node) or tensor(copy) is None:
            continue
        for user in list(overwritten.users):
            if copy < user and user.op != "output":
                user.replace_input_with(overwritten, copy)


@rule("copy_")
def _copy(dimensions: Dimensions, node: fx.Node) -> list[Axis | None] | None:
    """Axes of what was copied, as far as it was not repeated."""
    source, after = argument(node, 1, "src", "other"), shape(node)
    axes = dimensions.of(source)
    if axes is None or len(axes) > len(after):
        return None
    result: list[Axis | None] = [None] * len(after)
    for back in range(1, len(axes) + 1):
        if same(shape(source)[-back], after[-back]):
            result[-back] = axes[-back]
    return result


def note_write(dimensions: Dimensions, node: fx.Node) -> None:
    """What is still known of the tensors in a memory that a node writes into.

    Where no collective has to do with it, all stays as it was: what is computed from a tensor's
    rows and written into a part of it (positions, a pose for all frames but one) has these rows.
    """
    name = operation(node)
    for received in _received(node):
        _forget(dimensions, received, node)
    if name not in ("copy_", "setitem"):
        return
    written = node.args[0]
    source = argument(node, 1, "src", "other") if name == "copy_" else node.args[2]
    if not isinstance(written, fx.Node) or not isinstance(source, fx.Node):
        return
    before, new = dimensions.of(written), dimensions.of(source)
    there = before if name == "copy_" else _region(node, before)
    if there is None or new is None:
        return
    through = last_collectives(source, dimensions) or last_collectives(written, dimensions)
    if through and not _are_those(there, new):
        _forget(dimensions, written, node)


def _received(node: fx.Node) -> list[fx.Node]:
    """What a collective fills by itself."""
    if operation(node) in RECEIVES:
        return node.all_input_nodes
    target = node.target
    if isinstance(target, torch._ops.OpOverload) and namespace_of(target) in COLLECTIVES:
        return written_by(node)
    return []


def filled(node: fx.Node, dimensions: Dimensions) -> bool:
    """Whether a tensor was made of one that collectives filled in a way that is not followed."""
    if not dimensions.filled:
        return False
    seen, pending = {node}, [node]
    while pending:
        reached = pending.pop()
        if reached in dimensions.filled:
            return True
        if is_projection(reached):
            continue
        sources = [source for source in reached.all_input_nodes if source not in seen]
        seen.update(sources)
        pending += sources
    return False


def _region(node: fx.Node, axes: Shape | None) -> Shape | None:
    """Axes of `base[index]`, None where it is not made of slices and integers."""
    base, index = node.args[0], node.args[1]
    items = list(index) if isinstance(index, tuple) else [index]
    if axes is None or not all(item is Ellipsis or _is_plain(item) for item in items):
        return None
    if Ellipsis not in items:
        items.append(Ellipsis)
    at = items.index(Ellipsis)
    items[at : at + 1] = [slice(None)] * (len(axes) - len(items) + 1)
    if len(items) != len(axes):
        return None
    sizes = shape(base)
    for dim, item in enumerate(items):
        axes = at_index(axes, dim, item)
        one = of_one_rank(axes, dim, sizes[dim], item)
        if one is not None:
            axes, items[dim] = one, slice(None)
    return tuple(
        _slice_of(axis, item, size, node)
        for axis, item, size in zip(axes, items, sizes, strict=True)
        if isinstance(item, slice)
    )


def _is_plain(item: object) -> bool:
    return isinstance(item, slice) or isinstance(value(item), (int, torch.SymInt))


def _slice_of(axis: Axis, item: slice, size: Extent, node: fx.Node) -> Axis:
    """Axis of a slice from the front or to the end; without segments where it cannot be told."""
    start, stop, step = (value(bound) for bound in (item.start, item.stop, item.step))
    if step not in (None, 1) or any(isinstance(n, int) and n < 0 for n in (start, stop)):
        return ()
    start, stop = 0 if start is None else start, size if stop is None else stop
    found = take(axis, start, stop, node, 0) if at_most(stop, size) else None
    return () if found is None else found


def _are_those(there: Shape, new: Shape) -> bool:
    """Whether what is written are the entries that were thought to be there, channels apart."""
    for first, second in zip(reversed(there[:-1]), reversed(new[:-1]), strict=False):
        repeated = same(axis_size(second), 1) and not same(axis_size(first), 1)
        if not repeated and not alike(first, second):
            return False
    return True


def _forget(dimensions: Dimensions, written: fx.Node, node: fx.Node) -> None:
    """Nothing is known any more of what lies in the memory of a tensor and is read after a write.

    A copy itself is known: its readers are those of `read_copies`.
    """
    for each in _in_memory(written, node):
        if not any(node < user for user in each.users):
            continue
        dimensions.filled.add(each)
        if each in dimensions.several:
            dimensions.several[each] = [None] * len(dimensions.several[each])
        elif each in dimensions.axes:
            dimensions.axes[each] = dimensions.fresh(each, "made")


def _in_memory(node: fx.Node, writer: fx.Node) -> Iterator[fx.Node]:
    """A tensor, its views, and what it is a view of with its views, made before a write."""
    seen, pending = {node}, [node]
    while pending:
        found = pending.pop()
        yield found
        near = [user for user in found.users if user < writer and may_share(user, found)]
        near += [source for source in found.all_input_nodes if may_share(found, source)]
        pending += [each for each in near if each not in seen]
        seen.update(near)
