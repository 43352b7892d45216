"""Models of random weights that are the same whenever they are made."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def refilled(make: Callable[[], nn.Module]) -> nn.Module:
    """A model in evaluation mode, with random numbers where its class leaves zeros or nothing.

    Behind zeros no mistake would show. What a class makes by `torch.empty` and leaves to be loaded
    is whatever was in memory: zeros in a fresh process, by which what is drawn next would differ.
    """
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # has memory begin as NaN
    try:
        model = make()
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
    for parameter in model.parameters():
        values = parameter.detach()
        if not values.any() or values.isnan().any():
            nn.init.normal_(parameter, std=0.05)
    return model.eval()
