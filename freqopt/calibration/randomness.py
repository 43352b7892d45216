"""Random numbers that a model draws: the same in every run, and generators left as they were."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

NUMPY_SEEDS = 2**32


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The global generators of PyTorch, NumPy and Python at a seed; as they were afterwards."""
    restore = generators_kept()
    try:
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % NUMPY_SEEDS)
        yield
    finally:
        restore()


def generators_kept() -> Callable[[], None]:
    """Puts the global generators back to what they are now, when it is called."""
    pythons, numpys, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def restore() -> None:
        random.setstate(pythons)
        np.random.set_state(numpys)
        torch.set_rng_state(cpu)
        if gpus:
            torch.cuda.set_rng_state_all(gpus)

    return restore


def random_state() -> Tensor:
    """State of the generators of PyTorch that models draw from by default."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_available():
        states += torch.cuda.get_rng_state_all()
    return torch.cat(states)
