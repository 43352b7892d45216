"""`freqopt calibrate --dry-run`: what would be calibrated, on what, and in how many passes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

import freqopt
from freqopt.calibration.measure.ladder import THRESHOLDS
from freqopt.calibration.samples import Call, collect_samples
from freqopt.grid import Grid


def rehearsed(
    model: nn.Module, calls: Sequence[Call], grid: Grid | None, timestep: str | None, buckets: int
) -> str:
    """The sites, samples and timesteps of a calibration; runs the model twice, on the first sample.

    Raises:
        CalibrationError: samples that calibration would refuse.
    """
    samples = collect_samples(model, calls, timestep=timestep, buckets=buckets)
    args, kwargs = calls[0]
    found = freqopt.inspect(model, *args, grid=grid, min_tokens=0, **kwargs)
    eligible = sum(site.eligible for site in found.sites)
    span = samples.timestep_range
    times = "no timestep among the arguments"
    if span is not None:
        times = f"{samples.timestep_name} {span[0]:g} to {span[1]:g} in {samples.buckets} range(s)"
    lines = [
        str(found),
        "",
        f"{len(samples.fit)} samples to fit and {len(samples.held_out)} held out; {times}",
        f"would measure {eligible} sites on {len(samples.fit)} samples, each at up to "
        f"{len(THRESHOLDS)} thresholds, then run the model on the held-out ones for every plan "
        "that is tried",
        *(f"note: {note}" for note in samples.notes),
    ]
    return "\n".join(lines)
