"""Calls of a served model of which checkpoints run parts once more, in the backward pass.

The part is attended as it was: on the grid and with the budgets of the call that it is of.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from freqopt.capture.budgets import buckets_at, budget_at
from freqopt.capture.modules import CALLS
from freqopt.capture.repeated import Pending, several
from freqopt.capture.under_way import Arguments
from freqopt.eager.forms import Form
from freqopt.eager.lay import Lay
from freqopt.errors import InputError
from freqopt.passes.reasons import Why

if TYPE_CHECKING:
    from freqopt.plan.plan import Plan


@dataclass(frozen=True, eq=False)
class _Noted:
    """A call that gradients were asked of. times: its timestep, where budgets depend on it."""

    form: Form
    times: Tensor | None


class Again:
    """One of the calls that a backward pass may come for, all of which agree."""

    def __init__(self, plan: Plan, calls: Sequence[_Noted]) -> None:
        self.plan, self.calls = plan, calls
        self.form = calls[-1].form

    def lay(self, kind: object) -> Lay | Why | None:
        """How the tokens of a kind of site lay.

        Raises:
            InputError: not alike in all of the calls.
        """
        found = [call.form.lays.get(kind) for call in self.calls]
        known = [lay for lay in found if lay is not None]
        if any(lay != known[0] for lay in known):
            raise InputError(several(self.plan.model.class_name, "on several grids"))
        return known[0] if known else None

    def budget(self, site: str) -> Tensor:
        """(2, H) of a site, at the timestep of the call."""
        table, times = self.plan.module_budgets(site), self.calls[-1].times
        if times is None:
            return table.amin(0)
        return budget_at(table.flatten(1), _edges(self.plan), times.cpu()).view_as(table[0])


class Trained:
    """The calls of a model that a backward pass may come for."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._pending: Pending[_Noted] = Pending()

    def note(self, form: Form, arguments: Arguments) -> None:
        """A call begins that gradients may be asked of."""
        name = self.plan.timestep_name if self.plan.timestep_edges else None
        times: Any = None if name is None else arguments.get(name)
        if times is not None and not isinstance(times, Tensor):
            times = torch.tensor(times, dtype=torch.float32, device="cpu")
        self._pending.note(_Noted(form, None if times is None else times.detach().clone()))

    def again(self) -> Again | None:
        """The call of which a part runs once more; None if no gradients were asked of any.

        Raises:
            InputError: several may be meant, at timesteps of other budgets.
        """
        calls = self._pending.again()
        if not calls:
            return None
        edges = _edges(self.plan)
        buckets = {
            int(buckets_at(edges, each.times.cpu()).max())
            for each in calls
            if each.times is not None
        }
        if len(buckets) > 1:
            raise InputError(several(self.plan.model.class_name, "at several timesteps"))
        return Again(self.plan, calls)


def _edges(plan: Plan) -> Tensor:
    return torch.tensor(list(plan.timestep_edges), dtype=torch.float32, device="cpu")


def in_checkpoint(module: nn.Module) -> bool:
    """Whether an activation checkpoint is under way inside a module that is running."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name in CALLS and frame.f_locals.get("self") is module:
            return False
        if code.co_name == "checkpoint" and code.co_filename.endswith("checkpoint.py"):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
