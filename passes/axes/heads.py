"""Which of a model's heads an attention has, where processes share them out among them.

An exchange before attention deals out parts of the heads, and an all-gather leaves every process to
take its own; what each has follows from its rank. Plans count the heads of the whole model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import fx

from freqopt.passes.axes.dimensions import Atom, Shape, hint, same, segment_size
from freqopt.passes.axes.graph_axes import Dimensions
from freqopt.passes.axes.operands import Operands
from freqopt.passes.axes.provenance import is_projection, same_atom
from freqopt.passes.nodes import operation, value
from freqopt.passes.site import Attention, Share

GATHERS = {"all_gather_into_tensor", "all_gather_single", "all_gather_tensor"}
TAKEN = {"to_local"}
"""Leaves a process its part of a tensor that others have parts of too (DTensor)."""

Numbers = tuple[int, tuple[int, ...]]
"""How many entries a whole has, and which of them an axis has."""


def share_of(attention: Attention, operands: Operands, dimensions: Dimensions) -> Share | None:
    """The share of the heads that an attention has; None where no process has others."""
    before = last_collectives(attention.query, dimensions)
    groups = dict.fromkeys(group_of(node) for node in before)
    if not before or operands.query is None or operands.key is None or operands.value is None:
        return None
    if len(groups) != 1 or None in groups:
        return _untold(before[0])
    found = [_numbers(operand, before, dimensions) for operand in operands if operand]
    first, key = found[0], found[1]
    if all(operation(node) in GATHERS for node in before) and not any(found):
        return None  # what was gathered are tokens, and all heads are here
    if first is None or key is None or found[2] != key or not _goes_with(first, key):
        return _untold(before[0])
    name, ranks, _ = _group(before[0])
    return Share(name, ranks, *first)


def _untold(node: fx.Node) -> Share | None:
    name, ranks, _ = _group(node)
    return Share(name, ranks) if ranks > 1 else None


def _goes_with(queries: Numbers, keys: Numbers) -> bool:
    """Whether every query head is here with the key head that it attends to."""
    (heads, own), (key_heads, own_keys) = queries, keys
    if heads % key_heads or len(own) % len(own_keys):
        return False
    of_all, of_own = heads // key_heads, len(own) // len(own_keys)
    return all(own_keys[i // of_own] == number // of_all for i, number in enumerate(own))


def last_collectives(node: fx.Node, dimensions: Dimensions) -> list[fx.Node]:
    """The last collectives that a tensor came through since it was projected."""
    found: dict[fx.Node, None] = {}
    seen, pending = {node}, [node] if dimensions.collectives else []
    while pending:
        reached = pending.pop()
        if reached in dimensions.collectives:
            found[reached] = None
        elif not is_projection(reached):
            sources = [source for source in reached.all_input_nodes if source not in seen]
            seen.update(sources)
            pending += sources
    return list(found)


def group_of(node: fx.Node) -> str | None:
    """Name of the process group of a collective; None where it has several, or none."""
    if operation(node) in TAKEN:
        whole = value(node.args[0])
        cut = [i for i, p in enumerate(whole.placements) if getattr(p, "dim", None) is not None]
        return whole.device_mesh.get_group(cut[0]).group_name if len(cut) == 1 else None
    last = node.args[-1] if node.args else None
    found = node.kwargs.get("group_name", last)
    return found if isinstance(found, str) else None


def process_group(name: str) -> dist.ProcessGroup:
    """The process group of a name."""
    resolve: Any = vars(dist.distributed_c10d)["_resolve_process_group"]
    found: dist.ProcessGroup = resolve(name)
    return found


def _group(node: fx.Node) -> tuple[str, int, int]:
    """Name and size of the group of a collective, and the rank of this process in it."""
    name = group_of(node)
    if name is None or not dist.is_initialized():
        return "", 1, 0
    group = process_group(name)
    return name, dist.get_world_size(group), dist.get_rank(group)


def rank_of(node: fx.Node) -> tuple[int, int]:
    """Size of the group of a collective, and the rank of this process in it."""
    return _group(node)[1:]


def _numbers(axes: Shape, before: Sequence[fx.Node], dimensions: Dimensions) -> Numbers | None:
    """Which of all heads an operand (batch, heads, tokens, head_dim) has."""
    axis = axes[1]
    if len(axis) > 1:
        return None
    atoms = [atom for atom in (axis[0] if axis else ()) if not same(atom.size, 1)]
    if not atoms:
        return _single(axes, before, dimensions)
    if len(atoms) > 1:
        return None
    (atom,) = atoms
    if atom.cut is not None:
        return _own_piece(atom, before[0])
    if all(operation(node) in TAKEN for node in before):
        return _cut_by_weights(atom, before[0])
    return _dealt(atom, dimensions)


def _single(axes: Shape, before: Sequence[fx.Node], dimensions: Dimensions) -> Numbers | None:
    """The one head that is left of as many as there are ranks."""
    axis, channels = axes[1], axes[3]
    if all(operation(node) in TAKEN for node in before):
        piece = channels[0][0] if len(channels) == 1 and len(channels[0]) == 1 else None
        return None if piece is None else _of_rank(piece, 1, before[0])
    if axis and axis[0] and axis[0][0].cut is not None:
        return _own_piece(axis[0][0], before[0])
    of_last = [atom for atom, node in dimensions.dealt if node in before]
    ranks, rank = _group(before[0])[1:]
    if of_last and all(same(atom.size, ranks) for atom in of_last):
        return ranks, (rank,)
    return None


def _own_piece(atom: Atom, gather: fx.Node) -> Numbers | None:
    """Of heads that were gathered, the equal piece that is this rank's."""
    assert atom.cut is not None
    whole, start, _ = atom.cut
    _, ranks, rank = _group(gather)
    size, at, length = (hint(whole[0].size), hint(start), hint(atom.size))
    if operation(gather) not in GATHERS or len(whole) != 1 or size is None or length is None:
        return None
    if size != ranks * length or at != rank * length:
        return None
    return size, tuple(range(at, at + length))


def _cut_by_weights(atom: Atom, taken: fx.Node) -> Numbers | None:
    """Of heads whose channels are cut into equal pieces, those of this rank's piece."""
    channels, heads = atom.parent, hint(atom.size)
    if channels is None or heads is None or atom.part != 0:
        return None
    return _of_rank(channels, heads, taken)


def _of_rank(channels: Atom, heads: int, taken: fx.Node) -> Numbers | None:
    """Numbers of so many heads whose channels are this rank's equal piece of all."""
    if channels.cut is None:
        return None
    whole, start, _ = channels.cut
    _, ranks, rank = _group(taken)
    size, own = hint(segment_size(whole)), hint(channels.size)
    if size is None or own is None or size != ranks * own:
        return None
    if hint(start) != rank * own or own % heads:
        return None
    return ranks * heads, tuple(range(rank * heads, (rank + 1) * heads))


def _dealt(atom: Atom, dimensions: Dimensions) -> Numbers | None:
    """Which entries of the whole an atom has that was left as another part of it was dealt out."""
    size, parent = hint(atom.size), atom.parent
    if size is None or parent is None:
        return None
    for part, node in dimensions.dealt:
        if part.part == atom.part or not same_atom(part.parent, parent):
            continue
        ranks, rank = _group(node)[1:]
        if not same(part.size, ranks):
            return None
        total = ranks * size
        numbers = range(rank, total, ranks)
        if part.part < atom.part:
            numbers = range(rank * size, (rank + 1) * size)
        around = _dealt(parent, dimensions) if same(parent.size, total) else None
        if around is None:
            return total, tuple(numbers)
        return around[0], tuple(around[1][i] for i in numbers)
    return None
