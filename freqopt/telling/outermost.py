"""The call of a compiled model during which a backend runs: what was called, and when it ends.

A backend is given one graph at a time and never told that it was the last of a call. Dynamo keeps a
list of what to do when a compiled call returns; we find it on the stack and add to it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from torch import nn

WRAPPER = "compile_wrapper"


class OutermostCall:
    """The outermost compiled call on the stack. called: the module or the function."""

    def __init__(self, frame: FrameType) -> None:
        self._frame = frame
        function = frame.f_locals["fn"]
        code = getattr(function, "__code__", None)
        if code is not None and code.co_filename.endswith("external_utils.py"):
            function = _wrapped_inline(function)
        owner = getattr(function, "__self__", None)
        self.called: Any = owner if isinstance(owner, nn.Module) else function

    @property
    def name(self) -> str:
        """What people know it by: the class of the module, or the function's name."""
        if isinstance(self.called, nn.Module):
            return type(self.called).__name__
        return str(getattr(self.called, "__name__", type(self.called).__name__))

    def at_end(self, then: Callable[[], None]) -> None:
        """Call `then` when the call returns; not if it fails. What it raises, the call raises."""
        frame, handled = self._frame, sys.exc_info()[1]

        def end() -> None:
            succeeded = frame.f_locals.get("call_succeeded")
            if succeeded is None:  # torch 2.11 does not keep it
                succeeded = not _raises_beside(handled)
            if succeeded:
                then()

        frame.f_locals["cleanups"].append(end)


def _raises_beside(handled: BaseException | None) -> bool:
    """Whether an exception is under way that is none of those that were being handled before."""
    now = sys.exc_info()[1]
    while handled is not None:
        if handled is now:
            return False
        handled = handled.__context__
    return now is not None


def _wrapped_inline(function: Any) -> Any:
    """What Dynamo wraps to trace a module of PyTorch's own, or one that FSDP manages."""
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    return next((found for found in cells if callable(found)), function)


def outermost_call() -> OutermostCall | None:
    """The outermost compiled call under way; None where this version of torch shows none."""
    found, frame = None, sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == WRAPPER and code.co_filename.endswith("eval_frame.py"):
            found = frame
        frame = frame.f_back  # type: ignore[assignment]
    if found is None or not {"fn", "cleanups"} <= found.f_locals.keys():
        return None
    return OutermostCall(found)
