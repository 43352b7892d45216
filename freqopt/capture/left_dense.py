"""Which attention of a graph a plan was to split, and is dense all the same."""

from __future__ import annotations

from freqopt.capture.pieces import Part
from freqopt.passes.axes.dimensions import hint
from freqopt.passes.decision import Decision
from freqopt.passes.known import UNSHOWN
from freqopt.passes.reasons import Reason

MEANT = {Reason.TOO_SHORT, Reason.NOT_PLANNED, Reason.PLANNED_DENSE, Reason.CROSS}
"""Why attention is dense that nobody takes for planned attention that should be split."""


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
