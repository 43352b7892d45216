"""Why a model cannot run a sample: what about its arguments is unlike the model and other samples.

A model's own error names shapes and types deep inside of it. What a user can change are arguments,
so these are compared once a run has failed. Where they do not explain it, the model's error stands.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from freqopt.calibration.samples import Sample
from freqopt.capture.signatures import forward_signature, named_arguments
from freqopt.errors import CalibrationError, FreqoptError

LONGEST = 200
"""Characters of a model's own error that are shown."""


@contextmanager
def misfits_told(
    model: nn.Module,
    sample: Sample,
    others: Sequence[Sample] = (),
    kind: type[FreqoptError] = CalibrationError,
) -> Iterator[None]:
    """In the body a sample is run. others: those that it is compared with.

    Raises:
        FreqoptError: of the kind asked for: it failed, and something about the sample or the model
            explains that.
    """
    try:
        yield
    except (FreqoptError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        found = list(_misfits(model, sample, others))
        if not found:
            raise
        said = next((line for line in str(error).splitlines() if line.strip()), "")[:LONGEST]
        what = f"sample {sample.number}" if kind is CalibrationError else "the model"
        raise kind(
            f"{what} cannot be run ({type(error).__name__}: {said.strip()}): {'; '.join(found)}"
        ) from error


def _misfits(model: nn.Module, sample: Sample, others: Sequence[Sample]) -> Iterator[str]:
    parameters = dict(model.named_parameters())
    empty = [name for name, parameter in parameters.items() if parameter.is_meta]
    if empty:
        yield f"the model's {empty[0]} is on meta, without values: load its weights first"
        return
    types = {p.dtype for p in parameters.values() if p.is_floating_point()}
    devices = {p.device for p in parameters.values()}
    here = _tensors(model, sample)
    for name, tensor in here.items():
        if tensor.is_floating_point() and types and tensor.dtype not in types:
            yield f"{name!r} is {_of(tensor.dtype)} and the model {_listed(types)}: cast one"
        if devices and tensor.device not in devices:
            yield f"{name!r} is on {tensor.device} and the model on {_listed(devices)}: move one"
    for other in others:
        if other is sample:
            continue
        unlike = list(_unlike(here, _tensors(model, other), other.number))
        yield from unlike
        if unlike:
            return


def _unlike(here: Mapping[str, Tensor], there: Mapping[str, Tensor], number: int) -> Iterator[str]:
    """Where the tensors of one sample are others than those of another, by its number."""
    for name in [*here, *(name for name in there if name not in here)]:
        if name not in here or name not in there:
            yield f"{name!r} is {'not' if name in there else 'only'} here, unlike sample {number}"
            continue
        one, other = here[name], there[name]
        if one.shape != other.shape:
            yield f"{name!r} is {tuple(one.shape)} and {tuple(other.shape)} in sample {number}"
        elif one.dtype != other.dtype:
            yield f"{name!r} is {_of(one.dtype)} and {_of(other.dtype)} in sample {number}"


def _tensors(model: nn.Module, sample: Sample) -> dict[str, Tensor]:
    """Tensors among the arguments of a sample, by name."""
    named = named_arguments(forward_signature(model), sample.args, sample.kwargs)
    found: dict[str, Tensor] = {}
    for name, value in named.items():
        for path, leaf in pytree.tree_leaves_with_path(value):
            if isinstance(leaf, Tensor):
                found[name + pytree.keystr(path)] = leaf
    return found


def _of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _listed(values: set[Any]) -> str:
    return " or ".join(sorted(str(value).removeprefix("torch.") for value in values))
