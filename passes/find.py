"""Finds every attention site of a graph and says what is known about it.

Works on the graph that Dynamo hands to a backend and, by the same rules, on the graph of
`torch.export` before decompositions. Nothing is changed here; see `rewrite`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from freqopt.grid import Grid
from freqopt.passes.axes.dimensions import same
from freqopt.passes.axes.given import Others
from freqopt.passes.axes.graph_axes import Dimensions
from freqopt.passes.axes.grid import Said
from freqopt.passes.axes.heads import share_of
from freqopt.passes.axes.layout import Layout
from freqopt.passes.axes.operands import (
    heads_of,
    length_of_keys,
    operands_of,
    scale_of,
    settled_heads,
)
from freqopt.passes.axes.overwritten import filled
from freqopt.passes.axes.propagate import follow_axes
from freqopt.passes.axes.told import OrderOf, Told, unread
from freqopt.passes.classify import classify
from freqopt.passes.known import believe
from freqopt.passes.naming import Names, Numbered, name_around
from freqopt.passes.nodes import is_distributed, shape, tensor
from freqopt.passes.positional import make_positional
from freqopt.passes.reasons import Reason, Why
from freqopt.passes.site import OURS, Attention, Extent, Kind, Known, Mark, Side, Site
from freqopt.passes.spellings.anchors import find_attention

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Grids:
    """Grids of video tokens that come from elsewhere than the graph.

    given: the user's word for this model; it goes before what a graph tells, and has to fit.
    likely: to be tried where a graph tells none, such as those that a plan was made on. others:
    tokens before and after the given one in its axis. told: by the data of inputs, at every call;
    `believed` where the user or a plan says that the model's tokens are video. order_of: see there.
    """

    given: Grid | None = None
    likely: tuple[Grid, ...] = ()
    others: Others = (0, 0)
    told: tuple[Told, ...] = ()
    believed: bool = False
    order_of: OrderOf = unread

    def said(self, grid: Grid | None) -> Said:
        """What is said to a search for sites that tries a grid, or none."""
        return Said(grid, self.others, self.told, self.believed, self.order_of)


@dataclass(frozen=True)
class Model:
    """What is known of the model that a graph is of, from elsewhere than the graph.

    names: of its modules, by their `id`. known: how the tokens of a site lay when it was
    calibrated, by the site's name. inside: name of the module that runs the graph where that is a
    part of the model: attention in no module of the graph is in this one. totals: lengths of all
    calibrated sites. called: whether what the model is being called with is known. sides: on which
    calibrated sites have text, each of which may come to run in this graph. asked: what runs the
    graph asks masks that are believed, at every call, whether they are as calibration saw them.
    """

    names: Names | None = None
    known: Callable[[str], Sequence[Known]] | None = None
    inside: str = ""
    totals: tuple[int, ...] = ()
    called: bool = False
    sides: frozenset[Side] = frozenset()
    asked: bool = False


def find_on_grids(
    gm: fx.GraphModule, grids: Grids, marks: Mapping[str, Mark], model: Model | None = None
) -> list[Site]:
    """Sites of a graph as `find_sites` describes them, each with the mark of its module.

    Where the graph tells no grid, those of the marks and the likely ones are tried, and the one
    that accounts for most sites is taken; then what calibration saw of a site is believed.
    """
    model = model or Model()
    sites = find_sites(gm, said=grids.said(grids.given), model=model)
    by_model = [told for told in grids.told if told.by_model]
    silent = any(site.grid is None and site.kind in OURS for site in sites)
    by_call = any(told.sources for told in by_model) or _needs_numbers(sites, model)
    if grids.given is None and silent and not by_call:
        brought: Iterable[Grid] = (grid for mark in marks.values() for grid in mark.grids)
        sites = _by_likely(gm, sites, list(dict.fromkeys([*brought, *grids.likely])), model)
    outer = marks.keys() - {site.name for site in sites}  # of modules put around attention
    for site in sites:
        site.mark = marks.get(site.name) or marks.get(name_around(site.name, outer) or "")
        own = () if model.known is None else tuple(model.known(site.name))
        # A mark says the same as what the module has, but for where the grid comes from.
        seen = own if site.mark is None or site.mark.known == own else site.mark.known
        if grids.given is not None and not site.mark and site.why.reason is Reason.READY_MADE:
            seen = (*seen, Known(grids.given))
        believe(
            site,
            seen,
            model.totals,
            by_model,
            called=model.called,
            sides=model.sides,
            asked=model.asked,
        )
    return sites


def _needs_numbers(sites: Sequence[Site], model: Model) -> bool:
    """Whether grids are what numbers say that the model is called with, or nothing does."""
    if not model.called or model.known is None:
        return False
    return any(known.numbers for site in sites for known in model.known(site.name))


def _by_likely(
    gm: fx.GraphModule, sites: list[Site], likely: Sequence[Grid], model: Model
) -> list[Site]:
    """Sites on the one of some grids that accounts for most; on none where two would do as well.

    Landscape and portrait have as many tokens, and which of them a call is of no graph can tell.
    """
    tried = [(grid, find_sites(gm, grid=grid, model=model)) for grid in likely]
    counts = [sum(site.eligible for site in found) for _, found in tried]
    best = max(counts, default=0)
    if best <= sum(site.eligible for site in sites):
        return sites
    fitting = [pair for pair, count in zip(tried, counts, strict=True) if count == best]
    first, found = fitting[0]
    rivals = [grid for grid, _ in fitting if math.prod(grid) == math.prod(first)]
    if len(rivals) > 1:
        for site, own in zip(found, sites, strict=True):
            if site.eligible and not own.eligible:
                site.why = Reason.GRIDS_ALIKE(grids=", ".join(map(str, rivals)))
    return found


def find_sites(
    gm: fx.GraphModule,
    *,
    grid: Grid | None = None,
    said: Said | None = None,
    model: Model | None = None,
) -> list[Site]:
    """All attention of a graph, in the order of execution, with what may be done to it.

    Args:
        gm: a Dynamo or export graph whose nodes carry example values.
        grid: extents of the video tokens, slowest first, instead of those inferred. They must fit.
        said: the same and more, see `Said`.
        model: what is known of the model that the graph is of.

    Returns:
        Every site, eligible or not; bodies of activation checkpoints are included.
    """
    make_positional(gm)
    dimensions = follow_axes(gm.graph)
    model = model or Model()
    numbered = Numbered(model.names, model.inside)
    sites = [
        _describe(attention, inside, said or Said(grid), numbered.name(attention.node))
        for attention, inside in _walk(gm.graph, dimensions)
    ]
    for site in sites:
        logger.debug(
            "%s: %s, %s heads of %s, %s queries, grid %s, %s",
            site.name,
            site.kind,
            site.heads,
            site.head_dim,
            site.query_length,
            site.grid,
            site.why,
        )
    return sites


def _walk(graph: fx.Graph, dimensions: Dimensions) -> Iterator[tuple[Attention, Dimensions]]:
    attention = {found.node: found for found in find_attention(graph)}
    for node in graph.nodes:
        if node in attention:
            yield attention[node], dimensions
        elif node in dimensions.bodies:
            body, inner = dimensions.bodies[node]
            yield from _walk(body.graph, inner)


def _describe(attention: Attention, dimensions: Dimensions, said: Said, name: str) -> Site:
    query, key = tensor(attention.query), tensor(attention.key)
    operands = operands_of(attention, dimensions)
    own = attention.sizes
    sizes = heads_of(attention, operands) if own is None else own[:3]
    kind: Kind = "other"
    layout, problem = Layout(), attention.objection or _over_ranks(attention, dimensions)
    lengths: tuple[Extent, Extent] = (0, 0)
    if own is not None:
        kind = dimensions.provenance().kind(attention.query, attention.key)
        lengths = own.queries, own.keys
    elif query is not None and key is not None and query.dim() >= 2 and key.dim() >= 2:
        lengths = (query.shape[-2], length_of_keys(attention))
        if sizes is not None or problem is None:
            kind, layout, why_not = classify(attention, dimensions, said)
            problem = problem or why_not
    if problem is None:
        problem = _shape_problem(attention, sizes)
    if sizes is None or (problem is not None and not all(isinstance(n, int) for n in sizes)):
        sizes = 0, 0, 0
    heads, kv_heads, head_dim = settled_heads(sizes)
    return Site(
        name=name,
        kind=kind,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        query_length=lengths[0],
        key_length=lengths[1],
        grid=layout.grid,
        text_before=layout.text_before,
        text_after=layout.text_after,
        why=problem or Reason.FITS(remark=layout.remark),
        dtype=_compute_dtype(attention),
        device=query.device if query is not None else torch.device("cpu"),
        attention=attention,
        scale=scale_of(attention, head_dim),
        grid_arguments=layout.grid_arguments,
        text_before_arguments=layout.text_before_arguments,
        text_after_arguments=layout.text_after_arguments,
        pad_before_arguments=layout.pad_before_arguments,
        pad_after_arguments=layout.pad_after_arguments,
        share=share_of(attention, operands, dimensions) if heads else None,
        pieces=layout.pieces,
        sources=layout.sources,
    )


def _over_ranks(attention: Attention, dimensions: Dimensions) -> Why | None:
    """Why attention can never be rewritten whose tensors may be those of other ranks too."""
    operands = (attention.query, attention.key, attention.value)
    if any(is_distributed(n) for n in operands):
        return Reason.DISTRIBUTED()
    return Reason.FILLED() if any(filled(n, dimensions) for n in operands) else None


def _shape_problem(attention: Attention, sizes: tuple[Extent, ...] | None) -> Why | None:
    """Why tensors do not fit the op. sizes: heads, key heads and head_dim, where they are known."""
    if sizes is None:
        return Reason.NO_HEADS(shape=shape(attention.query))
    query, key, values = (shape(n) for n in (attention.query, attention.key, attention.value))
    if attention.key_transposed:
        key = (*key[:-2], key[-1], key[-2])
    if not (same(query[0], key[0]) and same(query[0], values[0])):
        return Reason.BATCHES()
    if not (same(key[1], values[1]) and same(key[-1], values[-1]) and same(query[-1], key[-1])):
        return Reason.SHAPES(keys=key, values=values)
    return None


def _compute_dtype(attention: Attention) -> torch.dtype:
    """The dtype that an attention runs in, which under autocast is that of its output only."""
    found = tensor(attention.node)
    if found is None:
        found = tensor(attention.query)
    return torch.float32 if found is None else found.dtype
