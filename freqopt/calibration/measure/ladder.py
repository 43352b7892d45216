"""What there is to choose from at a head: an order of its tokens, and a threshold of its router.

Thresholds are measured on a ladder; between its rungs choices are interpolated, and in one of many
runs every other rung is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from freqopt.config import ALL, DEFAULT_CHUNK

Array = NDArray[np.float64]

ORDERS = (0, 512, DEFAULT_CHUNK, 4096, ALL)
"""Orders of tokens that a key head may take, as chunks of the op: 0 by the grid, others by content.
Ascending, as larger chunks take longer. Curves have one row of rungs for each that is measured."""

GRID_ALONE = ORDERS[:1]

LEAST_TOKENS = 512
"""Tokens from which an order by content is considered; there are few blocks in fewer."""

# One decade a line, closest around 1.
_RUNGS = """
    0.003
    0.015 0.06
    0.15 0.3 0.5 0.75
    1.05 1.45 2.0 2.8 4.0 6.0
    10.0 17.0 30.0
"""

THRESHOLDS = tuple(float(rung) for rung in _RUNGS.split())
"""The ladder of thresholds tried at every head of every sample: four decades, closest around 1,
where scores lie and densities fall from a half to a few per cent."""

EVERY_RUNG = tuple(range(len(THRESHOLDS)))

FEW_RUNS = 4
"""Runs from which each measures every other rung: between two of them curves are smooth."""

_LEAST_DENSITY = 1e-9

REFINEMENT = 4
"""Choices per measured rung; between rungs curves are interpolated on logarithmic axes."""


def ladder_choices(thresholds: Array) -> Array:
    """REFINEMENT thresholds per rung of a ladder (rungs,), evenly spaced on a logarithmic axis."""
    rungs = np.log(thresholds)
    at = np.arange((len(rungs) - 1) * REFINEMENT + 1) / REFINEMENT
    choices: Array = np.exp(np.interp(at, np.arange(len(rungs)), rungs))
    return choices


def rungs_of(number: int, runs: int) -> tuple[int, ...]:
    """The rungs that a run measures, of so many runs: the ends, and of the others one in two."""
    if runs < FEW_RUNS:
        return EVERY_RUNG
    return tuple(sorted({EVERY_RUNG[0], *EVERY_RUNG[number % 2 :: 2], EVERY_RUNG[-1]}))


def on_every_rung(values: Tensor, rungs: Sequence[int], density: Tensor) -> Tensor:
    """Curves (rungs, H) float64 over all of the ladder, linear in the logarithm of density.

    Errors follow what is lifted, and densities are known everywhere: scores may lie close together
    between two rungs. rungs: ascending, those that values are of, the ends among them. density:
    (all rungs, H), falling.
    """
    if tuple(rungs) == EVERY_RUNG:
        return values
    measured = np.array(rungs)
    above = np.searchsorted(measured, EVERY_RUNG)  # places in rungs, at or after each
    below = np.maximum(above - 1, 0)
    logs = density.clamp(min=_LEAST_DENSITY).log()
    low, high = logs[measured[below]], logs[measured[above]]
    apart = high - low
    share = torch.where(apart < 0.0, (logs - low) / apart, 1.0)
    return values[below].lerp(values[above], share)


CHOICES = tuple(ladder_choices(np.array(THRESHOLDS)).tolist())
"""Thresholds whose densities are read off the scores, and among which allocation chooses."""
