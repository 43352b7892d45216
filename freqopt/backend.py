"""The torch.compile backend: `torch.compile(model, backend="freqopt", options={...})`.

Finds attention in the graph that Dynamo captured, decides about each site (by the plan, or one
budget for all), rewrites, and hands the graph on to the inner backend, inductor by default.
"""

from __future__ import annotations

import difflib
import functools
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from freqopt.break_even import default_min_tokens
from freqopt.config import DEFAULT_DENSITY, DEFAULT_PROBES
from freqopt.counting import counted
from freqopt.errors import FreqoptError, OptionError, SiteError
from freqopt.passes.manager import OURS, Decision, run_passes
from freqopt.passes.nodes import shape
from freqopt.passes.site import Extent, Site
from freqopt.passes.timestep import Timestep

if TYPE_CHECKING:
    from freqopt.plan import Plan

logger = logging.getLogger(__name__)

Compiled = Callable[..., Any]


@dataclass(frozen=True)
class Options:
    """Options of the backend.

    plan: a `Plan` or the path of one. grid: extents (t, h, w) of the video tokens, where the graph
    does not tell them. grids: several of these, for a model that is called at several resolutions:
    where a graph tells none, the one that has as many tokens is taken. threshold: one budget for
    all sites instead of a plan; 0 is exact. adapt: tighten a head's budget for the next call where
    the error measured in this one is above the plan's bound; outputs then depend on the calls
    before (`reset_counters` starts anew). min_tokens: shorter sites stay dense (default: by
    `freqopt.break_even`, from the site's heads). strict: raise where a site cannot be rewritten.
    inner: the backend that compiles the rewritten graph. mode: its mode, such as "reduce-overhead"
    (torch.compile does not take options and a mode at once).
    """

    plan: Plan | str | os.PathLike[str] | None = None
    grid: tuple[int, int, int] | None = None
    grids: tuple[tuple[int, int, int], ...] = ()
    threshold: float | None = None
    adapt: bool = False
    min_tokens: int | None = None
    strict: bool = False
    inner: str | Callable[..., Compiled] = "inductor"
    mode: str | None = None


def freqopt_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Compiled:
    """Entry point "freqopt" of torch.compile; see `Options`.

    Raises:
        OptionError: unknown or malformed options.
        PlanError: a plan that cannot be read, or was made for another model.
        SiteError: under ``strict``, a site that should be split and cannot be.
    """
    settings = parse_options(options)
    settings = replace(settings, mode=mode or settings.mode)
    start = time.perf_counter()
    decisions: list[Decision] = []
    try:
        rewritten = run_passes(
            gm, functools.partial(decide, settings), grid=settings.grid,
            likely=likely_grids(settings), strict=settings.strict,
        )  # fmt: skip
        decisions = rewritten.decisions
    except FreqoptError:
        raise
    except Exception as error:
        if settings.strict:
            raise SiteError(f"the passes failed on this graph: {error}") from error
        logger.warning("the passes failed, this graph stays as it is: %s", error, exc_info=True)
    logger.info("passes took %.0f ms", 1e3 * (time.perf_counter() - start))
    compiled: Compiled = inner_backend(settings.inner, settings.mode)(gm, example_inputs)
    return counted(compiled, decisions)


def likely_grids(settings: Options) -> list[tuple[int, int, int]]:
    """Grids to try where a graph tells none: the option's, then the plan's."""
    planned = [] if settings.plan is None else load_plan(settings.plan).grids
    return [*settings.grids, *planned]


def inner_backend(inner: str | Callable[..., Compiled], mode: str | None) -> Compiled:
    """The backend that gets the rewritten graph."""
    if inner == "inductor" and mode not in (None, "default"):
        from torch._inductor import list_mode_options
        from torch._inductor.compile_fx import compile_fx

        return functools.partial(compile_fx, config_patches=list_mode_options(mode))
    from torch._dynamo.backends.registry import lookup_backend

    found: Compiled = lookup_backend(inner)
    return found if mode in (None, "default") else functools.partial(found, mode=mode)


def parse_options(options: Mapping[str, Any] | None) -> Options:
    """Check options one by one.

    Raises:
        OptionError: what is wrong, and what was probably meant.
    """
    given = dict(options or {})
    known = [field.name for field in fields(Options)]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=2)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise OptionError(f"unknown option {name!r}{hint} (options: {', '.join(known)})")
    given = {name: item for name, item in given.items() if item is not None}
    if "grid" in given:
        given["grid"] = _parse_grid(given["grid"])
    if "grids" in given:
        several = given["grids"]
        if "grid" in given or not isinstance(several, (tuple, list)):
            raise OptionError(f"grids {several!r} must be a list of grids, and given without grid")
        given["grids"] = tuple(_parse_grid(grid) for grid in several)
    threshold = given.get("threshold")
    if threshold is not None:
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
            raise OptionError(f"threshold {threshold!r} must be a number; 0 is exact")
        if math.isnan(threshold) or threshold < 0:
            raise OptionError(f"threshold {threshold} must be 0 (exact) or larger")
        if "plan" in given:
            raise OptionError("plan and threshold were both given; a plan has its own budgets")
    least = given.get("min_tokens")
    if least is not None and (isinstance(least, bool) or not isinstance(least, int) or least < 0):
        raise OptionError(f"min_tokens {least!r} must be a number of tokens, 0 or larger")
    for name in ("strict", "adapt"):
        if not isinstance(given.get(name, False), bool):
            raise OptionError(f"{name} {given[name]!r} must be True or False")
    if given.get("adapt") and "plan" not in given:
        raise OptionError("adapt needs a plan, whose bounds of errors it holds")
    inner = given.get("inner", "inductor")
    if not (callable(inner) or isinstance(inner, str)):
        raise OptionError(f"inner {inner!r} must be the name of a backend, such as 'inductor'")
    if inner == "freqopt":
        raise OptionError("inner is 'freqopt' itself; name the backend that compiles the result")
    _check_mode(inner, given.get("mode"))
    return Options(**given)


def _check_mode(inner: object, mode: object) -> None:
    if mode is None or inner != "inductor":
        return
    from torch._inductor import list_mode_options

    known = list_mode_options()
    if mode not in known:
        raise OptionError(f"unknown mode {mode!r} of inductor (modes: {', '.join(known)})")


def _parse_grid(given: Any) -> tuple[int, int, int]:
    extents = tuple(given) if isinstance(given, (tuple, list)) else ()
    valid = len(extents) == 3 and all(
        isinstance(e, int) and not isinstance(e, bool) and e >= 1 for e in extents
    )
    if not valid:
        raise OptionError(
            f"grid {given!r} must be three positive extents (t, h, w), in tokens and not in "
            "pixels; an image is (1, h, w)"
        )
    return extents[0], extents[1], extents[2]


def load_plan(plan: Plan | str | os.PathLike[str]) -> Plan:
    """A plan as it was given, or read from its file (once, until the file changes).

    Raises:
        PlanError: see `Plan.load`.
        OptionError: neither a plan nor a path.
    """
    from freqopt.plan import Plan

    if isinstance(plan, Plan):
        return plan
    if not isinstance(plan, (str, os.PathLike)):
        raise OptionError(f"plan must be a Plan or the path of one, not {type(plan).__name__}")
    path = Path(plan)
    return _read_plan(str(path), path.stat().st_mtime_ns if path.exists() else 0)


@functools.lru_cache(maxsize=8)
def _read_plan(path: str, modified: int) -> Plan:
    del modified  # part of the cache's key
    from freqopt.plan import Plan

    return Plan.load(path)


def decide(settings: Options, sites: Sequence[Site]) -> list[Decision]:
    """Which sites are split, with which budget.

    Raises:
        PlanError, SiteError: as in `freqopt_backend`.
    """
    plan = None if settings.plan is None else load_plan(settings.plan)
    if plan is not None:
        shapes = {site.name: (site.heads, site.head_dim) for site in sites if site.eligible}
        if shapes:
            plan.check_model(shapes)
            _check_lengths(plan, sites)
        if any(site.device.type == "cuda" for site in sites):
            plan.mid_band_notes("on CUDA")
    decisions = [_decide_one(settings, plan, site) for site in sites]
    _report(settings, plan, decisions)
    return decisions


def _check_lengths(plan: Plan, sites: Sequence[Site]) -> None:
    """Tell the error to expect where lengths are not those that the plan was verified at.

    Raises:
        PlanError: a length that is too far off.
    """
    for site in sites:
        planned, length = plan.sites.get(site.name), site.query_length
        if planned is None or planned.decision == "dense" or not site.eligible:
            continue
        if not isinstance(length, int) or length == planned.tokens:
            continue
        expected = plan.expected_error(site.name, length)
        grids = ", ".join("x".join(map(str, grid)) for grid in plan.grids)
        logger.warning(
            "the plan was verified at %s (%d tokens) and is used at %d tokens: an output error of "
            "about %.3g is expected, but not verified; calibrate with samples of this size to know",
            grids, planned.tokens, length, expected,
        )  # fmt: skip
        return


def _decide_one(settings: Options, plan: Plan | None, site: Site) -> Decision:
    reason = why_dense(settings, site)
    if reason is not None:
        return Decision(site, False, reason)
    if site.mark is not None:
        return Decision(
            site, True, "by the budget attached to its module", site.mark.budget,
            mid_band=site.mark.mid_band, probes=DEFAULT_PROBES, adapt=site.mark.adapt,
        )  # fmt: skip
    if plan is not None:
        if site.name not in plan.sites:
            return Decision(site, False, "the plan has no budget for it: calibrate again")
        if plan.sites[site.name].decision == "dense":
            return Decision(site, False, f"by the plan: {plan.sites[site.name].reason}")
        edges, name = tuple(plan.timestep_edges), plan.timestep_name
        read = plan.adaptive_budgets if settings.adapt else plan.budgets
        budgets = read(site.name)
        return Decision(
            site, True, "by the plan",
            budgets if edges else budgets[0],
            mid_band=plan.uses_mid_band(site.name), probes=DEFAULT_PROBES,
            timestep=Timestep(name, edges) if name and edges else None, adapt=settings.adapt,
        )  # fmt: skip
    if settings.threshold is not None:
        budget = torch.full((2, site.heads), float(settings.threshold))
        probes = DEFAULT_PROBES if settings.threshold > 0 else 0
        return Decision(site, True, f"threshold {settings.threshold:g}", budget, probes=probes)
    budget = torch.zeros(2, site.heads)
    why = f"without a plan, at density {DEFAULT_DENSITY:g}"
    return Decision(site, True, why, budget, density=DEFAULT_DENSITY, probes=DEFAULT_PROBES)


def why_dense(settings: Options, site: Site, *, guard: bool = True) -> str | None:
    """Why a site stays dense whatever its budget, None if it may be split.

    guard: may add a guard that a symbolic length stays on its side of `min_tokens`.
    """
    if not site.eligible:
        return site.reason
    from freqopt.kernels.op import check_site

    problem = check_site(site.heads, site.kv_heads, site.head_dim, site.dtype, site.device)
    if problem is not None:
        return problem
    least = least_tokens(settings, site)
    if is_shorter(site.query_length, least, guard=guard):
        return f"{site.query_length} tokens are fewer than min_tokens = {least}"
    return None


def least_tokens(settings: Options, site: Site) -> int:
    """The option `min_tokens`, or the length from which splitting this site pays."""
    if settings.min_tokens is not None:
        return settings.min_tokens
    batch = shape(site.attention.query)[0] if len(shape(site.attention.query)) == 4 else 1
    heads = site.heads * (batch if isinstance(batch, int) else 1)
    graphs = records_cuda_graphs(settings)
    return default_min_tokens(site.device, heads, site.head_dim, cuda_graphs=graphs)


def records_cuda_graphs(settings: Options) -> bool:
    """Whether the inner backend is inductor in a mode that records CUDA graphs."""
    if settings.inner != "inductor":
        return False
    from torch._inductor import config, list_mode_options

    chosen = list_mode_options(settings.mode) if settings.mode is not None else {}
    return bool(chosen.get("triton.cudagraphs", config.triton.cudagraphs))


def is_shorter(length: Extent, least: int, *, guard: bool) -> bool:
    """Whether a length is below `least`.

    A symbolic length is guarded, so that the graph is compiled again on the other side of it; one
    that depends on data counts as long enough, as no guard is possible.
    """
    if isinstance(length, int):
        return length < least
    if not length.node.has_hint():
        return False
    return bool(length < least) if guard else int(length.node.hint) < least


def _report(settings: Options, plan: Plan | None, decisions: Sequence[Decision]) -> None:
    """Warn of, or under strict raise for, sites that were meant to be split and are not."""
    for decision in decisions:
        site = decision.site
        expected = site.kind in OURS and site.grid is not None
        too_short = decision.reason.endswith(f"min_tokens = {least_tokens(settings, site)}")
        if decision.split or not expected or too_short or (plan and site.eligible):
            continue
        message = f"attention at {site.name} stays dense: {decision.reason}"
        if settings.strict:
            raise SiteError(message)
        logger.warning("%s", message)
    if settings.grid is not None and decisions and not any(d.site.eligible for d in decisions):
        reasons = {d.reason for d in decisions if "grid=" in d.reason}
        if reasons:
            message = f"grid={settings.grid} fits no attention of this graph: {sorted(reasons)[0]}"
            if settings.strict:
                raise SiteError(message)
            logger.warning("%s; it stays dense", message)
    own = [d for d in decisions if d.split and d.site.mark is None]
    if plan is None and settings.threshold is None and own:
        _warn_of_no_plan()


@functools.lru_cache(maxsize=1)
def _warn_of_no_plan() -> None:
    logger.warning(
        "no plan was given, so every head keeps %.0f%% of its attention exact, a cautious guess. "
        "Calibrate for more speed at a known error: plan = freqopt.calibrate(model, samples); "
        'torch.compile(model, backend="freqopt", options={"plan": plan})',
        100 * DEFAULT_DENSITY,
    )
