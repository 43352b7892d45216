"""How collectives of several GPUs carry the axes of tensors on; see `parts` for what these become.

Along the first dimension of what an all-to-all or an all-gather brings together lies one part from
every rank, in the order of the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from freqopt.passes.axes.dimensions import Axis, axis_size, same
from freqopt.passes.axes.distribute import bundle_of, bundled
from freqopt.passes.axes.graph_axes import Dimensions
from freqopt.passes.axes.parts import over_ranks, ranks_axis
from freqopt.passes.axes.rules import known_axes, rule
from freqopt.passes.nodes import known_int, shape
from freqopt.passes.site import Extent


@rule("wait_tensor", "_wrap_tensor_autograd")
def _wait(dimensions: Dimensions, node: fx.Node) -> Sequence[Axis | None] | None:
    known = known_axes(dimensions, node)
    return None if known is None else known[1]


@rule("all_to_all_single")
def _all_to_all(dimensions: Dimensions, node: fx.Node) -> list[Axis | None] | None:
    """Part p of the result is what rank p had for this one; of even parts only.

    What is divided among the ranks must not be tokens: these would then be others than before.
    """
    known = known_axes(dimensions, node)
    splits = [node.args[i] for i in (1, 2) if i < len(node.args)]
    if known is None or not _even(splits):
        return None
    source, (first, *rest) = known
    count = len(splits[0]) if splits and isinstance(splits[0], (tuple, list)) else None
    replaced = _replaced(first, shape(source)[0], count)
    return None if replaced is None else [replaced, *rest]


def _even(splits: Sequence[object]) -> bool:
    sizes = [list(split) for split in splits if isinstance(split, (tuple, list))]
    flat = [size for split in sizes for size in split]
    return (
        len(sizes) == 2
        and all(isinstance(s, (int, fx.Node)) for s in flat)
        and (len({s if isinstance(s, int) else s.name for s in flat}) == 1)
    )


def _replaced(axis: Axis, size: Extent, count: int | None) -> Axis | None:
    """An axis whose slowest atom, of `count` entries, is of ranks in the place of what it was."""
    if count is None or len(axis) != 1:
        return None
    inner = bundle_of(axis)
    if inner is not None:
        first = _replaced(inner[0], axis_size(inner[0]), count)
        return None if first is None else bundled([first, *inner[1:]], size)
    atoms = [atom for atom in axis[0] if not same(atom.size, 1)]
    if not atoms or not same(atoms[0].size, count) or atoms[0].origin == "data":
        return None
    return ((ranks_axis(count)[0][0], *atoms[1:]),)


@rule("all_gather_into_tensor", "all_gather_single", "all_gather_tensor")
def _all_gather(dimensions: Dimensions, node: fx.Node) -> list[Axis | None] | None:
    """The parts of all ranks one after the other along the first dimension."""
    known = known_axes(dimensions, node)
    count = known_int(node.args[1]) if len(node.args) > 1 else None
    if known is None or count is None:
        return None
    first, *rest = known[1]
    return [over_ranks(count, first), *rest]
