"""The layout of tokens on a grid that the user gave, which has to fit them.

Other tokens in the axis of the grid's, such as a reference image's, can be given as well: how many
lie before it and after it.
"""

from __future__ import annotations

from torch import fx

from freqopt.grid import Grid
from freqopt.passes.axes.dimensions import Axis, axis_size, has, hint, product, same, segment_size
from freqopt.passes.axes.lattices import find_lattices, is_lattice
from freqopt.passes.axes.layout import Layout, around
from freqopt.passes.reasons import Reason
from freqopt.passes.site import Extent

Others = tuple[int, int]
"""Numbers of other tokens before and after a grid, in its axis."""


def given_layout(axis: Axis, given: Grid, graph: fx.Graph, others: Others = (0, 0)) -> Layout:
    """Layout of an axis of which one part is the grid, and the others given, in any segments."""
    if any(others):
        return _among_others(axis, given, others, graph)
    tokens = product(given)
    fits = [i for i, segment in enumerate(axis) if same(segment_size(segment), tokens)]
    runs = [(each.start, each.stop) for each in find_lattices(axis, {})]
    runs = [run for run in runs if same(axis_size(axis[slice(*run)]), tokens)]
    guarded = not fits and not runs
    if guarded:
        fits = _guarded(axis, tokens)
    lattices = [(i, i + 1) for i in fits if is_lattice(axis[i])]
    chosen = lattices or runs or [(i, i + 1) for i in fits]
    if len(chosen) != 1:
        sizes = " + ".join(str(segment_size(segment)) for segment in axis)
        misfit = Reason.GRID_MISFIT(
            grid=given,
            shown="x".join(map(str, given)),
            tokens=tokens,
            sizes=sizes,
            how_many="more than one has" if chosen else "none has",
        )
        return Layout(problem=misfit)
    layout = around(axis, *chosen[0], given, graph, counted=guarded)
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


def _among_others(axis: Axis, given: Grid, others: Others, graph: fx.Graph) -> Layout:
    """The layout where the grid is part of one segment, or of the whole sequence, as given."""
    before, after = others
    tokens = before + product(given) + after
    segments = [(i, i + 1) for i, segment in enumerate(axis) if has(segment_size(segment), tokens)]
    if not segments and has(axis_size(axis), tokens):
        segments = [(0, len(axis))]
    if len(segments) != 1:
        sizes = " + ".join(str(segment_size(segment)) for segment in axis)
        misfit = Reason.GRID_MISFIT(
            grid=given,
            shown=f"{before} + {'x'.join(map(str, given))} + {after}",
            tokens=tokens,
            sizes=sizes,
            how_many="more than one has" if segments else "none has",
        )
        return Layout(problem=misfit)
    layout = around(axis, *segments[0], given, graph, counted=True)
    layout.grid_arguments = given
    layout.shown = layout.text_before, axis_size(axis[slice(*segments[0])])
    layout.text_before = layout.text_before + before
    layout.text_after = layout.text_after + after
    layout.text_before_arguments = (*layout.text_before_arguments, before)
    layout.text_after_arguments = (after, *layout.text_after_arguments)
    return layout
