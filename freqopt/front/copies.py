"""Takes off a copy of an optimized model what was copied with it, so that it can be optimized.

Copies and pickles carry hooks and budgets along, and nothing that serves them.
"""

from __future__ import annotations

from torch import nn

from freqopt import regional
from freqopt.capture.modules import OwnOnly
from freqopt.eager.serve import unserve
from freqopt.front.range import unwatch

HANDLE = "freqopt_optimized"
"""Attribute of a model that is optimized: its handle is what that holds."""


def is_copy(model: nn.Module) -> bool:
    """Whether a model was copied from one that is optimized."""
    held = model.__dict__.get(HANDLE)
    return isinstance(held, OwnOnly) and held.held is None


def forget_copied(model: nn.Module) -> None:
    """Leave a copy of an optimized model as it was before that was optimized."""
    if not is_copy(model):
        return
    attached = model.__dict__.get(regional.HANDLE)
    if isinstance(attached, regional.Attached):
        attached.remove()
    unserve(model)
    unwatch(model)
    model.__dict__.pop(HANDLE)
