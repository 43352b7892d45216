"""Tells of models that a plan is attached to and that another backend compiles as a whole.

Its graph is made of what the model does without a compiler, so no hook of ours runs in its calls,
and budgets on the modules are noticed by nobody.
"""

from __future__ import annotations

import threading

import torch
from torch import nn

from freqopt.telling.attached import tell_unnoticed
from freqopt.telling.outermost import outermost_call


class _Own(threading.local):
    """Graphs that our backend was given in this thread."""

    def __init__(self) -> None:
        self.graphs = 0


_own = _Own()


def note_graph() -> None:
    """Our backend was given a graph."""
    _own.graphs += 1


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_traced() -> bool:
    """To be called where a hook of a model is compiled; Dynamo then runs it, once a compilation.

    Always true. At the end of the call it is told if none of its graphs came to our backend.
    """
    call, before = outermost_call(), _own.graphs

    def end() -> None:
        if _own.graphs == before:
            called = call.called if call is not None else None
            tell_unnoticed(called.modules() if isinstance(called, nn.Module) else None)

    if call is not None:
        call.at_end(end)
    return True
