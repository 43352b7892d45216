"""Takes modes off those that PyTorch has in a thread, wherever they are among them.

A mode's own exit takes the last one off, whichever that is: where a call was interrupted from the
keyboard, or a model is served no more, others may have come after ours.
"""

from __future__ import annotations

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
