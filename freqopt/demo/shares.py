"""Where the time of one call goes: looking, finding out where to look, and the model's rest."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from freqopt.kernels.chunked import ATTENDING

FUSED = "aten::_scaled_dot_product_flash_attention_for_cpu"
"""PyTorch's attention on a CPU: what dense models run."""

OP = "freqopt::split_attention"


class Shares(NamedTuple):
    """Seconds of one call. looking: in attention itself; finding: in the op around it."""

    looking: float
    finding: float
    rest: float


def shares(model: Callable[..., Any], inputs: dict[str, Any]) -> Shares:
    """Where one call of a model spends its time, on a CPU, as PyTorch's profiler sees it."""
    from torch.autograd.profiler_legacy import profile  # the other one writes to the terminal

    with torch.no_grad(), profile() as trace:
        started = time.perf_counter()
        model(**inputs)
        whole = time.perf_counter() - started
    spent = {event.key: 1e-6 * event.cpu_time_total for event in trace.key_averages()}
    op = spent.get(OP, 0.0)
    looking = spent.get(ATTENDING if op else FUSED, 0.0)
    return Shares(looking, max(op - looking, 0.0) if op else 0.0, max(whole - max(op, looking), 0))
