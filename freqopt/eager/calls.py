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
    with faking() as mode:
        gm, budget = asked.graph(mode, heads)
    outcome: list[Decision] = []
    put: list[Inserted] = []

    def decide(sites: Sequence[Site]) -> list[Decision]:
        outcome.extend(_decided(site, lay, budget, largest_chunk) for site in sites)
        return outcome

    def insert(gm: fx.GraphModule, decision: Decision) -> None:
        put.append(split_as_decided(gm, decision))

    with apart():
        rewrite(gm, decide, insert, Grids())
    if len(put) != 1:
        return outcome[0].why if outcome else Reason.NO_AXES()
    output = gm.graph.output_node()
    with gm.graph.inserting_before(output):
        told = [gm.graph.call_function(operator.getitem, (put[0].call, i)) for i in (1, 2)]
    output.args = ((output.args[0], *told),)
    gm.recompile()

    def run(tensors: Sequence[Tensor], budget: Tensor) -> tuple[Any, Tensor, Tensor]:
        found: tuple[Any, Tensor, Tensor] = gm.forward(*tensors, budget)
        return found

    return run


def _decided(site: Site, lay: Lay, budget: fx.Node, largest_chunk: int) -> Decision:
    """The one site of such a graph, told how its tokens lie."""
    found, mask = site.attention, lay.mask
    if found.objection is not None:
        return Decision(site, False, found.objection)
    if not mask:
        found.mask = None
    problem = settle_mask(site, lay.known, lay.before) if mask else None
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
    problem = problem or why_not(told)
    held = budget.meta["example_value"].shape[1]
    if problem is None and (why := untold(told, held)) is not None:
        return Decision(told, False, why)
    if problem is None and heads != held:
        problem = Reason.NO_KERNEL(problem=f"it has {heads} heads and its budget {held}")
    if problem is not None:
        return Decision(told, False, problem)
    return Decision(
        told, True, Reason.BY_MODULE(), budget, probes=DEFAULT_PROBES, largest_chunk=largest_chunk
    )
