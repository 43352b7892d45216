"""One call of a model at a time, where its budgets are put in place for each call.

A lock that a hook takes and another gives back, with one difference: a call that ended without
saying so, as by Ctrl-C, does not keep it.
"""

from __future__ import annotations

import sys
import threading
from types import FrameType
from typing import Any

LOOK_AGAIN = 0.05
"""Seconds after which a waiting thread looks whether the call that it waits for is still there."""


class Turns:
    """Whose turn it is. Copies and pickles of it are free."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._owner: int | None = None
        self._frames: list[int] = []

    def begin(self) -> None:
        """Wait for the other threads' calls. The caller of the caller is the call that begins."""
        own, frame = threading.get_ident(), sys._getframe(2)
        with self._changed:
            while self._owner not in (None, own) and self._is_running():
                self._changed.wait(LOOK_AGAIN)
            if self._owner != own:
                self._owner, self._frames = own, []
            there = set(_stack(sys._getframe(1)))
            self._frames = [each for each in self._frames if each in there]
            self._frames.append(id(frame))

    def end(self) -> None:
        """The call that began last in this thread is over."""
        with self._changed:
            if self._owner != threading.get_ident():
                return
            if self._frames:
                self._frames.pop()
            if not self._frames:
                self._owner = None
                self._changed.notify()

    def _is_running(self) -> bool:
        """Whether the owner is still in one of its calls."""
        frame = sys._current_frames().get(self._owner or 0)
        return frame is not None and not set(self._frames).isdisjoint(_stack(frame))

    def __deepcopy__(self, memo: dict[int, Any]) -> Turns:
        return Turns()

    def __reduce__(self) -> tuple[Any, ...]:
        return Turns, ()


def _stack(frame: FrameType | None) -> list[int]:
    """Identities of a frame and of those below it."""
    found = []
    while frame is not None:
        found.append(id(frame))
        frame = frame.f_back
    return found
