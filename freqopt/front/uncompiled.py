"""Takes the compiler off what is around attention that is served without it.

A block that another backend compiled runs no hook of ours, and its attention would be met by
nobody: from the second call on, as the first is written down without the compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

from torch import nn

COMPILED = "_compiled_call_impl"
ORIGINAL = "_torchdynamo_orig_callable"
"""Attribute of a function that torch.compile made, for the one that it was made of."""


def uncompile(model: nn.Module, parts: Iterable[nn.Module]) -> tuple[list[str], Callable[[], None]]:
    """Have what is around some modules of a model run without the compiler.

    Returns the names of what was compiled, and what puts it back where nobody changed it since.
    """
    every = dict(model.named_modules(remove_duplicate=False))
    wanted = set(map(id, parts))
    around: dict[str, nn.Module] = {}
    for name, module in every.items():
        if id(module) in wanted:
            steps = name.split(".") if name else []
            names = [".".join(steps[:length]) for length in range(len(steps) + 1)]
            around.update((each, every[each]) for each in names)
    undo, found = ExitStack(), []
    for name, module in around.items():
        if module.__dict__.get(COMPILED) is not None:
            found.append(name)
            undo.callback(_replace(module, COMPILED, None))
        forward = module.__dict__.get("forward")
        original = getattr(forward, ORIGINAL, None)
        if original is not None and id(module) not in wanted:  # what is inside its hooks is served
            found.append(name)
            undo.callback(_replace(module, "forward", original))
    return list(dict.fromkeys(found)), undo.close


def _replace(module: nn.Module, name: str, item: Any) -> Callable[[], None]:
    """Set an attribute of a module; what puts back what was there."""
    before = module.__dict__[name]
    module.__dict__[name] = item

    def undo() -> None:
        if module.__dict__.get(name) is item:
            module.__dict__[name] = before

    return undo
