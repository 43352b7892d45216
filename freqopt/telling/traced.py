"""Tells of models with a plan that another backend compiles, as a whole or a part with attention.

Its graph is made of what the model does without a compiler, so no hook of ours runs in its calls,
and budgets on the modules, or our own way of compiling the model, are noticed by nobody.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any

import torch
from torch import nn

from freqopt.capture.looking import is_looking
from freqopt.telling.outermost import outermost_call

Tell = Callable[[nn.Module], None]

_expected: weakref.WeakKeyDictionary[nn.Module, tuple[weakref.ref[nn.Module], Tell]]
_expected = weakref.WeakKeyDictionary()
"""Models and their modules with planned attention: the model, and what tells of it."""


class _Own(threading.local):
    """Graphs that our backend was given in this thread."""

    def __init__(self) -> None:
        self.graphs = 0


_own = _Own()


def note_graph() -> None:
    """Our backend was given a graph."""
    _own.graphs += 1


def expect(model: nn.Module, tell: Tell, parts: Iterable[nn.Module] = ()) -> None:
    """Have `tell` called with a model after calls that another backend compiled.

    parts: its modules with planned attention. A hook of each of them and of the model must ask
    `is_traced`. A method is not kept alive, as its object may hold the model, which would never be
    freed.
    """
    if isinstance(tell, MethodType):
        method: weakref.WeakMethod[Any] = weakref.WeakMethod(tell)

        def weakly(model: nn.Module) -> None:
            found = method()
            if found is not None:
                found(model)

        tell = weakly
    for module in (model, *parts):
        _expected[module] = weakref.ref(model), tell


def expect_no_more(model: nn.Module) -> None:
    """Forget a model; once is enough."""
    for module in [module for module, (of, _) in _expected.items() if of() is model]:
        del _expected[module]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_traced() -> bool:
    """To be called where a hook of a model is compiled; Dynamo then runs it, once a compilation.

    At the end of the call it is told if none of its graphs came to our backend: of the models among
    the modules of what was called, and of those with planned attention among them; of all where
    that is not known. Of an export it is told at once.

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
        found = [told for part, told in _expected.items() if inside is None or part in inside]
        models = {id(model): (model, tell) for of, tell in found if (model := of()) is not None}
        for model, tell in models.values():
            tell(model)

    if exporting:
        end()
    elif call is not None:
        call.at_end(end)
    return not exporting
