"""Models of `pieces_models` on a route, and a call of one."""

from __future__ import annotations

from typing import Any

import pieces_models as models
import torch
from torch import Tensor, nn

import freqopt


def optimized(model: Any, plan: Any, route: Any, **options: Any) -> freqopt.Handle:
    torch._dynamo.reset()
    return freqopt.optimize(model, plan, route=route, inner="eager", **options)


def called(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**models.inputs())
    return out
