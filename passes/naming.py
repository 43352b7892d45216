"""Names of sites: where the module of an attention stands in the model, whatever led there.

Dynamo notes with every node the modules that it is in, by their identity and by the way that it
reached them. Identity is believed where the model is known, else the way is read.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import fx

WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Attributes under which wrappers keep a module, which are no part of its name."""

NOISE = {"_modules", "_parameters", "_buffers", "__dict__", "", *WRAPPERS}

Names = Mapping[int, str]
"""Names of the modules of a model by their `id`."""


def readable_path(path: str) -> str:
    """The path in the model: "blocks.3.attn1" of "L['self'].blocks._modules['3'].attn1"."""
    path = re.sub(r"^[LG]\[['\"][^'\"]*['\"]\]", "", path)
    path = re.sub(r"\[['\"]?([^\]'\"]*)['\"]?\]", r".\1", path)
    parts = [part for part in path.split(".") if part not in NOISE]
    hidden = [i for i, part in enumerate(parts) if part.startswith("__")]  # of a hook, a closure
    return ".".join(parts[hidden[-1] + 1 :] if hidden else parts)


def plain_path(path: str) -> str:
    """A name of `named_modules` without what only wraps, or processes the attention around it."""
    parts = [part for part in path.split(".") if part not in NOISE]
    if len(parts) > 1 and parts[-1] == "processor":
        parts.pop()
    return ".".join(parts)


def module_path(node: fx.Node) -> str:
    """Path of the module that a node is in, such as "blocks.3.attn1"; "" for the model itself.

    The same on all versions of torch and in Dynamo and export graphs.
    """
    return _place(node.meta.get("nn_module_stack") or {}, None, "")[0]


def passes_through(node: fx.Node, path: str) -> bool:
    """Whether the way by which a node's module was reached goes through all parts of a path.

    Hooks stand in the way: blocks.0.forward.__closure__[2].cell_contents.attn1 is blocks.0.attn1.
    """
    entries = list((node.meta.get("nn_module_stack") or {}).values())
    last = entries[-1] if entries else ""
    way = iter(re.findall(r"\w+", str(last[0] if isinstance(last, tuple) else last)))
    return all(part in way for part in path.split("."))


def _place(stack: Mapping[Any, Any], names: Names | None, inside: str) -> tuple[str, int, str]:
    """Name of the module that a node is in, in which of its calls, and how it was reached."""
    if not stack:
        return inside, 0, ""
    entries = list(stack.items())
    call = _call_of(entries[-1][0])
    for key, entry in reversed(entries):
        name = (names or {}).get(_identity(key))
        if name is not None:
            return name, call, _way(entry)
    way = _way(entries[-1][1])
    return plain_path(readable_path(way)), call, way


def _way(entry: object) -> str:
    """The way by which a module was reached, of an entry of a stack."""
    return str(entry[0] if isinstance(entry, tuple) else entry)


def _identity(key: object) -> int:
    """The `id` of the module that an entry of a stack is of, -1 where it does not tell."""
    text = str(key).partition("@")[0]
    return int(text) if text.isdecimal() else -1


def _call_of(key: object) -> int:
    number = str(key).partition("@")[2]
    return int(number) if number.isdecimal() else 0


class Ways:
    """Where nodes are, with the calls of a module told apart.

    Dynamo numbers the calls of a module by one way only. One that stands at two places of a model
    is called once by each of two ways, and the second is its second call.
    """

    def __init__(self, names: Names | None = None, inside: str = "") -> None:
        self.names, self.inside = names, inside
        self.met: dict[str, dict[tuple[str, int], int]] = {}

    def place(self, stack: Mapping[Any, Any]) -> tuple[str, int]:
        """Name of the module that a node with such a stack is in, and in which of its calls."""
        name, call, way = _place(stack, self.names, self.inside)
        met = self.met.setdefault(name, {})
        first = next(iter(met), (way, 0))[0]
        found = met.setdefault((way, call), call if way == first else max(met.values()) + 1)
        return name, found


class Numbered:
    """Tells apart the attentions of a module ("attn#1") and its calls ("attn@1") in one graph."""

    def __init__(self, names: Names | None = None, inside: str = "") -> None:
        self.names, self.inside = names, inside
        self.seen: dict[tuple[str, int], int] = {}
        self.calls = Ways(names, inside)

    def name(self, node: fx.Node) -> str:
        """Name of the next site, which is at a node."""
        return self.of(node.meta.get("nn_module_stack") or {})

    def of(self, stack: Mapping[Any, Any]) -> str:
        """Name of the next site, whose node has such a stack of modules."""
        place = self.calls.place(stack)
        nth = self.seen.get(place, 0)
        self.seen[place] = nth + 1
        return site_name(*place, nth)


def name_around(name: str, names: Collection[str]) -> str | None:
    """The one of some names of sites that a name lies within: "attn" of "attn.inner".

    A module that was put around an attention has its name, and moves it to a name of its own.
    """
    path, _, nth = name.partition("#")
    while "." in path:
        path = path.rpartition(".")[0]
        outer = f"{path}#{nth}" if nth else path
        if outer in names:
            return outer
    return None


def site_name(path: str, call: int, nth: int) -> str:
    """Name of the nth attention in a call of a module, both from 0."""
    return (path or "model") + (f"#{nth}" if nth else "") + (f"@{call}" if call else "")
