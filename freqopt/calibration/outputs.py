"""What models return, as tensors that are compared, and how far two of them are apart."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from freqopt.calibration.team import Team
from freqopt.errors import CalibrationError

ALONE = Team()


def output_tensors(output: Any) -> list[Tensor]:
    """Floating-point tensors of whatever a model returns, in a fixed order; complex ones as two."""
    if isinstance(output, Tensor):
        if output.is_complex():
            return [torch.view_as_real(output.resolve_conj())]
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, (list, tuple)):
        return [tensor for item in output for tensor in output_tensors(item)]
    if dataclasses.is_dataclass(output):
        return output_tensors([getattr(output, f.name) for f in dataclasses.fields(output)])
    return []


def some_tensors(output: Any) -> list[Tensor]:
    """The same, of a model whose outputs are compared.

    Raises:
        CalibrationError: there is nothing to compare.
    """
    found = output_tensors(output)
    if not found:
        raise CalibrationError(
            f"the model returns {_kind(output)}, of which no error can be told: floating-point or "
            "complex tensors are needed, by themselves or in tuples, lists, dicts and dataclasses"
        )
    return found


def _kind(output: Any) -> str:
    """What a model returned, in a few words."""
    if isinstance(output, Tensor):
        return f"a tensor of {output.dtype}"
    kind = f"a {type(output).__name__}"
    if not isinstance(output, (dict, list, tuple)):
        return kind
    inside = output.values() if isinstance(output, dict) else output
    listed = ", ".join(_kind(each) for each in inside) or "nothing"
    return f"{kind} of {listed}"


def relative_error(output: list[Tensor], reference: list[Tensor], team: Team = ALONE) -> float:
    """Relative L2 error over all of a model's output tensors; infinite if one is not finite.

    team: processes that have parts of the output, or all of it.

    Raises:
        CalibrationError: they are of other shapes.
    """
    shapes = [[tuple(x.shape) for x in tensors] for tensors in (output, reference)]
    if shapes[0] != shapes[1]:
        raise CalibrationError(
            f"one sample gives outputs of shapes {shapes[1]} in one run and {shapes[0]} in "
            "another; calibration needs a model that does the same in every call"
        )
    difference = energy = 0.0
    for got, want in zip(output, reference, strict=True):
        want = want.to(got.device)
        difference += float((got.double() - want.double()).square().sum())
        energy += float(want.double().square().sum())
    of_all = team.all((difference, energy))
    difference, energy = (math.fsum(values) for values in zip(*of_all, strict=True))
    error = math.sqrt(difference / max(energy, 1e-30))
    return error if math.isfinite(error) else math.inf
