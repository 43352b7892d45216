"""Sensitivities: how much of an error at a site, or at a head, reaches the model's output.

A site's error is damped or amplified by its output projection and by everything after it. So errors
are injected one at a time, and the model's output is compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from freqopt.calibration.measure.ladder import THRESHOLDS, Array
from freqopt.calibration.measure.readings import MeasuredSite
from freqopt.calibration.measure.requests import Dense, Inject, SiteThresholds
from freqopt.calibration.runner import Replays
from freqopt.calibration.samples import Sample, SampleSet
from freqopt.calibration.search.workbench import Reference, Workbench
from freqopt.errors import CalibrationError

MAX_PROBED_HEADS = 64
"""Up to as many heads in the whole model are probed one by one; with more, sites are."""

MAX_PROBED_SITES = 16
"""Sites probed in a large model, evenly spaced; those between are interpolated over depth."""

MAX_PROBED_SAMPLES = 8
"""Samples for sensitivities, shared out among the timestep buckets (one each at least)."""

PROBE_DENSITY = 0.05
"""Density whose errors are injected."""

FIXED_RUNS = 2
"""Runs of a sample beside those with injections: everything exact, and everything split."""

SLOW_PASS, PASSES_WHEN_SLOW = 1.0, 30
"""Seconds from which a run of the model is dear, and runs spent on sensitivities and marginals
there, where no number is asked for; elsewhere as many as they take."""

TOGETHER = 0.02
"""Predicted error of the output, about, at which all sites are split at once."""

MOST_COHERENT = 3.0
"""Most that errors of all sites together are taken to be larger, or smaller, than predicted."""

LEAST_SHARE = 0.1
"""Least share of an observed output error that is ascribed to the injection, not to rounding."""


class Probing:
    """Runs with errors injected, and what they tell of every timestep bucket.

    squares: by bucket and (site, head), squared sensitivities of the samples there. roundings: of
    each reference, the output error with everything exact.
    """

    def __init__(self, bench: Workbench, references: Sequence[Reference]) -> None:
        self.bench, self.references = bench, references
        self.sites = list(bench.survey.measurable().values())
        self.squares: list[dict[tuple[int, int], list[float]]] = [
            {} for _ in range(bench.samples.buckets)
        ]
        self.roundings: list[float] = []

    def rounding(self, number: int) -> None:
        """Run a reference with everything exact."""
        exact = {
            site.name: SiteThresholds(torch.zeros(site.heads, dtype=torch.float32, device="cpu"))
            for site in self.sites
        }
        self.roundings.append(
            self.bench.kept(
                f"rounding/{number}",
                lambda: self.bench.split_error(self.references[number], exact),
            )
        )

    def inject(self, number: int, unit: tuple[int, int], replays: Replays) -> None:
        """Run a reference with errors injected at a unit of `probe_units`."""
        reference, (index, head) = self.references[number], unit
        injected, error = self.bench.kept(
            f"sensitivity/{number}/{index}/{head}",
            lambda: self._injected(reference, replays, self.sites[index], head),
        )
        if injected < 1e-14:
            return
        caused = max(above(error, self.roundings[number]), 1e-12 * injected)
        row = self.squares[self.bench.samples.bucket(reference.sample)]
        row.setdefault(unit, []).append(caused / injected)

    def _injected(
        self, reference: Reference, replays: Replays, site: MeasuredSite, head: int
    ) -> tuple[float, float]:
        """Squared relative error put into a site, and the relative error of the output."""
        result = replays.run(site.name, Inject(site.name, head, probe_threshold(site)))
        self.bench.survey.add_sites({}, result.failures)
        if result.injected is None:
            return 0.0, 0.0
        return float(result.injected), reference.error_of(result.output)

    def rows(self, *, pooled: bool) -> list[dict[str, Array]]:
        """Sensitivities (H,) by bucket and site, from squares: the target is a mean square.

        pooled: those of all buckets serve each of them.
        """
        rows, squares = [], self.squares
        if pooled:
            together: dict[tuple[int, int], list[float]] = {}
            for bucket in squares:
                for unit, values in bucket.items():
                    together.setdefault(unit, []).extend(values)
            squares = [together] * len(squares)
        for bucket in squares:
            logs = {unit: 0.5 * math.log(sum(x) / len(x)) for unit, x in bucket.items()}
            rows.append(spread_over_depth(self.sites, logs))
        return rows

    def excess(self, number: int, rows: Sequence[dict[str, Array]]) -> tuple[int, float]:
        """Bucket of a reference, and its squared error over the predicted one, everything split."""
        reference = self.references[number]
        bucket = self.bench.samples.bucket(reference.sample)
        threshold, predicted = together(self.sites, rows[bucket], bucket)
        every = {
            site.name: SiteThresholds(
                torch.full((site.heads,), threshold, dtype=torch.float32, device="cpu")
            )
            for site in self.sites
        }
        error = self.bench.kept(
            f"together/{number}/{threshold:.6g}",
            lambda: self.bench.split_error(reference, every),
        )
        return bucket, above(error, self.roundings[number]) / predicted


def share_out(
    units: Sequence[tuple[int, int]], references: int, passes: int | None
) -> list[list[tuple[int, int]]]:
    """Units to inject errors at in each reference, so that runs come to at most so many passes.

    A reference takes two more runs. Where not all units can be probed in all references, those
    probed are evenly spaced and take turns; references that no passes are left for have none.
    """
    whole = [list(units) for _ in range(references)]
    if passes is None or references * (len(units) + FIXED_RUNS) <= passes:
        return whole
    used = min(references, max(1, passes // (2 * FIXED_RUNS)))
    left = max(passes - FIXED_RUNS * used, 1)
    spaced = {round(x) for x in np.linspace(0, len(units) - 1, min(left, len(units)))}
    chosen = [units[at] for at in sorted(spaced)]
    shares: list[list[tuple[int, int]]] = [[] for _ in range(used)]
    for run in range(min(left, used * len(chosen))):
        turn, at = divmod(run, len(chosen))
        shares[(at + turn) % used].append(chosen[at])
    return shares


def measure_sensitivities(
    bench: Workbench, references: Sequence[Reference], passes: int | None = None
) -> tuple[dict[str, Array], float]:
    """Sensitivity of every head by timestep bucket, and the output error with everything exact.

    A sensitivity is the relative error of the model's output over the relative error of the site's
    output that caused it; without unit. Squares of the errors that heads cause are taken to add up;
    where all of them together cause more, as errors that point the same way do, or less, all
    sensitivities of the timestep bucket are raised or lowered. references: of `probed_samples`.
    passes: runs of the model that may be spent, beside the dense ones; None: any number. With too
    few for all heads, samples take turns, and what they tell serves all timestep buckets.
    Returns {site: (buckets, H)} and the rounding error.
    """
    probing = Probing(bench, references)
    units = probe_units(probing.sites)
    shares = share_out(units, len(references), passes)
    if len(shares) < len(references):
        at = np.linspace(0, len(references) - 1, len(shares)).round()
        probing.references = [references[int(i)] for i in at]
    pooled, numbers = shares != [units] * len(references), range(len(shares))
    total = sum(map(len, shares)) + 3 * len(shares)
    with bench.progress.phase("probing sensitivities", total) as step:
        for number in numbers:
            probing.rounding(number)
            step(2)
            replays = bench.replays(probing.references[number], Dense())
            for unit in shares[number]:
                probing.inject(number, unit, replays)
                step()
        every = [value for bucket in probing.squares for row in bucket.values() for value in row]
        if every and max(every) <= 1e-12:
            raise CalibrationError(
                "errors injected at the attention sites do not change the model's output: it does "
                "not depend on them. Calibrate with the output that you will use"
            )
        rows = probing.rows(pooled=pooled)
        ratios: list[list[float]] = [[] for _ in rows]
        for number in numbers:
            bucket, ratio = probing.excess(number, rows)
            ratios[bucket].append(ratio)
            step()
    bounds = MOST_COHERENT**-2, MOST_COHERENT**2
    fallback = [x for row in ratios for x in row] if pooled else [1.0]
    scales = [float(np.sqrt(np.clip(np.mean(x or fallback), *bounds))) for x in ratios]
    sensitivities = {
        site.name: np.stack([s * row[site.name] for s, row in zip(scales, rows, strict=True)])
        for site in probing.sites
    }
    return sensitivities, max(probing.roundings, default=0.0)


def above(error: float, rounding: float) -> float:
    """Squared error of the output that is not rounding."""
    return max(error**2 - rounding**2, LEAST_SHARE * error**2)


def nearest(values: Sequence[float] | Array, wanted: float) -> int:
    """Index of the value with the ratio nearest to 1."""
    return int(np.abs(np.log(np.maximum(values, 1e-30)) - math.log(wanted)).argmin())


def together(
    sites: list[MeasuredSite], sensitivities: dict[str, Array], bucket: int
) -> tuple[float, float]:
    """One threshold for everything, and the squared error of the output predicted for it.

    sensitivities: (H,) by site, in the timestep bucket. The threshold is the rung whose predicted
    error is nearest to TOGETHER: about what thresholds will be, and not where errors saturate.
    """
    predicted = np.zeros(len(THRESHOLDS))
    for site in sites:
        curve = site.buckets.get(bucket, site.total()).mean("site").numpy()
        predicted += curve @ np.square(sensitivities[site.name])
    rung = nearest(predicted, TOGETHER**2)
    return THRESHOLDS[rung], max(float(predicted[rung]), 1e-30)


def probed_samples(samples: SampleSet, most: int = MAX_PROBED_SAMPLES) -> list[Sample]:
    """At most so many fitted samples, evenly spaced within each timestep bucket, one at least."""
    used = []
    for bucket in range(samples.buckets):
        inside = [sample for sample in samples.fit if samples.bucket(sample) == bucket]
        count = min(len(inside), max(1, most // samples.buckets))
        middles = (np.arange(count) + 0.5) * len(inside) / count
        used += [inside[int(middle)] for middle in middles]
    return used


def probe_units(sites: list[MeasuredSite]) -> list[tuple[int, int]]:
    """(site, head) for every head of a small model; (site, -1), all heads at once, for a large."""
    if sum(site.heads for site in sites) <= MAX_PROBED_HEADS:
        return [(index, head) for index, site in enumerate(sites) for head in range(site.heads)]
    chosen = {round(x) for x in np.linspace(0, len(sites) - 1, MAX_PROBED_SITES)}
    return [(index, -1) for index in sorted(chosen)]


def spread_over_depth(
    sites: list[MeasuredSite], logs: dict[tuple[int, int], float]
) -> dict[str, Array]:
    """Sensitivities of all heads from the logarithms of those probed, interpolated over depth."""
    if not logs:
        return {site.name: np.full(site.heads, len(sites) ** -0.5) for site in sites}
    by_site: dict[int, list[float]] = {}
    for (index, _), value in logs.items():
        by_site.setdefault(index, []).append(value)
    probed = sorted(by_site)
    means = [sum(by_site[index]) / len(by_site[index]) for index in probed]
    every = np.interp(np.arange(len(sites)), probed, means)
    return {
        site.name: np.exp([logs.get((index, head), every[index]) for head in range(site.heads)])
        for index, site in enumerate(sites)
    }


def probe_threshold(site: MeasuredSite) -> Tensor:
    """Thresholds (H,) that give every head about PROBE_DENSITY."""
    density = site.total().mean("density")
    return torch.tensor(THRESHOLDS, dtype=torch.float32, device="cpu")[
        (density - PROBE_DENSITY).abs().argmin(0)
    ]
