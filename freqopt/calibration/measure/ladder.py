"""What there is to choose from at a head: an order of its tokens, and a threshold of its router.

Thresholds are measured on a ladder; between its rungs choices are interpolated.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

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

REFINEMENT = 4
"""Choices per measured rung; between rungs curves are interpolated on logarithmic axes."""


def ladder_choices(thresholds: Array) -> Array:
    """REFINEMENT thresholds per rung of a ladder (rungs,), evenly spaced on a logarithmic axis."""
    rungs = np.log(thresholds)
    at = np.arange((len(rungs) - 1) * REFINEMENT + 1) / REFINEMENT
    choices: Array = np.exp(np.interp(at, np.arange(len(rungs)), rungs))
    return choices


CHOICES = tuple(ladder_choices(np.array(THRESHOLDS)).tolist())
"""Thresholds whose densities are read off the scores, and among which allocation chooses."""
