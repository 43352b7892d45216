"""The line that a compiled model says on its first call: how many of its sites were split.

Graphs come one by one; what became of their sites is gathered until the outermost call returns, and
then said, as a warning where less was split than was planned. `strict` raises on exactly that.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import fx, nn

from freqopt.capture.modules import base_name, replaced_forwards
from freqopt.options import Options, load_plan
from freqopt.passes.decision import Decision
from freqopt.passes.reasons import Why
from freqopt.plan.identity import shown_name
from freqopt.telling.attached import attached_to, inside_attached
from freqopt.telling.limits import given_up
from freqopt.telling.outermost import OutermostCall, outermost_call
from freqopt.telling.outside import tell_outside
from freqopt.telling.verdict import Compiled, judge

if TYPE_CHECKING:
    from freqopt.plan.plan import Plan
    from freqopt.telling.running import Graph

_models: weakref.WeakKeyDictionary[Any, tuple[object, Compiled]] = weakref.WeakKeyDictionary()


def gather(
    options: object,
    settings: Options,
    gm: fx.GraphModule,
    decisions: Sequence[Decision],
    graph: Graph,
    planned_in: Callable[[object], set[str]],
    left: Mapping[str, Why],
) -> str:
    """Take in a graph that was just compiled; says the line, or has it said, at the call's end.

    options: the object that the user gave, the same for all graphs of a model. planned_in: names
    of the plan's sites in a module, which alone are awaited where that is what was compiled.
    left: what the graph leaves dense of them, and why.

    Returns:
        What the model is called.

    Raises:
        SiteError: under ``strict``, where the end of the call cannot be told and nothing is split.
    """
    call = outermost_call()
    if call is None:
        found = Compiled(settings)
        found.add(gm, decisions)
        found.served = {d.site.name for d in decisions if d.split}
        _say("the model", found, _planned(settings))
        return ""
    known = _known(call, options, settings)
    known.settings = settings
    known.missed.update(left)
    known.add(gm, decisions)
    known.graphs.append(graph)
    if isinstance(call.called, nn.Module):
        graph.owner = weakref.ref(call.called)
        if graph.range is not None:
            graph.range.owner = graph.owner
    if isinstance(call.called, nn.Module) and inside_attached(call.called, known):
        return call.name
    attached = attached_to(call.called)
    planned = attached or _planned(settings)
    name = shown_name(call.name, planned)
    if attached is None and planned is not None:
        known.awaited = planned_in(call.called)
    if not known.is_pending:
        known.is_pending = True
        limits = given_up()

        def tell() -> None:
            known.limited |= given_up() > limits
            _say(name, known, planned, call.called)

        call.at_end(tell)
    return name


def _known(call: OutermostCall, options: object, settings: Options) -> Compiled:
    try:
        before = _models.get(call.called)
        if before is None or before[0] is not options:
            before = _models[call.called] = (options, Compiled(settings))
    except TypeError:  # what cannot be referred to weakly is new each time
        return Compiled(settings)
    return before[1]


def _planned(settings: Options) -> Plan | None:
    return None if settings.plan is None else load_plan(settings.plan)


_breaks_seen = 0
"""How many of Dynamo's graph breaks were there when a line was last said."""


def _breaks_since() -> list[Any]:
    """Dynamo's graph breaks since the last line; those of frames that it gave up are only here."""
    global _breaks_seen
    from torch._dynamo.utils import graph_break_reasons

    start = _breaks_seen if _breaks_seen <= len(graph_break_reasons) else 0
    _breaks_seen = len(graph_break_reasons)
    return list(graph_break_reasons[start:])


def _say(name: str, known: Compiled, plan: Plan | None, model: object = None) -> None:
    for cause in _breaks_since():
        known.add_break(cause)
    if isinstance(model, nn.Module):
        known.replaced = replaced_forwards(model)
    missed, known.missed, known.is_pending = known.missed, {}, False
    served = {site for site in known.look(plan) if base_name(site) not in missed}
    verdict = judge(name, known, plan, served)
    known.said.say(verdict, missed, strict=known.settings.strict)
    if plan is not None and isinstance(model, nn.Module):
        tell_outside(model, plan, known.grids)
