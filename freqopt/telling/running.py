"""Compiled graphs while they run: calls, layers that share a graph, and what probes measure.

One increment a call of a graph, and the errors of its probes kept to be added up on the device:
nothing here waits for the device, and all of it works under CUDA graphs.
"""

from __future__ import annotations

import functools
import math
import operator
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx

from freqopt.capture.budgets import known_by
from freqopt.passes.bodies import outside
from freqopt.passes.decision import Decision
from freqopt.passes.nodes import operation
from freqopt.passes.rewrite.adding import add_function, add_method
from freqopt.passes.rewrite.timestep import find_timestep
from freqopt.telling.said import warn
from freqopt.telling.watching import MOST_KEPT, ProbeErrors, TimestepRange

if TYPE_CHECKING:
    from freqopt.plan.plan import Plan

MUCH_WORSE = 2.0
"""Times the error that a plan verified at a site, from which a warning is due. Samples of one model
differ by less; another model's plan, other weights and inputs far from the samples by more."""

LEAST_ERROR = 0.005
"""Errors below this are rounding, and worth no warning."""


Feed = Callable[[tuple[Any, ...]], tuple[Any, ...]]
"""Adds what a graph takes beside its own inputs to the arguments of a call."""


class Named(NamedTuple):
    """Whose attention a call is: model, site by the plan's name, and the error of the plan.

    from_call: calls whose mean error is comparable with the plan's.
    """

    model: str
    site: str
    verified: float | None = None
    from_call: int = 1


graphs: list[Graph] = []
"""Those that were compiled, in that order, and of those that are gone the latest."""

KEPT = 64
"""Graphs that are kept after they are gone, for their counts: a server compiles without end."""

_settling = threading.RLock()
"""Of threads that count, or ask for counts, one at a time."""

owners: list[weakref.WeakMethod[Callable[[Tensor], Named | None]]] = []
"""Attached models: each tells what a budget belongs to."""


@dataclass
class Calls:
    """Calls of a graph with one set of budgets: of one layer, where several share the graph.

    budgets: those that layers are known by. names: for each decision. untold: how many of the calls
    told no grid, by decision, and were dense there.
    """

    budgets: tuple[weakref.ref[Tensor], ...]
    names: tuple[Named, ...]
    count: int = 0
    errors: ProbeErrors | None = None
    untold: Counter[int] = field(default_factory=Counter)

    def split(self, decision: int) -> int:
        """How many calls were split, of a decision that is to split."""
        return self.count - self.untold[decision]


@dataclass
class Graph:
    """A compiled graph while it runs.

    decisions: (site, split, reason). names: those of the decisions in the plan, where they are
    among its sites. verified: the plan's error by its own names, judged_from: calls whose mean is
    comparable with it. measured: positions of those
    decisions whose probes are watched, heads: how many each has. budgets: for each decision the
    graph's input that holds the budget of its module, -1 for none. grids: the same for an input
    that is 0 where a call tells no grid, and attention is dense. timestep: input that holds it.
    most_kept: calls that may wait to be counted, with errors as the graph returned them.
    site_of: the plan's name of the site that a budget was given for. owner: the module that was
    called. plan: whose budgets it has.
    """

    decisions: tuple[tuple[str, bool, str], ...]
    names: Mapping[str, str] = field(default_factory=dict)
    verified: Mapping[str, float] = field(default_factory=dict)
    judged_from: int = 1
    measured: tuple[int, ...] = ()
    heads: tuple[int, ...] = ()
    budgets: tuple[int, ...] = ()
    grids: tuple[int, ...] = ()
    timestep: int = -1
    most_kept: int = MOST_KEPT
    range: TimestepRange | None = None
    site_of: Callable[[Tensor], str | None] = lambda budget: None
    model: str = ""
    owner: weakref.ref[Any] | None = None
    plan: weakref.ref[Plan] | None = None
    told: bool = False
    gone: bool = False

    def __post_init__(self) -> None:
        self.inputs = tuple(dict.fromkeys(index for index in self.budgets if index >= 0))
        self.tells = tuple(dict.fromkeys(index for index in self.grids if index >= 0))
        wanted = (*self.inputs, *self.tells)
        self._pick: Callable[[Any], Any] = operator.itemgetter(*wanted) if wanted else _nothing
        self._is_one = len(wanted) == 1
        self._waiting: list[tuple[Any, Tensor | None]] = []
        self._room, self._counted = 1, 0
        self._to_split = sum(split for _, split, _ in self.decisions)
        self._calls: dict[tuple[int, ...], Calls] = {}

    def note(self, arguments: Sequence[Any], errors: Tensor | None) -> None:
        """Count a call. errors: of the measured sites, flattened and joined."""
        if self.range is not None:
            self.range.note(arguments[self.timestep])
        if errors is not None and errors.requires_grad:
            errors = errors.detach()
        self._waiting.append((self._pick(arguments), errors))
        if len(self._waiting) >= self._room:
            self.settle()

    def writing_down(self, compiled: Callable[..., Any], feed: Feed) -> Callable[..., Any]:
        """`compiled`, whose last output are errors, with each call written down for `settle`.

        As `note` does it, without a call of its own: this runs once for each block of a model. The
        op's errors take no part in gradients.
        """
        waiting, pick, settle = self._waiting, self._pick, self.settle

        def run(*arguments: Any) -> Any:
            arguments = feed(arguments)
            found = compiled(*arguments)
            waiting.append((pick(arguments), found[-1]))
            if len(waiting) >= self._room:
                settle()
            return found[:-1]

        return run

    @property
    def attended(self) -> int:
        """Attentions that were to be split in all its calls; without waiting for anything."""
        return self._to_split * (self._counted + len(self._waiting))

    @property
    def calls(self) -> dict[tuple[int, ...], Calls]:
        """Calls by the `id` of their budgets."""
        if self._waiting:
            self.settle()
        return self._calls

    def settle(self) -> None:
        """Count the calls that wait for it: at first each at once, then ever more together."""
        with _settling:
            waiting = self._waiting[:]
            del self._waiting[: len(waiting)]
            self._counted += len(waiting)
            self._room = min(max(self._counted, 1), self.most_kept)
            measured: dict[int, tuple[Calls, list[Tensor]]] = {}
            for picked, errors in waiting:
                given = (picked,) if self._is_one else picked
                found = self._of(tuple(map(known_by, given[: len(self.inputs)])))
                found.count += 1
                for index, number in zip(self.tells, given[len(self.inputs) :], strict=True):
                    if not number:
                        found.untold.update(i for i, n in enumerate(self.grids) if n == index)
                if errors is not None and type(errors) is Tensor:
                    measured.setdefault(id(found), (found, []))[1].append(errors)
            for found, several in measured.values():
                found.errors = found.errors or ProbeErrors(self.heads)
                if found.errors.add(*several) and not self.told:
                    self._judge(found, found.errors.glance())

    def forget(self) -> None:
        """Count from zero."""
        with _settling:
            self._waiting.clear()
            self._calls.clear()

    def _of(self, given: tuple[Tensor, ...]) -> Calls:
        """Calls with such budgets."""
        key = tuple(map(id, given))
        known = self._calls.get(key)
        if known is not None and all(
            ref() is budget for ref, budget in zip(known.budgets, given, strict=True)
        ):
            return known
        by_place = dict(zip(self.inputs, given, strict=True))
        names = tuple(
            self._named(site, by_place.get(index))
            for (site, _, _), index in zip(self.decisions, self.budgets, strict=True)
        )
        found = self._calls[key] = Calls(tuple(map(weakref.ref, given)), names)
        return found

    def _named(self, site: str, budget: Tensor | None) -> Named:
        if budget is not None:
            for owner in owners:
                ask = owner()
                found = None if ask is None else ask(budget)
                if found is not None:
                    return found
            site = self.site_of(budget) or site
        name = self.names.get(site, site)
        return Named(self.model, name, self.verified.get(name), self.judged_from)

    def _judge(self, found: Calls, means: Tensor | None) -> None:
        """Warn once where probes measure much more than the plan verified."""
        if means is None:
            return
        names = [found.names[index] for index in self.measured]
        known = zip(names, means.tolist(), strict=True)
        worse = exceeded((named, mean) for named, mean in known if found.count >= named.from_call)
        if worse:
            self.told = True
            warn(_worse_than_verified(worse, len(names)))


def _nothing(arguments: object) -> tuple[()]:
    return ()


def exceeded(means: Iterable[tuple[Named, float]]) -> list[tuple[Named, float]]:
    """Where an error is much more than a plan verified, worst first."""
    found = [
        (named, mean)
        for named, mean in means
        if named.verified is not None and mean > max(MUCH_WORSE * named.verified, LEAST_ERROR)
    ]
    return sorted(found, key=lambda item: (item[0].verified or 0.0) / item[1])


def _worse_than_verified(worse: list[tuple[Named, float]], sites: int) -> str:
    named, mean = worse[0]
    return (
        f"{named.model}: the probes of {len(worse)} of {sites} split sites measure more than "
        f"{MUCH_WORSE:g} times the error that the plan verified ({named.site}: {mean:.3g}, "
        f"verified {named.verified:.3g}). Is it the plan of this model, with these weights and "
        "adapters, and were its samples like these inputs? Calibrate anew; freqopt.counters() "
        "lists all sites"
    )


class Measured(NamedTuple):
    """Split calls of a site, and its error as probes measured it: root mean square, and worst."""

    calls: int
    mean: float | None
    worst: float | None


def measured_in(
    several: Iterable[Graph], name_of: Callable[[Graph, Calls, int], str | None] | None = None
) -> dict[str, Measured]:
    """What was split in calls of some graphs, by site; waits for the device.

    name_of: name of the site of a decision in calls with one set of budgets, None for none of
    those wanted.
    """
    found: dict[str, list[Measured]] = {}
    for graph in several:
        for calls in graph.calls.values():
            means, worst = errors_of(calls, graph)
            for index, (_, split, _) in enumerate(graph.decisions):
                named = calls.names[index].site if name_of is None else name_of(graph, calls, index)
                if split and named is not None and calls.split(index):
                    measured = Measured(calls.split(index), means.get(index), worst.get(index))
                    found.setdefault(named, []).append(measured)
    return {site: _together(parts) for site, parts in found.items()}


def _together(parts: Sequence[Measured]) -> Measured:
    known = [(part.calls, part.mean) for part in parts if part.mean is not None]
    calls = sum(count for count, _ in known)
    squares = sum(count * mean * mean for count, mean in known)
    return Measured(
        sum(part.calls for part in parts),
        math.sqrt(squares / calls) if calls else None,
        max((part.worst for part in parts if part.worst is not None), default=None),
    )


def counted(
    compiled: Callable[..., Any], graph: Graph, feed: Feed | None = None
) -> Callable[..., Any]:
    """`compiled`, given what it takes besides, and counting its calls for the sites it holds.

    Where sites are measured, the last output of `compiled` is their errors and is taken off.
    """
    if not graph.decisions and graph.range is None:
        return compiled if feed is None else functools.partial(_fed, compiled, feed)
    remember(graph)
    if not graph.measured:
        run = _noting(compiled, graph, feed or tuple)
    elif graph.range is not None:
        run = _noting_errors(compiled, graph, feed or tuple)
    else:
        run = graph.writing_down(compiled, feed or tuple)
    gone_with(run, graph)
    return run


def gone_with(holder: object, graph: Graph) -> None:
    """A graph is gone when what runs it is."""
    weakref.finalize(holder, setattr, graph, "gone", True).atexit = False


def _noting(compiled: Callable[..., Any], graph: Graph, feed: Feed) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        arguments = feed(arguments)
        found = compiled(*arguments)
        graph.note(arguments, None)
        return found

    return run


def _noting_errors(compiled: Callable[..., Any], graph: Graph, feed: Feed) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        arguments = feed(arguments)
        found = compiled(*arguments)
        graph.note(arguments, found[-1])
        return found[:-1]

    return run


def _fed(compiled: Callable[..., Any], feed: Feed, *arguments: Any) -> Any:
    return compiled(*feed(arguments))


def remember(graph: Graph) -> None:
    """Add a graph to those that are known, and forget the oldest of those that are gone."""
    gone = [each for each in graphs if each.gone]
    for each in gone[: max(len(gone) - KEPT, 0)]:
        graphs.remove(each)
    graphs.append(graph)


def graph_of(
    gm: fx.GraphModule, decisions: Sequence[Decision], measured: Sequence[int], most_kept: int
) -> Graph:
    """The record of a rewritten graph. measured: positions of decisions with watched probes."""
    inputs = {node: i for i, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
    return Graph(
        decisions=tuple((d.site.name, d.split, d.reason) for d in decisions),
        measured=tuple(measured),
        heads=tuple(decisions[index].site.heads for index in measured),
        budgets=tuple(inputs.get(_input_of(gm.graph, d.budget), -1) for d in decisions),
        grids=tuple(_grid_at_call(d, inputs) for d in decisions),
        most_kept=most_kept,
    )


def _grid_at_call(decision: Decision, inputs: Mapping[fx.Node, int]) -> int:
    """The input that is 0 where a call tells no grid for a site, -1 if there is none."""
    if not decision.split:
        return -1
    return next((inputs[node] for node in decision.site.read_at_call if node in inputs), -1)


def _input_of(graph: fx.Graph, budget: object) -> Any:
    """The input that a budget is, in whichever body it is used and to whichever device brought."""
    while isinstance(budget, fx.Node):
        if budget.graph is not graph and (found := outside(budget, graph)) is not budget:
            budget = found
        elif operation(budget) == "to":
            budget = budget.args[0]
        else:
            return budget
    return None


def with_timesteps(graph: Graph, gm: fx.GraphModule, plan: Plan) -> Graph:
    """`graph`, looking at the timesteps that it is called at, where it has them."""
    node = None if plan.timestep_name is None else find_timestep(gm, plan.timestep_name)
    if node is not None and plan.timestep_range is not None:
        graph.timestep = list(gm.graph.find_nodes(op="placeholder")).index(node)
        graph.range = TimestepRange(plan)
    return graph


def watch_probes(gm: fx.GraphModule, calls: Mapping[int, fx.Node]) -> list[int]:
    """Let a graph return the errors of its probes as a last output, flattened and joined.

    calls: the op's nodes by position of their decision, all with probes and on one device. Returns
    the positions that are watched: those whose op is in the graph itself.
    """
    inside = {i: n for i, n in calls.items() if n.graph is gm.graph}
    (output,) = gm.graph.find_nodes(op="output")
    if not inside or not isinstance(output.args[0], (tuple, list)):
        return []
    with gm.graph.inserting_before(output):
        # AOTAutograd's cache takes no graph in which a method is called on what has no example.
        errors = [add_function({}, operator.getitem, node, 2) for node in inside.values()]
        parts = [add_method({}, "flatten", error) for error in errors]
        joined = gm.graph.call_function(torch.cat, (parts,))
    output.args = ((*output.args[0], joined),)
    gm.recompile()
    return list(inside)


def errors_of(found: Calls, graph: Graph) -> tuple[dict[int, float], dict[int, float]]:
    """Means and worst errors by position of the decision; waits for the device."""
    if found.errors is None or not found.errors.calls:
        return {}, {}
    means, worst = found.errors.means().tolist(), found.errors.worst().tolist()
    known = [i for i, mean in enumerate(means) if not math.isnan(mean)]
    by_place = ({graph.measured[i]: values[i] for i in known} for values in (means, worst))
    return next(by_place), next(by_place)
