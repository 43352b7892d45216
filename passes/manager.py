"""The one way to rewrite a graph: find its sites, decide about each, put something in their places.

Who compiles, measures, exports or only looks differs in what decides and in what is put there. Each
step is timed and logged, and a site for which it fails stays as it was.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import fx
from torch._logging._internal import trace_structured

from freqopt.errors import SiteError
from freqopt.passes.decision import Decision, Rewritten
from freqopt.passes.find import Grids, Model, find_on_grids
from freqopt.passes.marks import take_marks
from freqopt.passes.rewrite.timestep import select_by_timestep
from freqopt.passes.site import Site
from freqopt.passes.spellings.packed import packed_opened

logger = logging.getLogger(__name__)

Decide = Callable[[Sequence[Site]], list[Decision]]
"""From all sites of a graph, in the order of execution, to one decision each."""

Replace = Callable[[fx.GraphModule, Decision], object]
"""Puts something in the place of a site that is to be split; see `passes.rewrite`."""


def rewrite(
    gm: fx.GraphModule,
    decide: Decide,
    replace: Replace | None,
    grids: Grids,
    *,
    strict: bool = False,
    model: Model | None = None,
) -> Rewritten:
    """Rewrite, in place, the sites of a graph that `decide` wants split.

    Args:
        gm: a graph of Dynamo or of torch.export before decompositions.
        replace: None leaves all sites where they are; decisions are made all the same.
        strict: raise where a site cannot be rewritten, instead of leaving it dense.
        model: what is known of the model that the graph is of.

    Raises:
        SiteError: under `strict`.
    """
    result = Rewritten()
    with packed_opened(gm):
        with _timed(result, "find"):
            marks = take_marks(gm, model.names, model.inside) if model else take_marks(gm)
            sites = find_on_grids(gm, grids, marks, model)
        with _timed(result, "decide"):
            result.decisions = decide(sites)
        if replace is not None and result.count:
            dump(gm, "freqopt_before")
            with _timed(result, "rewrite"):
                select_by_timestep(gm, result.decisions, strict)
                for decision in result.decisions:
                    if decision.split:
                        _put(gm, decision, replace, strict)
    if marks or "rewrite" in result.seconds:
        gm.graph.lint()
        gm.recompile()
        dump(gm, "freqopt_after")
    for decision in result.decisions:
        action = "split" if decision.split else "stays dense"
        logger.info("%s: %s, %s", decision.site.name, action, decision.why)
    steps = ", ".join(f"{name} {1e3 * s:.0f} ms" for name, s in result.seconds.items())
    done = "to be split" if replace is None else "rewritten"
    logger.info("%d of %d attention sites %s (%s)", result.count, len(sites), done, steps)
    return result


def _put(gm: fx.GraphModule, decision: Decision, replace: Replace, strict: bool) -> None:
    """Put something in the place of a site, or leave it as it was."""
    graph = decision.site.node.graph
    before = set(graph.nodes)
    try:
        replace(gm, decision)
    except Exception as error:
        for node in reversed(list(graph.nodes)):
            if node not in before and not node.users:
                graph.erase_node(node)
        decision.fail(error)
        message = f"attention at {decision.site.name} stays dense: {decision.why}"
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
