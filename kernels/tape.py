"""What a call launches, written down while it runs: kernels, memory, and what PyTorch computes.

Kernels are launched by `queued`; while a `Tape` records on this thread it notes them, and PyTorch's
own operations by their dispatch. A tensor is noted as a `Place`: by whose memory it lies in, since
the next call of the same form has other tensors in other places. `freqopt.kernels.repeat` makes
calls of what is written here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from freqopt.kernels.compiling import compiled_alone, is_compiling

aten = torch.ops.aten

ALLOCATING = frozenset(
    {
        aten.empty.memory_format,
        aten.empty_like.default,
        aten.empty_strided.default,
        aten.new_empty.default,
        aten.new_empty_strided.default,
    }
)
"""Operations that give memory which nobody has written."""

UNSEEN = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})
"""Of operations whose outcome is not told by the form of what they are given."""


class Place(NamedTuple):
    """A tensor, by where it lies.

    base: whose memory, by its number on the tape. offset: bytes behind the base's first: of one of
    the call's inputs that is where its data begin, of others the storage.
    """

    base: int
    offset: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]


class Launched(NamedTuple):
    """A kernel on a grid.

    arguments: in the kernel's order, None where a tensor goes. tensors: (argument, place).
    descriptors: (argument, place of what it describes).
    """

    kernel: Any
    grid: tuple[int, int, int]
    arguments: list[Any]
    tensors: list[tuple[int, Place]]
    descriptors: list[tuple[int, Place]]

    @property
    def places(self) -> list[Place]:
        """All that it reads or writes."""
        return [place for _, place in (*self.tensors, *self.descriptors)]


class Computed(NamedTuple):
    """An operation of PyTorch. given: its arguments (args, kwargs), places for tensors.

    made: numbers of the bases that its results are, by their place among its flattened results.
    """

    function: Any
    given: Any
    made: dict[int, int]

    @property
    def places(self) -> list[Place]:
        """All that it reads or writes."""
        return [x for x in pytree.tree_leaves(self.given, is_leaf=_is_place) if _is_place(x)]


class Switched(NamedTuple):
    """What is done to the current stream, when the call is repeated. joins: a fork ends by it."""

    act: Callable[[dict[str, Any]], None]
    forks: bool = False
    joins: bool = False

    @property
    def places(self) -> list[Place]:
        """It touches no tensor."""
        return []


Step = Launched | Computed | Switched


class Memory(NamedTuple):
    """Memory that the call allocates. begun: how many steps there were before."""

    base: int
    begun: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    bytes: int


class Unrepeatable(Exception):
    """The call does what another call of its form may do otherwise."""


_recording = threading.local()


def current() -> Tape | None:
    """The tape that this thread's launches are noted on."""
    return getattr(_recording, "tape", None)


def queued(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
    """What launches a kernel of Triton's on a grid, to be called with its arguments."""
    if is_compiling():
        return compiled_alone(kernel, grid)
    launch: Callable[..., Any] = kernel[grid]
    tape = current()
    if tape is None:
        return launch

    def noted(*args: Any, **kwargs: Any) -> Any:
        compiled = launch(*args, **kwargs)
        tape.launched(kernel, compiled, grid, args, kwargs)
        return compiled

    return noted


class Tape(TorchDispatchMode):
    """Records what happens in ``with tape:`` on this thread.

    inputs: the call's tensors, None for those it has not. Bases are numbered: first the inputs,
    then what the call allocates or computes, or finds elsewhere, such as tables that are kept.
    """

    def __init__(self, inputs: Sequence[Tensor | None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[Step] = []
        self.memories: dict[int, Memory] = {}
        self.kept: dict[int, Tensor] = {}
        self.count = len(inputs)
        self._inputs = inputs
        self._given: dict[int, list[int]] = {}
        self._bases: dict[int, int] = {}
        self._failed = ""
        for number, x in enumerate(inputs):
            if x is not None:
                self._given.setdefault(_storage(x), []).append(number)

    def __enter__(self) -> Tape:
        _recording.tape = self
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *given: Any) -> None:
        _recording.tape = None
        super().__exit__(*given)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        if func in ALLOCATING:
            self._allocated(found)
        else:
            self._computed(func, args, kwargs, found)
        return found

    def check(self) -> None:
        """Whether what was recorded is all there was.

        Raises:
            Unrepeatable: it is not.
        """
        if self._failed:
            raise Unrepeatable(self._failed)

    def place(self, x: Tensor) -> Place:
        """Where a tensor lies; memory that was not met before is kept."""
        storage, base = _storage(x), 0
        if storage in self._given and storage not in self._bases:
            own = self._given[storage]
            at = _begin(x)
            base = next((i for i in own if self._start(i) == at), own[0])
            offset = at - self._start(base)
        else:
            if storage not in self._bases:
                self.kept[self._number(storage)] = x
            base, offset = self._bases[storage], int(x.storage_offset()) * x.itemsize
        return Place(base, offset, x.dtype, tuple(x.shape), x.stride())

    def launched(
        self, kernel: Any, compiled: Any, grid: Sequence[int], args: Any, kwargs: dict[str, Any]
    ) -> None:
        """Note a kernel that was launched. compiled: what it was for these arguments."""
        names = kernel.arg_names
        named = {**dict(zip(names, args, strict=False)), **kwargs}
        parameters = kernel.signature.parameters
        arguments = [named[n] if n in named else parameters[n].default for n in names]
        tensors, descriptors = [], []
        for at, value in enumerate(arguments):
            if isinstance(value, Tensor):
                tensors.append((at, self.place(value)))
                arguments[at] = None
            elif isinstance(getattr(value, "base", None), Tensor):
                descriptors.append((at, self.place(value.base)))
        x, y, z = (*grid, 1, 1)[:3]
        self.steps.append(Launched(compiled, (x, y, z), arguments, tensors, descriptors))

    def switched(
        self, act: Callable[[dict[str, Any]], None], *, forks: bool = False, joins: bool = False
    ) -> None:
        """Note what was done to the current stream.

        act: does it again; it is given what earlier ones kept.
        """
        self.steps.append(Switched(act, forks, joins))

    def _allocated(self, x: Tensor) -> None:
        base = self._number(_storage(x))
        self.memories[base] = Memory(
            base, len(self.steps), x.dtype, tuple(x.shape), x.stride(), x.untyped_storage().nbytes()
        )

    def _computed(self, func: Any, args: Any, kwargs: dict[str, Any], found: Any) -> None:
        if UNSEEN & set(func.tags) or func is aten._local_scalar_dense.default:
            self._failed = self._failed or f"{func} tells what is in a tensor"
            return
        known = {_storage(x) for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        results = pytree.tree_leaves(found)
        new = {
            at: x
            for at, x in enumerate(results)
            if isinstance(x, Tensor) and _storage(x) not in known
        }
        if not new and not func._schema.is_mutable:
            return  # a view
        given = pytree.tree_map_only(Tensor, self.place, (args, kwargs))
        made = {at: self._number(_storage(x)) for at, x in new.items()}
        self.steps.append(Computed(func, given, made))

    def _number(self, storage: int) -> int:
        """A new base; what lay there before is gone."""
        self._bases[storage] = self.count
        self.count += 1
        return self._bases[storage]

    def _start(self, number: int) -> int:
        own = self._inputs[number]
        assert own is not None
        return _begin(own)


def _begin(x: Tensor) -> int:
    """Where a tensor's data begin; `data_ptr` is 0 of what has none."""
    return x.untyped_storage().data_ptr() + int(x.storage_offset()) * x.itemsize


def _storage(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)


def _is_place(x: Any) -> bool:
    return isinstance(x, Place)
