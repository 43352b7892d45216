"""What a model computes in beside its weights: its dtype, and the adapters (LoRA and the like).

PEFT's layers, which diffusers and transformers use, name the active adapters and the merged ones.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def dtype_of(model: nn.Module) -> str:
    """Type of a model's first parameter, such as "bfloat16"; "none" where it has none."""
    parameter = next(model.parameters(), None)
    return "none" if parameter is None else str(parameter.dtype).removeprefix("torch.")


def adapters_of(model: nn.Module) -> list[str]:
    """Names of the adapters that change what a model computes, sorted.

    Weights that an adapter was merged into, and that have forgotten it, tell of none.
    """
    found: set[str] = set()
    for module in model.modules():
        merged = getattr(module, "merged_adapters", None)
        if merged is None or getattr(module, "disable_adapters", False):
            continue  # no layer with adapters, or one that takes even merged ones off when called
        found |= _names(merged) | _names(getattr(module, "active_adapters", None))
    return sorted(found)


def _names(given: object) -> set[str]:
    if isinstance(given, str):
        return {given}
    return set(map(str, given)) if isinstance(given, Iterable) else set()
