"""Per-layer budgets for regional compilation, where one graph serves all layers of a model.

`attach` puts a plan's budgets onto the attention modules themselves. A compiled block then finds
its budget among its inputs, like a weight, so that blocks compiled once (torch.compile of a block,
diffusers' compile_repeated_blocks) still spend what the plan gives each layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from freqopt.calibration.samples import forward_signature, named_arguments
from freqopt.errors import PlanError

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from freqopt.plan.plan import Plan

BUFFER = "freqopt_budget"

_marked: dict[type[nn.Module], type[nn.Module]] = {}


class Attached:
    """Budgets on a model; `remove` takes them off, and so does leaving a ``with`` block."""

    def __init__(self, modules: Sequence[nn.Module], hook: RemovableHandle | None) -> None:
        self.modules, self.hook = list(modules), hook

    def remove(self) -> None:
        """Give the modules back their own classes."""
        if self.hook is not None:
            self.hook.remove()
        for module in self.modules:
            module.__class__ = type(module).__mro__[1]
            del module._buffers[BUFFER]
            del module.__dict__["freqopt_grids"], module.__dict__["freqopt_mid_band"]
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


def attach(model: nn.Module, plan: Plan) -> Attached:
    """Put a plan's budgets onto the attention modules of `model`, for regional compilation.

    Afterwards compile blocks with ``backend="freqopt"`` and no plan among the options:
    ``model.compile_repeated_blocks(backend="freqopt")`` of diffusers, or ``block.compile(...)``.
    A layer that the plan leaves dense gets threshold 0, which is exact, as its graph is shared. The
    grid is one of the plan's, the one that accounts for the tokens of the call. Budgets by timestep
    are put in place as the model is called, on the device and without waiting for it, so the
    timestep must be among the arguments of `model` itself.

    Args:
        model: the model that the plan was calibrated for, or one of the same architecture.
        plan: its plan; one attention per module (no "#1" sites).

    Returns:
        A handle whose `remove` undoes it.

    Raises:
        PlanError: the plan is for another model, or names a module that has two attentions.
    """
    inner = getattr(model, "_orig_mod", model)
    plan.check_model(inner)
    if torch.device(_device_of(inner)).type == "cuda":
        plan.mid_band_notes("on CUDA")
    extents = [extent for grid in plan.grids for extent in grid]
    mid_band = any(plan.uses_mid_band(name) for name in plan.sites)
    modules = []
    for name in plan.sites:
        if "#" in name:
            raise PlanError(
                f"{name}: its module has more than one attention, and a budget attached to a "
                "module serves one; compile the whole model with options={'plan': plan} instead"
            )
        module = inner.get_submodule(name)
        budget = plan.budgets(name).amin(0).to(_device_of(module))
        module.register_buffer(BUFFER, budget, persistent=False)
        module.__dict__["freqopt_grids"] = extents
        module.__dict__["freqopt_mid_band"] = mid_band
        module.__class__ = marked_class(type(module))
        modules.append(module)
    hook = None
    if plan.timestep_name is not None and plan.timestep_edges:
        tables = [plan.budgets(name) for name in plan.sites]
        select = _Selector(modules, tables, plan.timestep_name, plan.timestep_edges)
        hook = inner.register_forward_pre_hook(select, with_kwargs=True)
    return Attached(modules, hook)


class _Selector:
    """Forward pre-hook of a model: puts the budgets of the call's timestep on its modules."""

    def __init__(
        self,
        modules: Sequence[nn.Module],
        tables: Sequence[Tensor],
        name: str,
        edges: Sequence[float],
    ) -> None:
        self.modules, self.name = list(modules), name
        self.sizes = [table[0].numel() for table in tables]
        self.table = torch.cat([table.flatten(1) for table in tables], 1)
        self.edges = torch.tensor(list(edges), dtype=torch.float32)

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = named_arguments(forward_signature(model), args, kwargs)
        timestep = named.get(self.name)
        if not isinstance(timestep, (Tensor, int, float)):
            raise PlanError(
                f"the plan selects budgets by the argument {self.name!r} of the model, and this "
                f"call has none with a value (it has {', '.join(named)})"
            )
        budgets = [getattr(module, BUFFER) for module in self.modules]
        device = budgets[0].device
        if self.table.device != device:
            self.table, self.edges = self.table.to(device), self.edges.to(device)
        times = torch.as_tensor(timestep).to(device, non_blocking=True)
        row = budget_at(self.table, self.edges, times)
        parts = row.split(self.sizes)
        torch._foreach_copy_(
            budgets, [part.view_as(b).to(b.device) for part, b in zip(parts, budgets, strict=True)]
        )


def budget_at(table: Tensor, edges: Tensor, timestep: Tensor) -> Tensor:
    """Row of a table (buckets, n) at a timestep; eager twin of `passes.timestep.select_budgets`.

    edges: (buckets - 1,) ascending. timestep: () or (B,) or (B, ...): the mean of each batch item
    decides its bucket, and the smallest entries over the items are taken.
    """
    times = timestep.to(torch.float32)
    if times.dim() > 1:
        times = times.flatten(1).mean(1)
    return table.index_select(0, (times.reshape(-1, 1) > edges).sum(-1)).amin(0)


def _device_of(module: nn.Module) -> Any:
    weight = next(module.parameters(), None)
    return "cpu" if weight is None else weight.device


def marked_class(base: type[nn.Module]) -> type[nn.Module]:
    """A subclass of `base` that marks its first tensor argument.

    One class for all layers: a wrapper for each would make the compiler guard on its identity, and
    compile the block again for every layer.
    """
    if base in _marked:
        return _marked[base]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        from freqopt.kernels.mark import mark

        budget, grids, mid = self.freqopt_budget, self.freqopt_grids, self.freqopt_mid_band
        if args and isinstance(args[0], Tensor):
            args = (mark(args[0], budget, grids, mid), *args[1:])
        elif isinstance(kwargs.get("hidden_states"), Tensor):
            kwargs = {**kwargs, "hidden_states": mark(kwargs["hidden_states"], budget, grids, mid)}
        return base.forward(self, *args, **kwargs)

    made = type(base.__name__, (base,), {"forward": forward, "__module__": base.__module__})
    _marked[base] = made
    return made
