"""What is known of a compiled model, and the line about it: how many of its sites were split.

A line is good where everything is as it was planned, or, without a plan, where anything was split.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from traceback import FrameSummary
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import fx, nn

from freqopt.capture.modules import base_name
from freqopt.errors import SiteError
from freqopt.grid import Grid
from freqopt.options import Options
from freqopt.passes.decision import Decision
from freqopt.passes.reasons import Reason, Text, Why
from freqopt.plan.identity import class_name_of
from freqopt.telling.said import tell, warn

if TYPE_CHECKING:
    from freqopt.plan.plan import Plan
    from freqopt.telling.running import Graph

SHOWN = 3
"""Reasons that a line gives; `freqopt.inspect` gives all."""

TO_DO = {Reason.TOO_SHORT: "pass min_tokens=0 to split them all the same"}
INSPECT = "freqopt.inspect(model, ...) says what was found and why"
AROUND_HOOKS = (
    "freqopt.attach(model, plan) and compile the blocks, or "
    'freqopt.optimize(model, plan, route="eager")'
)
HOOKED = f"a hook (offloading, casting, a step cache) cannot be traced: {AROUND_HOOKS}"
REPLACED = (
    "something (offloading, casting, a step cache) has replaced the forward of {0}, and "
    f"torch.compile may run it as it is: {AROUND_HOOKS}"
)
DATA_DEPENDENT = (
    "set torch._dynamo.config.capture_dynamic_output_shape_ops = True, which keeps operators whose "
    "sizes depend on data in the graph"
)
OTHER_BACKEND = (
    "another backend than freqopt's compiled the model, or blocks of it, with all that is in them: "
    "compile with backend='freqopt' or not at all (inner= of freqopt.optimize compiles the rest)"
)
EXPORTED = (
    "torch.export takes the model as it is without freqopt: freqopt.export_onnx(model, ..., plan=) "
    "exports the split, and handle.disable() before torch.export says that dense is meant"
)
LIMITED = (
    "torch.compile stopped at its limit of recompilations and ran the rest as it is: raise "
    "torch._dynamo.config.recompile_limit"
)
NOT_MET = "not met in any graph"


class Outcome(NamedTuple):
    """What became of a site in the last graph that had it."""

    split: bool
    why: Why
    cross: bool


class Verdict(NamedTuple):
    """A line, and whether everything is as it was planned."""

    line: str
    good: bool


@dataclass
class Lines:
    """What was said of one model: how many sites are split so far, then of calls that have fewer.

    line: the last one of all calls. whole: it was a good one. reasons: those that calls were told
    of.
    """

    line: str = ""
    whole: bool = False
    reasons: set[Reason] = field(default_factory=set)

    def say(self, verdict: Verdict, missed: Mapping[str, Why], *, strict: bool) -> None:
        """Say a verdict that is new. missed: why sites were dense in this call.

        Raises:
            SiteError: as `say`.
        """
        reasons = {why.reason for why in missed.values()}
        if self.whole and missed:
            again = reasons <= self.reasons
            verdict = Verdict(verdict.line.replace(" split", " split in this call", 1), False)
        else:
            again, self.line = verdict.line == self.line, verdict.line
            self.whole = verdict.good
        self.reasons |= reasons
        say(verdict, again=again, strict=strict)


def say(verdict: Verdict, *, again: bool, strict: bool) -> None:
    """Say a line, unless it was said before.

    Raises:
        SiteError: under `strict`, if it is a bad one.
    """
    if not verdict.good and strict:
        raise SiteError(verdict.line)
    if not again:
        (tell if verdict.good else warn)(verdict.line)


@dataclass
class Compiled:
    """What is known of one compiled model, or of one compiled part of an attached model.

    settings: of the last graph. graphs: all of them. served: names of sites that were split in a
    call. awaited: names of the plan's sites in the part that was compiled, None for all. breaks:
    (place, reason) where Dynamo left a graph, and whether a hook did it. limited: it has reached
    its limit of recompilations of some function. replaced: names of modules whose forward was
    replaced on the instance. grids: that tokens of split attention lie on, where a graph is for
    one. missed: why sites that are served call by call were dense, until it was told.
    """

    settings: Options
    graphs: list[Graph] = field(default_factory=list)
    served: set[str] = field(default_factory=set)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    breaks: dict[tuple[str, str], bool] = field(default_factory=dict)
    limited: bool = False
    replaced: tuple[str, ...] = ()
    said: Lines = field(default_factory=Lines)
    is_pending: bool = False
    awaited: set[str] | None = None
    grids: set[Grid] = field(default_factory=set)
    missed: dict[str, Why] = field(default_factory=dict)

    def add(self, gm: fx.GraphModule, decisions: Iterable[Decision]) -> None:
        """Take in a graph."""
        for decision in decisions:
            cross = decision.site.kind == "cross"
            self.outcomes[decision.site.name] = Outcome(decision.split, decision.why, cross)
            grid = decision.site.grid
            if decision.split and grid and all(isinstance(extent, int) for extent in grid):
                self.grids.add((int(grid[0]), int(grid[1]), int(grid[2])))
        cause = getattr(gm, "compile_subgraph_reason", None)
        if cause is not None and cause.graph_break:
            self.add_break(cause)

    def look(self, plan: Plan | None) -> set[str]:
        """Names, of the plan where it has them, of the sites that were split in a call.

        Where budgets are by the module that runs, its calls are not told apart: all are split.
        """
        by_module = set()
        for graph in self.graphs:
            for calls in graph.calls.values():
                for index, (_, split, _) in enumerate(graph.decisions):
                    if split and calls.split(index):
                        self.served.add(calls.names[index].site)
                        if graph.budgets and graph.budgets[index] >= 0:
                            by_module.add(calls.names[index].site)
        further = () if plan is None else plan.sites
        self.served |= {name for name in further if base_name(name) in by_module}
        return self.served

    def add_break(self, cause: Any) -> None:
        """Take in a `GraphCompileReason` of Dynamo."""
        reason = (str(cause.reason).strip().splitlines() or ["for no stated reason"])[0]
        stack = list(cause.user_stack or ())
        self.breaks[_place(stack), reason] = by_hook(reason, stack)


def by_hook(reason: str, stack: Sequence[FrameSummary]) -> bool:
    """Whether a hook, which is not the model's own code, made Dynamo leave a graph."""
    frames = (text.lower() for frame in stack for text in (frame.filename, frame.name))
    return "hook" in reason.lower() or any("hook" in text for text in frames)


def _place(stack: Sequence[FrameSummary]) -> str:
    """File and line of the innermost frame that is not PyTorch's own."""
    torchs = os.path.dirname(torch.__file__)
    own = [frame for frame in stack if not frame.filename.startswith(torchs)] or stack
    return f"{own[-1].filename}:{own[-1].lineno}" if own else "an unknown place"


def say_outside(model: nn.Module, name: str, *, again: bool, strict: bool) -> None:
    """Say that a module with planned attention runs in no call of its model, and is dense.

    Raises:
        SiteError: under `strict`.
    """
    line = (
        f"{class_name_of(model)}: attention at {name or 'the model'} was called in no call of the "
        "model (as by model.forward(...), a block alone, or in another thread), and is dense "
        "there: call the model itself"
    )
    say(Verdict(line, False), again=again, strict=strict)


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
        if known.awaited is not None:
            names = [site for site in names if site in known.awaited]
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


def by_another_backend(name: str, plan: Plan) -> Verdict:
    """That of a model that another backend compiled, or a part of it, or that is exported."""
    verdict = judge(name, Compiled(Options()), plan, set())
    why = EXPORTED if torch.compiler.is_exporting() else OTHER_BACKEND
    return Verdict(verdict.line.replace(INSPECT, why), verdict.good)


def _by_plan(outcomes: Mapping[str, Outcome], plan: Plan) -> dict[str, Outcome]:
    """What became of sites, by the names that the plan has for them."""
    names = plan.names_of(outcomes)
    found = {names[site]: outcome for site, outcome in outcomes.items() if site in names}
    for site, outcome in outcomes.items():
        if site not in names:
            for planned in alike(site, plan.sites):
                found.setdefault(planned, outcome)
    return found


def alike(name: str, planned: Mapping[str, Any]) -> set[str]:
    """Sites of a plan that end in a name, whose layers may be left open as in "blocks.*.attn"."""
    pattern = r"(?:.*\.)?" + re.escape(re.sub(r"@\d+$", "", name)).replace(r"\*", r"\d+")
    return {site for site in planned if re.fullmatch(pattern, site)}


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
    return outcome.why.seen


def _advice(left: Iterable[Outcome | None], known: Compiled) -> str:
    """What to do: about the graph breaks where there are some, else about the reasons."""
    unseen = INSPECT
    if known.replaced:
        unseen = REPLACED.format(known.replaced[0] or "the model itself")
    if known.breaks:
        (where, reason), count = next(iter(known.breaks)), len(known.breaks)
        times = "once" if count == 1 else f"at {count} places"
        found = f"torch.compile left the graph {times} ({where}: {reason})"
        if any(reason.startswith("Dynamic shape operator") for _, reason in known.breaks):
            return f"{found}; {DATA_DEPENDENT}"
        other = HOOKED if any(known.breaks.values()) else unseen
        return f"{found}; {LIMITED}, or: {other}" if known.limited else f"{found}; {other}"
    found_advice: dict[str, None] = dict.fromkeys([LIMITED] if known.limited else [])
    for outcome in left:
        if outcome is None:
            found_advice[unseen] = None
            continue
        text: Text = outcome.why.reason.value
        advice = TO_DO.get(outcome.why.reason) or text.advice
        if advice:
            found_advice[advice] = None
    return "; ".join(list(found_advice)[:2])
