"""How collectives of several GPUs carry the axes of tensors on; see `parts` for what these become.

Along the first dimension of what an all-to-all or an all-gather brings together lies one part from
every rank, in the order of the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from freqopt.passes.axes.dimensions import Atom, Axis, axis_size, piece, same
from freqopt.passes.axes.distribute import bundle_of, bundled
from freqopt.passes.axes.graph_axes import Dimensions
from freqopt.passes.axes.parts import over_ranks, ranks_axis
from freqopt.passes.axes.rules import dim_of, known_axes, rule
from freqopt.passes.nodes import argument, is_distributed, known_int, shape, value
from freqopt.passes.site import Extent


@rule("wait_tensor", "_wrap_tensor_autograd", "all_reduce", "broadcast")
def _wait(dimensions: Dimensions, node: fx.Node) -> Sequence[Axis | None] | None:
    known = known_axes(dimensions, node)
    return None if known is None else known[1]


@rule("all_to_all_single")
def _all_to_all(dimensions: Dimensions, node: fx.Node) -> list[Axis | None] | None:
    """Part p of the result is what rank p had for this one; of even parts only.

    What is divided among the ranks must not be tokens: these would then be others than before.
    """
    dimensions.collectives.add(node)
    known = known_axes(dimensions, node)
    splits = [node.args[i] for i in (1, 2) if i < len(node.args)]
    if known is None or not _even(splits):
        return None
    source, (first, *rest) = known
    count = len(splits[0]) if splits and isinstance(splits[0], (tuple, list)) else None
    replaced = _replaced(first, shape(source)[0], count)
    if replaced is None:
        return None
    dimensions.dealt.append((replaced[1], node))
    return [replaced[0], *rest]


def _even(splits: Sequence[object]) -> bool:
    sizes = [list(split) for split in splits if isinstance(split, (tuple, list))]
    flat = [size for split in sizes for size in split]
    return (
        len(sizes) == 2
        and all(isinstance(s, (int, fx.Node)) for s in flat)
        and (len({s if isinstance(s, int) else s.name for s in flat}) == 1)
    )


def _replaced(axis: Axis, size: Extent, count: int | None) -> tuple[Axis, Atom] | None:
    """An axis whose slowest atom, or `count` runs of it, is of ranks in the place of what it was.

    And the atom of `count` entries that ranks took the place of.
    """
    if count is None or len(axis) != 1:
        return None
    inner = bundle_of(axis)
    if inner is not None:
        first = _replaced(inner[0], axis_size(inner[0]), count)
        return None if first is None else (bundled([first[0], *inner[1:]], size), first[1])
    atoms = [atom for atom in axis[0] if not same(atom.size, 1)]
    if not atoms or atoms[0].origin == "data":
        return None
    (ranks,) = ranks_axis(count)[0]
    if same(atoms[0].size, count):
        return ((ranks, *atoms[1:]),), atoms[0]
    parts = _in_two(atoms[0], count)
    return None if parts is None else (((ranks, parts[1], *atoms[1:]),), parts[0])


def _in_two(atom: Atom, count: int) -> tuple[Atom, Atom] | None:
    """An atom as `count` equal runs and what each is of, as if a view had taken it apart."""
    if not isinstance(atom.size, int) or atom.size % count or atom.cut or atom.bundle:
        return None
    sizes = count, atom.size // count
    first, second = (
        Atom(size, atom.origin, atom.root, None, 0, atom, part, 2)
        for part, size in enumerate(sizes)
    )
    return first, second


@rule("all_gather_into_tensor", "all_gather_single", "all_gather_tensor")
def _all_gather(dimensions: Dimensions, node: fx.Node) -> list[Axis | None] | None:
    """The parts of all ranks one after the other along the first dimension."""
    dimensions.collectives.add(node)
    known = known_axes(dimensions, node)
    count = known_int(node.args[1]) if len(node.args) > 1 else None
    if known is None or count is None:
        return None
    first, *rest = known[1]
    return [over_ranks(count, first), *rest]


@rule("from_local")
def _from_local(dimensions: Dimensions, node: fx.Node) -> list[Axis | None] | None:
    """The whole of what processes have parts of, or all of it (DTensor): what is cut is new."""
    known, placements = known_axes(dimensions, node), argument(node, 2, "placements")
    if known is None or not isinstance(placements, (tuple, list)):
        return None
    cut = [_dim_of(p, len(known[1])) for p in placements]
    return [None if dim in cut else axis for dim, axis in enumerate(known[1])]


@rule("redistribute")
def _redistribute(dimensions: Dimensions, node: fx.Node) -> Sequence[Axis | None] | None:
    known = known_axes(dimensions, node)
    return None if known is None else known[1]


@rule("to_local")
def _to_local(dimensions: Dimensions, node: fx.Node) -> list[Axis | None] | None:
    """The part that this process has of a DTensor: of a dimension that is cut, its equal piece."""
    known = known_axes(dimensions, node)
    if known is None or not is_distributed(known[0]):
        return None
    dimensions.collectives.add(node)
    source, axes = known
    whole, result = value(source), list(axes)
    for mesh_dim, placement in enumerate(whole.placements):
        dim = _dim_of(placement, len(axes))
        if dim is None:
            continue
        length, axis = shape(node)[dim], result[dim]
        count, rank = whole.device_mesh.size(mesh_dim), whole.device_mesh.get_local_rank(mesh_dim)
        if len(axis) != 1 or not same(axis_size(axis), length * count):
            return None
        result[dim] = ((piece(axis[0], rank * length, (rank + 1) * length, node, dim),),)
    return list(result)


def _dim_of(placement: object, dims: int) -> int | None:
    """The dimension that a placement of a DTensor cuts, if it does."""
    dim = getattr(placement, "dim", None)
    return dim_of(dim, dims) if isinstance(dim, int) else None
