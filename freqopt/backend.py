"""The torch.compile backend: `torch.compile(model, backend="freqopt", options={...})`.

Finds attention in the graph that Dynamo captured, decides about each site (by the plan, or one
budget for all), rewrites, and hands the graph on to the inner backend, inductor by default.
"""

from __future__ import annotations

import functools
import logging
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd.graph import saved_tensors_hooks

from freqopt.capture.call_grids import CallGrids
from freqopt.capture.deciding import decide_in_part, is_left
from freqopt.capture.exchanges import show_exchanges
from freqopt.capture.pieces import Part, part_of_model
from freqopt.config import DEFAULT_DENSITY
from freqopt.decisions import grids_of, is_shorter, least_tokens, records_cuda_graphs
from freqopt.errors import FreqoptError, SiteError, through_compiler
from freqopt.options import Compiled, Options, load_plan, parse_options
from freqopt.passes.decision import Decision
from freqopt.passes.manager import rewrite
from freqopt.passes.reasons import Reason, Why
from freqopt.passes.rewrite.rewrite import split_as_decided
from freqopt.passes.site import OURS, Site
from freqopt.reuse import compile_reusing
from freqopt.selecting import of_their_own_call
from freqopt.telling.attached import judged_from, verified_errors
from freqopt.telling.changed import looking_at_file, state_of
from freqopt.telling.first_call import gather
from freqopt.telling.running import Graph, counted, graph_of, watch_probes, with_timesteps
from freqopt.telling.traced import note_graph
from freqopt.telling.watching import MOST_KEPT

logger = logging.getLogger(__name__)

show_exchanges()

UNREAD = {
    Reason.OPAQUE,
    Reason.IN_POSITIONS,
    Reason.GRIDS_ALIKE,
    Reason.CALL_UNTOLD,
    Reason.TEXT_UNTOLD,
    Reason.PLACED,
    Reason.DISTRIBUTED,
    Reason.FILLED,
    Reason.HEADS_UNTOLD,
    Reason.IN_PIECES,
}
"""Why attention that may well be a video's stays dense: it, or its grid, cannot be read."""


def freqopt_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | Options | None = None,
    mode: str | None = None,
) -> Compiled:
    """Entry point "freqopt" of torch.compile; see `Options`.

    Raises:
        OptionError: unknown or malformed options.
        PlanError: a plan that cannot be read, or was made for another model.
        SiteError: under ``strict``, a site that should be split and cannot be.
    """
    note_graph()
    with through_compiler():
        settings = parse_options(options)
        # One plan for all that follows: its file may be another by the time it is read again.
        file, state = settings.plan, state_of(settings.plan)
        plan = None if settings.plan is None else load_plan(settings.plan)
        settings = replace(settings, mode=mode or settings.mode, plan=plan)
        # What examples of sizes save for a backward pass is none of a checkpoint's around the call.
        with saved_tensors_hooks(_as_it_is, _as_it_is):
            part = part_of_model(settings)
            calls = CallGrids(gm, example_inputs, strict=settings.strict)
            graph = _rewritten(calls, settings, part, options)
    feed = part.masks.feed(calls.gm, part.feeding.feed() if part.inputs else None)
    feed = feed if part.lengths is None else part.lengths.feed(feed)
    inputs = [*example_inputs, *calls.numbers, *part.examples]
    inner, graph_of_part = inner_backend(settings.inner, settings.mode), part.graph(calls.gm)
    if settings.reuse_order > 1:
        compiled: Compiled = compile_reusing(inner, graph_of_part, inputs, settings.reuse_order)
    else:
        compiled = inner(graph_of_part, inputs)
    if graph.inputs and torch.is_grad_enabled():
        feed = of_their_own_call(feed or tuple, graph.inputs)
    run = calls.reading(counted(compiled, graph, feed))
    return looking_at_file(run, file, plan, state) if graph.decisions else run


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _rewritten(calls: CallGrids, settings: Options, part: Part, given: object) -> Graph:
    """Rewrite a graph in place; what is to be known of it while it runs.

    calls: the graph, and the grids of its calls. given: the options as the user gave them, one
    object for all graphs of a model.
    """
    start = time.perf_counter()
    decisions: list[Decision] = []
    placed: dict[int, fx.Node] = {}
    gm = calls.gm

    def put(gm: fx.GraphModule, decision: Decision) -> None:
        placed[id(decision)] = split_as_decided(gm, decision).call

    try:
        grids, told = grids_of(settings, calls), part.tells(gm)
        if told:
            grids = replace(grids, told=(*grids.told, *told), believed=True)
        decisions = rewrite(
            gm,
            functools.partial(_decide, settings, part, gm),
            put,
            grids,
            strict=settings.strict,
            model=part.model,
        ).decisions
    except FreqoptError:
        raise
    except Exception as error:
        if settings.strict:
            raise SiteError(f"the passes failed on this graph: {error}") from error
        logger.warning("the passes failed, this graph stays as it is: %s", error, exc_info=True)
    finally:
        calls.settle()
        part.settle(gm)
    if any(map(part.takes_grid_for_granted, decisions)):
        text = (
            "a part of a model was compiled where no call of the model tells its grid (outside the "
            "model, or in model.forward(...)): it takes every call for one on the calibrated grid. "
            "Call the model itself"
        )
        if settings.strict and part.is_in_forward():
            raise SiteError(text)
        logger.warning("%s", text)
    logger.info("passes took %.0f ms", 1e3 * (time.perf_counter() - start))
    device = next((d.site.device for d in decisions if d.split), None)
    watched = {
        index: placed[id(decision)]
        for index, decision in enumerate(decisions)
        if id(decision) in placed and decision.probes and decision.site.device == device
    }
    graph = graph_of(gm, decisions, watch_probes(gm, watched), _most_kept(settings, device))
    if part.plan is not None:
        graph.names = part.plan.names_of([d.site.name for d in decisions])
        graph.verified = verified_errors(part.plan)
        graph.plan = weakref.ref(part.plan)
        graph.judged_from = judged_from(part.plan)
        if part.inputs:
            graph.site_of = _weakly(part.feeding.site_of)
        graph = with_timesteps(graph, gm, part.plan)
    part.watch_lengths(gm, decisions, graph)
    left = _left(settings, part, decisions)
    graph.model = gather(given, settings, gm, decisions, graph, part.planned_in, left)
    return graph


def _most_kept(settings: Options, device: torch.device | None) -> int:
    """Calls whose outputs may be kept: one where CUDA graphs write them anew, or may do so."""
    known = settings.inner in ("inductor", "eager", "aot_eager")
    if device is None or device.type == "cpu" or (known and not records_cuda_graphs(settings)):
        return MOST_KEPT
    return 1


def _weakly(tell: Callable[[Tensor], str | None]) -> Callable[[Tensor], str | None]:
    """A method of a part, which must not keep its model alive."""
    method = weakref.WeakMethod(tell)

    def ask(budget: Tensor) -> str | None:
        found = method()
        return None if found is None else found(budget)

    return ask


def inner_backend(inner: str | Callable[..., Compiled], mode: str | None) -> Compiled:
    """The backend that gets the rewritten graph."""
    if inner == "inductor" and mode not in (None, "default"):
        from torch._inductor import list_mode_options
        from torch._inductor.compile_fx import compile_fx

        return functools.partial(compile_fx, config_patches=list_mode_options(mode))
    from torch._dynamo.backends.registry import lookup_backend

    found: Compiled = lookup_backend(inner)
    return found if mode in (None, "default") else functools.partial(found, mode=mode)


def _decide(
    settings: Options, part: Part, gm: fx.GraphModule, sites: Sequence[Site]
) -> list[Decision]:
    """As `decide`, and tell of what was meant to be split and is not.

    Raises:
        PlanError, SiteError: as in `freqopt_backend`.
    """
    decisions = decide_in_part(settings, part, gm, sites)
    for decision in decisions:
        missed = _is_missed(settings, part, decision)
        if missed or (settings.strict and is_left(part, decision)):
            _complain(settings, f"attention at {decision.site.name} stays dense: {decision.why}")
    if not any(site.eligible for site in sites):
        misfits = [d for d in decisions if d.why.reason is Reason.GRID_MISFIT]
        if misfits:
            _complain(
                settings, f"grid={settings.grid} fits no attention of this graph: {misfits[0].why}"
            )
    own = [d for d in decisions if d.split and not isinstance(d.budget, fx.Node)]
    if settings.plan is None and settings.threshold is None and own:
        _warn_of_no_plan()
    return decisions


def _is_missed(settings: Options, part: Part, decision: Decision) -> bool:
    """Whether an attention over a video stays dense that neither length nor plan keep so."""
    site = decision.site
    if decision.split or part.is_dense_by_plan(site):
        return False
    if decision.why.reason in UNREAD:
        return site.kind != "cross" and not is_shorter(
            site.query_length, least_tokens(settings, site), guard=False
        )
    if site.kind not in OURS or site.grid is None:
        return False
    unserved = decision.why.reason is Reason.NO_KERNEL and bool(part.to_be_split(site))
    by_plan = settings.plan is not None and site.eligible and not unserved
    return not by_plan and decision.why.reason is not Reason.TOO_SHORT


def _left(settings: Options, part: Part, decisions: Sequence[Decision]) -> dict[str, Why]:
    """Sites of a plan that a graph leaves dense, which was not told yet, and why."""
    return {
        name: decision.why
        for decision in decisions
        if not _is_missed(settings, part, decision) and is_left(part, decision)
        for name in part.to_be_split(decision.site)
    }


def _complain(settings: Options, message: str) -> None:
    if settings.strict:
        raise SiteError(message)
    logger.warning("%s", message)


@functools.lru_cache(maxsize=1)
def _warn_of_no_plan() -> None:
    logger.warning(
        "no plan was given, so every head keeps %.0f%% of its attention exact, a cautious guess. "
        "Calibrate for more speed at a known error: plan = freqopt.calibrate(model, samples); "
        'torch.compile(model, backend="freqopt", options={"plan": plan})',
        100 * DEFAULT_DENSITY,
    )
