"""Counts, at run time, how many attention calls of compiled models were split and how many dense.

A compile-time message can be missed; these numbers say what ran, and the probes of every call how
far it was off. `freqopt.telling.running` keeps them.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from freqopt.telling import running
from freqopt.telling.running import Graph

UNTOLD = "these calls tell no grid of its tokens"


@dataclass(frozen=True)
class SiteCount:
    """Calls of one site in one compiled graph.

    Attributes:
        site: name of the site, as plans have it.
        split: whether it is split in this graph.
        calls: how often the graph ran.
        reason: why it is split or stays dense.
        model: what the model is called.
        probe_mean: relative L2 error of the site's heads as their probes measured it, root mean
            square over calls, batch and heads; None where nothing was measured.
        probe_worst: the same of the worst head in a call.
        verified: what the plan expects of the mean.
    """

    site: str
    split: bool
    calls: int
    reason: str
    model: str = ""
    probe_mean: float | None = None
    probe_worst: float | None = None
    verified: float | None = None

    def __str__(self) -> str:
        action = "split" if self.split else "dense"
        error = ""
        if self.probe_mean is not None and self.probe_worst is not None:
            error = f", probe error {self.probe_mean:.3g}, worst {self.probe_worst:.3g}"
            if self.verified is not None:
                error += f", verified {self.verified:.3g}"
        return f"{self.site}: {self.calls} {action}{error} ({self.reason})"


@dataclass(frozen=True)
class ModelCount:
    """The sum over one model.

    Attributes:
        model: what it is called.
        split: calls of attention that were split.
        dense: calls that ran as they were in the model.
        sites_split: how many of its sites are split.
        sites: how many sites it has.
        probe_mean: relative L2 error of the split sites as their probes measured it, root mean
            square; None where nothing was measured.
        probe_worst: the same of the worst head in a call.
    """

    model: str
    split: int
    dense: int
    sites_split: int
    sites: int
    probe_mean: float | None
    probe_worst: float | None

    def __str__(self) -> str:
        error = ""
        if self.probe_mean is not None and self.probe_worst is not None:
            error = f"; probe error {self.probe_mean:.3g}, worst {self.probe_worst:.3g}"
        return (
            f"{self.model or 'a model'}: {self.sites_split} of {self.sites} sites split, "
            f"{self.split} calls split, {self.dense} dense{error}"
        )


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

    @property
    def models(self) -> tuple[ModelCount, ...]:
        """Totals by model."""
        names = dict.fromkeys(site.model for site in self.sites)
        return tuple(_total(name, [s for s in self.sites if s.model == name]) for name in names)

    def to_dict(self) -> dict[str, Any]:
        """As plain dicts and lists, for JSON."""
        return {**asdict(self), "models": [asdict(model) for model in self.models]}

    def __str__(self) -> str:
        lines = [f"{self.split} attention calls split, {self.dense} dense"]
        for model in self.models:
            lines.append(f" {model}")
            lines += [f"  {site}" for site in self.sites if site.model == model.model]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"Counters(split={self.split}, dense={self.dense}, sites={len(self.sites)})"

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def _total(name: str, sites: Sequence[SiteCount]) -> ModelCount:
    measured = [(s.calls, s.probe_mean) for s in sites if s.probe_mean is not None]
    calls = sum(count for count, _ in measured)
    squares = math.fsum(count * mean * mean for count, mean in measured)
    by_site: dict[str, bool] = {}
    for site in sites:
        by_site[site.site] = by_site.get(site.site, False) or site.split
    return ModelCount(
        name,
        sum(s.calls for s in sites if s.split),
        sum(s.calls for s in sites if not s.split),
        sum(by_site.values()),
        len(by_site),
        math.sqrt(squares / calls) if calls else None,
        max((s.probe_worst for s in sites if s.probe_worst is not None), default=None),
    )


def counters() -> Counters:
    """How many attention calls of models compiled with freqopt were split, and how many not."""
    sites = tuple(site for graph in running.graphs for site in _counts(graph))
    return Counters(
        split=sum(s.calls for s in sites if s.split),
        dense=sum(s.calls for s in sites if not s.split),
        sites=sites,
    )


def _counts(graph: Graph) -> Iterator[SiteCount]:
    """Counts of a graph's sites: one for each, and for each layer that shares the graph."""
    for calls in graph.calls.values():
        means, worst = running.errors_of(calls, graph)
        for index, (_, split, reason) in enumerate(graph.decisions):
            named = calls.names[index]
            if calls.untold[index]:
                yield SiteCount(named.site, False, calls.untold[index], UNTOLD, named.model)
            yield SiteCount(
                named.site,
                split,
                calls.split(index),
                reason,
                named.model,
                means.get(index),
                worst.get(index),
                named.verified,
            )


def reset_counters() -> None:
    """Start counting from zero."""
    for graph in running.graphs:
        graph.forget()
