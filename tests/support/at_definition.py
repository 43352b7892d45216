"""What a model returns where the definition, in float32, computes its attention on a given grid."""

from __future__ import annotations

from typing import Any

import torch
from attention_cases import Case, reference_split
from torch import Tensor, nn

from freqopt.capture.eager import answered
from freqopt.plan.plan import Plan


def at_definition(
    model: nn.Module,
    plan: Plan,
    grid: tuple[int, int, int],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Tensor:
    """The first output of a call; every site of the plan has its threshold of the only bucket."""
    met = set()

    def answer(name: str, given: tuple[Any, ...], options: dict[str, Any]) -> Tensor | None:
        if name not in plan.sites:
            return None
        met.add(name)
        query, key, value = (*given, *(options[n] for n in ("query", "key", "value")[len(given) :]))
        threshold = plan.budget(name)[0]
        case = Case(grid, query.shape[-1], query.shape[1], key.shape[1], query.shape[0])
        shown = torch.ones(query.shape[0], query.shape[2], dtype=torch.bool)
        return reference_split(case, (query, key, value, shown), threshold)[0]

    with torch.no_grad():
        out = answered(model, args, kwargs, answer)
    assert met == set(plan.sites)
    return out[0] if isinstance(out, tuple) else out
