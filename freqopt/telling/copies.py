"""Tells of copies of optimized models: nothing replaces their attention.

A copy, or what is read from a pickle, has the attributes and hooks of the original, and neither its
compiled code nor what serves it.
"""

from __future__ import annotations

import weakref

from torch import nn

from freqopt.capture.looking import is_looking
from freqopt.capture.modules import OwnOnly
from freqopt.errors import SiteError
from freqopt.telling.said import warn

OPTIMIZED = "freqopt_optimized"
"""Attribute of an optimized model: its handle is what that holds."""

STRICT = "freqopt_strict"
"""Attribute of such a model, which copies have too: whether a planned attention must be split."""

_told: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def is_copy(model: nn.Module) -> bool:
    """Whether a model is a copy of one that is optimized."""
    held = model.__dict__.get(OPTIMIZED)
    return isinstance(held, OwnOnly) and held.held is None


def tell_of_copy(model: nn.Module) -> None:
    """Say once of a model that is called that it is a copy, whose attention is dense.

    Raises:
        SiteError: all planned attention of the original must be split.
    """
    if is_looking():
        return
    text = (
        f"{type(model).__name__} is a copy of a model that freqopt optimized, and is dense: call "
        "freqopt.optimize on the copy"
    )
    if model.__dict__.get(STRICT):
        raise SiteError(text)
    if model not in _told:
        _told.add(model)
        warn(text)
