"""Tells of copies of optimized models, which nobody serves."""

from __future__ import annotations

import weakref

from torch import nn

from freqopt.telling.said import warn

_told: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def warn_of_copy(module: nn.Module) -> None:
    """Say once of a model that it is a copy, whose attention is dense."""
    if module not in _told:
        _told.add(module)
        warn(
            f"{type(module).__name__} is a copy of a model that freqopt.optimize serves, and is "
            "dense: call freqopt.optimize on the copy"
        )
