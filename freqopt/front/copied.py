"""What a copy of an optimized model has of the original, and how it is taken off."""

from __future__ import annotations

from torch import nn

from freqopt.eager.dispatcher import restore
from freqopt.eager.serve import unserve
from freqopt.front.range import look_no_more
from freqopt.front.routes import LOOKS
from freqopt.regional import HANDLE, Attached
from freqopt.telling.copies import OPTIMIZED, STRICT


def clear_copy(model: nn.Module) -> None:
    """Leave a copy as the original was before it was optimized."""
    modules = list(model.modules())
    unserve(modules)
    restore(modules)
    for module in modules:
        attached = module.__dict__.get(HANDLE)
        if isinstance(attached, Attached):
            attached.remove()
        module._forward_pre_hooks.pop(LOOKS, None)
        look_no_more(module)
    model.__dict__.pop(OPTIMIZED, None)
    model.__dict__.pop(STRICT, None)
