"""Budgets of each call's timestep on the modules of a model that a plan is attached to."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from freqopt.capture import under_way
from freqopt.capture.budgets import attribute_of, buckets_at, budget_at, known_by, standing_for
from freqopt.capture.repeated import Pending, in_backward, several
from freqopt.capture.signatures import forward_signature, named_arguments
from freqopt.errors import InputError, PlanError
from freqopt.telling.attached import begin_call, is_watched, watch
from freqopt.telling.copies import is_copy, tell_of_copy
from freqopt.telling.traced import is_traced
from freqopt.turns import Turns

if TYPE_CHECKING:
    from freqopt.plan.plan import Plan

Feed = Callable[[tuple[Any, ...]], tuple[Any, ...]]


@dataclass(eq=False)
class _Trained:
    """A call that gradients may be asked of: its timestep, and the budget of each layer in it."""

    times: Tensor
    edges: Tensor
    budgets: tuple[Tensor, ...]

    @functools.cached_property
    def buckets(self) -> frozenset[int]:
        """Those of its batch items; waits for the device, so that only a backward pass asks."""
        return frozenset(buckets_at(self.edges, self.times).tolist())


class Selector:
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
        self._trained: Pending[_Trained] = Pending()

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A call begins.

        Raises:
            PlanError: it has no timestep, and the budgets depend on it.
            SiteError: see `tell_of_copy`.
        """
        compiling = torch.compiler.is_compiling()
        if self.name is not None and not compiling:
            self.turns.begin()
        if not compiling:
            under_way.begin(model)
            self._follow(model)
            if not is_watched(model):  # a copy, or read from a file
                watch(model, self.plan, self.sites())
            if is_copy(model):
                tell_of_copy(model)
            begin_call(model)
        elif not is_traced():
            return
        if self.name is None:
            return
        times = self._timestep(model, args, kwargs)
        if compiling:
            budgets = [getattr(module, attribute) for module, attribute in self.places]
            torch._foreach_copy_(budgets, self._parts(times, budgets))
        else:
            self._select(times)

    def _timestep(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """That of a call, on the device of the budgets."""
        named = named_arguments(forward_signature(model), args, kwargs)
        timestep = named.get(self.name or "")
        if not isinstance(timestep, (Tensor, int, float)):
            raise PlanError(
                f"the plan selects budgets by the argument {self.name!r} of the model, and this "
                f"call has none with a value (it has {', '.join(named)})"
            )
        module, attribute = self.places[0]
        device = getattr(module, attribute).device
        if self.table.device != device:
            self.table, self.edges = self.table.to(device), self.edges.to(device)
        if not isinstance(timestep, Tensor):
            timestep = torch.tensor(timestep, dtype=torch.float32, device="cpu")
        if not torch.compiler.is_compiling() and (timestep.is_meta or not timestep.numel()):
            # No value, as of a batch of nothing: one of each bucket, so the most exact budgets.
            timestep = torch.cat([self.edges, self.edges.new_full((1,), torch.inf)])
        return timestep.to(device, non_blocking=True)

    def _select(self, times: Tensor) -> None:
        """Put the budgets of a timestep on the modules.

        In new memory for each call: the kernels of one on another stream may yet read theirs. As
        objects of their own where gradients may be asked for, as the backward pass reads them.
        """
        known = [known_by(module.__dict__[attribute]) for module, attribute in self.places]
        trains = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.no_grad():
            fresh = torch._foreach_mul(self._parts(times, known), 1.0)
            if trains:
                pairs = zip(known, fresh, strict=True)
                self._put([standing_for(own, part) for own, part in pairs])
            else:
                for own, part in zip(known, fresh, strict=True):
                    own.data = part
                self._put(known)
        if trains and not in_backward():
            self._trained.note(_Trained(times.detach().clone(), self.edges, tuple(fresh)))
            _selectors.add(self)

    def _put(self, budgets: Sequence[Tensor]) -> None:
        """Have each module bring a budget."""
        for (module, attribute), budget in zip(self.places, budgets, strict=True):
            module.__dict__[attribute] = budget

    def again(self, budget: Tensor) -> Tensor:
        """The budget of a layer in the call of which a checkpoint runs a part once more.

        budget: what its module brings now, after whatever call was the last. It is returned as it
        is where gradients were asked of no call, or it is of another model.

        Raises:
            InputError: several calls may be meant, at timesteps of other budgets.
        """
        wanted = known_by(budget)
        for place, (module, attribute) in enumerate(self.places):
            own = module.__dict__.get(attribute)
            if isinstance(own, Tensor) and known_by(own) is wanted:
                calls = self._trained.again()
                if len({call.buckets for call in calls}) > 1:
                    raise InputError(several(self.plan.model.class_name, "at several timesteps"))
                return calls[-1].budgets[place] if calls else budget
        return budget

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
                module.__dict__[attribute] = budget.to(device_of(module, model))


def device_of(module: nn.Module, around: nn.Module | None = None) -> torch.device:
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


_selectors: weakref.WeakSet[Selector] = weakref.WeakSet()
"""Those of models that are trained."""


def own_budget(budget: Tensor) -> Tensor:
    """The budget of a layer in the call of which a checkpoint runs a part once more.

    Raises:
        InputError: see `Selector.again`.
    """
    for selector in list(_selectors):
        budget = selector.again(budget)
    return budget


def of_their_own_call(feed: Feed, places: Sequence[int]) -> Feed:
    """Gives a graph that a checkpoint runs once more, in a backward pass, the budgets it had.

    No call of the model is under way then, and the last one may have been at another timestep.
    places: which of the arguments that `feed` returns are budgets.
    """

    def run(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        found = feed(arguments)
        if not in_backward() or under_way.is_under_way():
            return found
        given = list(found)
        for place in places:
            given[place] = own_budget(given[place])
        return tuple(given)

    return run
