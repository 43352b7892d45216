"""The lattices of a token axis: which segments are a grid of data, and which of them are one.

A video that follows its first frames, or an image that follows the one it is an edit of, lies in
the sequence as one longer video does, where both have as many rows and columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from freqopt.passes.axes.dimensions import Atom, Axis, Segment, same
from freqopt.passes.axes.parts import holds_ranks
from freqopt.passes.axes.provenance import alike
from freqopt.passes.reasons import Reason, Why
from freqopt.passes.site import Extent

LatticeExtent = Atom | int | tuple[Atom | int, ...]
"""An extent of a lattice: an atom, a number, or the sum of several."""


@dataclass(frozen=True)
class Lattice:
    """Segments start..stop of an axis; three extents, slowest first, or the problem with them."""

    start: int
    stop: int
    segment: Segment
    extents: tuple[LatticeExtent, ...] = ()
    problem: Why | None = None

    def shape(self) -> str:
        """As "3x6x10"; in tiles, all the extents that there are."""
        sizes = [extent_size(extent) for extent in self.extents]
        return "x".join(map(str, sizes or [atom.size for atom in self.segment]))


def extent_size(extent: LatticeExtent) -> Extent:
    """The number of entries of an extent."""
    if isinstance(extent, tuple):
        total: Extent = 0
        for part in extent:
            total = total + extent_size(part)
        return total
    return extent.size if isinstance(extent, Atom) else extent


def find_lattices(axis: Axis, positions: Mapping[Atom, Sequence[Segment]]) -> list[Lattice]:
    """The lattices of an axis, in order, neighbours joined that are one.

    positions: lattices of the tables of positions that packed tokens meet, see `Dimensions`; they
    are asked where no segment is a lattice itself.
    """
    found = [_lattice(i, segment) for i, segment in enumerate(axis) if is_lattice(segment)]
    if not found:
        return [_lattice(i, table) for i, table in _by_positions(axis, positions).items()]
    for each in list(found):
        _add_neighbours(axis, each, found)
    found.sort(key=lambda lattice: lattice.start)
    joined = found[:1]
    for lattice in found[1:]:
        both = _join(joined[-1], lattice)
        joined[-1:] = [joined[-1], lattice] if both is None else [both]
    return joined


def _lattice(index: int, segment: Segment) -> Lattice:
    extents = lattice_extents(segment)
    if isinstance(extents, Why):
        return Lattice(index, index + 1, segment, problem=extents)
    return Lattice(index, index + 1, segment, tuple(extents))


def _add_neighbours(axis: Axis, lattice: Lattice, found: list[Lattice]) -> None:
    """Add frames of another input that have the rows and columns of a lattice beside them."""
    known = {each.start for each in found}
    for step in (-1, 1):
        index = lattice.start + step
        while 0 <= index < len(axis) and index not in known:
            segment = axis[index]
            frames = len(segment) == 3 and segment[0].origin == "data"
            if not (frames and alike((segment[1:],), (lattice.segment[-2:],))):
                break
            found.append(Lattice(index, index + 1, segment, segment))
            index += step


def _join(first: Lattice, second: Lattice) -> Lattice | None:
    """Two lattices as one, where the second goes on where the first ends."""
    if first.problem or second.problem or first.stop != second.start:
        return None
    rows = zip(first.extents[1:], second.extents[1:], strict=True)
    if not all(same(extent_size(a), extent_size(b)) for a, b in rows):
        return None
    frames = tuple(
        part
        for extent in (first.extents[0], second.extents[0])
        for part in (extent if isinstance(extent, tuple) else (extent,))
    )
    return Lattice(first.start, second.stop, second.segment, (frames, *second.extents[1:]))


def _by_positions(axis: Axis, positions: Mapping[Atom, Sequence[Segment]]) -> dict[int, Segment]:
    """Lattices of segments by their positions, where all tables agree."""
    found: dict[int, Segment] = {}
    for i, segment in enumerate(axis):
        tables = positions.get(segment[0], ()) if len(segment) == 1 else ()
        if tables and all(
            all(same(a.size, b.size) for a, b in zip(tables[0], table, strict=True))
            for table in tables
        ):
            found[i] = tables[0]
    return found


def is_lattice(segment: Segment) -> bool:
    """Whether a segment is a lattice of data: two axes or more of one of the graph's inputs."""
    atoms = [a for a in segment if not same(a.size, 1)] or list(segment)
    if holds_ranks(segment):
        return False
    if len(segment) < 2 or any(a.origin != "data" for a in atoms):
        return False
    return len({a.root[0] for a in atoms}) == 1 and len({a.root[1] for a in segment}) > 1


def lattice_extents(segment: Segment) -> list[Atom | int] | Why:
    """Three extents of a lattice, slowest first, or why there are not three."""
    atoms = list(segment)
    while len(atoms) > 3:
        unit = next((i for i, atom in enumerate(atoms) if same(atom.size, 1)), None)
        if unit is None:
            return Reason.AXES(shape="x".join(str(atom.size) for atom in segment))
        del atoms[unit]
    if len({atom.root for atom in atoms}) < len(atoms):
        return Reason.TILES()
    if len(atoms) == 2:
        # With one frame, or one row of patches, no trace of that axis may be left.
        return [1, *atoms]
    return [*atoms]
