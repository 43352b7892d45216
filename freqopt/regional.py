"""Per-layer budgets for regional compilation, where one graph serves all layers of a model.

`attach` puts a plan's budgets onto the attention modules themselves. A compiled block then finds
its budget among its inputs, like a weight, so that blocks compiled once (torch.compile of a block,
diffusers' compile_repeated_blocks) still spend what the plan gives each layer.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from freqopt.calibration.samples import forward_signature, named_arguments
from freqopt.capture import under_way
from freqopt.capture.modules import base_name, module_of, module_of_site, modules_of
from freqopt.errors import PlanError
from freqopt.options import load_plan
from freqopt.passes.marks import numbers_of
from freqopt.passes.site import Known
from freqopt.telling.attached import begin_call, is_watched, unwatch, watch
from freqopt.telling.traced import is_traced
from freqopt.turns import Turns

if TYPE_CHECKING:
    from freqopt.plan.plan import Plan

BUDGET = "freqopt_budget"
"""Attribute of a module for the budget of its first attention; of others with their number."""

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
    alone, and copying or pickling the model takes them along. Budgets by timestep are those of a
    call alone: threads that call one model, each at its own timestep, take turns.

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
            continue  # a further call of a module has the budget of the first
        module, (_, nth) = modules[name], module_of_site(site)
        budget = plan.budgets(site).amin(0)
        with torch.inference_mode(False):
            module.__dict__[attribute_of(nth)] = budget.to(_device_of(module, inner), copy=True)
        about = (*module.__dict__.get(ATTACHED, ()), (nth, Facts(plan.known(site), largest)))
        module.__dict__[ATTACHED] = about
        _hook(module, MARKS, mark_call)
        places.append((module, nth, plan.budgets(site)))
    selector = _Selector(places, plan, list(handle.places))
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


def attribute_of(nth: int) -> str:
    """The attribute of a module that holds the budget (2, H) of its nth attention."""
    return f"{BUDGET}_{nth}" if nth else BUDGET


def mark_call(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook of a module with budgets: in a graph, marks a tensor that it is called with.

    One function for all layers: one for each would be another guard for each.
    """
    if not torch.compiler.is_compiling():
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


class _Selector:
    """Forward pre-hook of a model: puts the budgets of the call's timestep on its modules.

    It notes the call too, of which parts of the model then ask, and has copies of the model watched
    as the model is.
    """

    def __init__(
        self,
        places: Sequence[tuple[nn.Module, int, Tensor]],
        plan: Plan,
        names: Sequence[str],
    ) -> None:
        self.places = [(module, attribute_of(nth)) for module, nth, _ in places]
        self.plan, self.names = plan, list(names)
        edges = plan.timestep_edges
        self.name = plan.timestep_name if edges else None
        self.sizes = [table[0].numel() for _, _, table in places]
        self.table = torch.cat([table.flatten(1) for _, _, table in places], 1)
        self.edges = torch.tensor(list(edges), dtype=torch.float32, device="cpu")
        self.turns = Turns()

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        compiling = torch.compiler.is_compiling()
        if self.name is not None and not compiling:
            self.turns.begin()
        if not compiling:
            under_way.begin(model)
            self._follow(model)
            if not is_watched(model):  # a copy, or read from a file
                watch(model, self.plan, self.sites())
            begin_call(model)
        elif not is_traced():
            return
        if self.name is None:
            return
        named = named_arguments(forward_signature(model), args, kwargs)
        timestep = named.get(self.name)
        if not isinstance(timestep, (Tensor, int, float)):
            raise PlanError(
                f"the plan selects budgets by the argument {self.name!r} of the model, and this "
                f"call has none with a value (it has {', '.join(named)})"
            )
        budgets = [getattr(module, attribute) for module, attribute in self.places]
        device = budgets[0].device
        if self.table.device != device:
            self.table, self.edges = self.table.to(device), self.edges.to(device)
        if not isinstance(timestep, Tensor):
            timestep = torch.tensor(timestep, dtype=torch.float32, device="cpu")
        times = timestep.to(device, non_blocking=True)
        if compiling:
            parts = self._parts(times, budgets)
            torch._foreach_copy_(budgets, parts)
            return
        with torch.inference_mode(False), torch.no_grad():
            # New memory for each call: the kernels of one on another stream may yet read theirs.
            fresh = torch._foreach_mul(self._parts(times, budgets), 1.0)
            for budget, part in zip(budgets, fresh, strict=True):
                budget.data = part

    def sites(self) -> dict[str, tuple[nn.Module, str]]:
        """Where the budgets of the plan's sites are."""
        return dict(zip(self.names, self.places, strict=True))

    def _parts(self, times: Tensor, budgets: Sequence[Tensor]) -> list[Tensor]:
        """The budgets at a timestep, each as it lies on its module."""
        parts = budget_at(self.table, self.edges, times).split(self.sizes)
        return [part.view_as(b).to(b.device) for part, b in zip(parts, budgets, strict=True)]

    def end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook: the call is over, well or not."""
        if torch.compiler.is_compiling():
            return
        under_way.end(model)
        if self.name is not None:
            self.turns.end()

    def _follow(self, model: nn.Module) -> None:
        """Bring the budgets to where the modules are now, if the first has moved."""
        first, attribute = self.places[0]
        weight = next(first.parameters(), None)
        moved = None if weight is None else weight.device
        if moved is None or moved.type == "meta" or moved == first.__dict__[attribute].device:
            return
        with torch.inference_mode(False):
            for module, attribute in self.places:
                budget = module.__dict__[attribute]
                module.__dict__[attribute] = budget.to(_device_of(module, model))


def budget_at(table: Tensor, edges: Tensor, timestep: Tensor) -> Tensor:
    """Row of a table (buckets, n) at a timestep; eager twin of `passes.timestep.select_budgets`.

    edges: (buckets - 1,) ascending. timestep: () or (B,) or (B, ...): the mean of each batch item
    decides its bucket, and the smallest entries over the items are taken.
    """
    return table.index_select(0, buckets_at(edges, timestep)).amin(0)


def buckets_at(edges: Tensor, timestep: Tensor) -> Tensor:
    """(B,) the bucket of each batch item; see `budget_at`."""
    times = timestep.to(torch.float32)
    if times.dim() > 1:
        times = times.flatten(1).mean(1)
    return (times.reshape(-1, 1) > edges).sum(-1)


def _device_of(module: nn.Module, around: nn.Module | None = None) -> torch.device:
    """Where a module computes; the CPU where its weights are nowhere at the moment."""
    for place in filter(None, (module, around)):
        hook = getattr(place, "_hf_hook", None)  # accelerate's, of weights that are brought in
        with contextlib.suppress(TypeError, ValueError, RuntimeError):
            if (device := getattr(hook, "execution_device", None)) is not None:
                if (found := torch.device(device)).type != "meta":
                    return found
        for tensor in (*place.parameters(), *place.buffers()):
            if tensor.device.type != "meta":
                return tensor.device
    return torch.device("cpu")
