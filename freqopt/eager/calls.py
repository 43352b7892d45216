"""One call of attention in eager mode, with the op in its place.

The call alone is a small graph. The passes put the op there as they do in a whole model's graph, so
both routes compute the same; the budget is an input, so one such graph serves all layers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, fx

from freqopt.config import DEFAULT_PROBES
from freqopt.decisions import untold, why_not
from freqopt.eager.asked import Asked, apart, faking
from freqopt.eager.lay import Lay
from freqopt.passes.decision import Decision
from freqopt.passes.find import Grids
from freqopt.passes.manager import rewrite
from freqopt.passes.masks.calibrated import settle_mask
from freqopt.passes.reasons import Reason, Why
from freqopt.passes.rewrite.rewrite import Inserted, split_as_decided
from freqopt.passes.site import Site

Served = Callable[[Sequence[Tensor], Tensor], tuple[Any, Tensor, Tensor]]
"""From the tensors among a call's arguments and a budget (2, H) to what the call returns, density
(B, H) and probe error (B, H)."""


def serve(asked: Asked, lay: Lay, heads: int, largest_chunk: int) -> Served | Why:
    """What serves calls like this one, or why they stay as they are.

    heads: of the budget. largest_chunk: of all layers.
    """
    put: list[Inserted] = []

    def decide(site: Site, budget: fx.Node) -> Decision:
        return _decided(site, lay, budget, largest_chunk)

    def insert(gm: fx.GraphModule, decision: Decision) -> None:
        put.append(split_as_decided(gm, decision))

    gm, decisions = rewritten(asked, heads, decide, insert)
    if len(put) != 1:
        return decisions[0].why if decisions else Reason.NO_AXES()
    output = gm.graph.output_node()
    with gm.graph.inserting_before(output):
        told = [gm.graph.call_function(operator.getitem, (put[0].call, i)) for i in (1, 2)]
    output.args = ((output.args[0], *told),)
    gm.recompile()

    def run(tensors: Sequence[Tensor], budget: Tensor) -> tuple[Any, Tensor, Tensor]:
        found: tuple[Any, Tensor, Tensor] = gm.forward(*tensors, budget)
        return found

    return run


def rewritten(
    asked: Asked,
    heads: int,
    decide: Callable[[Site, fx.Node], Decision],
    insert: Callable[[fx.GraphModule, Decision], None],
) -> tuple[fx.GraphModule, list[Decision]]:
    """The graph of a call alone, with something in the place of its attention.

    The graph takes the call's tensors and a budget (2, heads), of which `decide` is told. insert:
    puts something in the place of a site that is to be split.
    """
    decisions: list[Decision] = []
    with faking() as mode:
        gm, budget = asked.graph(mode, heads)

    def decide_all(sites: Sequence[Site]) -> list[Decision]:
        decisions.extend(decide(site, budget) for site in sites)
        return decisions

    with apart():
        rewrite(gm, decide_all, insert, Grids())
    return gm, decisions


def placed(site: Site, lay: Lay) -> Site | Why:
    """The one site of the graph of a call alone, told how its tokens lie; or why it stays dense."""
    found, mask = site.attention, lay.mask
    if found.objection is not None:
        return found.objection
    if not mask:
        found.mask = None
    problem = settle_mask(site, lay.known, lay.before, proven=lay.proven) if mask else None
    heads, kv_heads = lay.folded if any(lay.folded) else (site.heads, site.kv_heads)
    told = replace(
        site,
        heads=heads,
        kv_heads=kv_heads,
        kind=lay.kind,
        grid=lay.grid,
        text_before=lay.before,
        text_after=lay.after,
        why=Reason.FITS(remark=""),
        grid_arguments=lay.grid,
        text_before_arguments=(lay.before,),
        text_after_arguments=(lay.after,),
        query_arguments=lay.queries,
        pieces=lay.pieces,
        pad_before_arguments=(lay.pads[0],) if any(lay.pads) else (),
        pad_after_arguments=(lay.pads[1],) if any(lay.pads) else (),
    )
    return problem or why_not(told) or told


def _decided(site: Site, lay: Lay, budget: fx.Node, largest_chunk: int) -> Decision:
    """What is done about such a site under a budget."""
    told = placed(site, lay)
    if isinstance(told, Why):
        return Decision(site, False, told)
    held = budget.meta["example_value"].shape[1]
    problem = untold(told, held)
    if problem is None and told.heads != held:
        problem = Reason.NO_KERNEL(problem=f"it has {told.heads} heads and its budget {held}")
    if problem is not None:
        return Decision(told, False, problem)
    return Decision(
        told, True, Reason.BY_MODULE(), budget, probes=DEFAULT_PROBES, largest_chunk=largest_chunk
    )
