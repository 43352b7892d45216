"""Gains: how much of an error made at a site, or at one of its heads, reaches the model's output.

A site's error is damped or amplified by its output projection and by everything after it. So errors
are injected one at a time, and the model's output is compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from freqopt.calibration.checkpoint import Journal
from freqopt.calibration.measure.readings import Measured
from freqopt.calibration.measure.recorder import THRESHOLDS, Session
from freqopt.calibration.runner import Runner, relative_error
from freqopt.calibration.samples import Sample, SampleSet
from freqopt.errors import CalibrationError
from freqopt.progress import Progress

Array = NDArray[np.float64]

MAX_PROBED_HEADS = 64
"""Up to as many heads in the whole model are probed one by one; with more, sites are."""

MAX_PROBED_SITES = 16
"""Sites probed in a large model, evenly spaced; between them gains are interpolated over depth."""

MAX_PROBED_SAMPLES = 8
"""Samples that gains are measured on, shared out among the timestep buckets (one each at least)."""

PROBE_DENSITY = 0.05
"""Density whose errors are injected."""

TOGETHER = 0.02
"""Predicted error of the output, about, at which all sites are split at once."""

MOST_COHERENT = 3.0
"""Most that errors of all sites together are taken to be larger, or smaller, than predicted."""

LEAST_SHARE = 0.1
"""Least share of an observed output error that is ascribed to the injection, not to rounding."""


def measure_gains(
    runner: Runner, references: Sequence[Dense], progress: Progress, journal: Journal
) -> tuple[dict[str, Array], float]:
    """Gain of every head by timestep bucket, and the output error with everything exact (rounding).

    A gain is the relative error of the model's output over the relative error of the site's output
    that caused it; without unit. Squares of the errors that heads cause are taken to add up; where
    all of them together cause more, as errors that point the same way do, or less, all gains of the
    timestep bucket are raised or lowered. references: of `probed_samples`.
    Returns {site: (buckets, H)} and the rounding error.
    """
    session, sites = runner.session, list(runner.session.measurable().values())
    samples, units = runner.samples, probe_units(sites)
    squares: list[dict[tuple[int, int], list[float]]] = [{} for _ in range(samples.buckets)]
    roundings = []
    with progress.phase("probing gains", len(references) * (len(units) + 3)) as step:
        for number, reference in enumerate(references):
            sample = reference.sample
            exact = journal.find(f"rounding/{number}")
            if exact is None:
                session.budgets = {site.name: torch.zeros(site.heads) for site in sites}
                output = runner.run(sample, "split")
                exact = journal.keep(f"rounding/{number}", reference.error_of(output))
            rounding = float(exact.facts)
            roundings.append(rounding)
            step(2)
            for index, head in units:
                key = f"gain/{number}/{index}/{head}"
                found = journal.find(key) or journal.keep(
                    key, _inject(session, sites[index], head, runner, reference)
                )
                step()
                injected, error = found.facts
                if injected < 1e-14:
                    continue
                caused = max(above(error, rounding), 1e-12 * injected)
                known = squares[samples.bucket(sample)]
                known.setdefault((index, head), []).append(caused / injected)
        every = [value for bucket in squares for row in bucket.values() for value in row]
        if every and max(every) <= 1e-12:
            raise CalibrationError(
                "errors injected at the attention sites do not change the model's output: it does "
                "not depend on them. Calibrate with the output that you will use"
            )
        # The target is a mean square over samples, so squares are averaged, not logarithms.
        rows = []
        for bucket in squares:
            logs = {unit: 0.5 * math.log(sum(x) / len(x)) for unit, x in bucket.items()}
            rows.append(spread_gains(sites, logs))
        ratios: list[list[float]] = [[] for _ in rows]
        for number, reference in enumerate(references):
            bucket_of = samples.bucket(reference.sample)
            threshold, predicted = together(sites, rows[bucket_of], bucket_of)
            key = f"together/{number}/{threshold:.6g}"
            entry = journal.find(key)
            if entry is None:
                session.budgets = {s.name: torch.full((s.heads,), threshold) for s in sites}
                entry = journal.keep(key, reference.error_of(runner.run(reference.sample, "split")))
            step()
            ratios[bucket_of].append(above(float(entry.facts), roundings[number]) / predicted)
    bounds = MOST_COHERENT**-2, MOST_COHERENT**2
    scales = [float(np.sqrt(np.clip(np.mean(x), *bounds))) if x else 1.0 for x in ratios]
    gains = {
        site.name: np.stack([s * row[site.name] for s, row in zip(scales, rows, strict=True)])
        for site in sites
    }
    return gains, max(roundings, default=0.0)


def above(error: float, rounding: float) -> float:
    """Squared error of the output that is not rounding."""
    return max(error**2 - rounding**2, LEAST_SHARE * error**2)


def nearest(values: Sequence[float] | Array, wanted: float) -> int:
    """Index of the value with the ratio nearest to 1."""
    return int(np.abs(np.log(np.maximum(values, 1e-30)) - math.log(wanted)).argmin())


def together(sites: list[Measured], gains: dict[str, Array], bucket: int) -> tuple[float, float]:
    """One threshold for everything, and the squared error of the output predicted for it.

    gains: (H,) by site, in the timestep bucket. The threshold is the rung whose predicted error is
    nearest to TOGETHER: about what budgets will be, and not where errors saturate.
    """
    predicted = np.zeros(len(THRESHOLDS))
    for site in sites:
        curve = site.buckets.get(bucket, site.total()).mean("site")[0].numpy()
        predicted += curve @ np.square(gains[site.name])
    rung = nearest(predicted, TOGETHER**2)
    return THRESHOLDS[rung], max(float(predicted[rung]), 1e-30)


class Dense:
    """The dense output for a sample, computed when it is first needed."""

    def __init__(self, runner: Runner, sample: Sample) -> None:
        self.runner, self.sample = runner, sample
        self._output: list[Tensor] | None = None

    @property
    def output(self) -> list[Tensor]:
        """The dense output."""
        if self._output is None:
            self._output = self.runner.run(self.sample, "dense")
        return self._output

    def error_of(self, output: list[Tensor]) -> float:
        """Relative L2 error of another output."""
        return relative_error(output, self.output)


def _inject(
    session: Session, site: Measured, head: int, runner: Runner, reference: Dense
) -> tuple[float, float]:
    """Squared relative error put into a site, and the relative error that reaches the output."""
    session.probed, session.probed_head, session.probe_error = site.name, head, None
    session.budgets = {site.name: probe_budget(site)}
    output = runner.run(reference.sample, "probe")
    if session.probe_error is None:
        return 0.0, 0.0
    return float(session.probe_error), reference.error_of(output)


def probed_samples(samples: SampleSet, most: int = MAX_PROBED_SAMPLES) -> list[Sample]:
    """At most so many fitted samples, evenly spaced within each timestep bucket, one at least."""
    used = []
    for bucket in range(samples.buckets):
        inside = [sample for sample in samples.fit if samples.bucket(sample) == bucket]
        count = min(len(inside), max(1, most // samples.buckets))
        middles = (np.arange(count) + 0.5) * len(inside) / count
        used += [inside[int(middle)] for middle in middles]
    return used


def probe_units(sites: list[Measured]) -> list[tuple[int, int]]:
    """(site, head) for every head of a small model; (site, -1), all heads at once, for a large."""
    if sum(site.heads for site in sites) <= MAX_PROBED_HEADS:
        return [(index, head) for index, site in enumerate(sites) for head in range(site.heads)]
    chosen = {round(x) for x in np.linspace(0, len(sites) - 1, MAX_PROBED_SITES)}
    return [(index, -1) for index in sorted(chosen)]


def spread_gains(sites: list[Measured], logs: dict[tuple[int, int], float]) -> dict[str, Array]:
    """Gains of all heads from the logarithms of those probed, interpolated over depth."""
    if not logs:
        return {site.name: np.full(site.heads, len(sites) ** -0.5) for site in sites}
    by_site: dict[int, list[float]] = {}
    for (index, _), value in logs.items():
        by_site.setdefault(index, []).append(value)
    known = sorted(by_site)
    means = [sum(by_site[index]) / len(by_site[index]) for index in known]
    every = np.interp(np.arange(len(sites)), known, means)
    return {
        site.name: np.exp([logs.get((index, head), every[index]) for head in range(site.heads)])
        for index, site in enumerate(sites)
    }


def probe_budget(site: Measured) -> Tensor:
    """Budget (H,) that gives every head about PROBE_DENSITY."""
    density = site.total().mean("density")
    return torch.tensor(THRESHOLDS)[(density - PROBE_DENSITY).abs().argmin(0)]
