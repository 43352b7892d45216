"""Values of tensors of any class: quantised weights and other subclasses as ordinary tensors.

Subclasses know the operations that a model needs of them and not much else, so each of several ways
to their values is tried, the last of which is the tensors that they are made of.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from freqopt.errors import InputError


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is of PyTorch's own classes, which know every operation."""
    return type(tensor) in (Tensor, torch.nn.Parameter, torch.nn.Buffer)


def plain_values(tensor: Tensor) -> Tensor:
    """What a tensor stands for, as an ordinary tensor.

    Raises:
        InputError: a subclass with no way to its values.
    """
    found = tensor.detach()
    if is_plain(found):
        return found
    for way in (_dequantized, _without_class, _multiplied):
        try:
            values = way(tensor)
        except Exception:  # whatever the subclass raises about what it does not know
            continue
        if is_plain(values) and values.shape == tensor.shape:
            return values.detach()
    raise InputError(
        f"a {type(tensor).__name__} of shape {tuple(tensor.shape)} cannot be made an ordinary "
        "tensor: it has no dequantize(); pass what it stands for"
    )


def _dequantized(tensor: Tensor) -> Tensor:
    return tensor.dequantize()


def _without_class(tensor: Tensor) -> Tensor:
    """Of subclasses that only add behaviour to a tensor with memory of its own."""
    if is_traceable_wrapper_subclass(tensor):
        raise TypeError("a wrapper has no memory of its own")
    return tensor.detach().as_subclass(Tensor).clone()


def _multiplied(tensor: Tensor) -> Tensor:
    """Of weights that know nothing but linear: their product with the identity."""
    if tensor.dim() != 2:
        raise TypeError("not a matrix")
    identity = torch.eye(tensor.shape[1], dtype=tensor.dtype, device=tensor.device)
    return torch.nn.functional.linear(identity, tensor.detach()).t()


def parts_of(tensor: Tensor) -> list[Tensor]:
    """The ordinary tensors that a tensor is made of: itself, or what a subclass wraps."""
    if is_plain(tensor):
        return [tensor]
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return [part for name in names for part in parts_of(getattr(tensor, name))]
    return [plain_values(tensor)]
