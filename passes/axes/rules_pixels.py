"""How operations on pixels carry the axes of tensors on: convolution, pooling, padding, shuffling.

See `rules` for what a rule is. An extent that changes is still one of the same input.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from freqopt.passes.axes.dimensions import Atom, Axis, hint, join, same
from freqopt.passes.axes.graph_axes import Dimensions
from freqopt.passes.axes.rules import dim_of, known_axes, rule
from freqopt.passes.nodes import argument, known_int, operation, shape, value
from freqopt.passes.site import Extent

POOLS = [
    f"{name}_pool{d}d"
    for d in (1, 2, 3)
    for name in ("avg", "max", "lp", "adaptive_avg", "adaptive_max")
]


@rule("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _conv(dimensions: Dimensions, node: fx.Node) -> list[Axis | None] | None:
    known = known_axes(dimensions, node)
    if known is None or len(known[1]) != len(shape(node)):
        return None
    spatial = known[1][2:]
    inputs = {axis[0][0].root[0] for axis in spatial if len(axis) == 1 and axis[0]}
    axes: list[Axis | None] = [known[1][0], None]
    for dim, axis in enumerate(spatial, 2):
        axes.append(resized(axis, shape(node)[dim], node, dim, inputs))
    return axes


def resized(
    axis: Axis, size: Extent, node: fx.Node, dim: int, inputs: Collection[str] = ()
) -> Axis | None:
    """The same axis of an input with another extent: convolved, padded or interpolated.

    inputs: those that the other axes are of. A concatenation, such as a first frame and the rest,
    becomes the axis of the one among them, or of the largest.
    """
    atoms = [segment[0] for segment in axis if len(segment) == 1]
    if not axis or len(atoms) < len(axis):
        return None
    if any(atom.cut is not None and len(atom.cut[0]) != 1 for atom in atoms):
        return None
    if len(atoms) > 1 and any(atom.origin != "data" for atom in atoms):
        return None
    atom = max(atoms, key=lambda a: (a.root[0] in inputs, hint(a.size) or 0))
    return ((Atom(size, atom.origin, atom.root, node, dim),),)


@rule("pad", "constant_pad_nd", "interpolate", "upsample", *POOLS)
def _resize(dimensions: Dimensions, node: fx.Node) -> list[Axis | None] | None:
    """Dimensions that change stay axes of the same input, with another extent."""
    known = known_axes(dimensions, node)
    if known is None or len(known[1]) != len(shape(node)):
        return None
    result: list[Axis | None] = []
    for dim, axis in enumerate(known[1]):
        size = shape(node)[dim]
        if same(shape(known[0])[dim], size):
            result.append(axis)
        elif len(axis) > 1 or (axis and len(axis[0]) > 1):
            result.append(_filled_up(axis, dim - len(known[1]), node))
        else:
            result.append(resized(axis, size, node, dim))
    return result


def _filled_up(axis: Axis, dim: int, node: fx.Node) -> Axis | None:
    """Tokens of a lattice, or with text, that are padded: those put to them are no part of it."""
    pads = argument(node, 1, "pad", default=())
    if operation(node) not in ("pad", "constant_pad_nd") or len(pads) < -2 * dim:
        return None
    pair = [value(n) for n in pads[-2 * dim - 2 : -2 * dim]]
    if not all(isinstance(n, int) and n >= 0 for n in pair):
        return None
    before, after = (((Atom(n, "made", (node.name, i)),),) for i, n in enumerate(pair))
    return join([*([before] if pair[0] else []), axis, *([after] if pair[1] else [])])


@rule("pixel_unshuffle", "pixel_shuffle")
def _pixel_shuffle(dimensions: Dimensions, node: fx.Node) -> list[Axis | None] | None:
    """(.., C, H, W) as (.., C * r * r, H / r, W / r), or the other way round."""
    known = known_axes(dimensions, node)
    if known is None:
        return None
    axes = known[1]
    last = range(len(axes) - 2, len(axes))
    return [*axes[:-3], None, *(resized(axes[d], shape(node)[d], node, d) for d in last)]


@rule("unfold", "im2col")
def _unfold(dimensions: Dimensions, node: fx.Node) -> list[Axis | None] | None:
    """Windows along one dimension, `x.unfold(dim, size, step)`, or the blocks of `F.unfold`."""
    known = known_axes(dimensions, node)
    if known is None:
        return None
    axes = list(known[1])
    if node.op == "call_method" or len(shape(node)) == len(axes) + 1:
        dim = known_int(argument(node, 1, "dimension"))
        if dim is None:
            return None
        dim = dim_of(dim, len(axes))
        result: list[Axis | None] = [*axes, None]
        result[dim] = resized(axes[dim], shape(node)[dim], node, dim)
        return result
    blocks = _blocks(node, known[0])
    if len(axes) != 4 or blocks is None:
        return None
    lattice = []
    for axis, size in zip(axes[2:], blocks, strict=True):
        found = resized(axis, size, node, 2)
        if found is None:
            return None
        # No dimension of the output has this extent alone.
        atom = found[0][0]
        lattice.append(Atom(size, atom.origin, atom.root))
    return [axes[0], None, (tuple(lattice),)]


def _blocks(node: fx.Node, source: fx.Node) -> list[Extent] | None:
    """Rows and columns of the blocks that `F.unfold` cuts an image into."""
    names = ("kernel_size", "dilation", "padding", "stride")
    pairs = []
    for i, (name, default) in enumerate(zip(names, (None, 1, 0, 1), strict=True), 1):
        given = value(argument(node, i, name, default=default))
        pair = given if isinstance(given, (tuple, list)) else (given, given)
        if len(pair) != 2 or not all(isinstance(item, int) for item in pair):
            return None
        pairs.append(pair)
    return [
        (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, dilation, padding, stride in zip(shape(source)[-2:], *pairs, strict=True)
    ]


@rule("flip", "roll")
def _reorder(dimensions: Dimensions, node: fx.Node) -> list[Axis | None] | None:
    """Backwards, a lattice is one still; rolled along several of its axes at once, it is not."""
    known = known_axes(dimensions, node)
    if known is None or operation(node) == "flip":
        return None if known is None else list(known[1])
    given = argument(node, 2, "dims")
    listed = given if isinstance(given, (tuple, list)) else [given]
    rolled = {dim_of(d, len(known[1])) for d in listed if isinstance(d, int)}
    if not rolled:
        return None
    return [
        None if d in rolled and any(len(segment) > 1 for segment in axis) else axis
        for d, axis in enumerate(known[1])
    ]
