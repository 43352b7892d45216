"""Whether a model is called to be looked at: by inspect, calibrate, or verify.

Whatever serves it, or tells of its calls, leaves such a call alone: attention is to be as it was.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx

Compiler = Callable[[fx.GraphModule, Any], Callable[..., Any]]
"""A backend of `torch.compile`."""


class _Own(threading.local):
    """How many looks are under way in this thread."""

    def __init__(self) -> None:
        self.looks = 0


_own = _Own()


@contextmanager
def looking() -> Iterator[None]:
    """Calls in the body, in this thread, are made to look at a model."""
    _own.looks += 1
    try:
        yield
    finally:
        _own.looks -= 1


def weak_backend(backend: Compiler) -> Compiler:
    """The same for `torch.compile`, which keeps what it is given until it is reset.

    A backend that is made to look at a model holds that, and what it found.
    """
    held = weakref.ref(backend)

    def compile_with(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        found = held()
        assert found is not None, "the look is over"
        return found(gm, example_inputs)

    return compile_with


def is_looking() -> bool:
    """Whether a call under way in this thread is one."""
    return _own.looks > 0
