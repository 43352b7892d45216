"""Arguments of a model's calls by name, whichever way they were given."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn


def forward_signature(model: nn.Module) -> inspect.Signature | None:
    """Signature of a model's forward, None where it cannot be told."""
    forward = getattr(model, "_orig_mod", model).forward
    try:
        return inspect.signature(forward)
    except (TypeError, ValueError):
        return None


def misfit_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Why a model's forward does not take a call, and what it takes; empty where it may.

    Hooks may make another call of it.
    """
    inner = getattr(model, "_orig_mod", model)
    signature = forward_signature(inner)
    if signature is None or inner._forward_pre_hooks or "forward" in inner.__dict__:
        return ""
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        taken = ", ".join(map(str, signature.parameters.values()))
        return f"{error}; a {type(inner).__name__} takes {taken}"
    return ""


def named_arguments(
    signature: inspect.Signature | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Arguments by name, positional ones too where the model's signature tells.

    Those that a wrapper takes as ``*args`` are "argument 0" and on, by their place in the call.
    """
    if signature is None:
        return _unbound(args, kwargs)
    try:
        bound = signature.bind(*args, **kwargs).arguments
    except TypeError:  # the model itself will say what is wrong with the call
        return _unbound(args, kwargs)
    found: dict[str, Any] = {}
    for name, value in bound.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            found.update(value)
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            found.update(_unbound(value, {}, len(args) - len(value)))
        else:
            found[name] = value
    return found


def _unbound(args: tuple[Any, ...], kwargs: dict[str, Any], first: int = 0) -> dict[str, Any]:
    return {**{f"argument {i}": value for i, value in enumerate(args, first)}, **kwargs}
