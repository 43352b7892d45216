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
from freqopt.passes.find import find_sites
from freqopt.passes.marks import Mark, take_marks
from freqopt.passes.rewrite import insert_split
from freqopt.passes.site import Site

logger = logging.getLogger(__name__)


@dataclass
class Decision:
    """What becomes of a site. budget: (2, H) float32 thresholds, used where density is 0; a node of
    the graph where the module brings its own."""

    site: Site
    split: bool
    reason: str
    budget: Tensor | fx.Node | None = None
    mid_band: bool = False
    density: float = 0.0
    probes: int = 0


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
    strict: bool = False,
) -> Rewritten:
    """Rewrite, in place, the sites of a graph that `decide` wants split.

    Args:
        decide: from all sites of the graph, in order, to one decision each.
        grid: as in `find_sites`.
        strict: raise where a site cannot be rewritten, instead of leaving it dense.

    Raises:
        SiteError: under `strict`.
    """
    result = Rewritten()
    with _timed(result, "find"):
        marks = take_marks(gm)
        sites = find_marked(gm, grid, marks)
    with _timed(result, "decide"):
        result.decisions = decide(sites)
    if any(decision.split for decision in result.decisions):
        dump(gm, "freqopt_before")
        with _timed(result, "rewrite"):
            for decision in result.decisions:
                if decision.split:
                    _rewrite(gm, decision, strict)
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
    gm: fx.GraphModule, grid: tuple[int, int, int] | None, marks: dict[str, Mark]
) -> list[Site]:
    """Sites of a graph, with the marks of their modules; a mark's grids are tried where none is
    known, and the one that explains most sites is taken."""
    grids = [grid]
    if grid is None:
        grids += dict.fromkeys(g for mark in marks.values() for g in mark.grids)
    found = [find_sites(gm, grid=candidate) for candidate in grids]
    sites = max(found, key=lambda sites: sum(site.eligible for site in sites))
    for site in sites:
        site.mark = marks.get("" if site.name == "model" else site.name)
    return sites


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
