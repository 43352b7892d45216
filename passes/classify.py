"""Reads off a site's token dimensions what it is: kind, grid, memory order, text on either side."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import fx

from freqopt.passes.dims import DATA, Atom, Dim, Dims, Segment
from freqopt.passes.graph_values import same
from freqopt.passes.site import Kind, Size, SizeSource

MAX_AXES = 3


@dataclass(frozen=True)
class Lattice:
    """The video segment of a sequence and what stands before and after it."""

    atoms: Segment
    before: tuple[Segment, ...]
    after: tuple[Segment, ...]

    @property
    def grid(self) -> tuple[Size, Size, Size]:
        """Extents in memory order, always three."""
        sizes = [atom.size for atom in self.axes]
        return tuple([1] * (MAX_AXES - len(sizes)) + sizes)  # type: ignore[return-value]

    @property
    def axes(self) -> Segment:
        """At most three axes: of more (tokens tiled by windows) the outer ones count as one."""
        return self.atoms[-MAX_AXES:] if len(self.atoms) <= MAX_AXES else ()

    def sources(self) -> tuple[SizeSource | int, ...] | None:
        """Where the running graph reads each extent, or None if one cannot be named."""
        found: list[SizeSource | int] = [1] * (MAX_AXES - len(self.axes))
        for atom in self.axes:
            if isinstance(atom.size, int):
                found.append(atom.size)
            elif atom.source is not None:
                found.append(SizeSource(*atom.source))
            else:
                return None
        return tuple(found)


def segment_size(segment: Segment) -> Size:
    """Tokens of a segment."""
    return math.prod([atom.size for atom in segment])


def keys(dim: Dim) -> list[tuple[Any, ...]]:
    """Identity of each segment: equal for equal origins."""
    return [tuple(atom.key for atom in segment) for segment in dim]


def kind_of(query: Dim, key: Dim) -> tuple[Kind, str]:
    """Compare the origins of queries and keys; lengths do not tell."""
    ours, theirs = keys(query), keys(key)
    if ours == theirs:
        if len(ours) == 1:
            return "self", "self-attention"
        return "joint", "joint attention"
    if set(ours) <= set(theirs):
        return "joint", "its keys hold tokens that are not among its queries"
    if not set(ours) & set(theirs):
        return "cross", "cross-attention: queries and keys have different origins"
    return "other", "its queries and keys share only part of their tokens"


def is_lattice(segment: Segment) -> bool:
    """Whether a segment is two or more axes of one input: pixels, latents, patches."""
    telling = [a for a in segment if a.origin == DATA and a.axis is not None]
    return len(telling) >= 2 and len({a.axis[0] for a in telling if a.axis}) == 1


def largest_lattice(dim: Dim) -> tuple[Lattice | None, str]:
    """The segment of a token dimension that is a lattice, the largest if there are several.

    The others then count as text: exact as keys, dense as queries.
    """
    candidates = [i for i, segment in enumerate(dim) if is_lattice(segment)]
    if not candidates:
        return None, "its tokens do not come from a lattice that the graph shows"
    best = candidates[0]
    note = ""
    for i in candidates[1:]:
        sizes = segment_size(dim[i]), segment_size(dim[best])
        if all(isinstance(s, int) for s in sizes):
            best = i if sizes[0] > sizes[1] else best
        note = f"{len(candidates)} grids in one sequence; the largest is split"
    return Lattice(tidy(dim[best]), dim[:best], dim[best + 1 :]), note


def tidy(segment: Segment) -> Segment:
    """Drop axes of size 1 beyond three, and join what one axis was cut into and not reordered."""
    atoms: list[Atom] = list(segment)
    while len(atoms) > MAX_AXES and any(same(a.size, 1) for a in atoms):
        atoms.remove(next(a for a in atoms if same(a.size, 1)))
    if len(atoms) > MAX_AXES and all(isinstance(a.size, int) for a in atoms):
        outer = atoms[: len(atoms) - MAX_AXES + 1]
        joined = Atom(("joined", *(a.key for a in outer)), segment_size(tuple(outer)), DATA,
                      outer[0].axis)  # fmt: skip
        atoms = [joined, *atoms[len(outer) :]]
    return tuple(atoms)


def outside_tokens(batch: Dims, lattice: Lattice) -> bool:
    """Whether axes of the same input stand outside the token dimension.

    Then the attention covers only part of the tokens: frames apart, windows, or time alone.
    """
    inputs = {a.axis[0] for a in lattice.atoms if a.axis is not None}
    for dim in batch:
        atoms = [a for segment in dim for a in segment]
        inner = [a for a in atoms if a.axis is not None and a.axis[0] in inputs and a.axis[1] != 0]
        if any(not same(a.size, 1) for a in inner):
            return True
    return False


def single_axis(dim: Dim) -> Atom | None:
    """The one axis of a plain sequence, if it is one axis of an input."""
    if len(dim) == 1 and len(dim[0]) == 1 and dim[0][0].origin == DATA:
        return dim[0][0]
    return None


def text_source(segments: tuple[Segment, ...]) -> SizeSource | int | None:
    """Where the size of leading text can be read: a number, one named axis, or None."""
    sizes = [segment_size(s) for s in segments]
    if all(isinstance(s, int) for s in sizes):
        return sum(sizes)
    if len(segments) == 1 and len(segments[0]) == 1 and segments[0][0].source is not None:
        return SizeSource(*segments[0][0].source)
    return None


def merges_of(graph: fx.Graph, length: Size) -> set[tuple[int, int, int]]:
    """Grids that reshapes elsewhere in the graph make of `length` tokens: rope tables, unpatchify.

    Looks at every reshape that merges two or three neighbouring dimensions into `length`, or cuts
    `length` into them; dimensions of heads and channels cannot take part, as `length` stands alone.
    """
    from freqopt.passes.graph_values import op_name, shape_of
    from freqopt.passes.provenance import RESHAPES

    found: set[tuple[int, int, int]] = set()
    if not isinstance(length, int):
        return found
    for node in graph.nodes:
        if op_name(node) not in RESHAPES or not isinstance(node.args[0], fx.Node):
            continue
        shapes = shape_of(node.args[0]), shape_of(node)
        if None in shapes:
            continue
        for many, few in (shapes, shapes[::-1]):
            assert many is not None and few is not None
            if not all(isinstance(s, int) for s in (*many, *few)) or length not in few:
                continue
            at = few.index(length)
            lead = math.prod(few[:at])
            for start in range(len(many)):
                if math.prod(many[:start]) != lead:
                    continue
                for stop in range(start + 2, min(start + 4, len(many) + 1)):
                    run = many[start:stop]
                    if math.prod(run) == length and sum(r > 1 for r in run) >= 2:
                        found.add((*[1] * (3 - len(run)), *run))
    return found
