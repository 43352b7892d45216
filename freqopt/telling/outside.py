"""Tells where a model is used outside of what its plan was verified for: once, and what that was.

Grids, timesteps, dtype and adapters are looked at; each is told once for a model and its plan.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from freqopt.capture.conditions import adapters_of, dtype_of
from freqopt.capture.modules import class_of
from freqopt.grid import Grid
from freqopt.plan.text import scope_of
from freqopt.shown import shown
from freqopt.telling.said import warn

if TYPE_CHECKING:
    from freqopt.plan.plan import Plan

TIMESTEPS, GRIDS = "timesteps", "grids"

_told: weakref.WeakKeyDictionary[nn.Module, set[tuple[str, str]]] = weakref.WeakKeyDictionary()


class Difference(NamedTuple):
    """Something that was not verified. kind: of difference; words: what is seen."""

    kind: str
    words: str


def is_first(model: nn.Module | None, plan: Plan, kind: str) -> bool:
    """Whether a kind of difference is told for the first time of a model with this plan."""
    if model is None:
        return True
    told = _told.setdefault(model, set())
    key = (kind, scope_of(plan))
    if key in told:
        return False
    told.add(key)
    return True


def tell_outside(model: nn.Module, plan: Plan, grids: Iterable[Grid]) -> None:
    """Warn of all that was not verified, unless it was told before: each grid, and all else, once.

    grids: that the tokens of split attention lie on. Those of other lengths are left out: a plan is
    held to its lengths, where it is told what to expect.
    """
    known = set(map(math.prod, plan.grids))
    grids = [grid for grid in grids if math.prod(grid) in known and not _covers(plan, grid)]
    new = [grid for grid in grids if is_first(model, plan, f"{GRIDS} {grid}")]
    found = [
        each
        for each in differences(model, plan, new)
        if each.kind == GRIDS or is_first(model, plan, each.kind)
    ]
    if found:
        warn(
            f"{type(model).__name__}: {'; '.join(each.words for each in found)}. The error of its "
            f"plan was not verified there; it was verified for {scope_of(plan)}. "
            "plan.verify(model, samples) measures it here"
        )


def differences(model: nn.Module, plan: Plan, grids: Iterable[Grid]) -> Iterator[Difference]:
    """What a model is used with that its plan was not verified for."""
    other = sorted({grid for grid in grids if not _covers(plan, grid)})
    if other:
        words = ", ".join("x".join(map(str, grid)) for grid in other)
        yield Difference(GRIDS, f"its tokens lie on a grid of {words}")
    verified, name = plan.verified, class_of(model).__name__
    if verified is None or name != plan.model.class_name:  # a part, or a wrapper
        return
    dtype = dtype_of(model)
    if dtype != verified.dtype:
        yield Difference("dtype", f"its parameters are {dtype}")
    if verified.adapters is None:  # a plan of before they were looked at
        return
    adapters = adapters_of(model)
    if adapters != verified.adapters:
        more = sorted(set(adapters) - set(verified.adapters))
        fewer = sorted(set(verified.adapters) - set(adapters))
        parts = [f"it has the adapter {shown(name)}" for name in more]
        parts += [f"it lacks the adapter {shown(name)}" for name in fewer]
        yield Difference("adapters", " and ".join(parts))


def _covers(plan: Plan, grid: Grid) -> bool:
    """Whether a plan was verified on a grid; a row of tokens is none, only a length."""
    known = {tuple(each) for each in plan.grids}
    if grid[:2] == (1, 1):
        return math.prod(grid) in map(math.prod, known)
    return grid in known
