"""The grid of a site: which segment of its tokens is video, on which lattice, and what is text.

A wrong grid is worse than none, so a grid is given only if it provably multiplies to the number of
video tokens; a grid set by the user is held to the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from freqopt.passes.dimensions import (
    Atom,
    Axis,
    Segment,
    axis_size,
    hint,
    product,
    same,
    segment_size,
)
from freqopt.passes.site import Argument, Extent, Size

Grid3 = tuple[Extent, Extent, Extent]


@dataclass
class Layout:
    """How a site's tokens lie: grid extents (slowest first) and the text around the video.

    problem: why there is no grid. remark: what else is to say where there is one. The arguments
    are what the graph computes the extents from.
    """

    grid: Grid3 | None = None
    text_before: Extent = 0
    text_after: Extent = 0
    problem: str | None = None
    remark: str = ""
    grid_arguments: tuple[Argument, ...] = ()
    text_before_arguments: tuple[Argument, ...] = ()
    text_after_arguments: tuple[Argument, ...] = ()


def infer_layout(
    axis: Axis,
    given: tuple[int, int, int] | None,
    graph: fx.Graph,
    positions: Mapping[Atom, Sequence[Segment]] | None = None,
) -> Layout:
    """Layout of a token axis.

    given: the user's grid, which goes before what the graph says, if it fits. positions: lattices
    of the tables of positions that tokens packed into one axis meet, see `Dimensions`.
    """
    if given is not None:
        return _given_layout(axis, given, graph)
    video = {i: segment for i, segment in enumerate(axis) if is_lattice(segment)}
    if not video:
        video = _by_positions(axis, positions or {})
    if not video:
        return Layout(problem=_why_no_lattice(axis))
    index = _main(video)
    shapes = ["x".join(str(atom.size) for atom in video[i]) for i in video if i != index]
    if index is None:
        several = ", ".join(shapes)
        return Layout(problem=f"its tokens are several grids in one sequence ({several})")
    segment = video[index]
    extents = lattice_extents(segment)
    if isinstance(extents, str):
        return Layout(problem=extents)
    sizes = [extent.size if isinstance(extent, Atom) else extent for extent in extents]
    layout = _around(axis, index, (sizes[0], sizes[1], sizes[2]), graph)
    arguments = [_argument(extent, graph) for extent in extents]
    known = tuple(argument for argument in arguments if argument is not None)
    if layout.problem is None and len(known) < 3:
        layout.problem = "an extent of its grid cannot be read where the attention is"
    layout.grid_arguments = known
    if shapes:
        others = ", ".join(shapes)
        layout.remark = f"; other grids in its sequence ({others}) stay exact, as text does"
    return layout


def _main(video: Mapping[int, Segment]) -> int | None:
    """The lattice that has more tokens than all others together, such as a video after its history.

    The others are left exact. None where no lattice is as large, and for unknown sizes.
    """
    if len(video) == 1:
        return next(iter(video))
    sizes = {i: hint(segment_size(segment)) for i, segment in video.items()}
    known = {i: size for i, size in sizes.items() if size is not None}
    if len(known) < len(sizes):
        return None
    largest = max(known, key=lambda i: known[i])
    return largest if 2 * known[largest] > sum(known.values()) else None


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
    if len(segment) < 2 or any(a.origin != "data" for a in atoms):
        return False
    return len({a.root[0] for a in atoms}) == 1 and len({a.root[1] for a in segment}) > 1


def lattice_extents(segment: Segment) -> list[Atom | int] | str:
    """Three extents of a lattice, slowest first, or why there are not three."""
    atoms = list(segment)
    while len(atoms) > 3:
        unit = next((i for i, atom in enumerate(atoms) if same(atom.size, 1)), None)
        if unit is None:
            shape = "x".join(str(atom.size) for atom in segment)
            return (
                f"its tokens lie on more than three axes or in tiles ({shape}), not in raster order"
            )
        del atoms[unit]
    if len({atom.root for atom in atoms}) < len(atoms):
        return "its tokens lie in tiles, not in raster order"
    if len(atoms) == 2:
        # With one frame, or one row of patches, no trace of that axis may be left.
        return [1, *atoms]
    return [*atoms]


def _given_layout(axis: Axis, given: tuple[int, int, int], graph: fx.Graph) -> Layout:
    tokens = product(given)
    fits = [i for i, segment in enumerate(axis) if same(segment_size(segment), tokens)]
    guarded = not fits
    if guarded:
        fits = _guarded(axis, tokens)
    lattices = [i for i in fits if is_lattice(axis[i])]
    chosen = lattices or fits
    if len(chosen) != 1:
        shown = "x".join(map(str, given))
        sizes = " + ".join(str(segment_size(segment)) for segment in axis)
        why = "none has" if not chosen else "more than one has"
        return Layout(
            problem=f"grid={given} was given, {shown} = {tokens} tokens, but of its {sizes} tokens "
            f"{why} that many"
        )
    layout = _around(axis, chosen[0], given, graph)
    layout.grid_arguments = given
    if guarded:
        layout.remark = f"; other numbers of video tokens than the {tokens} of grid= compile anew"
    return layout


def _guarded(axis: Axis, tokens: Extent) -> list[int]:
    """The segments of symbolic size that have as many tokens as the user's grid in this call.

    Guards keep it so: where the answer changes, the model is compiled anew. Sizes that depend on
    data take no guard, and do not count.
    """
    sizes = [segment_size(segment) for segment in axis]
    return [i for i, size in enumerate(sizes) if hint(size) is not None and bool(size == tokens)]


def _around(axis: Axis, index: int, grid: Grid3, graph: fx.Graph) -> Layout:
    """The layout with the segments before and after the video as text, checked against the sum."""
    before, after = axis[:index], axis[index + 1 :]
    layout = Layout(
        grid=grid,
        text_before=axis_size(before) if before else 0,
        text_after=axis_size(after) if after else 0,
    )
    if not same(product(grid), segment_size(axis[index])):
        layout.problem = (
            f"grid {grid} does not provably have the {segment_size(axis[index])} video tokens"
        )
    for name, part in (("text_before_arguments", before), ("text_after_arguments", after)):
        arguments = [_segment_argument(segment, graph) for segment in part]
        if any(argument is None for argument in arguments):
            layout.problem = "the number of its text tokens cannot be read in the graph"
        setattr(layout, name, tuple(a for a in arguments if a is not None))
    return layout


def _segment_argument(segment: Segment, graph: fx.Graph) -> Argument | None:
    size = segment_size(segment)
    if isinstance(size, int):
        return size
    return _argument(segment[0], graph) if len(segment) == 1 else None


def _argument(extent: Atom | int, graph: fx.Graph) -> Argument | None:
    """How the graph can compute an extent."""
    if isinstance(extent, int):
        return extent
    if isinstance(extent.size, int):
        return extent.size
    if extent.node is None or extent.node.graph is not graph:
        return None
    return Size(extent.node, extent.dim)


def _why_no_lattice(axis: Axis) -> str:
    roots = {a.root[0]: a.origin for segment in axis for a in segment}
    data = [name for name, origin in roots.items() if origin == "data"]
    if not data:
        return "where its tokens come from cannot be followed in this graph; pass grid=(t, h, w)"
    listed = ", ".join(readable_input(name) for name in data)
    return (
        f"its tokens are one axis of the input {listed}, which has no grid (text, audio, or video "
        "packed before the model); if they are video, pass grid=(t, h, w); an image is (1, h, w), "
        "one long sequence (1, 1, n)"
    )


def readable_input(name: str) -> str:
    """Name of a graph input as the user wrote it: l_kwargs_hidden_states_ is hidden_states."""
    for prefix in ("l_kwargs_", "l_args_", "l_", "kwargs_", "args_"):
        if name.startswith(prefix):
            name = name[len(prefix) :]
            break
    return name.strip("_") or name
