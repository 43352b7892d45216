"""Refuses, as it runs, a pipeline whose components have each other's plans.

Two experts of one architecture share the denoising steps. A plan keeps the timesteps that it was
verified at, so a model that is called at another's has the other's plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from freqopt.capture.modules import OwnOnly
from freqopt.capture.signatures import forward_signature, named_arguments
from freqopt.errors import PlanError
from freqopt.plan.plan import Plan
from freqopt.telling.watching import TimestepRange

LOOKS = -20_260_020
"""Key of the hook: ours of a model, whatever the route."""

KEPT = "freqopt_range"


class OwnRange(TimestepRange):
    """The timesteps of one component among others. name: of the component."""

    def __init__(self, component: str, plan: Plan, others: Mapping[str, Plan]) -> None:
        super().__init__(plan)
        self.component = component
        self.others = {other: TimestepRange(each) for other, each in others.items()}

    def judge(self, low: float, high: float) -> None:
        """Refuse timesteps of another component.

        Raises:
            PlanError: whose they are.
        """
        for time in (low, high):
            if self.range is None or self.covers(time):
                continue
            for other, known in self.others.items():
                if known.range is not None and known.covers(time):
                    raise PlanError(
                        f"{self.component} is called at {self.name} {time:g}, and its plan was "
                        f"verified at {self.range[0]:g} to {self.range[1]:g}: {time:g} is in the "
                        f"range of {other}'s plan. Are the two plans swapped?"
                    )


class Ranges:
    """Looks at the timesteps of several components from `start` to `stop`."""

    def __init__(self, models: Mapping[str, nn.Module], plans: Mapping[str, Plan]) -> None:
        self.models = dict(models)
        self.ranges = {
            name: OwnRange(name, plan, {o: p for o, p in plans.items() if o != name})
            for name, plan in plans.items()
            if len(plans) > 1 and plan.timestep_name is not None
        }

    def start(self) -> None:
        """Look from the next call on."""
        for name, found in self.ranges.items():
            model = self.models[name]
            model.__dict__[KEPT] = OwnOnly(found)
            model._forward_pre_hooks[LOOKS] = _look
            model._forward_pre_hooks_with_kwargs[LOOKS] = True

    def stop(self) -> None:
        """Look no more."""
        for model in self.models.values():
            unwatch(model)


def unwatch(model: nn.Module) -> None:
    """Take our hook off a model."""
    model.__dict__.pop(KEPT, None)
    model._forward_pre_hooks.pop(LOOKS, None)
    model._forward_pre_hooks_with_kwargs.pop(LOOKS, None)


def _look(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if torch.compiler.is_compiling():
        return
    found = model.__dict__[KEPT].held
    if isinstance(found, OwnRange):
        times = named_arguments(forward_signature(model), args, kwargs).get(found.name or "")
        if isinstance(times, (Tensor, int, float)):
            found.note(times)
