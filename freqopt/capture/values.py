"""What a model's call may be given that its grid follows from, beside sizes and positions.

Numbers and texts among its arguments, small tensors of ints whose values it reads, and pairs and
triples of ints that its modules keep. Calls that differ in one of these may lie on other grids.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

MOST_VALUES = 24
"""Ints of a tensor that may tell a grid: (t, h, w) of eight items of a batch."""

ADDRESS = re.compile(r"\b0x[0-9a-fA-F]+")

EXTENTS = range(2, 5)
"""How many ints of a module may tell a grid."""

SEQUENCES = frozenset({tuple, list, torch.Size})


def kind_of(leaf: object) -> object:
    """What calls of one shape have in common: shape and dtype of a tensor, else a type."""
    return (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else type(leaf)


def value_of(leaf: object, *, read: bool) -> object:
    """What an argument tells by its value; None of most tensors.

    read: whether the model is known to read data. Small tensors of ints are then read here too,
    which waits for the device where they are on one.
    """
    if isinstance(leaf, Tensor):
        return tuple(leaf.flatten().tolist()) if read and _may_tell(leaf) else None
    # Objects that do not say what is in them are as good as others of their kind.
    return ADDRESS.sub("", repr(leaf))


def _may_tell(leaf: Tensor) -> bool:
    if leaf.dtype == torch.bool or leaf.is_floating_point() or leaf.is_complex():
        return False
    return 0 < leaf.numel() <= MOST_VALUES and type(leaf) is Tensor and not is_unreadable(leaf)


def is_unreadable(tensor: Tensor) -> bool:
    """Whether a tensor has no values now. Nothing reads them while a CUDA graph is captured.

    What the model's own code makes of data cannot change then either.
    """
    from torch._subclasses.fake_tensor import FakeTensor

    if isinstance(tensor, FakeTensor) or tensor.is_meta:
        return True
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return True
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def own_modules(model: nn.Module) -> list[nn.Module]:
    """Modules of a model that are not PyTorch's own layers, which keep no grids."""
    return [m for m in model.modules() if not type(m).__module__.startswith("torch.nn.")]


def kept_by(modules: Sequence[nn.Module]) -> tuple[object, ...]:
    """Pairs and triples of ints that modules keep, and some more: a grid may be among them."""
    return tuple(
        tuple(item)
        for module in modules
        for item in vars(module).values()
        if type(item) in SEQUENCES
        and len(item) in EXTENTS
        and all(type(each) is int for each in item)
    )
