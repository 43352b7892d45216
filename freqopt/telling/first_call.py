"""The line that a compiled model says on its first call: how many of its sites were split.

Graphs come one by one; what became of their sites is gathered until the outermost call returns, and
then said, as a warning where less was split than was planned. `strict` raises on exactly that.
"""

from __future__ import annotations

import os
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from traceback import FrameSummary
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import fx, nn

from freqopt.capture.modules import match_names
from freqopt.errors import SiteError
from freqopt.options import Options, load_plan
from freqopt.passes.decision import Decision
from freqopt.passes.reasons import Reason, Text, Why
from freqopt.telling.outermost import OutermostCall, outermost_call
from freqopt.telling.said import tell, warn

if TYPE_CHECKING:
    from freqopt.plan.plan import Plan
    from freqopt.telling.running import Graph

SHOWN = 3
"""Reasons that a line gives; `freqopt.inspect` gives all."""

TO_DO = {Reason.TOO_SHORT: "pass min_tokens=0 to split them all the same"}
INSPECT = "freqopt.inspect(model, ...) says what was found and why"
HOOKED = (
    "a hook (offloading, casting, a step cache) cannot be traced: freqopt.attach(model, plan), and "
    "compile the blocks"
)
NOT_MET = "not met in any graph"


class Outcome(NamedTuple):
    """What became of a site in the last graph that had it."""

    split: bool
    why: Why
    cross: bool


@dataclass
class Compiled:
    """What is known of one compiled model, or of one compiled part of an attached model.

    settings: of the last graph. graphs: all of them. served: names of sites that were split in a
    call. breaks: (place, reason) where Dynamo left a graph, and whether a hook did it.
    """

    settings: Options
    graphs: list[Graph] = field(default_factory=list)
    served: set[str] = field(default_factory=set)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    breaks: dict[tuple[str, str], bool] = field(default_factory=dict)
    said: str = ""

    def add(self, gm: fx.GraphModule, decisions: Iterable[Decision]) -> None:
        """Take in a graph."""
        for decision in decisions:
            cross = decision.site.kind == "cross"
            self.outcomes[decision.site.name] = Outcome(decision.split, decision.why, cross)
        cause = getattr(gm, "compile_subgraph_reason", None)
        if cause is not None and cause.graph_break:
            self.add_break(cause)

    def look(self) -> set[str]:
        """Names, of the plan where it has them, of the sites that were split in a call."""
        self.served |= {
            named.site
            for graph in self.graphs
            for calls in graph.calls.values()
            for named, (_, split, _) in zip(calls.names, graph.decisions, strict=True)
            if split and calls.count
        }
        return self.served

    def add_break(self, cause: Any) -> None:
        """Take in a `GraphCompileReason` of Dynamo."""
        reason = (str(cause.reason).strip().splitlines() or ["for no stated reason"])[0]
        stack = list(cause.user_stack or ())
        hooked = "hook" in reason.lower() or any(map(_is_hook, stack))
        self.breaks[_place(stack), reason] = hooked


def _is_hook(frame: FrameSummary) -> bool:
    return "hook" in frame.filename.lower() or "hook" in frame.name.lower()


def _place(stack: Sequence[FrameSummary]) -> str:
    """File and line of the innermost frame that is not PyTorch's own."""
    torchs = os.path.dirname(torch.__file__)
    own = [frame for frame in stack if not frame.filename.startswith(torchs)] or stack
    return f"{own[-1].filename}:{own[-1].lineno}" if own else "an unknown place"


class Verdict(NamedTuple):
    """A line, and whether everything is as it was planned."""

    line: str
    good: bool


_models: weakref.WeakKeyDictionary[Any, tuple[object, Compiled]] = weakref.WeakKeyDictionary()


def gather(
    options: object,
    settings: Options,
    gm: fx.GraphModule,
    decisions: Sequence[Decision],
    graph: Graph,
) -> str:
    """Take in a graph that was just compiled; says the line, or has it said, at the call's end.

    options: the object that the user gave, the same for all graphs of a model.

    Returns:
        What the model is called.

    Raises:
        SiteError: under ``strict``, where the end of the call cannot be told and nothing is split.
    """
    from freqopt.telling.attached import attached_to, inside_attached

    call = outermost_call()
    if call is None:
        found = Compiled(settings)
        found.add(gm, decisions)
        found.served = {d.site.name for d in decisions if d.split}
        _say("the model", found, _planned(settings))
        return ""
    known = _known(call, options, settings)
    fresh = not known.outcomes and not known.breaks and not known.said
    known.settings = settings
    known.add(gm, decisions)
    known.graphs.append(graph)
    if isinstance(call.called, nn.Module) and inside_attached(call.called, known):
        return call.name
    planned = attached_to(call.called) or _planned(settings)
    if fresh or not known.said.startswith(_pending):
        known.said = _pending + known.said
        call.at_end(lambda: _say(call.name, known, planned))
    return call.name


_pending = "\0"
"""Stands before the last line that was said while the next one is being gathered."""


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


def _say(name: str, known: Compiled, plan: Plan | None) -> None:
    for cause in _breaks_since():
        known.add_break(cause)
    before, known.said = known.said.removeprefix(_pending), ""
    verdict = judge(name, known, plan, known.look())
    known.said = verdict.line
    say(verdict, again=verdict.line == before, strict=known.settings.strict)


def say(verdict: Verdict, *, again: bool, strict: bool) -> None:
    """Say a line, unless it was said before.

    Raises:
        SiteError: under `strict`, if it is a bad one.
    """
    if not verdict.good and strict:
        raise SiteError(verdict.line)
    if not again:
        (tell if verdict.good else warn)(verdict.line)


def judge(name: str, known: Compiled, plan: Plan | None, split: set[str]) -> Verdict:
    """The line about a model. split: names of the sites that are split."""
    outcomes = known.outcomes
    if plan is not None:
        outcomes = _by_plan(outcomes, plan)
    if plan is None:
        names = [s for s, outcome in outcomes.items() if not outcome.cross] or list(outcomes)
        what = "attention sites"
        good = any(site in split for site in names)
    else:
        names = [site for site, planned in plan.sites.items() if planned.decision == "split"]
        what = "planned sites"
        good = all(site in split for site in names)
        if not names:
            return Verdict(f"{name}: dense throughout, as the plan splits no site", True)
    count = sum(site in split for site in names)
    line = f"{name}: {count} of {len(names)} {what} split"
    if count == len(names) and names:
        return Verdict(line, True)
    if not names:
        reasons, to_do = ["no attention was found in its graphs"], _advice([None], known)
    else:
        left = {site: outcomes.get(site) for site in names if site not in split}
        reasons, to_do = _reasons(left), _advice(left.values(), known)
    return Verdict("; ".join([f"{line}: {'; '.join(reasons)}", *filter(None, [to_do])]), good)


def _by_plan(outcomes: Mapping[str, Outcome], plan: Plan) -> dict[str, Outcome]:
    """What became of sites, by the names that the plan has for them."""
    from freqopt.telling.attached import alike

    names = match_names(outcomes, plan.sites)
    found = {names[site]: outcome for site, outcome in outcomes.items() if site in names}
    for site, outcome in outcomes.items():
        if site not in names:
            for planned in alike(site, plan.sites):
                found.setdefault(planned, outcome)
    return found


def _reasons(left: Mapping[str, Outcome | None]) -> list[str]:
    """The commonest reasons, each with the number of sites."""
    seen = Counter(_seen(outcome) for outcome in left.values())
    shown = [f"{text} ({count})" for text, count in seen.most_common(SHOWN)]
    rest = sum(seen.values()) - sum(count for _, count in seen.most_common(SHOWN))
    return [*shown, f"others ({rest})"] if rest else shown


def _seen(outcome: Outcome | None) -> str:
    if outcome is None:
        return NOT_MET
    if outcome.split:
        return "split, but not for its module"
    text: Text = outcome.why.reason.value
    return text.seen.format(**outcome.why.details)


def _advice(left: Iterable[Outcome | None], known: Compiled) -> str:
    """What to do: about the graph breaks where there are some, else about the reasons."""
    if known.breaks:
        (where, reason), count = next(iter(known.breaks)), len(known.breaks)
        times = "once" if count == 1 else f"at {count} places"
        found = f"torch.compile left the graph {times} ({where}: {reason})"
        return f"{found}; {HOOKED if any(known.breaks.values()) else INSPECT}"
    found_advice: dict[str, None] = {}
    for outcome in left:
        if outcome is None:
            found_advice[INSPECT] = None
            continue
        text: Text = outcome.why.reason.value
        advice = TO_DO.get(outcome.why.reason) or text.advice
        if advice:
            found_advice[advice] = None
    return "; ".join(list(found_advice)[:2])
