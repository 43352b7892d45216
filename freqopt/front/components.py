"""Finds what denoises in a pipeline, by what it holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from freqopt.capture.modules import USUAL, modules_in
from freqopt.errors import InputError, OptionError

ALONE = "model"
"""The name of a module that was given by itself."""

MOST_LISTED = 20


def components_of(given: Any, names: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """The modules that denoise, by name: of a pipeline, of a dict of modules, or a module itself.

    Args:
        given: a pipeline, which is anything that holds modules; modules by name; or one module.
        names: which of the modules that are held; by default those of the usual names.

    Raises:
        InputError: nothing that denoises is found, or it is wrapped by torch.compile.
        OptionError: a name that there is not.
    """
    if isinstance(names, str):
        raise OptionError(f"components={names!r} must be a list of names, such as [{names!r}]")
    if names is not None and not isinstance(names, Iterable):
        raise OptionError(f"components={names!r} must be a list of names")
    held = _held(given, names)
    if names is not None:
        names = list(names)
        wrong = [name for name in names if not isinstance(name, str) or not name]
        if wrong or not names:
            what = f"holds a {type(wrong[0]).__name__} without one" if wrong else "is empty"
            raise OptionError(f"components must be a list of names, and it {what}")
        missing = [name for name in names if name not in held]
        if missing:
            raise OptionError(
                f"components {names}: a {type(given).__name__} holds no module {missing[0]!r} "
                f"(it holds {_listed(held)})"
            )
        chosen = {name: held[name] for name in names}
    else:
        usual = [name for name in USUAL if name in held]
        chosen = {name: held[name] for name in usual} if usual else held
        if not usual and not isinstance(given, (nn.Module, Mapping)):
            listed = ", ".join(f"{name} ({type(m).__name__})" for name, m in held.items())
            raise InputError(
                f"a {type(given).__name__} holds {listed or 'no torch.nn.Module'}, and none of the "
                f"usual names {', '.join(USUAL)}: pass components=['name of what denoises']"
            )
    for name, module in chosen.items():
        if hasattr(module, "_orig_mod"):
            raise InputError(
                f"{name} is wrapped by torch.compile(...): pass what it was made from "
                f"(pipe.{name} = pipe.{name}._orig_mod), and freqopt.optimize compiles it in place"
            )
    return chosen


def _listed(names: Iterable[str]) -> str:
    """Names in a message, which a large model has thousands of."""
    known = [name for name in names if name]
    more = f", and {len(known) - MOST_LISTED} more" if len(known) > MOST_LISTED else ""
    return ", ".join(known[:MOST_LISTED]) + more


def _held(given: Any, names: Sequence[str] | None) -> dict[str, nn.Module]:
    if isinstance(given, nn.Module):
        return {ALONE: given} if names is None else dict(given.named_modules())
    if isinstance(given, Mapping):
        wrong = [name for name, module in given.items() if not isinstance(module, nn.Module)]
        if wrong or not given:
            why = f"{wrong[0]!r} is none" if wrong else "this one is empty"
            raise InputError(f"a dict must hold modules by name, and {why}")
        unnamed = [name for name in given if not isinstance(name, str) or not name]
        if unnamed:
            raise InputError(f"a dict must hold modules by name, and {unnamed[0]!r} is no name")
        return dict(given)
    usual = {name: getattr(given, name, None) for name in USUAL}  # properties among them
    return {n: m for n, m in usual.items() if isinstance(m, nn.Module)} | modules_in(given)
