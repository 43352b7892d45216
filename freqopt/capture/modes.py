"""What PyTorch has in a thread: modes, which are taken off wherever they are, and transforms.

A mode's own exit takes the last one off, whichever that is: where a call was interrupted from the
keyboard, or a model is served no more, others may have come after ours.
"""

from __future__ import annotations

import torch
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode_stack,
    _pop_mode,
    _push_mode,
)


def take_off(mode: TorchFunctionMode) -> None:
    """Take a mode off this thread's; those above it stay. Once is enough."""
    if not any(each is mode for each in _get_current_function_mode_stack()):
        return
    above = []
    while (last := _pop_mode()) is not mode:
        above.append(last)
    for each in reversed(above):
        _push_mode(each)


def is_transformed() -> bool:
    """Whether a transform of torch.func, or torch.jit.trace, is under way."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return bool(torch._C._get_tracing_state())
