"""Sites to allocate thresholds at, small enough to try all choices."""

from __future__ import annotations

import numpy as np

from freqopt.calibration.search.choices import SiteChoices


def random_site(
    rng: np.random.Generator, name: str, choices: int = 4, shares: tuple[float, ...] = (1.0,)
) -> SiteChoices:
    """Two heads whose curves fall with density but are not convex, in each timestep bucket."""
    rows = 2 * len(shares)
    density = np.sort(rng.uniform(0.02, 0.9, (rows, choices)))[:, ::-1]
    error = np.sort(rng.exponential(1e-3, (rows, choices)))
    one, none = np.ones((rows, 1)), np.zeros((rows, 1))
    return SiteChoices(
        name=name,
        tokens=int(rng.integers(256, 2048)),
        head_dim=64,
        threshold=np.arange(choices + 1.0),
        density=np.concatenate([one, density], 1),
        error=np.concatenate([none, error], 1),
        weighted_error=np.concatenate([none, error], 1),
        shares=shares,
    )
