"""From what was measured at a site to what there is to choose from there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from freqopt.calibration.measure.readings import FINE, Measured
from freqopt.calibration.measure.recorder import THRESHOLDS
from freqopt.calibration.search.allocate import (
    Array,
    HeadCurves,
    SiteChoices,
    join_curves,
    make_choices,
)

BIAS_WEIGHT = 4.0
"""How much more a squared bias counts than noise: it adds up over layers and denoising steps."""


def site_choices(site: Measured, gains: Array, samples: Sequence[int]) -> SiteChoices:
    """The choices of a site from what was measured, errors carried to the model's output.

    Args:
        gains: (buckets, H), from `measure_gains`.
        samples: fitted samples in each timestep bucket. A site that was not reached in one of them
            is taken to behave there as it does on average.
    """
    shares = [count / sum(samples) for count in samples]
    total = site.total()
    rows: list[HeadCurves] = []
    for bucket, share in enumerate(shares):
        sums, weight = site.buckets.get(bucket, total), np.square(gains[bucket])[:, None]
        density, error, bias, fine = (
            sums.mean(name).T.numpy() for name in ("density", "site", "site_bias", FINE)
        )
        damage = error + (BIAS_WEIGHT - 1.0) * bias
        scale = share * weight
        rows.append(HeadCurves(density, scale * error, scale * damage, fine))
    return make_choices(
        site.name, site.tokens, site.head_dim, np.array(THRESHOLDS), join_curves(rows), shares
    )
