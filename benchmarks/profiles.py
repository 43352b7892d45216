"""Where a profile of a model's step puts the time of its attention and of its collectives."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

OF_DENSE = ("flash", "fmha", "sdpa")
"""What kernels of dense attention have in their names."""


class Parts(NamedTuple):
    """Seconds of one run, and of the attention and the collectives in it."""

    whole: float
    attention: float
    collectives: float


def profiled(run: Callable[[], object], device: torch.device, wait: Callable[[], None]) -> Parts:
    """The parts of a warm run. wait: returns when the device has nothing left to do."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=kinds) as found:
        wait()
        start = time.perf_counter()
        run()
        wait()
        whole = time.perf_counter() - start
    ours = split_kernels()
    attention = collectives = 0.0
    for event in found.key_averages():
        if on_gpu and event.device_type != DeviceType.CUDA:
            continue  # of an operation, whose kernels are counted by themselves
        spent = 1e-6 * (event.self_device_time_total if on_gpu else event.self_cpu_time_total)
        name = event.key.lower()
        if name.startswith(("nccl",) if on_gpu else ("gloo:",)):
            collectives += spent
        elif event.key in ours or any(part in name for part in OF_DENSE):
            attention += spent
    return Parts(whole, attention, collectives)


def split_kernels() -> set[str]:
    """Names under which a profile has the kernels of split attention, on a GPU or a CPU."""
    from triton.runtime import JITFunction

    loaded = [m for name, m in sys.modules.items() if name.startswith("freqopt.kernels")]
    kernels = {v for module in loaded for v in vars(module).values() if isinstance(v, JITFunction)}
    return {kernel.__name__ for kernel in kernels} | {"freqopt::split_attention"}
