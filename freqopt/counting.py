"""Counts, at run time, how many attention calls of compiled models were split and how many dense.

A compile-time message can be missed; these numbers say what ran. One increment per call
of a compiled graph, so counting costs nothing that matters and works under CUDA graphs too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from freqopt.passes.decision import Decision


@dataclass(frozen=True)
class SiteCount:
    """Calls of one site in one compiled graph.

    Attributes:
        site: name of the site, as plans have it.
        split: whether it is split in this graph.
        calls: how often the graph ran.
        reason: why it is split or stays dense.
    """

    site: str
    split: bool
    calls: int
    reason: str


@dataclass(frozen=True)
class Counters:
    """What ran since the start or the last `reset_counters`.

    Attributes:
        split: calls of attention that were split.
        dense: calls that ran as they were in the model.
        sites: the same site by site, one entry for each compiled graph that it is in.
    """

    split: int
    dense: int
    sites: tuple[SiteCount, ...]

    def __str__(self) -> str:
        lines = [f"{self.split} attention calls split, {self.dense} dense"]
        for item in self.sites:
            action = "split" if item.split else "dense"
            lines.append(f"  {item.site}: {item.calls} {action} ({item.reason})")
        return "\n".join(lines)


@dataclass
class _Graph:
    decisions: tuple[tuple[str, bool, str], ...]
    calls: int = 0


_graphs: list[_Graph] = []


def counted(compiled: Callable[..., Any], decisions: Sequence[Decision]) -> Callable[..., Any]:
    """`compiled`, counting its calls for the sites it holds."""
    if not decisions:
        return compiled
    graph = _Graph(tuple((d.site.name, d.split, d.reason) for d in decisions))
    _graphs.append(graph)

    def run(*arguments: Any) -> Any:
        graph.calls += 1
        return compiled(*arguments)

    return run


def counters() -> Counters:
    """How many attention calls of models compiled with freqopt were split, and how many not."""
    sites = tuple(
        SiteCount(name, split, graph.calls, reason)
        for graph in _graphs
        if graph.calls
        for name, split, reason in graph.decisions
    )
    return Counters(
        split=sum(s.calls for s in sites if s.split),
        dense=sum(s.calls for s in sites if not s.split),
        sites=sites,
    )


def reset_counters() -> None:
    """Start counting from zero."""
    for graph in _graphs:
        graph.calls = 0
