"""Runs the passes over a graph in order: find sites, decide about each, rewrite those to be split.

Every step is timed and logged, the graph before and after goes into torch's structured trace, and
a site whose rewrite fails stays as it was.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, fx
from torch._logging._internal import trace_structured

from freqopt.errors import SiteError
from freqopt.passes.bodies import bring, way_into
from freqopt.passes.find import find_sites
from freqopt.passes.marks import Mark, take_marks
from freqopt.passes.packed import packed_opened
from freqopt.passes.rewrite import insert_split
from freqopt.passes.site import Site
from freqopt.passes.timestep import Timestep, find_timestep, select_budgets

logger = logging.getLogger(__name__)


@dataclass
class Decision:
    """What becomes of a site.

    budget: thresholds, used where density is 0: (2, H) float32, or (buckets, 2, H) by `timestep`;
    a node of the graph where the module brings its own.
    """

    site: Site
    split: bool
    reason: str
    budget: Tensor | fx.Node | None = None
    mid_band: bool = False
    density: float = 0.0
    probes: int = 0
    timestep: Timestep | None = None


@dataclass
class Rewritten:
    """Outcome of the passes. seconds: time of each step."""

    decisions: list[Decision] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Number of sites that were rewritten."""
        return sum(decision.split for decision in self.decisions)


def run_passes(
    gm: fx.GraphModule,
    decide: Callable[[Sequence[Site]], list[Decision]],
    *,
    grid: tuple[int, int, int] | None = None,
    likely: Sequence[tuple[int, int, int]] = (),
    strict: bool = False,
) -> Rewritten:
    """Rewrite, in place, the sites of a graph that `decide` wants split.

    Args:
        decide: from all sites of the graph, in order, to one decision each.
        grid: as in `find_sites`.
        likely: grids to try where the graph tells none, such as those that a plan was made on.
        strict: raise where a site cannot be rewritten, instead of leaving it dense.

    Raises:
        SiteError: under `strict`.
    """
    result = Rewritten()
    with packed_opened(gm):
        with _timed(result, "find"):
            sites = find_marked(gm, grid, take_marks(gm), likely)
        with _timed(result, "decide"):
            result.decisions = decide(sites)
        if result.count:
            dump(gm, "freqopt_before")
            with _timed(result, "rewrite"):
                _select_by_timestep(gm, result.decisions, strict)
                for decision in result.decisions:
                    if decision.split:
                        _rewrite(gm, decision, strict)
    if "rewrite" in result.seconds:
        gm.graph.lint()
        gm.recompile()
        dump(gm, "freqopt_after")
    for decision in result.decisions:
        action = "split" if decision.split else "stays dense"
        logger.info("%s: %s, %s", decision.site.name, action, decision.reason)
    steps = ", ".join(f"{name} {1e3 * s:.0f} ms" for name, s in result.seconds.items())
    logger.info("%d of %d attention sites rewritten (%s)", result.count, len(sites), steps)
    return result


def find_marked(
    gm: fx.GraphModule,
    grid: tuple[int, int, int] | None,
    marks: dict[str, Mark],
    likely: Sequence[tuple[int, int, int]] = (),
) -> list[Site]:
    """Sites of a graph, with the marks of their modules.

    Where the graph tells no grid, the marks' grids and the likely ones are tried, and the one that
    explains most sites is taken.
    """
    sites = find_sites(gm, grid=grid)
    if grid is None and any(site.grid is None and site.kind in OURS for site in sites):
        candidates = dict.fromkeys([*(g for mark in marks.values() for g in mark.grids), *likely])
        found = [sites, *(find_sites(gm, grid=candidate) for candidate in candidates)]
        sites = max(found, key=lambda sites: sum(site.eligible for site in sites))
    for site in sites:
        site.mark = marks.get("" if site.name == "model" else site.name)
    return sites


OURS = ("self", "joint", "text in keys")
"""Kinds of attention that can be split where a grid is known."""


def _select_by_timestep(gm: fx.GraphModule, decisions: Sequence[Decision], strict: bool) -> None:
    """Replace budgets per timestep bucket by nodes that select among them in the graph.

    Where the graph has no such timestep, the most exact of a site's budgets serves them all.
    """
    timed = [d for d in decisions if d.split and d.timestep is not None]
    groups = dict.fromkeys((d.timestep, d.site.device) for d in timed)
    for timestep, device in groups:
        assert timestep is not None
        members = [d for d in timed if (d.timestep, d.site.device) == (timestep, device)]
        source = find_timestep(gm, timestep.name)
        inside = [d for d in members if source is not None and _is_reached(gm, d)]
        if source is not None and inside:
            tables = [_table(d).to(device) for d in inside]
            nodes = select_budgets(gm, source, timestep.edges, tables)
            for decision, node in zip(inside, nodes, strict=True):
                decision.budget = bring(node, decision.site.node.graph)
        others = [d for d in members if d not in inside]
        if not others:
            continue
        message = (
            f"{others[0].site.name} and {len(others) - 1} other sites: their graph has no tensor "
            f"input {timestep.name!r}, by which the plan selects budgets (it is a Python number "
            "there, or another graph after a graph break), so the most exact budget of all "
            "timesteps is used; pass the timestep as a tensor, or use freqopt.attach"
        )
        if strict:
            raise SiteError(message)
        logger.warning("%s", message)
        for decision in others:
            decision.budget = _table(decision).amin(0)


def _is_reached(gm: fx.GraphModule, decision: Decision) -> bool:
    """Whether values of the graph can be had where the site is, in it or in a body inside it."""
    return way_into(gm.graph, decision.site.node.graph) is not None


def _table(decision: Decision) -> Tensor:
    assert isinstance(decision.budget, Tensor)
    return decision.budget


def _rewrite(gm: fx.GraphModule, decision: Decision, strict: bool) -> None:
    site = decision.site
    graph = site.node.graph
    before = set(graph.nodes)
    assert decision.budget is not None
    try:
        insert_split(
            gm, site, decision.budget, mid_band=decision.mid_band, density=decision.density,
            probes=decision.probes,
        )  # fmt: skip
    except Exception as error:
        for node in reversed(list(graph.nodes)):
            if node not in before and not node.users:
                graph.erase_node(node)
        decision.split = False
        decision.reason = f"rewriting it failed: {type(error).__name__}: {error}"
        message = f"attention at {site.name} stays dense: {decision.reason}"
        if strict:
            raise SiteError(message) from error
        logger.warning("%s", message)


def dump(gm: fx.GraphModule, name: str) -> None:
    """Put a graph into torch's structured trace (TORCH_TRACE), beside torch's own graphs."""
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "string"},
        payload_fn=lambda: gm.print_readable(print_output=False, include_stride=True),
    )


@contextmanager
def _timed(result: Rewritten, name: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        result.seconds[name] = result.seconds.get(name, 0.0) + time.perf_counter() - start
