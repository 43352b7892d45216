"""Tells of models with a plan that another backend compiles as a whole.

Its graph is made of what the model does without a compiler, so no hook of ours runs in its calls,
and budgets on the modules, or our own way of compiling the model, are noticed by nobody.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from types import MethodType

import torch
from torch import nn

from freqopt.capture.looking import is_looking
from freqopt.telling.outermost import outermost_call

_expected: weakref.WeakKeyDictionary[nn.Module, Callable[[nn.Module], None]]
_expected = weakref.WeakKeyDictionary()


class _Own(threading.local):
    """Graphs that our backend was given in this thread."""

    def __init__(self) -> None:
        self.graphs = 0


_own = _Own()


def note_graph() -> None:
    """Our backend was given a graph."""
    _own.graphs += 1


def expect(model: nn.Module, tell: Callable[[nn.Module], None]) -> None:
    """Have `tell` called with a model after calls that another backend compiled.

    A hook of the model must ask `is_traced`. A method is not kept alive, as its object may hold the
    model, which would never be freed.
    """
    if isinstance(tell, MethodType):
        method = weakref.WeakMethod(tell)

        def weakly(model: nn.Module) -> None:
            found = method()
            if found is not None:
                found(model)

        _expected[model] = weakly
    else:
        _expected[model] = tell


def expect_no_more(model: nn.Module) -> None:
    """Forget a model; once is enough."""
    _expected.pop(model, None)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_traced() -> bool:
    """To be called where a hook of a model is compiled; Dynamo then runs it, once a compilation.

    At the end of the call it is told if none of its graphs came to our backend: of the models among
    the modules of what was called, of all where that is not known. Of an export it is told at once.

    Returns whether what is traced will run as this model; what is exported is a program of its own.
    """
    exporting: bool = torch.compiler.is_exporting()
    if is_looking():
        return not exporting
    call, before = outermost_call(), _own.graphs

    def end() -> None:
        if _own.graphs != before:
            return
        called = call.called if call is not None else None
        inside = set(called.modules()) if isinstance(called, nn.Module) else None
        for model, tell in list(_expected.items()):
            if inside is None or model in inside:
                tell(model)

    if exporting:
        end()
    elif call is not None:
        call.at_end(end)
    return not exporting
