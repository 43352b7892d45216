"""How many runs of a model a calibration takes, and so how long: for dry runs and progress.

The parts and their numbers are those of docs/samples.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from freqopt.calibration.search.sensitivity import (
    FIXED_RUNS,
    MAX_PROBED_HEADS,
    MAX_PROBED_SAMPLES,
    MAX_PROBED_SITES,
    MOST_PASSES,
    PASSES_WHEN_SLOW,
    SLOW_PASS,
)

MEASURING = 2.0
"""Dense runs that measuring a sample takes; twice that with orders by content."""

TRIALS = 3
"""Plans that are tried out on the held-out samples, as a rule."""

BEHIND = 0.55
"""Part of a run that is behind a site, on average, and run for it."""

COMPARED = 4
"""Strategies that are compared, each on one sample."""


@dataclass(frozen=True)
class Runs:
    """Runs of the model by part of a calibration, in dense runs."""

    measuring: float
    probing: float
    comparing: float
    verifying: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.measuring + self.probing + self.comparing + self.verifying

    def seconds(self, of_a_run: float) -> float:
        """How long they take, where one takes so many seconds."""
        return self.total * of_a_run


def runs_of(
    *,
    fitted: int,
    held_out: int,
    sites: int,
    heads: int,
    content: bool = True,
    rounds: int | None = None,
    passes: int | None = None,
    seconds_of_run: float | None = None,
    on_gpu: bool = True,
) -> Runs:
    """The runs of a calibration.

    Args:
        fitted, held_out: samples.
        sites, heads: attention that can be split, and heads of all of it.
        content: whether orders by content are considered.
        rounds, passes: as given to `freqopt.calibrate`.
        seconds_of_run: of one dense run, where it is known.
        on_gpu: whether the model is on a GPU.
    """
    small = heads <= MAX_PROBED_HEADS
    units = heads if small else min(sites, MAX_PROBED_SITES)  # of marginals
    samples = min(fitted, MAX_PROBED_SAMPLES)
    if rounds is None:
        rounds = 3 if small and on_gpu else 1
    alone = samples * (FIXED_RUNS + BEHIND * heads) if small else MOST_PASSES
    probing = alone + BEHIND * units * samples * (rounds + (rounds >= 3))
    if passes is None and seconds_of_run is not None and seconds_of_run >= SLOW_PASS and on_gpu:
        passes = PASSES_WHEN_SLOW
    if passes is not None:
        probing = min(probing, passes)
    return Runs(
        measuring=fitted * MEASURING * (2 if content else 1),
        probing=float(probing),
        comparing=float(COMPARED * samples),
        verifying=float((1 + TRIALS) * held_out),
    )
