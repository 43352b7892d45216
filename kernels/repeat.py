"""Calls whose launches are known, repeated without finding out again what to launch.

A call of the op launches some twenty kernels and takes forty pieces of memory. Python needs 1.7 ms
for that on the host of an H200, whatever the GPU does: more than the kernels of few heads take, so
that such models wait for it. All of it follows from the form of a call: shapes, strides, types,
alignment, settings. The second call of a form is recorded (`freqopt.kernels.tape`), and from then
on its kernels are launched as they were, with this call's pointers; what is allocated in between is
one piece of memory, in which tensors that are not needed at the same time share places.

A recording is used where repeating it gave, bit by bit, what the call gave.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from freqopt.kernels.compiling import compile_first, is_compiling
from freqopt.kernels.layout import Inputs, Settings
from freqopt.kernels.tape import (
    Computed,
    Launched,
    Memory,
    Place,
    Switched,
    Tape,
    Unrepeatable,
    current,
)
from freqopt.kernels.tiles import Launch
from freqopt.kernels.workspace import is_long

logger = logging.getLogger(__name__)

FORMS = 256
"""Forms of calls that are remembered; a model has a few for each resolution."""

ALIGNED = 512
"""Bytes, as PyTorch aligns memory on a GPU."""

Run = Callable[[Inputs, Settings], tuple[Tensor, ...]]


class Pointer:
    """Stands for a tensor in a descriptor, which asks it for nothing but its address."""

    __slots__ = ("address",)

    def __init__(self) -> None:
        self.address = 0

    def data_ptr(self) -> int:
        """The address."""
        return self.address


class _Launch:
    """A recorded launch. Where its arguments point: (argument or pointer, base, offset)."""

    def __init__(self, step: Launched) -> None:
        self.run = step.kernel[step.grid]
        self.arguments = list(step.arguments)
        self.tensors = [(at, place.base, place.offset) for at, place in step.tensors]
        self.descriptors = []
        for at, place in step.descriptors:
            pointer = Pointer()
            self.arguments[at] = copy.copy(self.arguments[at])
            self.arguments[at].base = pointer
            self.descriptors.append((pointer, place.base, place.offset))

    def __call__(self, now: _Now) -> None:
        arguments, bases = self.arguments, now.bases
        for at, base, offset in self.tensors:
            arguments[at] = bases[base] + offset
        for pointer, base, offset in self.descriptors:
            pointer.address = bases[base] + offset
        self.run(*arguments)


class _Compute:
    """A recorded operation of PyTorch."""

    def __init__(self, step: Computed) -> None:
        self.step = step

    def __call__(self, now: _Now) -> None:
        args, kwargs = pytree.tree_map(
            lambda x: now.tensor(x) if isinstance(x, Place) else x,
            self.step.given,
            is_leaf=lambda x: isinstance(x, Place),
        )
        results = pytree.tree_leaves(self.step.function(*args, **kwargs))
        for at, base in self.step.made.items():
            now.hold(base, results[at])


class _Now:
    """Where the bases of this call are, as addresses and as (storage, first byte)."""

    def __init__(self, count: int) -> None:
        self.bases = [0] * count
        self.storages: dict[int, tuple[Any, int]] = {}
        self.streams: dict[str, Any] = {}

    def hold(self, base: int, x: Tensor) -> None:
        """A tensor's storage is a base."""
        storage = x.untyped_storage()
        self.bases[base], self.storages[base] = storage.data_ptr(), (storage, 0)

    def tensor(self, place: Place) -> Tensor:
        """The tensor that lies at a place."""
        storage, first = self.storages[place.base]
        empty = torch.empty(0, dtype=place.dtype, device=storage.device)
        at = (first + place.offset) // place.dtype.itemsize
        return empty.set_(storage, at, place.size, place.stride)


class Recording:
    """A call that can be repeated with other tensors of the same form.

    Raises:
        Unrepeatable: what was recorded does not tell all of it.
    """

    def __init__(self, tape: Tape, returned: Sequence[Tensor]) -> None:
        tape.check()
        self._lock = threading.Lock()  # arguments are filled in, in place
        self._count, self._kept = tape.count, dict(tape.kept)
        self._returned = [(x.dtype, None) if not x.numel() else tape.place(x) for x in returned]
        results = {place.base for place in self._returned if isinstance(place, Place)}
        self._own = [m for base, m in tape.memories.items() if base in results]
        made = {base for s in tape.steps if isinstance(s, Computed) for base in s.made.values()}
        if not results <= {m.base for m in self._own} | made:
            raise Unrepeatable("it returns memory that it has not made")
        aside = [m for base, m in tape.memories.items() if base not in results]
        self._places, self._bytes = packed(aside, tape)
        self._steps: list[Callable[[_Now], None]] = []
        for step in tape.steps:
            if isinstance(step, Switched):
                self._steps.append(_switch(step))
            else:
                self._steps.append(_Launch(step) if isinstance(step, Launched) else _Compute(step))

    def __call__(self, inputs: Sequence[Tensor | None], device: torch.device) -> tuple[Tensor, ...]:
        """What the recorded call returned, of these inputs. They must be of the recorded form."""
        now = _Now(self._count)
        for number, x in enumerate(inputs):
            if x is not None:
                storage, at = x.untyped_storage(), x.data_ptr()
                now.bases[number] = at
                now.storages[number] = storage, at - storage.data_ptr()
        for base, x in self._kept.items():
            now.hold(base, x)
        own = {
            m.base: torch.empty_strided(m.size, m.stride, dtype=m.dtype, device=device)
            for m in self._own
        }
        for base, x in own.items():
            now.hold(base, x)
        work = torch.empty(self._bytes, dtype=torch.uint8, device=device)
        storage, start = work.untyped_storage(), work.data_ptr()
        for base, offset in self._places:
            now.bases[base], now.storages[base] = start + offset, (storage, offset)
        with self._lock:
            try:
                for step in self._steps:
                    step(now)
            finally:
                if "here" in now.streams:
                    torch.cuda.set_stream(now.streams["here"])
        found = []
        for place in self._returned:
            if not isinstance(place, Place):
                found.append(torch.empty(0, dtype=place[0], device=device))
                continue
            x = own.get(place.base)
            if x is None:
                found.append(now.tensor(place))
            else:
                found.append(x.as_strided(place.size, place.stride, place.offset // x.itemsize))
        return tuple(found)


def _switch(step: Switched) -> Callable[[_Now], None]:
    return lambda now: step.act(now.streams)


def packed(memories: Sequence[Memory], tape: Tape) -> tuple[list[tuple[int, int]], int]:
    """Offsets of memories in one piece, as (base, offset), and its bytes.

    Those whose times do not meet may share a place. What is used while two streams run is there
    from the fork to the join.
    """
    ends = {m.base: m.begun for m in memories}
    begins = dict(ends)
    for at, step in enumerate(tape.steps):
        for place in step.places:
            if place.base in ends:
                ends[place.base] = at
    for first, last in _forks(tape):
        for base in ends:
            if begins[base] <= last and ends[base] >= first:
                begins[base], ends[base] = min(begins[base], first), max(ends[base], last)
    placed: list[tuple[int, int, int, int]] = []  # offset, end, begins, ends
    found = []
    for memory in sorted(memories, key=lambda m: -m.bytes):
        begun, over = begins[memory.base], ends[memory.base]
        offset = 0
        for low, high, first, last in sorted(placed):
            meets = begun <= last and first <= over
            if meets and low < offset + memory.bytes and offset < high:
                offset = high
        high = offset + -(-memory.bytes // ALIGNED) * ALIGNED
        placed.append((offset, high, begun, over))
        found.append((memory.base, offset))
    return found, max((high for _, high, _, _ in placed), default=0)


def _forks(tape: Tape) -> list[tuple[int, int]]:
    """First and last steps of what runs on two streams."""
    found, first = [], 0
    for at, step in enumerate(tape.steps):
        if isinstance(step, Switched) and step.forks:
            first = at
        if isinstance(step, Switched) and step.joins:
            found.append((first, at))
    return found


class Repeater:
    """Serves calls by recordings of their forms."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[Any, Recording | str] = OrderedDict()
        self._plain = threading.local()

    def serve(self, inputs: Inputs, settings: Settings, launch: Launch, run: Run) -> Any:
        """What `run` gives, which is called unless the form of this call is recorded.

        launch: tiles of the call's kernels.
        """
        tensors, query = inputs.tensors, inputs.query
        if not query.is_cuda or is_long(inputs.layout.tokens) or self._is_plain():
            return run(inputs, settings)
        cast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        form = (form_of(tensors), inputs.layout, inputs.query_layout, settings, launch, cast)
        with self._lock:
            known = self._known.get(form)
            if known is not None:
                self._known.move_to_end(form)
        if isinstance(known, Recording):
            return known(tensors, query.device)
        if torch.cuda.is_current_stream_capturing() or known == REFUSED:
            return run(inputs, settings)
        if known is None:
            compile_first(form, lambda: run(inputs, settings))
            self._remember(form, SEEN)
            return run(inputs, settings)
        found, recorded = record(tensors, query.device, lambda: run(inputs, settings))
        self._remember(form, recorded)
        return found

    def forget(self) -> None:
        """Have no recordings, as at the beginning."""
        with self._lock:
            self._known.clear()

    @contextlib.contextmanager
    def plainly(self) -> Iterator[None]:
        """Calls of this thread are launched anew in here, and nothing is recorded."""
        before = self._is_plain()
        self._plain.on = True
        try:
            yield
        finally:
            self._plain.on = before

    def _is_plain(self) -> bool:
        return getattr(self._plain, "on", False) or current() is not None or is_compiling()

    def _remember(self, form: Any, what: Recording | str) -> None:
        with self._lock:
            self._known[form] = what
            if len(self._known) > FORMS:
                self._known.popitem(last=False)


SEEN, REFUSED = "seen", "refused"


def record(
    tensors: Sequence[Tensor | None],
    device: torch.device,
    run: Callable[[], tuple[Tensor, ...]],
) -> tuple[tuple[Tensor, ...], Recording | str]:
    """What a call gives, and its recording; REFUSED, and a line in the log, where there is none."""
    tape = Tape(tensors)
    with tape:
        found = run()
    try:
        recording = Recording(tape, found)
        again = recording(tensors, device)
        if not all(map(_same, found, again)):
            raise Unrepeatable("repeated, it gives something else")
    except Exception as error:  # of Triton, of another version than those that were tried
        logger.warning(
            "calls of the op are launched one kernel at a time, which takes longer: a call could "
            "not be repeated (%s: %s)",
            type(error).__name__,
            error,
        )
        return found, REFUSED
    return found, recording


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit by bit, however they lie."""
    if a.shape != b.shape or a.stride() != b.stride() or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def form_of(tensors: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """All that launches depend on: types, shapes, strides, alignment, and who shares memory."""
    found: list[Any] = []
    storages: dict[int, tuple[int, int]] = {}
    for number, x in enumerate(tensors):
        if x is None:
            found.append(None)
            continue
        at = x.data_ptr()
        first, start = storages.setdefault(x.untyped_storage().data_ptr(), (number, at))
        found.append((x.dtype, x.device, x.shape, x.stride(), at % 16 == 0, first, at - start))
    return tuple(found)


REPEATER = Repeater()
