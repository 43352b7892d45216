"""Tells where the file of a plan holds another one than graphs were compiled with.

Dynamo takes a model that is compiled again with equal options for the same, and a path is equal to
itself whatever is in the file: nothing is compiled anew, and the old plan runs on.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from freqopt.errors import FreqoptError
from freqopt.options import load_plan
from freqopt.telling.said import warn

if TYPE_CHECKING:
    from freqopt.plan.plan import Plan

PlanPath = str | os.PathLike[str]


class PlanFile:
    """The file that a plan was read from. before: `state_of` it, before it was read."""

    def __init__(self, path: PlanPath, plan: Plan, before: object) -> None:
        self.path, self.plan, self._state = path, plan, before
        self._is_told = False

    def look(self) -> None:
        """See whether it holds another plan by now, which is said once."""
        if self._is_told or (now := state_of(self.path)) in (self._state, None):
            return
        self._state = now
        try:
            is_same = load_plan(self.path) == self.plan
        except FreqoptError:
            return  # it is no plan, or not yet: compiling anew would say so
        if not is_same:
            self._is_told = True
            warn(
                f"{os.fspath(self.path)} holds another plan than when it was compiled with, and "
                "what torch.compile has compiled keeps that one, also where it is compiled again "
                "with this path: call torch._dynamo.reset() before, or give the plan itself "
                "(freqopt.Plan.load), which is told from another"
            )


_files: WeakValueDictionary[tuple[str, int], PlanFile] = WeakValueDictionary()
"""By path and `id` of the plan, which they keep: all graphs of a plan have one."""


def state_of(path: object) -> object:
    """What changes when another file is written there; None where there is none, or no path."""
    if not isinstance(path, (str, os.PathLike)):
        return None
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def looking_at_file(
    compiled: Callable[..., Any], path: object, plan: Plan | None, before: object
) -> Callable[..., Any]:
    """`compiled`, looking at the file of its plan at every call, if the plan is from a file.

    before: `state_of` it, before it was read.
    """
    if plan is None or not isinstance(path, (str, os.PathLike)):
        return compiled
    key = os.fspath(path), id(plan)
    file = _files.get(key)
    if file is None:
        file = _files[key] = PlanFile(path, plan, before)
    look = file.look

    def run(*arguments: Any) -> Any:
        look()
        return compiled(*arguments)

    return run
