"""Which calls read what is in a tensor, so that what they make may follow it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from freqopt.capture.reads import as_read

ROWS, ONE = torch.arange(24.0).view(6, 4), torch.tensor([1])
TWO, THREE = torch.tensor(2), torch.tensor(3, dtype=torch.uint8)


class Reading(TorchFunctionMode):
    """Makes calls with what they are taken to read, and notes whether they read anything."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = as_read(func, args, kwargs or {})
        self.reads = self.reads or found.reads
        return func(*found.args, **found.kwargs)


NUMBERS: list[Callable[[], Any]] = [
    lambda: ROWS.view(TWO, THREE, 4),
    lambda: ROWS.reshape((TWO, 3, -1)),
    lambda: torch.reshape(ROWS, shape=(TWO, THREE, 4)),
    lambda: ROWS[None].expand(TWO, -1, -1),
    lambda: ROWS.repeat(1, TWO),
    lambda: ROWS.split(TWO, 1)[0],
    lambda: ROWS.unflatten(0, (TWO, -1)),
    lambda: ROWS.narrow(0, 0, TWO),
    lambda: ROWS[:TWO],
    lambda: ROWS[..., ONE : TWO + 1],
    lambda: ROWS[TWO],
    lambda: ROWS[1, TWO],
    lambda: ROWS.sum(0)[ONE:],
    lambda: torch.arange(THREE),
    lambda: torch.arange(0, end=TWO),
    lambda: torch.linspace(0, 1, TWO, dtype=torch.float32),
    lambda: torch.zeros(TWO, THREE, dtype=torch.float32),
    lambda: ROWS.new_zeros((TWO, THREE)),
    lambda: torch.full((2,), TWO, dtype=torch.float32),
    lambda: torch.tensor([TWO, THREE], dtype=torch.int64),
    lambda: ROWS.repeat_interleave(TWO, 0),
    lambda: ROWS.tensor_split(TWO),
    lambda: F.pad(ROWS, (0, TWO)),
    lambda: F.interpolate(ROWS[None, None], size=(TWO, THREE)),
    lambda: ROWS[list(range(TWO))],
    lambda: TWO.item(),
    lambda: THREE.tolist(),
    lambda: ROWS + int(TWO),
]

TENSORS: list[Callable[[], Any]] = [
    lambda: ROWS * TWO,
    lambda: TWO + ROWS,
    lambda: torch.add(ROWS, TWO),
    lambda: TWO * torch.exp(ROWS),
    lambda: torch.stack([TWO, ONE[0]]),
    lambda: torch.cat([ONE, ONE]),
    lambda: torch.meshgrid(TWO, ONE, indexing="ij"),
    lambda: torch.where(ROWS > TWO, ROWS, TWO),
    lambda: ROWS.clamp(max=TWO),
    lambda: ROWS.masked_fill(ROWS > 3, TWO),
    lambda: ROWS.index_select(0, ONE),
    lambda: F.embedding(TWO, ROWS),
    lambda: F.one_hot(ONE, 4),
    lambda: ROWS[ONE],
    lambda: ROWS[:, ONE],
    lambda: ROWS[ROWS[:, 0] > 3],
    lambda: ONE[None, :].expand(2, 1).to(ROWS),
    lambda: TWO.float().view(1, 1),
    lambda: torch.full((2,), 3.0, dtype=torch.float32),
]


@pytest.mark.parametrize("call", range(len(NUMBERS)))
def test_a_number_that_is_a_tensor_is_read(call: int) -> None:
    alone = NUMBERS[call]()
    with Reading() as mode:
        found = NUMBERS[call]()
    assert mode.reads
    if isinstance(alone, Tensor):
        assert torch.equal(found, alone)


@pytest.mark.parametrize("call", range(len(TENSORS)))
def test_a_tensor_that_is_used_as_one_is_not(call: int) -> None:
    """Or a model with its timestep in an int would wait for the device at every call."""
    with Reading() as mode:
        TENSORS[call]()
    assert not mode.reads


def test_numbers_are_written_in_the_place_of_tensors() -> None:
    assert as_read(Tensor.view, (ROWS, TWO, THREE, -1), {}).args[1:] == (2, 3, -1)
    bounds = as_read(Tensor.__getitem__, (ROWS, (..., slice(ONE, TWO))), {}).args[1]
    assert bounds == (..., slice(1, 2))
    assert as_read(torch.arange, (0,), {"end": TWO}).kwargs == {"end": 2}
    made = as_read(Tensor.view, (ROWS, TWO.to("meta"), -1), {})
    assert made.reads and made.args[1].is_meta
