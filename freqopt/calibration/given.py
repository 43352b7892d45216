"""What a model is given of a sample: the user's own tensors, or copies where it writes into them.

The first run of a sample is on copies and tells. A sample is run many times and must be the same
every time, and it is the user's own, so that a model which writes into its inputs gets copies.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from freqopt.calibration.randomness import generators_kept
from freqopt.calibration.samples import Call, Sample

logger = logging.getLogger(__name__)


class GivenInputs:
    """Inputs of runs of samples, none of which a model has written into."""

    def __init__(self) -> None:
        self._writes: dict[int, bool] = {}

    def is_tried(self, sample: Sample) -> bool:
        """Whether it is known if the model writes into a sample."""
        return id(sample) in self._writes

    def writes(self, sample: Sample) -> bool:
        """Whether the model was seen to write into a sample."""
        return self._writes.get(id(sample), False)

    @contextmanager
    def of(self, sample: Sample) -> Iterator[Call]:
        """Arguments for a run of a sample, which ends with the body."""
        if self.is_tried(sample) and not self.writes(sample):
            yield sample.args, sample.kwargs
            return
        given = sample.args, sample.kwargs
        args, kwargs = copied = copied_arguments(given)
        before = _state(copied)
        yield args, kwargs
        if not self.is_tried(sample):
            written = not _is_same(before, _state(copied)) or _differ(given, copied)
            self._writes[id(sample)] = written
            if written:
                logger.info("the model writes into its inputs, so it is given copies of samples")


@contextmanager
def aside(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Call]:
    """Arguments for a call, the body, after which they and the generators are as before."""
    restore = generators_kept()
    try:
        yield copied_arguments((args, kwargs))
    finally:
        restore()


def copied_arguments(given: Call) -> Call:
    """Arguments with containers and tensors of their own; what was one tensor stays one."""
    made: dict[int, Any] = {}

    def copy(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in made:
            made[id(value)] = _copy(value)
        return made[id(value)]

    found: Call = pytree.tree_map(copy, given)
    return found


def _copy(tensor: Tensor) -> Tensor:
    """A tensor that graphs take for the other; itself where none can write into it."""
    source = tensor.detach()
    extents = zip(source.shape, source.stride(), strict=True) if _is_strided(tensor) else ()
    if not _is_strided(tensor):
        copy = source.clone()
    elif any(step == 0 and size > 1 for size, step in extents):
        return tensor  # expanded: PyTorch refuses to write
    else:
        copy = torch.empty_strided(
            source.shape, source.stride(), dtype=source.dtype, device=source.device
        ).copy_(source)
    return copy.requires_grad_(tensor.requires_grad) if tensor.is_floating_point() else copy


def _is_strided(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and tensor.layout == torch.strided


def _state(given: Call) -> list[Any]:
    """Structure of arguments, their leaves, and how often each tensor was written into."""
    leaves, form = pytree.tree_flatten(given)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return [form, leaves, [x._version for x in tensors if not x.is_inference()]]


def _is_same(before: list[Any], after: list[Any]) -> bool:
    """Whether two states are one: of leaves the very objects."""
    same = len(before[1]) == len(after[1]) and all(
        one is other for one, other in zip(before[1], after[1], strict=True)
    )
    return same and bool(before[0] == after[0]) and bool(before[2] == after[2])


def _differ(given: Call, copied: Call) -> bool:
    """Whether tensors of inference mode, which count no writes, have other values than before."""
    pairs = zip(pytree.tree_leaves(given), pytree.tree_leaves(copied), strict=False)
    return any(
        isinstance(copy, Tensor) and copy.is_inference() and not torch.equal(one, copy)
        for one, copy in pairs
    )
