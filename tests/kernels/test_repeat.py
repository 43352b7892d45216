"""Calls are repeated as they were recorded, with the tensors of the call at hand.

Kernels here are functions on the memory at an address, as a GPU's are; they run on a CPU.
"""

from __future__ import annotations

import ctypes
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from freqopt.kernels import tape as tape_module
from freqopt.kernels.repeat import (
    ALIGNED,
    REFUSED,
    Recording,
    form_of,
    packed,
    record,
)
from freqopt.kernels.tape import Tape, Unrepeatable, queued

CPU = torch.device("cpu")


class Kernel:
    """A function of float32 memory, launched like one of Triton's: kernel[grid](...)."""

    def __init__(self, body: Callable[..., None]) -> None:
        self.body = body
        self.signature = inspect.signature(body)
        self.arg_names = list(self.signature.parameters)
        self.launches = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def launch(*args: Any, num_warps: int = 4, **kwargs: Any) -> Compiled:
            bound = self.signature.bind(*args, **kwargs)
            bound.apply_defaults()
            self._run(list(bound.arguments.values()))
            return Compiled(self)

        return launch

    def _run(self, arguments: list[Any]) -> None:
        self.launches += 1
        self.body(*(_memory(x) for x in arguments))


class Compiled:
    """Takes addresses for tensors, and all arguments in their order."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        assert len(grid) == 3
        return lambda *arguments: self.kernel._run(list(arguments))


def _memory(x: Any) -> Any:
    """Memory from an address on, a tensor's or that of what a descriptor describes."""
    if isinstance(x, Tensor):
        x = x.data_ptr()
    if hasattr(x, "base"):
        x = x.base.data_ptr()
    if isinstance(x, int) and x > 1 << 20:
        return ctypes.cast(x, ctypes.POINTER(ctypes.c_float))
    return x


@Kernel
def scale_kernel(x: Any, out: Any, count: int, by: float = 2.0) -> None:
    for i in range(count):
        out[i] = x[i] * by


@Kernel
def add_kernel(x: Any, y: Any, out: Any, count: int) -> None:
    for i in range(count):
        out[i] = x[i] + y[i]


def described(x: Tensor) -> Any:
    return SimpleNamespace(base=x)


def work(x: Tensor, y: Tensor | None) -> tuple[Tensor, ...]:
    """2 x - 3 y in steps, and its mean, through memory that is soon free again."""
    count = x.numel()
    doubled = torch.empty_like(x)
    queued(scale_kernel, (1,))(x, doubled, count, num_warps=8)
    out = torch.empty(2, count, dtype=torch.float32)
    if y is not None:
        tripled = torch.empty(count)
        queued(scale_kernel, (1, 2))(y, out=tripled, count=count, by=-3.0)
        queued(add_kernel, (1,))(described(doubled), tripled, out[1], count)
        del tripled
    later = torch.empty(count)
    queued(scale_kernel, (1,))(doubled, later, count, by=0.5)
    queued(scale_kernel, (1,))(later, out[0], count, by=1.0)
    return out[1].view(-1, 1), out[0].mean(0, keepdim=True) / 2, out.new_empty(0)


def expected(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return (2 * x - 3 * y).view(-1, 1), x.mean(0, keepdim=True) / 2


def recorded(*inputs: Tensor) -> Recording:
    found, recording = record(inputs, CPU, lambda: work(*inputs))
    assert isinstance(recording, Recording)
    torch.testing.assert_close(found[:2], expected(*inputs))
    return recording


def test_other_tensors_of_the_same_form() -> None:
    recording = recorded(torch.randn(37), torch.randn(37))
    before = scale_kernel.launches
    for _ in range(3):
        x, y = torch.randn(37), torch.randn(37)
        found = recording((x, y), CPU)
        torch.testing.assert_close(found[:2], expected(x, y))
        assert found[0].shape == (37, 1) and found[2].shape == (0,)
    assert scale_kernel.launches == before + 12


def test_results_of_one_call_are_not_those_of_the_next() -> None:
    recording = recorded(torch.randn(19), torch.randn(19))
    x, y = torch.randn(19), torch.randn(19)
    first = recording((x, y), CPU)
    recording((y, x), CPU)
    torch.testing.assert_close(first[:2], expected(x, y))


def test_parts_of_one_tensor() -> None:
    """Packed inputs: where they lie in the memory they share is part of the form."""
    both = torch.randn(2, 16)
    recording = recorded(both[0], both[1])
    again = torch.randn(2, 16)
    torch.testing.assert_close(recording((again[0], again[1]), CPU)[:2], expected(*again))
    apart = form_of((both[0], torch.randn(16)))
    assert form_of((both[0], both[1])) == form_of((again[0], again[1])) != apart
    assert form_of((both[1], both[0])) != form_of((both[0], both[1]))


def test_one_tensor_given_twice() -> None:
    x = torch.randn(11)
    recording = recorded(x, x)
    other = torch.randn(11)
    torch.testing.assert_close(recording((other, other), CPU)[:2], expected(other, other))
    assert form_of((x, x)) != form_of((x, other))


def test_a_table_that_is_kept_is_read_where_it_is() -> None:
    table = torch.randn(5)

    def run(x: Tensor) -> tuple[Tensor, ...]:
        out = torch.empty(5)
        queued(add_kernel, (1,))(x, table, out, 5)
        return (out,)

    x = torch.randn(5)
    _, recording = record((x,), CPU, lambda: run(x))
    assert isinstance(recording, Recording)
    other = torch.randn(5)
    torch.testing.assert_close(recording((other,), CPU)[0], other + table)


def test_what_pytorch_computes_in_place_is_repeated() -> None:
    def run(x: Tensor) -> tuple[Tensor, ...]:
        out = torch.zeros(4, 6)
        out[1:3].copy_(x.view(2, 6) * 2)
        out.mul_(x.sum())
        return (out.transpose(0, 1),)

    x = torch.randn(12)
    _, recording = record((x,), CPU, lambda: run(x))
    assert isinstance(recording, Recording)
    other = torch.randn(12)
    found = recording((other,), CPU)[0]
    torch.testing.assert_close(found, run(other)[0])
    assert found.stride() == (1, 6)


def test_parts_that_hold_nothing() -> None:
    """As the text before the video, where there is none."""
    x = torch.randn(6, 1)

    def joined(given: Tensor) -> tuple[Tensor, ...]:
        return (torch.cat([given[:0], given[3:] * 2, given[2:2]]),)

    _, recording = record((x,), CPU, lambda: joined(x))
    assert isinstance(recording, Recording)
    other = torch.randn(6, 1)
    torch.testing.assert_close(recording((other,), CPU)[0], 2 * other[3:])


def test_what_depends_on_the_data_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    def run(x: Tensor) -> tuple[Tensor, ...]:
        return (x * 2 if x.sum().item() > 0 else x * 3,)

    found, recording = record((torch.ones(3),), CPU, lambda: run(torch.ones(3)))
    assert recording == REFUSED
    torch.testing.assert_close(found[0], 2 * torch.ones(3))
    assert "one kernel at a time" in caplog.text and "tells what is in a tensor" in caplog.text


def test_what_repeats_otherwise_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    """A kernel that a recording launches wrongly, as another version of Triton might."""

    @Kernel
    def drifting_kernel(x: Any, out: Any, count: int) -> None:
        for i in range(count):
            out[i] = x[i] + drifting_kernel.launches

    def run(x: Tensor) -> tuple[Tensor, ...]:
        out = torch.empty_like(x)
        queued(drifting_kernel, (1,))(x, out, len(x))
        return (out,)

    x = torch.randn(7)
    _, recording = record((x,), CPU, lambda: run(x))
    assert recording == REFUSED and "gives something else" in caplog.text


def test_returning_an_input_is_refused() -> None:
    x = torch.randn(3)
    tape = Tape((x,))
    with tape:
        pass
    with pytest.raises(Unrepeatable, match="has not made"):
        Recording(tape, (x,))


def test_an_error_of_the_call_is_its_own() -> None:
    def run() -> tuple[Tensor, ...]:
        raise ValueError("no such call")

    with pytest.raises(ValueError, match="no such call"):
        record((torch.ones(1),), CPU, run)
    assert tape_module.current() is None


def test_memory_is_shared_by_what_is_not_there_at_the_same_time() -> None:
    def run(x: Tensor) -> tuple[Tensor, ...]:
        for _ in range(8):
            y = torch.empty_like(x)
            queued(scale_kernel, (1,))(x, y, len(x), by=1.5)
            x = y
        out = torch.empty_like(x)
        queued(scale_kernel, (1,))(x, out, len(x), by=1.0)
        return (out,)

    x = torch.randn(200)
    tape = Tape((x,))
    with tape:
        found = run(x)
    memories = [m for m in tape.memories.values()]
    _, spent = packed(memories, tape)
    assert spent == 2 * -(-800 // ALIGNED) * ALIGNED
    recording = Recording(tape, found)
    torch.testing.assert_close(recording((x,), CPU)[0], found[0])


def test_between_fork_and_join_nothing_shares() -> None:
    def run(x: Tensor, tape: Tape) -> tuple[Tensor, ...]:
        tape.switched(lambda kept: None, forks=True)
        for _ in range(3):
            y = torch.empty_like(x)
            queued(scale_kernel, (1,))(x, y, len(x))
        tape.switched(lambda kept: None, joins=True)
        out = torch.empty_like(x)
        queued(scale_kernel, (1,))(y, out, len(x))
        return (out,)

    x = torch.randn(128)
    tape = Tape((x,))
    with tape:
        found = run(x, tape)
    last = max(tape.memories)
    _, spent = packed([m for b, m in tape.memories.items() if b != last], tape)
    assert spent == 3 * ALIGNED
    torch.testing.assert_close(Recording(tape, found)((x,), CPU)[0], found[0])


def test_alignment_and_strides_are_of_the_form() -> None:
    x = torch.randn(8, 8)
    assert form_of((x,)) == form_of((torch.randn(8, 8),))
    others = [x.t(), x[:, :4], x.flatten()[1:17].view(4, 4), x.half(), None]
    assert len({form_of((each,)) for each in (x, *others)}) == 6
