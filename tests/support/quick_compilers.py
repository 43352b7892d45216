"""What PyTorch's compilers do beside compiling, left out of processes that compile all the time."""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock


def prepare_compilers() -> None:
    """A third less time for what compiles in this process, once all is imported; same results."""
    _look_for_cycles_seldom()
    _print_no_graphs()
    _time_no_guards()


def _look_for_cycles_seldom() -> None:
    """Compilers make objects by the million: looking for cycles took a seventh of all time."""
    gc.collect()
    gc.freeze()  # what is imported stays to the end
    gc.set_threshold(100_000, 50, 100)


def _print_no_graphs() -> None:
    """Keep pytest, which listens to every logger, from PyTorch's structured trace.

    Graphs, guards and tensors are written down for whoever listens.
    """
    trace: Any = logging.getLogger("torch.__trace")
    add = trace.addHandler

    def add_others(handler: logging.Handler) -> None:
        if not type(handler).__module__.startswith("_pytest."):
            add(handler)

    trace.addHandler = add_others


def _time_no_guards() -> None:
    """Guards of every graph are timed for a log, and the caches flushed for that: 50 ms each."""
    guards: Any = sys.modules.get("torch._dynamo.guards")
    if hasattr(guards, "profile_guard_manager"):
        guards.profile_guard_manager = lambda *guarded: 0.0


@contextlib.contextmanager
def symbols_computed_anew() -> Iterator[None]:
    """A third less time for graphs with symbols for sizes; same results.

    What an operator gives is kept for the next call alike, of which there are few: comparing
    symbols takes longer than computing it anew. Where sizes are numbers keeping it pays.
    """
    import torch._dynamo

    with torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
        yield


@contextlib.contextmanager
def translations_read_once() -> Iterator[None]:
    """A sixth less time for an ONNX export, which reads the source of every translation anew."""
    from torch.onnx._internal.exporter import _registration

    kept: dict[tuple[Any, ...], Any] = {}
    read = _registration.ONNXRegistry.from_torchlib

    def once(*opset: Any, **named: Any) -> Any:
        key = (opset, *named.values())
        if key not in kept:
            kept[key] = read(*opset, **named)
        registry = copy.copy(kept[key])  # an export adds its own
        registry.functions = {name: list(found) for name, found in registry.functions.items()}
        return registry

    with mock.patch.object(_registration.ONNXRegistry, "from_torchlib", staticmethod(once)):
        yield
