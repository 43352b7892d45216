"""Ways to choose budgets: with all ingredients of calibration, with all but one, with none."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch

import freqopt
from benchmarks.calibration_bench import Bench, Budgets
from freqopt.calibration.calibrate import Calibration
from freqopt.calibration.checkpoint import Journal
from freqopt.calibration.runner import opened
from freqopt.calibration.search.allocate import (
    Array,
    CostModel,
    SiteChoices,
    solve_density,
)
from freqopt.calibration.search.choices import site_choices
from freqopt.calibration.search.refine import MAX_REFINED_SAMPLES, Refinement, best_at_density
from freqopt.calibration.search.sensitivity import Dense, probed_samples
from freqopt.calibration.search.strategies import Way
from freqopt.calibration.search.verify import budgets
from freqopt.calibration.search.video import GeneratedVideo, weighed_ways
from freqopt.progress import Progress

ALL, UNIFORM, NO_PROBES = "calibrated", "one threshold for all", "without probes"
BY_VIDEO = "timesteps weighed by the video"

WEIGHED_SEED = 1000
"""Of the video that timesteps are weighed by: one of the two that calibration samples come from."""


@dataclass(frozen=True)
class Variant:
    """A way to choose budgets: from a predicted mean density to them. probes: of the op's calls."""

    name: str
    budgets_at: Callable[[float], Budgets]
    probes: int = freqopt.config.DEFAULT_PROBES


def allocated(sites: Sequence[SiteChoices], cost: CostModel, density: float) -> Budgets:
    """The allocation with a predicted density; every site is split, as with `target_density`."""
    forced = [replace(site, forced=True) for site in sites]
    return budgets(forced, solve_density(forced, density, cost))


def uniform(sites: Sequence[SiteChoices], density: float) -> Budgets:
    """One threshold for every head, site and timestep."""
    means = np.mean(
        [(s.weight[:, None] * s.density[:, 1:]).sum(0) / s.heads for s in sites], axis=0
    )
    at = np.interp(-math.log(density), -np.log(means), np.log(sites[0].threshold[1:]))
    return {s.name: torch.full((len(s.shares), s.heads), math.exp(at)) for s in sites}


def tied(site: SiteChoices, group: Array) -> SiteChoices:
    """The same site where rows of one group must make the same choice. group: (R,) labels."""
    density, error, damage = site.density.copy(), site.error.copy(), site.damage.copy()
    for label in np.unique(group):
        rows = group == label
        share = site.weight[rows] / site.weight[rows].sum()
        density[rows] = share @ site.density[rows]
        error[rows] = np.outer(share, site.error[rows].sum(0))
        damage[rows] = np.outer(share, site.damage[rows].sum(0))
    return replace(site, density=density, error=error, damage=damage)


def heads_tied(site: SiteChoices) -> SiteChoices:
    """One choice for all heads of a site."""
    return tied(site, np.repeat(np.arange(len(site.shares)), site.heads))


def timesteps_tied(site: SiteChoices) -> SiteChoices:
    """One choice for all timesteps of a head."""
    return tied(site, np.tile(np.arange(site.heads), len(site.shares)))


def without_bias_weight(site: SiteChoices) -> SiteChoices:
    """The same site where a bias counts no more than noise."""
    return replace(site, damage=site.error)


@dataclass
class Refined:
    """Refinement at each of some densities, as `freqopt.calibrate(target_density=...)` does it.

    And the way that is best in calls of the model, and the one that is best in the video.
    """

    refinement: Refinement
    sites: list[SiteChoices]
    densities: Sequence[float]
    video: GeneratedVideo
    known: dict[float, Way] = field(default_factory=dict)
    known_video: dict[float, Way] = field(default_factory=dict)

    def nearest(self, density: float) -> float:
        """The density, of those refined at, whose ways serve another."""
        return min(self.densities, key=lambda known: abs(math.log(known / density)))

    def ways(self, density: float) -> list[Way]:
        """Ways for a density."""
        forced = [replace(site, forced=True) for site in self.sites]
        return self.refinement.ways_at_density(forced, density)

    def way(self, density: float) -> Way:
        """The way that is best in calls of the model."""
        at = self.nearest(density)
        if at not in self.known:
            r = self.refinement
            best = best_at_density(self.ways(at), r.fitted(1.0), at, r.cost, r.progress)[0].way
            print(f"at a density of {at:g} in calls: {best.name}", flush=True)
            self.known[at] = best
        return self.known[at]

    def way_by_video(self, density: float) -> Way:
        """The way that is best in the video."""
        at = self.nearest(density)
        if at not in self.known_video:
            r, ways = self.refinement, self.ways(at)
            allocation = ways[-1].solve_density(at, r.cost)
            weighed = weighed_ways(r, self.video, ways[-1], allocation)
            every = [*ways[:2], ways[-1], *weighed]
            best = best_at_density(every, self.video, at, r.cost, r.progress)[0].way
            print(f"at a density of {at:g} in the video: {best.name}", flush=True)
            self.known_video[at] = best
        return self.known_video[at]


def of_way(
    way_at: Callable[[float], Way],
    cost: CostModel,
    density: float,
    change: Callable[[SiteChoices], SiteChoices] | None = None,
) -> Budgets:
    """Budgets of a way with a predicted density, its sites changed."""
    way = way_at(density)
    if change is not None:
        way = replace(way, sites=[change(site) for site in way.sites], around=None)
    return budgets(way.sites, way.solve_density(density, cost))


def make_variants(
    bench: Bench,
    calibration: Calibration,
    sites: list[SiteChoices],
    densities: Sequence[float],
    bars: Progress,
) -> list[Variant]:
    """All ways to choose budgets, those to compare with first. sites: of the calibration.

    densities: those to refine at.
    """
    runner, cost = calibration.runner, bench.cost
    counts = runner.samples.bucket_samples
    measured = runner.session.measurable()
    level = {name: np.ones_like(gains) for name, gains in calibration.gains.items()}
    unweighted = [site_choices(site, level[name], counts) for name, site in measured.items()]
    journal = Journal(None, "")
    video = GeneratedVideo(bench.runner, bench.pipeline(WEIGHED_SEED), 20.0, journal)
    used = probed_samples(runner.samples, MAX_REFINED_SAMPLES)
    references = [Dense(bench.runner, sample) for sample in used]
    refinement = Refinement(bench.runner, cost, bars, journal, references)
    refined = Refined(refinement, sites, densities, video)
    changed = {
        "without budgets per head": heads_tied,
        "without budgets per timestep": timesteps_tied,
    }
    alone = {
        "without marginals": sites,
        "without marginals and downstream gains": unweighted,
        "without marginals and bias weight": [without_bias_weight(site) for site in sites],
    }
    return [
        Variant(ALL, partial(of_way, refined.way, cost)),
        Variant(UNIFORM, partial(uniform, sites)),
        Variant(BY_VIDEO, partial(of_way, refined.way_by_video, cost)),
        *(
            Variant(name, partial(of_way, refined.way, cost, change=change))
            for name, change in changed.items()
        ),
        *(Variant(name, partial(allocated, chosen, cost)) for name, chosen in alone.items()),
    ]


def variant_without_probes(bench: Bench, calibration: Calibration, bars: Progress) -> Variant:
    """The op without its probes, its curves measured anew; the gains are those of `calibration`."""
    samples = calibration.runner.samples
    with opened(bench.model, samples, None, 0) as runner:
        runner.session.probes = 0
        bare = Calibration(runner, bars, Journal(None, ""))
        bare.measure()
        sites = [
            site_choices(site, calibration.gains[name], samples.bucket_samples)
            for name, site in runner.session.measurable().items()
        ]
    return Variant(NO_PROBES, partial(allocated, sites, bench.cost), probes=0)
