"""Parts of a model that run once more in the backward pass, as activation checkpoints do.

No call of the model is under way then. It was one that gradients were asked of; what such calls
told is kept until a backward pass has come for them.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

import torch

MOST_PENDING = 256
"""What differs among calls before one backward pass; where no checkpoint ever asks, no more of it
is kept."""

Told = TypeVar("Told")


def several(model: str, what: str) -> str:
    """The message where more than one call may be meant, which differ in what matters.

    what: how they were made, "on several grids" or the like.
    """
    return (
        f"activation checkpointing runs a part of {model} once more, outside of any call of it, "
        f"and it was called {what} since: call backward() after each"
    )


def in_backward() -> bool:
    """Whether a backward pass is under way in this thread."""
    return bool(torch._C._current_graph_task_id() != -1)


class Pending(Generic[Told]):
    """What calls told that a backward pass may come for. Copies and pickles know of no call."""

    def __init__(self) -> None:
        self._told: deque[Told] = deque(maxlen=MOST_PENDING)
        self._is_repeated = False

    def note(self, told: Told) -> bool:
        """Remember a call, and forget those that a backward pass came for; whether it is new."""
        if self._is_repeated:
            self._is_repeated = False
            self._told.clear()
        if told in self._told:
            return False
        self._told.append(told)
        return True

    def again(self) -> list[Told]:
        """What the call told that runs once more, in part: one of these."""
        self._is_repeated = True
        return list(self._told)

    def __deepcopy__(self, memo: object) -> Pending[Told]:
        return Pending()

    def __reduce__(self) -> tuple[type[Pending[Told]], tuple[()]]:
        return Pending, ()
