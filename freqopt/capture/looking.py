"""Whether a model is called to be looked at: by inspect, calibrate, or verify.

Whatever serves it, or tells of its calls, leaves such a call alone: attention is to be as it was.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


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


def is_looking() -> bool:
    """Whether a call under way in this thread is one."""
    return _own.looks > 0
