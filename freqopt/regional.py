"""Per-layer budgets for regional compilation, where one graph serves all layers of a model.

`attach` puts a plan's budgets onto the attention modules themselves. A compiled block then finds
its budget among its inputs, like a weight, so that blocks compiled once (torch.compile of a block,
diffusers' compile_repeated_blocks) still spend what the plan gives each layer.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from freqopt.capture.budgets import attribute_of
from freqopt.capture.modules import base_name, module_of, module_of_site, modules_of
from freqopt.errors import PlanError
from freqopt.options import load_plan
from freqopt.passes.marks import numbers_of
from freqopt.passes.site import Known
from freqopt.selecting import Selector, device_of
from freqopt.telling.attached import unwatch, watch
from freqopt.telling.traced import is_traced

if TYPE_CHECKING:
    from freqopt.plan.plan import Plan

ATTACHED = "freqopt_attached"
"""Attribute of modules that have budgets: what else there is to know about them."""

HANDLE = "freqopt_handle"
"""Attribute of the model that `attach` was given."""

MARKS, SELECTS, ENDS = -20_260_000, -20_260_001, -20_260_003
"""Keys of our hooks, the same in all modules: the compiler guards on the keys of hooks, and numbers
that differ from layer to layer would compile every layer anew."""


class Attached:
    """Budgets on a model; `remove` takes them off, and so does leaving a ``with`` block.

    root: the module that was calibrated. places: where the budget of each site is, as a module and
    the number of the attention in it.
    """

    def __init__(
        self, model: nn.Module, root: nn.Module, places: Mapping[str, tuple[nn.Module, int]]
    ) -> None:
        self.model, self.root, self.places = model, root, dict(places)
        self.modules = list(dict.fromkeys(module for module, _ in places.values()))

    def remove(self) -> None:
        """Leave the model as it was; once is enough."""
        for module in self.modules:
            for nth, _ in module.__dict__.pop(ATTACHED, ()):
                module.__dict__.pop(attribute_of(nth), None)
            _unhook(module, MARKS)
        _unhook(self.root, SELECTS)
        self.root._forward_hooks.pop(ENDS, None)
        self.root._forward_hooks_always_called.pop(ENDS, None)
        unwatch(self.root)
        self.model.__dict__.pop(HANDLE, None)
        self.modules = []

    def __enter__(self) -> Attached:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()


def attach(model: nn.Module, plan: Plan | str | os.PathLike[str]) -> Attached:
    """Put a plan's budgets onto the attention modules of `model`, for regional compilation.

    Afterwards compile blocks with ``backend="freqopt"`` and no plan among the options:
    ``model.compile_repeated_blocks(backend="freqopt")`` of diffusers, or ``block.compile(...)``.
    A layer that the plan leaves dense gets threshold 0, which is exact, as its graph is shared. The
    grid is one of the plan's, the one that accounts for the tokens of the call. Budgets by timestep
    are put in place as the model is called, on the device and without waiting for it, so the
    timestep must be among the arguments of the model that was calibrated.

    Budgets are no parameters and no buffers: moving, casting or offloading the model leaves them
    alone, and copying or pickling the model takes them along. A module that is called several times
    in a call of the model has the smallest thresholds of them all. Budgets by timestep are those of
    a call alone: threads that call one model, each at its own timestep, take turns.

    Args:
        model: the model that the plan was calibrated for, one of the same architecture (with an
            adapter, quantised or fused weights, compiled blocks), or a module around it.
        plan: its plan, or the path of one.

    Returns:
        A handle whose `remove` undoes it.

    Raises:
        PlanError: the plan is for another model, or the model has budgets already.
    """
    inner = module_of(model, "attach")
    plan = load_plan(plan)
    names = plan.modules(inner)
    plan.check_model(inner)
    modules = modules_of(inner)
    taken = [name for name in names.values() if ATTACHED in modules[name].__dict__]
    if taken:
        raise PlanError(
            f"{taken[0] or 'the model'} has budgets already: call remove() of what the earlier "
            f"freqopt.attach returned (model.{HANDLE} is the same), then attach again"
        )
    places = {
        site: (modules[name], module_of_site(site)[1])
        for site, name in names.items()
        if base_name(site) == site
    }
    handle = Attached(inner, modules[_root_of(names)], places)
    try:
        _put(handle, plan, names, modules)
    except BaseException:
        handle.remove()  # all of it or nothing
        raise
    return handle


def _put(
    handle: Attached, plan: Plan, names: dict[str, str], modules: Mapping[str, nn.Module]
) -> None:
    """Put budgets and hooks onto a model. names: of the modules in it, by the plan's sites."""
    inner, root = handle.model, handle.root
    largest = max((plan.largest_chunk(name) for name in plan.sites), default=0)
    places = []
    for site, name in names.items():
        if base_name(site) != site:
            continue  # it is among those of the first call of its module
        module, (_, nth) = modules[name], module_of_site(site)
        budgets = plan.module_budgets(site)
        with torch.inference_mode(False):
            own = budgets.amin(0).to(device_of(module, inner), copy=True)
            module.__dict__[attribute_of(nth)] = own
        about = (*module.__dict__.get(ATTACHED, ()), (nth, Facts(plan.known(site), largest)))
        module.__dict__[ATTACHED] = about
        _hook(module, MARKS, mark_call)
        places.append((module, nth, budgets))
    selector = Selector(places, plan, list(handle.places))
    _hook(root, SELECTS, selector)
    root._forward_hooks[ENDS] = selector.end
    root._forward_hooks_always_called[ENDS] = True
    watch(root, plan, selector.sites())
    inner.__dict__[HANDLE] = handle


class Facts:
    """What the mark of an attention says beside its budget, as the compiler can read it."""

    def __init__(self, known: tuple[Known, ...], largest_chunk: int) -> None:
        self.known, self.largest_chunk = known, largest_chunk
        self.layouts = numbers_of(known)


def mark_call(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook of a module with budgets: in a graph, marks a tensor that it is called with.

    One function for all layers: one for each would be another guard for each. What is exported is a
    program of its own, where nothing would read the marks.
    """
    if not torch.compiler.is_compiling() or not is_traced():
        return None
    from freqopt.kernels.mark import first_tensor, mark, with_item

    at = first_tensor(args, kwargs)
    if at is None:
        return None
    for nth, facts in module.__dict__[ATTACHED]:
        item = args[at] if isinstance(at, int) else kwargs[at]
        budget = getattr(module, attribute_of(nth)).to(item.device)
        marked = mark(item, budget, facts.layouts, nth, facts.largest_chunk)
        args, kwargs = with_item(args, kwargs, at, marked)
    return args, kwargs


def _hook(module: nn.Module, key: int, hook: Any) -> None:
    module._forward_pre_hooks[key] = hook
    module._forward_pre_hooks_with_kwargs[key] = True


def _unhook(module: nn.Module, key: int) -> None:
    module._forward_pre_hooks.pop(key, None)
    module._forward_pre_hooks_with_kwargs.pop(key, None)


def _root_of(names: dict[str, str]) -> str:
    """Name of the module that was calibrated, in the model: what stands before all plan's names."""
    for site, name in names.items():
        module = module_of_site(site)[0]
        if name == module or not name.endswith(module):
            return ""
        return name[: len(name) - len(module)].rstrip(".")
    return ""
