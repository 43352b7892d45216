"""Decides about attention sites, for whoever compiles, measures, exports or inspects a model.

A site may be split if its form allows it, the op has a kernel for it and it is long enough; whether
it is, and with which budget, is said by the module's own mark, the plan, or one threshold for all.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from freqopt.break_even import default_min_tokens
from freqopt.chunks import check_chunk
from freqopt.config import DEFAULT_DENSITY, DEFAULT_PROBES
from freqopt.errors import PlanError
from freqopt.options import Options, load_plan
from freqopt.passes.content import by_content
from freqopt.passes.decision import Decision, Timestep
from freqopt.passes.find import Grids
from freqopt.passes.nodes import shape
from freqopt.passes.reasons import Reason, Why
from freqopt.passes.site import Extent, Mark, Site

if TYPE_CHECKING:
    from freqopt.capture.call_grids import OneCall
    from freqopt.plan.plan import Plan

logger = logging.getLogger(__name__)


def grids_of(settings: Options, calls: OneCall | None = None) -> Grids:
    """The grids that the options tell: `grid`, and to be tried, `grids` and the plan's.

    calls: what the inputs of the graph tell at every call. Positions are believed where any grid
    is said, as tokens with positions need not be video.

    Raises:
        PlanError, OptionError: as in `load_plan`.
    """
    planned = () if settings.plan is None else tuple(load_plan(settings.plan).grids)
    likely = (*settings.grids, *planned)
    believed = settings.grid is not None or bool(likely)
    others = (settings.before, settings.after)
    if calls is None:
        return Grids(settings.grid, likely, others)
    return Grids(settings.grid, likely, others, tuple(calls.told), believed, calls.order_of)


def decide(
    settings: Options,
    sites: Sequence[Site],
    *,
    device: torch.device | None = None,
    guard: bool = True,
) -> list[Decision]:
    """Which sites are split, with which budget.

    Args:
        device: where the split will run, if that is not where the graph was captured.
        guard: may add guards that symbolic lengths stay on their side of `min_tokens`.

    Raises:
        PlanError: a plan that cannot be read, was made for another model, or at lengths too far
            from those of the sites.
    """
    plan = None if settings.plan is None else load_plan(settings.plan)
    names = {} if plan is None else plan.names_of([site.name for site in sites])
    if plan is not None:
        told = [site for site in sites if site.eligible and _has_rows(plan, names, site)]
        if told:
            plan.check_model({site.name: (site.all_heads, site.head_dim) for site in told})
            _check_lengths(plan, names, sites)
    decisions = []
    for found in sites:
        site = _by_content(settings, plan, found, names.get(found.name))
        known = site.mark is not None or site.name in names
        problem = why_dense(settings, site, device, guard=guard, planned=known)
        dense = None if problem is None else Decision(site, False, problem)
        decisions.append(dense or _budgeted(settings, plan, site, names.get(site.name)))
    return decisions


def _by_content(settings: Options, plan: Plan | None, site: Site, name_there: str | None) -> Site:
    """A site without a usable grid as an order by content serves it, if one was asked for.

    name_there: of the site in the plan.
    """
    planned = None if plan is None or name_there is None else plan.sites[name_there]
    asked = settings.order == "content" or (planned is not None and any(planned.chunks))
    if site.eligible or not asked:
        return site
    return by_content(site) or site


def why_not(site: Site, device: torch.device | None = None) -> Why | None:
    """Why a site can not be split, whatever its length and budget; None if it can.

    device: where the split will run, if that is not where the graph was captured.
    """
    if not site.eligible:
        return site.why
    from freqopt.kernels.op import check_site

    where = device or site.device
    problem = check_site(site.heads, site.kv_heads, site.head_dim, site.dtype, where)
    return None if problem is None else Reason.NO_KERNEL(problem=problem)


def why_dense(
    settings: Options,
    site: Site,
    device: torch.device | None = None,
    *,
    guard: bool = True,
    planned: bool = False,
) -> Why | None:
    """Why a site stays dense whatever its budget: it cannot be split, or is too short to gain.

    planned: a plan has decided about it, which goes before the default of `min_tokens`.
    """
    problem = why_not(site, device)
    if problem is None and not (planned and settings.min_tokens is None):
        problem = _too_short(settings, site, guard)
    return problem


def _too_short(settings: Options, site: Site, guard: bool) -> Why | None:
    least = least_tokens(settings, site)
    for length in (site.query_length, site.key_length):
        if is_shorter(length, least, guard=guard):
            return Reason.TOO_SHORT(tokens=length, least=least)
    return None


def _budgeted(settings: Options, plan: Plan | None, site: Site, planned: str | None) -> Decision:
    """What is decided about a site that can be split. planned: its name in the plan."""
    if site.mark is not None:
        given = shape(site.mark.budget)[-1:]
        if given and (problem := untold(site, int(given[0]))) is not None:
            return Decision(site, False, problem)
        _check_mark(site, site.mark)
        return Decision(
            site,
            True,
            Reason.BY_MODULE(),
            site.mark.budget,
            probes=DEFAULT_PROBES,
            largest_chunk=site.mark.largest_chunk,
        )
    if plan is not None:
        return _planned(plan, site, planned)
    chunk = check_chunk(settings.chunk) if settings.order == "content" else 0
    budget = torch.zeros(2, site.heads, dtype=torch.float32, device="cpu")
    budget[1] = chunk
    if settings.threshold is not None:
        budget[0] = float(settings.threshold)
        probes = DEFAULT_PROBES if settings.threshold > 0 else 0
        why = Reason.BY_THRESHOLD(threshold=settings.threshold)
        return Decision(site, True, why, budget, probes=probes, largest_chunk=chunk)
    return Decision(
        site,
        True,
        Reason.BY_DENSITY(density=DEFAULT_DENSITY),
        budget,
        density=DEFAULT_DENSITY,
        probes=DEFAULT_PROBES,
        largest_chunk=chunk,
    )


def _has_rows(plan: Plan, names: Mapping[str, str], site: Site) -> bool:
    """Whether a plan that knows a site can say which of its rows are the site's."""
    planned = names.get(site.name)
    return planned is None or untold(site, plan.sites[planned].heads) is None


def untold(site: Site, planned: int) -> Why | None:
    """Why a budget of so many heads cannot serve a site that may have some of them only."""
    known = (site.heads, site.all_heads)
    if planned in known or not site.heads or planned % site.heads:
        return None
    shared = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if (site.share is not None and site.share.heads) or not shared:
        return None  # a plan for another model
    return Reason.HEADS_UNTOLD(heads=site.heads, planned=planned)


def _check_mark(site: Site, mark: Mark) -> None:
    heads = shape(mark.budget)[-1:]
    if heads and heads[0] not in (site.heads, site.all_heads):
        raise PlanError(
            f"attention at {site.name} has {site.heads} heads and the budget attached to its "
            f"module is for {heads[0]}: the plan was made for another model"
        )


def _planned(plan: Plan, site: Site, name_there: str | None) -> Decision:
    """What a plan decides about a site."""
    if name_there is None:
        return Decision(site, False, Reason.NOT_PLANNED())
    planned = plan.sites[name_there]
    if planned.decision == "dense":
        return Decision(site, False, Reason.PLANNED_DENSE(reason=planned.reason))
    if (problem := untold(site, planned.heads)) is not None:
        return Decision(site, False, problem)
    name, edges = plan.timestep_name, tuple(plan.timestep_edges)
    budgets = own_rows(site, plan.budgets(name_there))
    return Decision(
        site,
        True,
        Reason.BY_PLAN(),
        budgets if edges else budgets[0],
        probes=DEFAULT_PROBES,
        timestep=Timestep(name, edges) if name and edges else None,
        largest_chunk=plan.largest_chunk(name_there),
    )


def own_rows(site: Site, budgets: torch.Tensor) -> torch.Tensor:
    """Of budgets (..., H) of all heads those of the heads that are here."""
    if site.share is None or budgets.shape[-1] == site.heads:
        return budgets
    return budgets[..., list(site.share.numbers)]


def _check_lengths(plan: Plan, names: Mapping[str, str], sites: Sequence[Site]) -> None:
    """Tell the error to expect where lengths are not those that the plan was verified at.

    names: of the sites in the plan.

    Raises:
        PlanError: a length that is too far off.
    """
    for site in sites:
        planned, length = plan.sites.get(names.get(site.name, "")), site.key_length
        if planned is None or planned.decision == "dense" or not site.eligible:
            continue
        if isinstance(length, int) and check_length(plan, names[site.name], length):
            return


def check_length(plan: Plan, name: str, length: int) -> bool:
    """Tell the error to expect where a site of a plan has another length; whether it has.

    Raises:
        PlanError: a length that is too far off.
    """
    planned = plan.sites[name].tokens
    if length == planned:
        return False
    expected = plan.expected_error(name, length)
    grids = ", ".join("x".join(map(str, grid)) for grid in plan.grids)
    logger.warning(
        "the plan was verified at %s (%d tokens) and is used at %d tokens: an output error of "
        "about %.3g is expected, but not verified; calibrate with samples of this size to know",
        grids,
        planned,
        length,
        expected,
    )
    return True


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
