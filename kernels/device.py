"""What the kernels need to know of a GPU."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

HOPPER_SHARED = 232_448
"""Bytes of shared memory a program may use on Hopper."""


def shared_memory(device: torch.device | str) -> int:
    """Bytes of shared memory one program may use; Hopper's where there is no GPU to ask."""
    if torch.device(device).type != "cuda":
        return HOPPER_SHARED
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


def uncast(device: torch.device) -> AbstractContextManager[object]:
    """No autocast on a device: what the op multiplies is in the types that it says."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def processors(device: torch.device | str) -> int:
    """Streaming multiprocessors of a GPU; 1 where there is none."""
    if torch.device(device).type != "cuda":
        return 1
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.multi_processor_count)
