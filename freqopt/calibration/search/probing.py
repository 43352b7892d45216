"""Probing: runs with errors injected at heads, and what they tell of every timestep bucket."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from freqopt.calibration.measure.injections import INJECTED, Inject, Injection, one_head
from freqopt.calibration.measure.ladder import THRESHOLDS, Array
from freqopt.calibration.measure.readings import MeasuredSite
from freqopt.calibration.measure.requests import SiteThresholds
from freqopt.calibration.runner import Replays
from freqopt.calibration.search.signed import LEAST_SHARE, Draws, Group, estimate
from freqopt.calibration.search.workbench import Deviations, Reference, Workbench

PROBE_DENSITY = 0.05
"""Density whose errors are injected."""

TOGETHER = 0.02
"""Predicted error of the output, about, at which all sites are split at once."""


class Probing:
    """Runs with errors injected, and what they tell of every timestep bucket.

    squares: by bucket and (site, head), squared sensitivities of the samples there. draws: of runs
    with random signs. roundings: of each reference, the output error with everything exact.
    """

    def __init__(self, bench: Workbench, references: Sequence[Reference]) -> None:
        self.bench, self.references = bench, references
        self.sites = list(bench.survey.measurable().values())
        self.squares: list[dict[tuple[int, int], list[float]]] = [
            {} for _ in range(bench.samples.buckets)
        ]
        self.draws: list[Draws] = []
        self.roundings: dict[int, float] = {}

    def rounding(self, number: int) -> None:
        """Run a reference with everything exact."""
        exact = {
            site.name: SiteThresholds(torch.zeros(site.heads, dtype=torch.float32, device="cpu"))
            for site in self.sites
        }
        self.roundings[number] = self.bench.kept(
            f"rounding/{number}",
            lambda: self.bench.split_error(self.references[number], exact),
        )

    def inject(self, number: int, index: int, head: int, replays: Replays) -> None:
        """Run a reference with the error of one head injected."""
        reference, site = self.references[number], self.sites[index]
        request = Inject({site.name: Injection(probe_threshold(site), one_head(site.heads, head))})

        def run() -> tuple[float, float]:
            result = replays.run(site.name, request)
            self.bench.survey.add_sites({}, result.failures)
            if site.name not in result.injected:
                return 0.0, 0.0
            return float(result.injected[site.name].sum()), reference.error_of(result.output)

        injected, error = self.bench.kept(f"sensitivity/{number}/{index}/{head}", run)
        if injected < 1e-14:
            return
        caused = max(above(error, self.roundings[number]), 1e-12 * injected)
        row = self.squares[self.bench.samples.bucket(reference.sample)]
        row.setdefault((index, head), []).append(caused / injected)

    def draw(self, number: int, group: Group, replays: Replays) -> None:
        """Run a reference some times, with errors of random signs at all heads of a group."""
        reference, sites = self.references[number], self.sites[group.first : group.last]
        heads = [site.heads for site in sites]
        generator = np.random.default_rng([number, *group])
        signs = generator.choice([-1.0, 1.0], (group.draws, sum(heads)))
        level = INJECTED / len(sites) ** 0.5

        def run() -> tuple[list[float], list[list[float]]]:
            deviations = Deviations(reference)
            put_in = np.zeros(sum(heads))
            rows = np.zeros((group.draws, group.draws))
            for at, row in enumerate(signs):
                by_site = torch.tensor(row, dtype=torch.float32, device="cpu").split(heads)
                request = Inject(
                    {
                        site.name: Injection(probe_threshold(site), of)
                        for site, of in zip(sites, by_site, strict=True)
                    },
                    level,
                )
                result = replays.run(sites[0].name, request)
                self.bench.survey.add_sites({}, result.failures)
                rows[at, : at + 1] = rows[: at + 1, at] = deviations.add(result.output)
                nothing = torch.zeros(max(heads), dtype=torch.float32, device="cpu")
                found = [result.injected.get(s.name, nothing[: s.heads]) for s in sites]
                put_in += torch.cat(found).double().numpy() / group.draws
            return put_in.tolist(), rows.tolist()

        weights, products = self.bench.kept(f"signed/{number}/{'/'.join(map(str, group))}", run)
        self.draws.append(
            Draws(
                bucket=self.bench.samples.bucket(reference.sample),
                first=sum(site.heads for site in self.sites[: group.first]),
                signs=signs,
                weights=np.array(weights),
                products=np.array(products),
                rounding=self.roundings[number],
            )
        )

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

    def estimated(self) -> tuple[list[dict[str, Array]], float]:
        """Sensitivities (H,) by bucket and site from draws, and their mean standard error."""
        heads = [site.heads for site in self.sites]
        mean, deviation = estimate(self.draws, heads, self.bench.samples.buckets)
        ends = np.cumsum(heads)[:-1]
        rows = [
            {s.name: np.sqrt(x) for s, x in zip(self.sites, np.split(row, ends), strict=True)}
            for row in mean
        ]
        return rows, float((0.5 * deviation / mean).mean())

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
