"""The model table's classes in the ways that models are run, each compared with the class as it is.

A way changes a model (hooks, adapters, a step cache), compiles it whole or by blocks, and is right
if every planned site is split with its own budget on its own grid: the output is that of the class
compiled whole, where a coarse budget shows any difference, and the dense one at threshold 0.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from model_cases import Case, load_all
from model_checks import tensors
from pieces_models import Adapted
from plans import plan_of
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import freqopt
from benchmarks.ways import ROUTES, way_of
from freqopt.backend import freqopt_backend
from freqopt.capture.budgets import BUDGET
from freqopt.plan.plan import Plan

LOUD: dict[str, Any] = {"min_tokens": 0, "inner": "eager"}
COARSE = 5.0
CLOSE = 1e-4
"""Relative distance of outputs that are the same but for the order of sums."""


class Unfit(Exception):
    """A way that a class has not; the message says why."""


def as_it_is(model: nn.Module) -> None:
    """No change."""


def cast(model: nn.Module) -> None:
    """Weights in half precision, cast layer by layer (diffusers)."""
    hooks = pytest.importorskip("diffusers.hooks")
    hooks.apply_layerwise_casting(
        model,
        storage_dtype=torch.float16,
        compute_dtype=torch.float32,
        skip_modules_pattern=("norm", "embed"),
    )


def moved(items: Any, device: torch.device, **_: Any) -> Any:
    """Tensors of a tree on a device."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), items)


def offloaded(kind: str) -> Callable[[nn.Module], None]:
    """Weights brought in group by group (diffusers)."""

    def change(model: nn.Module) -> None:
        hooks = pytest.importorskip("diffusers.hooks")
        from diffusers.hooks import group_offloading

        if not hasattr(group_offloading, "send_to_device"):  # of accelerate, which need not be here
            group_offloading.send_to_device = moved
        groups = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        hooks.apply_group_offloading(
            model,
            onload_device=torch.device("cpu"),
            offload_device=torch.device("cpu"),
            offload_type=kind,
            **groups,
        )

    return change


def adapted(model: nn.Module) -> None:
    """An adapter that is not merged on every linear layer of the blocks."""
    wanted = [
        (parent, name, child)
        for blocks in block_lists(model)
        for parent in blocks.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear
    ]
    if not wanted:
        raise Unfit("no linear layers in its blocks")
    for parent, name, child in wanted:
        if isinstance(parent, (nn.ModuleList, nn.Sequential)):
            parent[int(name)] = Adapted(child)
        elif not isinstance(parent, nn.MultiheadAttention):
            setattr(parent, name, Adapted(child))


def cached(model: nn.Module) -> None:
    """diffusers' first-block cache, which never skips at threshold 0."""
    diffusers = pytest.importorskip("diffusers")
    if not hasattr(model, "enable_cache"):
        raise Unfit("diffusers has no caches for it")
    try:
        model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.0))
    except ValueError as error:
        raise Unfit("diffusers' first-block cache does not know its blocks") from error


@dataclass(frozen=True)
class Way:
    """A way to run a model: what is done to it, and how it is served after that.

    by: of `benchmarks.ways.ROUTES`. hooked: its hooks break graphs, so that a class cannot be
    compiled with fullgraph=True.
    """

    change: Callable[[nn.Module], None]
    by: str = "whole"
    hooked: bool = False


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "": as_it_is,
    "cast": cast,
    "offload": offloaded("leaf_level"),
    "lora": adapted,
    "cache": cached,
}
"""What is done to a model, by the names of `benchmarks.ways.CONDITIONS`."""

BY_BLOCKS = {"offload": offloaded("block_level")}
"""What is done instead where blocks are compiled."""

HOOKED = {"cast", "offload", "cache"}

WAYS = {
    way_of(name, by): Way(
        BY_BLOCKS.get(name, change) if by == "blocks" else change, by, name in HOOKED
    )
    for name, change in CHANGES.items()
    for by in ROUTES
}


def block_lists(model: nn.Module) -> list[nn.ModuleList]:
    """The outermost lists of modules."""
    if isinstance(model, nn.ModuleList):
        return [model]
    return [found for child in model.children() for found in block_lists(child)]


def compile_blocks(model: Any, **options: Any) -> None:
    """As diffusers' `compile_repeated_blocks`; every block of a model that names none."""
    if getattr(model, "_repeated_blocks", None):
        model.compile_repeated_blocks(backend=freqopt_backend, **options)
        return
    blocks = [block for each in block_lists(model) for block in each]
    if not blocks:
        raise Unfit("it has no list of blocks")
    for block in blocks:
        block.compile(backend=freqopt_backend, **options)


def made_inputs(case: Case) -> dict[str, Any]:
    """The inputs that come with `made`."""
    grid, batch = case.variant(list(load_all().values()).index(case))
    torch.manual_seed(0)
    return case.make(grid, batch)[1]


def made(case: Case) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """The model, with weights that half precision holds, its inputs, and the grid to give."""
    grid, batch = case.variant(list(load_all().values()).index(case))
    torch.manual_seed(0)
    torch._dynamo.reset()
    freqopt.reset_counters()
    model, inputs = case.make(grid, batch)
    for parameter in model.parameters():
        parameter.data = parameter.data.half().to(parameter.dtype)
    return model, inputs, {"given": grid} if case.source == "given" else {}


@dataclass
class Class:
    """A class of the table: plans for it, its dense outputs, and what it does compiled whole."""

    case: Case
    plans: tuple[Plan, Plan]
    dense: list[Tensor]
    whole: Ran


def look(case: Case) -> Class:
    """What every way is compared with."""
    model, inputs, given = made(case)
    plan, zero = (plan_of(model, inputs, threshold, **given) for threshold in (COARSE, 0.0))
    with torch.no_grad():
        dense = tensors(model(**inputs))
    return Class(case, (plan, zero), dense, run(case, WAYS["whole"], (plan, zero)))


def split_sites(plan: Plan) -> set[str]:
    """Names of a plan's sites that were split in a call since the last reset."""
    counted = [site.site for site in freqopt.counters().sites if site.split and site.calls]
    return {re.sub(r"@\d+$", "", name) for name in counted} & set(plan.sites)


class Ran(NamedTuple):
    """Outputs of a class run in a way, coarsely split and at threshold 0, and what was said.

    sites: names of the plan's sites that were split. line: the last one about them.
    """

    split: list[Tensor]
    exact: list[Tensor]
    sites: set[str]
    line: str


def run(case: Case, way: Way, plans: tuple[Plan, Plan]) -> Ran:
    """Run a class in a way, with a coarse plan and one whose thresholds are 0.

    Raises:
        Unfit: the class has no such way.
    """
    coarse, zero = plans
    if way.by == "eager":
        out, sites, line = _served(case, way, coarse)
        return Ran(out, _served(case, way, zero)[0], sites, line)
    out, sites, line, model = _called(case, way, coarse)
    if way.by == "whole":
        return Ran(out, _called(case, way, zero)[0], sites, line)
    for module in model.modules():
        for name, item in vars(module).items():
            if re.fullmatch(rf"{BUDGET}(_\d+)?", name):
                item.zero_()
    inputs = made_inputs(case)
    with torch.no_grad(), context_of(model, "another"):
        return Ran(out, tensors(model(**inputs)), sites, line)


def _called(case: Case, way: Way, plan: Plan) -> tuple[list[Tensor], set[str], str, nn.Module]:
    model, inputs, _ = made(case)
    way.change(model)
    fullgraph = case.fullgraph and not way.hooked
    with torch.no_grad(), lines() as said, context_of(model):
        compiled: Any = model
        if way.by == "blocks":
            freqopt.attach(model, plan)
            compile_blocks(model, options=LOUD, fullgraph=fullgraph)
        else:
            compiled = torch.compile(
                model, backend=freqopt_backend, options={**LOUD, "plan": plan}, fullgraph=fullgraph
            )
        out = tensors(compiled(**inputs))
    line = next((text for text in reversed(said) if "sites split" in text), "")
    return out, split_sites(plan), line, model


def _served(case: Case, way: Way, plan: Plan) -> tuple[list[Tensor], set[str], str]:
    """A call without a compiler: outputs, sites that were split, and what was said of them."""
    model, inputs, _ = made(case)
    way.change(model)
    with torch.no_grad(), lines() as said, context_of(model):
        handle = freqopt.optimize(model, plan, route="eager")
        try:
            out = tensors(model(**inputs))
            sites = split_sites(plan)
        finally:
            handle.disable()
    return out, sites, next((text for text in reversed(said) if "sites split" in text), "")


def context_of(model: Any, name: str = "one") -> Any:
    """What a step cache wants calls to be in."""
    cached_now = getattr(model, "is_cache_enabled", False)
    return model.cache_context(name) if cached_now else contextlib.nullcontext()


@contextlib.contextmanager
def lines() -> Iterator[list[str]]:
    """What freqopt says meanwhile."""
    said: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger("freqopt")]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.addHandler(handler)
        each.setLevel(logging.INFO)
    try:
        yield said
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.removeHandler(handler)
            each.setLevel(level)


def worst(first: list[Tensor], second: list[Tensor]) -> float:
    """The largest relative distance of two lists of outputs."""
    return max(
        float((a - b).norm() / b.norm().clamp(min=1e-9))
        for a, b in zip(first, second, strict=True)
        if b.is_floating_point()
    )


def fails_by_itself(case: Case, way: Way) -> bool:
    """Whether a class fails in a way without freqopt, and without a compiler."""
    model, inputs, _ = made(case)
    way.change(model)
    try:
        with torch.no_grad(), context_of(model):
            model(**inputs)
    except Exception:
        return True
    return False


def outcome(known: Class, way: Way) -> str:
    """What becomes of a way.

    "split"; "dense: why", or "1 of 2 split: why"; "none: why" where there is no such way; or
    "WRONG: what", such as an exception.
    """
    planned = known.plans[0].sites
    if not planned:
        return "none: no site can be planned"
    try:
        found = known.whole if way is WAYS["whole"] else run(known.case, way, known.plans)
    except Unfit as why:
        return f"none: {why}"
    except Exception as error:
        if fails_by_itself(known.case, way):
            return "none: it fails in this way without a compiler, too"
        return f"WRONG: {type(error).__name__}: {str(error).splitlines()[0]}"
    if (distance := worst(found.exact, known.dense)) > CLOSE:
        return f"WRONG: {distance:.1e} from dense at threshold 0"
    if len(found.sites) == len(planned):
        distance = worst(found.split, known.whole.split)
        alike = found.sites == known.whole.sites
        return f"WRONG: {distance:.1e} from whole" if alike and distance > CLOSE else "split"
    why = re.sub(r"^.*?sites split:? ?", "", found.line) or "NO REASON"
    share = f"{len(found.sites)} of {len(planned)} split" if found.sites else "dense"
    return f"{share}: {why}"
