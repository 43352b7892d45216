"""Takes off a copy of an optimized model what was copied with it, so that it can be optimized.

Copies and pickles carry hooks and budgets along, and nothing that serves them.
"""

from __future__ import annotations

from torch import nn

from freqopt import regional
from freqopt.eager.hooks import unserve
from freqopt.front.parts import look_no_more
from freqopt.front.range import unwatch
from freqopt.telling.copies import OPTIMIZED, STRICT


def forget_copied(model: nn.Module) -> None:
    """Leave a copy of an optimized model as the original was before."""
    modules = list(model.modules())
    unserve(modules)
    for module in modules:
        attached = module.__dict__.get(regional.HANDLE)
        if isinstance(attached, regional.Attached):
            attached.remove()
        unwatch(module)
        look_no_more(module)
    model.__dict__.pop(OPTIMIZED, None)
    model.__dict__.pop(STRICT, None)
