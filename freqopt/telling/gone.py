"""Looks whether the modules that a plan was put on are still in their model, at every call.

A module that is replaced takes its budget along, and what has its place brings none: it is dense.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from torch import nn

SHOWN = 3
"""Names that a line gives."""


class _Link(NamedTuple):
    """A module that is held by another, by name. Weakly, as nothing here keeps a model alive."""

    holder: weakref.ref[nn.Module]
    name: str
    held: weakref.ref[nn.Module]

    def is_there(self) -> bool:
        holder, held = self.holder(), self.held()
        return holder is not None and held is not None and holder._modules.get(self.name) is held


class Presence:
    """Modules of planned sites, by the plan's names, and the way to each of them in a model."""

    def __init__(self, model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
        self._model = weakref.ref(model)
        self._modules = {name: weakref.ref(module) for name, module in modules.items()}
        self._links = list(_links(model, modules.values()))

    def gone(self) -> list[str]:
        """Names of the sites whose module the model has no more.

        One that was put elsewhere in the model, as into a wrapper, is there. All modules are walked
        only where something has changed.
        """
        model = self._model()
        if model is None or all(link.is_there() for link in self._links):
            return []
        inside = set(model.modules())
        held = {name: ref() for name, ref in self._modules.items()}
        gone = [name for name, module in held.items() if module not in inside]
        if not gone:
            self._links = list(_links(model, [m for m in held.values() if m is not None]))
        return gone


def _links(model: nn.Module, modules: Iterable[nn.Module]) -> Iterator[_Link]:
    """What leads from a model to modules in it, each once."""
    wanted, seen = {id(module) for module in modules}, set()
    for name, module in model.named_modules():
        if id(module) not in wanted or not name:
            continue
        holder = model
        for part in name.split("."):
            held = holder._modules[part]
            assert held is not None
            if (id(holder), part) not in seen:
                seen.add((id(holder), part))
                yield _Link(weakref.ref(holder), part, weakref.ref(held))
            holder = held


def line_about(model: str, gone: list[str]) -> str:
    """What is said of sites whose modules are gone."""
    more = f" and {len(gone) - SHOWN} more" if len(gone) > SHOWN else ""
    return (
        f"{model}: the modules that had the budgets of {', '.join(gone[:SHOWN])}{more} are not in "
        "the model any more, and what has their places is dense: put them back, or put the plan on "
        "the model as it is now (disable() and enable() of the handle of freqopt.optimize, or "
        "remove() of that of freqopt.attach, and attach again)"
    )
