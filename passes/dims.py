"""Dimension provenance: what each dimension of a tensor is made of.

A dimension is a list of segments (several after a concatenation), a segment an ordered list of
atoms, an atom an axis of some input or of a patchifier's output. Reshapes regroup atoms; reading the
token dimension of a query then tells grid, memory order and text in one look.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from freqopt.passes.graph_values import same

DATA, WEIGHT, UNKNOWN = "data", "weight", "unknown"


@dataclass(frozen=True)
class Atom:
    """An indivisible axis. Equal keys mean the same axis of the same origin.

    axis: (input name, dimension) it descends from. source: (node, dim) whose size is its size.
    """

    key: tuple[Any, ...]
    size: Any = field(compare=False)
    origin: str = field(compare=False)
    axis: tuple[str, int] | None = field(compare=False, default=None)
    source: tuple[fx.Node, int] | None = field(compare=False, default=None)


Segment = tuple[Atom, ...]
Dim = tuple[Segment, ...]
Dims = tuple[Dim, ...]

ONE: Dim = ((),)
"""A dimension of size 1 that stands for nothing, as unsqueeze makes."""


def single(atom: Atom) -> Dim:
    """A dimension made of one atom."""
    return ((atom,),)


def fresh(node: fx.Node, dim: int, size: Any, origin: str = UNKNOWN) -> Dim:
    """A dimension of which nothing is known but where it was made; size 1 stands for nothing."""
    if same(size, 1):
        return ONE
    return single(Atom((node.name, dim), size, origin, None, (node, dim)))


def size_of(dim: Dim) -> Any:
    """Size of a dimension: sum over segments of the product over atoms."""
    total: Any = 0
    for segment in dim:
        total = total + math.prod([atom.size for atom in segment])
    return total


def rank(dim: Dim) -> tuple[int, int]:
    """How much is known of a dimension; the most telling operand of a broadcast decides."""
    atoms = [atom for segment in dim for atom in segment]
    known = sum(atom.origin == DATA for atom in atoms)
    trusted = 2 if known else int(any(atom.origin == WEIGHT for atom in atoms))
    return trusted, known + len(dim)


def _split_atom(atom: Atom, sizes: Sequence[Any], node: fx.Node, first_dim: int) -> list[Atom]:
    """Atoms of an axis cut into factors, outermost first."""
    factors = tuple(str(size) for size in sizes)
    return [
        Atom((*atom.key, factors, i), size, atom.origin, atom.axis, (node, first_dim + i))
        for i, size in enumerate(sizes)
    ]


def reshape(dims: Dims, sizes: Sequence[Any], node: fx.Node) -> Dims:
    """Regroup atoms as a reshape to `sizes` does, in row-major order.

    Walks both sides in step, closing a group wherever their products agree: several atoms into one
    dimension is a merge, one atom into several dimensions a split. What neither covers (a factor
    shared by two dimensions) becomes unknown, for that group only.
    """
    items: list[tuple[Any, Dim]] = []
    for dim in dims:
        if len(dim) == 1:
            items += [(atom.size, single(atom)) for atom in dim[0]]
        else:
            items.append((size_of(dim), dim))
    result: list[Dim] = []
    position, out = 0, 0
    while out < len(sizes):
        group: list[tuple[Any, Dim]] = []
        taken, made, count = 1, 1, 0
        while True:
            if count == 0 or _smaller(made, taken):
                if out + count >= len(sizes):
                    break
                made = made * sizes[out + count]
                count += 1
            elif position < len(items) and not (same(taken, made) and group):
                if same(made, 1) and not same(items[position][0], 1):
                    break
                taken = taken * items[position][0]
                group.append(items[position])
                position += 1
            if same(made, 1) and not group and _is_one(items, position):
                group.append(items[position])
                position += 1
            if same(taken, made) and (group or same(made, 1)):
                while position < len(items) and out + count == len(sizes):
                    group.append(items[position])
                    position += 1
                break
            if position >= len(items) and not _smaller(made, taken):
                break
        result += _regroup(group, sizes[out : out + count], node, out)
        out += count
    return tuple(result)


def _is_one(items: list[tuple[Any, Dim]], position: int) -> bool:
    return position < len(items) and same(items[position][0], 1)


def _smaller(a: Any, b: Any) -> bool:
    """Whether one product is known to be below another (by value, or by having fewer factors)."""
    if isinstance(a, int) and isinstance(b, int):
        return a < b
    return not same(a, b) and same(b % a, 0) if not same(a, 0) else False


def _regroup(
    group: list[tuple[Any, Dim]], sizes: Sequence[Any], node: fx.Node, first_dim: int
) -> list[Dim]:
    if not group:
        return [fresh(node, first_dim + i, size) for i, size in enumerate(sizes)]
    if len(sizes) == 1:
        telling = [dim for size, dim in group if not same(size, 1)] or [group[0][1]]
        if len(telling) == 1 and (len(telling[0]) > 1 or len(group) == 1):
            return telling
        if all(len(dim) == 1 for _, dim in group):
            return [(tuple(atom for _, dim in group for atom in dim[0]),)]
        return [fresh(node, first_dim, sizes[0])]
    big = [dim for size, dim in group if not same(size, 1)]
    if len(big) == 1 and len(big[0]) == 1:
        return [single(a) for a in _split_atom(big[0][0][0], sizes, node, first_dim)]
    if len(group) == len(sizes) and all(same(s, g) for s, (g, _) in zip(sizes, group, strict=True)):
        return [dim for _, dim in group]
    return _factor(group, sizes, node, first_dim)


def _factor(
    group: list[tuple[Any, Dim]], sizes: Sequence[Any], node: fx.Node, first_dim: int
) -> list[Dim]:
    """Many atoms into many dimensions: cut atoms where static sizes divide, else unknown."""
    unknown = [fresh(node, first_dim + i, size) for i, size in enumerate(sizes)]
    static = all(isinstance(size, int) for size in sizes)
    if not static or not all(isinstance(g, int) and len(dim) == 1 for g, dim in group):
        return unknown
    atoms = [dim[0][0] for _, dim in group if dim[0]]
    result: list[Dim] = []
    for i, size in enumerate(sizes):
        left, taken = size, []
        while left > 1 and atoms:
            atom = atoms.pop(0)
            if left % atom.size == 0:
                taken.append(atom)
                left //= atom.size
            elif atom.size % left == 0:
                outer, inner = _split_atom(atom, (left, atom.size // left), node, first_dim + i)
                taken.append(outer)
                atoms.insert(0, inner)
                left = 1
            else:
                return unknown
        if left != 1:
            return unknown
        result.append((tuple(taken),))
    return result if not atoms else unknown
