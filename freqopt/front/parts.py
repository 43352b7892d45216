"""Looks at the planned modules of a model that is compiled as a whole: do they run in its calls?

`model.forward(...)`, a block alone and `torch.compile(model.forward)` do not come to what compiles
the model, and are dense.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from freqopt.capture.looking import is_looking
from freqopt.capture.modules import OwnOnly
from freqopt.telling.outermost import outermost_call
from freqopt.telling.traced import is_traced
from freqopt.telling.verdict import say_outside

RUNS = -20_260_021
"""Key of the hook, the same in all modules, as the compiler may guard on it."""

PARTS = "freqopt_parts"
"""Attribute of the modules for what looks at them."""


class _Own(threading.local):
    """Models whose compiled calls are under way in this thread, by `id`."""

    def __init__(self) -> None:
        self.called: list[int] = []


_own = _Own()


class Parts:
    """Looks at some modules of a model, by name, from `start` to `stop`."""

    def __init__(self, model: nn.Module, parts: Mapping[str, nn.Module], *, strict: bool) -> None:
        self._model, self.parts, self.strict = weakref.ref(model), dict(parts), strict
        self._is_told = False

    def start(self) -> None:
        """Look from the next call on."""
        for module in self.parts.values():
            module.__dict__[PARTS] = OwnOnly(weakref.ref(self))
            module._forward_pre_hooks[RUNS] = _runs

    def stop(self) -> None:
        """Look no more."""
        for module in self.parts.values():
            look_no_more(module)

    @contextmanager
    def in_call(self) -> Iterator[None]:
        """The body is a call of the model."""
        _own.called.append(id(self._model()))
        try:
            yield
        finally:
            _own.called.pop()

    def run(self, module: nn.Module) -> None:
        """A module runs without the compiler.

        Raises:
            SiteError: in no call of the model, if all planned attention must be split.
        """
        model = self._model()
        if model is None or id(model) in _own.called or outermost_call() is not None:
            return  # why a compiler left it out there is told in the end
        name = next(name for name, part in self.parts.items() if part is module)
        say_outside(model, name, again=self._is_told, strict=self.strict)
        self._is_told = True


def look_no_more(module: nn.Module) -> None:
    """Take our hook off a module; once is enough."""
    module.__dict__.pop(PARTS, None)
    module._forward_pre_hooks.pop(RUNS, None)


def _runs(module: nn.Module, args: tuple[Any, ...]) -> None:
    if torch.compiler.is_compiling():
        is_traced()
        return
    held = module.__dict__.get(PARTS)
    ref = held.held if isinstance(held, OwnOnly) else None
    found = ref() if isinstance(ref, weakref.ref) else None  # of a copy there is none
    if isinstance(found, Parts) and not is_looking():
        found.run(module)
