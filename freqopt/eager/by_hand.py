"""Attention written by hand, put off until it is known to be attention.

In a module with planned attention a product of queries and keys is not computed where it is called:
what is returned stands for it, and so do its softmax and what lies between. Their product with the
values is then one call of attention. Whatever else reads such a tensor has it computed.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from freqopt.errors import InputError

PRODUCTS = frozenset(["matmul", "bmm", "baddbmm", "einsum", "__matmul__"])
"""Functions that begin and end attention by hand."""

WEIGHING = frozenset(["softmax", "exp"])
"""What makes scores weights."""

BETWEEN = WEIGHING | frozenset(
    "to type type_as float half bfloat16 contiguous clone mul div add sub true_divide multiply "
    "__mul__ __rmul__ __truediv__ __div__ __add__ __radd__ __sub__ masked_fill where amax sum "
    "dropout".split()
)
"""What may lie between, and writes into nothing."""

READS_NO_ENTRIES = frozenset(
    getattr(Tensor, name).__get__
    for name in "shape dtype device ndim layout requires_grad is_cuda is_meta".split()
) | frozenset([Tensor.size, Tensor.dim, Tensor.stride, Tensor.numel, Tensor.is_floating_point])


class Step:
    """A call that was put off.

    versions: of the tensors that it reads. autocast: as it was, by type of device.
    """

    def __init__(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self.function, self.args, self.kwargs = function, tuple(args), dict(kwargs)
        self.read = tensors_in(self.args, self.kwargs)
        self.versions = [0 if isinstance(t, PutOff) else t._version for t in self.read]
        device = self.read[0].device.type
        enabled = torch.is_autocast_enabled(device)
        self.autocast = device, torch.get_autocast_dtype(device), enabled

    def check(self) -> None:
        """The tensors are what they were.

        Raises:
            InputError: one was written into.
        """
        for tensor, version in zip(self.read, self.versions, strict=True):
            if not isinstance(tensor, PutOff) and tensor._version != version:
                raise InputError(
                    f"a tensor that {self.function.__name__} reads was written into after the "
                    "call, and attention by hand is put off until something reads it: copy the "
                    "tensor before it is written into, or use another route of freqopt.optimize"
                )

    def run(self) -> Tensor:
        """Its result."""
        self.check()
        device, dtype, enabled = self.autocast
        with torch.no_grad(), torch.autocast(device, dtype=dtype, enabled=enabled):
            found: Tensor = self.function(*computed(self.args), **computed(self.kwargs))
        return found


class PutOff(Tensor):
    """Scores or weights that are computed when something reads them.

    step: the call whose result it is, None when that was computed. weighs: whether a softmax is
    behind it.
    """

    step: Step | None
    weighs: bool

    @staticmethod
    def __new__(cls, step: Step, like: Like, weighs: bool) -> PutOff:  # noqa: D102
        made: PutOff = Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride, dtype=like.dtype, device=like.device
        )
        return made

    def __init__(self, step: Step, like: Like, weighs: bool) -> None:
        self.step, self.weighs = step, weighs
        self._found: Tensor | None = None
        self._readers: list[weakref.ref[PutOff]] = []
        for tensor in step.read:
            if isinstance(tensor, PutOff):
                tensor._readers.append(weakref.ref(self))

    def compute(self) -> Tensor:
        """Its entries, as a plain tensor that all who ask share."""
        if self.step is not None:
            computed(self.step.read)  # which may compute this one too, as it reads them
        if self.step is not None:
            with torch._C.DisableTorchFunction():
                self._found, self.step = self.step.run(), None
            # Who has the entries may write into them: calls that were made before come first.
            for reader in self._readers:
                if (other := reader()) is not None:
                    other.compute()
        assert self._found is not None
        return self._found

    def __repr__(self, **given: Any) -> str:  # type: ignore[override]
        return repr(self.compute())

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in READS_NO_ENTRIES:
                return func(*args, **(kwargs or {}))
            return func(*computed(args), **computed(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return func(*computed(args), **computed(kwargs or {}))


class Like(NamedTuple):
    """What a tensor is but for its entries."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def computed(items: Any) -> Any:
    """A tree whose tensors are plain."""
    return pytree.tree_map_only(PutOff, PutOff.compute, items)


def is_put_off(item: object) -> bool:
    """Whether a tensor stands for one that nobody has computed."""
    return isinstance(item, PutOff) and item.step is not None


def reads(item: PutOff, tensors: Sequence[Tensor]) -> bool:
    """Whether what a put-off tensor stands for is read from the memory of one of some tensors."""
    if item.step is None:
        return False
    written = {_memory(t) for t in tensors if not isinstance(t, PutOff)} - {None}
    return any(
        reads(t, tensors) if isinstance(t, PutOff) else _memory(t) in written
        for t in item.step.read
    )


def _memory(tensor: Tensor) -> int | None:
    """Where its entries are, None if it has them in another way."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    return tensor.untyped_storage().data_ptr() if plain else None


def can_begin(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a product may be that of queries and keys, and may be put off."""
    tensors = tensors_in(args, kwargs)
    return (
        len(tensors) >= 2
        and all(_can_be_read_later(t) and t.dim() in (3, 4) for t in tensors)
        and torch.amp.is_autocast_available(tensors[0].device.type)
        and "out" not in kwargs
    )


def can_go_on(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call that reads put-off tensors may be put off too."""
    tensors = tensors_in(args, kwargs)
    return "out" not in kwargs and all(is_put_off(t) or _can_be_read_later(t) for t in tensors)


def _can_be_read_later(tensor: Tensor) -> bool:
    """Whether a call that reads a tensor may be made later.

    Gradients would be wanted of it when it is too late, and tensors of `torch.inference_mode` do
    not tell whether they were written into. Other classes of tensors have rules of their own.
    """
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and not tensor.is_inference()
        and not (torch.is_grad_enabled() and tensor.requires_grad)
    )


def ends(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a product is one of weights that were put off."""
    weights = (t for t in tensors_in(args, kwargs) if isinstance(t, PutOff) and is_put_off(t))
    return any(t.weighs for t in weights) and can_go_on(args, kwargs)


def writes(name: str, kwargs: Mapping[str, Any]) -> bool:
    """Whether a function writes into an argument, by its name."""
    dunder = name.startswith("__")
    return (
        "out" in kwargs
        or bool(kwargs.get("inplace"))
        or name in ("__setitem__", "__set__")
        or (dunder and name.startswith("__i") and name != "__invert__")
        or (not dunder and name.endswith("_"))
    )


def tensors_in(args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors among arguments, in a fixed order."""
    return [
        leaf for leaf in pytree.tree_leaves((tuple(args), dict(kwargs))) if isinstance(leaf, Tensor)
    ]


def chain_of(last: Step) -> list[Step]:
    """All calls that a product with values stands on, in the order they were made, and itself.

    Raises:
        InputError: what one of them reads was written into.
    """
    steps: list[Step] = []

    def take(step: Step) -> None:
        for each in step.read:
            if isinstance(each, PutOff) and each.step is not None and each.step not in steps:
                take(each.step)
        step.check()
        steps.append(step)

    take(last)
    return steps
