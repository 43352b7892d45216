"""Sensitivities: how much of an error at a site, or at a head, reaches the model's output.

A site's error is damped or amplified by its output projection and by everything after it. So errors
are injected, one at a time or many with random signs, and the model's output is compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from freqopt.calibration.measure.ladder import Array
from freqopt.calibration.measure.readings import MeasuredSite
from freqopt.calibration.measure.requests import Dense
from freqopt.calibration.samples import Sample, SampleSet
from freqopt.calibration.search.probing import Probing
from freqopt.calibration.search.signed import scheme_of
from freqopt.calibration.search.workbench import Reference, Workbench
from freqopt.errors import CalibrationError

MAX_PROBED_HEADS = 64
"""Up to as many heads in the whole model are probed one by one, where no passes are given."""

MAX_PROBED_SITES = 16
"""Sites whose marginals are probed in a large model, evenly spaced; those between are interpolated
over depth."""

MAX_PROBED_SAMPLES = 8
"""Samples for sensitivities, shared out among the timestep buckets (one each at least)."""

FIXED_RUNS = 2
"""Runs of a sample beside those with injections: everything exact, and everything split."""

TRIED_RUNS = 2
"""Runs that it takes to try whether the model can be run in part."""

MOST_PASSES = 80
"""Runs for the sensitivities of models of more than MAX_PROBED_HEADS heads, if they are quick."""

SLOW_PASS, PASSES_WHEN_SLOW = 1.0, 26
"""Seconds from which a run of the model is dear, and runs spent on sensitivities and marginals
there, where no number is asked for; elsewhere as many as they take. With the four or so that
strategies are compared by they are 30."""

MOST_COHERENT = 3.0
"""Most that errors of all sites together are taken to be larger, or smaller, than predicted."""


class Sensitivities(NamedTuple):
    """What `measure_sensitivities` finds.

    values: {site: (buckets, H)}. rounding: relative error of the output with everything exact.
    passes: runs that it takes. deviation: mean standard error relative to the value, where it was
    estimated from signed runs; None where every head was probed alone. notes: what the plan should
    say.
    """

    values: dict[str, Array]
    rounding: float
    passes: float
    deviation: float | None
    notes: list[str]


def shares_behind(bench: Workbench, reference: Reference) -> tuple[list[float], bool]:
    """Part of a run that each site's own runs take, and whether the model can be run in part.

    Where it must be run whole the parts are 1.
    """
    names = list(bench.survey.measurable())

    def look() -> tuple[list[float], bool]:
        held = bench.runner.hold(reference.sample)
        shares = [1.0 if held is None else held.staged.share(name) for name in names]
        return shares, held is not None

    shares, in_parts = bench.kept("parts of a run", look)
    return shares, in_parts


def measure_sensitivities(
    bench: Workbench, references: Sequence[Reference], passes: int | None = None
) -> Sensitivities:
    """Sensitivity of every head by timestep bucket, and the output error with everything exact.

    A sensitivity is the relative error of the model's output over the relative error of the site's
    output that caused it; without unit. Squares of the errors that heads cause are taken to add up;
    where all of them together cause more, as errors that point the same way do, or less, all
    sensitivities of the timestep bucket are raised or lowered. references: of `probed_samples`.
    passes: runs of the model that may be spent, beside the dense ones; None: as many as all heads
    take alone, or MOST_PASSES for a model of many heads. With too few for all heads alone, errors
    of many are injected at once, with random signs.
    """
    probing = Probing(bench, references)
    heads = [site.heads for site in probing.sites]
    shares, in_parts = shares_behind(bench, references[0])
    if passes is None and sum(heads) > MAX_PROBED_HEADS:
        passes = MOST_PASSES
    scheme = scheme_of(
        heads, shares, len(references), None if passes is None else passes - TRIED_RUNS, FIXED_RUNS
    )
    alone = [(index, head) for index, count in enumerate(heads) for head in range(count)]
    of_one = sum(g.draws for each in scheme.groups for g in each)
    total = len(scheme.references) * 3 + (of_one or len(scheme.references) * len(alone))
    with bench.progress.phase("probing sensitivities", total) as step:
        for at, number in enumerate(scheme.references):
            probing.rounding(number)
            step(2)
            replays = bench.replays(references[number], Dense())
            for group in scheme.groups[at] if scheme.groups else ():
                probing.draw(number, group, replays)
                step(group.draws)
            for index, head in () if scheme.groups else alone:
                probing.inject(number, index, head, replays)
                step()
        check_reached(probing)
        pooled = len(scheme.references) < len(references)
        rows, deviation = (
            probing.estimated() if scheme.groups else (probing.rows(pooled=pooled), None)
        )
        ratios: list[list[float]] = [[] for _ in rows]
        for number in scheme.references:
            bucket, ratio = probing.excess(number, rows)
            ratios[bucket].append(ratio)
            step()
    bounds = MOST_COHERENT**-2, MOST_COHERENT**2
    fallback = [x for row in ratios for x in row] if pooled else [1.0]
    scales = [float(np.sqrt(np.clip(np.mean(x or fallback), *bounds))) for x in ratios]
    values = {
        site.name: np.stack([s * row[site.name] for s, row in zip(scales, rows, strict=True)])
        for site in probing.sites
    }
    rounding = max(probing.roundings.values(), default=0.0)
    notes = []
    if not in_parts:
        notes.append(
            "the model cannot be run in part (its graph is in pieces, draws random numbers, or "
            "writes into what it computed before), so every run that probes it is a whole one"
        )
    spent = scheme.passes + TRIED_RUNS
    if deviation is not None:
        notes.append(
            f"sensitivities were estimated in {spent:.0f} runs of the model; their standard error "
            f"is {deviation:.0%}"
        )
    return Sensitivities(values, rounding, spent, deviation, notes)


def check_reached(probing: Probing) -> None:
    """Hold the model's output to depend on attention.

    Raises:
        CalibrationError: errors that were injected do not reach it.
    """
    every = [value for bucket in probing.squares for row in bucket.values() for value in row]
    every += [
        float(np.diag(each.products).max()) / max(float(each.weights.sum()), 1e-30)
        for each in probing.draws
    ]
    if every and max(every) <= 1e-12:
        raise CalibrationError(
            "errors injected at the attention sites do not change the model's output: it does "
            "not depend on them. Calibrate with the output that you will use"
        )


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
