"""What is to be done about the attention of a part of a model, and what a plan misses there."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from freqopt.capture.pieces import Part
from freqopt.config import DEFAULT_PROBES
from freqopt.decisions import decide, untold, why_dense
from freqopt.options import Options
from freqopt.passes.axes.dimensions import hint
from freqopt.passes.decision import Decision
from freqopt.passes.known import UNSHOWN
from freqopt.passes.reasons import Reason
from freqopt.passes.site import Site

MEANT = {Reason.TOO_SHORT, Reason.NOT_PLANNED, Reason.PLANNED_DENSE, Reason.CROSS}
"""Why attention is dense that nobody takes for planned attention that should be split."""


def decide_in_part(
    settings: Options, part: Part, gm: fx.GraphModule, sites: Sequence[Site]
) -> list[Decision]:
    """As `decide`; in a graph that serves several layers, by the module that is running.

    Raises:
        PlanError: as `decide`.
    """
    part.masks.watch(gm, [site for site in sites if not part.is_dense_by_plan(site)])
    by_module = [site for site in sites if part.is_by_module(site)]
    others = iter(decide(settings, [site for site in sites if site not in by_module]))
    decisions = []
    for site in sites:
        if site not in by_module:
            decisions.append(next(others))
            continue
        problem = why_dense(settings, site, planned=part.is_planned(site))
        if problem is None and not part.is_told(site):
            problem = Reason.SHARED()
        if problem is None:
            problem = untold(site, part.planned_heads(site) or site.heads)
        if problem is not None:
            decisions.append(Decision(site, False, problem))
            continue
        why = Reason.BY_MODULE() if part.plan is None else Reason.BY_PLAN()
        budget, largest = part.operand(gm, site), part.largest_chunk()
        decisions.append(
            Decision(site, True, why, budget, probes=DEFAULT_PROBES, largest_chunk=largest)
        )
    return decisions


def is_left(part: Part, decision: Decision) -> bool:
    """Whether attention that a plan splits is dense in a graph that neither length nor plan ask.

    Of a graph that is silent about its tokens, only what attends to as many as its own is taken
    for that attention: further ones in the same module have its name there.
    """
    site, reason = decision.site, decision.why.reason
    if decision.split or reason in MEANT:
        return False
    if reason in UNSHOWN and hint(site.query_length) != hint(site.key_length):
        return False
    return bool(part.to_be_split(site))
