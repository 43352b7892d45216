"""Which model a plan belongs to: a hash of its parameters, and its sites in another's modules."""

from __future__ import annotations

import functools
import hashlib
import logging
import re
from collections.abc import Iterable, Mapping

from torch import nn

from freqopt.capture.modules import base_name, class_of, match_names, module_of_site, modules_of
from freqopt.errors import PlanError
from freqopt.plan.content import PlanContent, some_of

logger = logging.getLogger(__name__)

SiteShape = tuple[int, int]
"""(heads, head_dim) of a site, all that a compiler backend can check a plan against."""


def model_fingerprint(model: nn.Module) -> str:
    """Hash of a model's class name and of its parameters' names and shapes (not their values).

    Fine-tuned, merged-LoRA, quantised-in-place and cast weights of one architecture share it;
    another architecture, size or an unmerged adapter does not. 16 hexadecimal digits.
    """
    inner = unwrapped_model(model)
    shapes = sorted((name, tuple(p.shape)) for name, p in inner.named_parameters())
    return hashlib.sha256(repr((class_name_of(inner), shapes)).encode()).hexdigest()[:16]


def unwrapped_model(model: nn.Module) -> nn.Module:
    """A model without the wrapper of torch.compile."""
    inner = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    return inner if isinstance(inner, nn.Module) else model


def class_name_of(model: nn.Module) -> str:
    """Name of a model's class, whether it is compiled, or its weights are shared out, or not."""
    return class_of(unwrapped_model(model)).__name__


def shown_name(class_name: str, plan: PlanContent | None) -> str:
    """What a model is called where it is told of: with the pipeline's name for it, if there is one.

    Two experts are of one class.
    """
    component = None if plan is None else plan.component
    return f"{class_name} ({component})" if component else class_name


def names_in(plan: PlanContent, names: Iterable[str]) -> dict[str, str]:
    """Which of a plan's sites each site of a model is, by name, where that is unique."""
    return match_names(names, plan.sites, plan.evidence.dense_sites)


def modules_in(plan: PlanContent, model: nn.Module) -> dict[str, str]:
    """Names in a model of the modules that a plan's sites are in, by the site's name.

    Raises:
        PlanError: some are not there, or the model has more of them than were calibrated.
    """
    modules = modules_of(model)
    planned = {name: module_of_site(name)[0] for name in plan.sites}
    matched = match_names(modules, planned.values())
    found = {module: name for name, module in matched.items()}
    missing = [name for name, module in planned.items() if module not in found]
    if missing:
        raise PlanError(
            f"this plan was calibrated for {plan.model.class_name} and {class_name_of(model)} has"
            f" no module for {len(missing)} of its {len(plan.sites)} sites "
            f"({some_of(dict.fromkeys(missing))}), or more than one: it is another "
            "architecture or depth. Calibrate this model with freqopt.calibrate()"
        )
    known = {module_of_site(name)[0] for name in (*plan.sites, *plan.evidence.dense_sites)}
    known = {found.get(name, name) for name in known}
    like = {(_pattern(name), type(modules[name])) for name in found.values()}
    more = [n for n, m in modules.items() if (_pattern(n), type(m)) in like and n not in known]
    if more:
        raise PlanError(
            f"this plan was calibrated for {plan.model.class_name} with {len(plan.sites)} sites"
            f" and {class_name_of(model)} has {len(more)} modules more of the kind "
            f"({some_of(dict.fromkeys(more))}): it is of another depth. Calibrate this model "
            "with freqopt.calibrate()"
        )
    return {name: found[module] for name, module in planned.items()}


def check_sites(plan: PlanContent, sites: Mapping[str, SiteShape]) -> None:
    """Refuse the sites of a graph that are not those of a plan, see `Plan.check_model`.

    Raises:
        PlanError: saying what differs.
    """
    shared = names_in(plan, sites)
    if sites and not shared:
        twice = [n for n in plan.sites if sum(_fits(name, n) for name in sites) > 1]
        if twice:
            ends = dict.fromkeys(name for name in sites if _fits(name, twice[0]))
            raise PlanError(
                f"the sites of this plan for {plan.model.class_name} are in this graph more "
                f"than once ({some_of(ends)}): one plan serves one model, so compile each "
                "model by itself, with its own plan, or call freqopt.attach for each"
            )
        raise PlanError(
            f"none of the {len(sites)} sites of this graph ({some_of(sites)}) is among the "
            f"{len(plan.sites)} ({some_of(plan.sites)}) of this plan for "
            f"{plan.model.class_name}: it was made for another model"
        )
    for name, plan_name in shared.items():
        planned = (plan.sites[plan_name].heads, plan.sites[plan_name].head_dim)
        if planned != tuple(sites[name]):
            raise PlanError(
                f"site {name!r} has (heads, head_dim) {tuple(sites[name])} and this plan for "
                f"{plan.model.class_name} has {planned}: it was made for another model"
            )


def note_difference(plan: PlanContent, model: nn.Module) -> None:
    """Tell, once, that the model's parameters are not those that the plan was calibrated with."""
    _note_once(
        f"the parameters of {class_name_of(model)} are not named and shaped as those of the "
        f"{plan.model.class_name} that the plan was calibrated for (an adapter, fused or quantised "
        f"weights, a wrapper): its {len(plan.sites)} sites are all there and keep their budgets, "
        "whose error is verified for the calibrated weights only"
    )


@functools.cache
def _note_once(note: str) -> None:
    logger.info("%s", note)


def _fits(name: str, planned: str) -> bool:
    """Whether a name ends in that of a plan's site, as within a wrapper."""
    return base_name(name).endswith(f".{planned}")


def _pattern(name: str) -> str:
    """A name with its numbers left open: blocks.*.attn."""
    return re.sub(r"\b\d+\b", "*", name)
