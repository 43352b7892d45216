"""Several GPUs: heads balanced by the plan, and attention of a rank's queries over all ranks' keys.

Public names are loaded on first use, as those of `freqopt` are.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from freqopt.parallel.all_keys import over_all_keys
    from freqopt.parallel.balancing import Balanced, balance
    from freqopt.parallel.costs import imbalance
    from freqopt.parallel.sequence import attention_over_ranks

_HOMES = {
    "Balanced": "balancing",
    "attention_over_ranks": "sequence",
    "balance": "balancing",
    "imbalance": "costs",
    "over_all_keys": "all_keys",
}

__all__ = ["Balanced", "attention_over_ranks", "balance", "imbalance", "over_all_keys"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(
            f"module 'freqopt.parallel' has no attribute {name!r} (public: {__all__})"
        )
    value = getattr(importlib.import_module(f"freqopt.parallel.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
