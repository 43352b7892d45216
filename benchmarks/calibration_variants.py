"""Ways to choose thresholds: with all ingredients of calibration, with all but one, with none."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch

from benchmarks.calibration_bench import Bench
from freqopt.calibration.checkpoint import Checkpoint
from freqopt.calibration.measure.ladder import Array
from freqopt.calibration.measure.requests import SiteThresholds, Split, Thresholds
from freqopt.calibration.phases import Calibration
from freqopt.calibration.search.allocate import solve_density
from freqopt.calibration.search.choices import SiteChoices, site_choices
from freqopt.calibration.search.cost import CostModel
from freqopt.calibration.search.refine import Refinement, best_at_density
from freqopt.calibration.search.strategies import Strategy
from freqopt.calibration.search.verify import thresholds_of
from freqopt.calibration.search.video import GeneratedVideo, weighed_strategies
from freqopt.calibration.search.workbench import Workbench
from freqopt.calibration.survey import measure_sites
from freqopt.config import DEFAULT_PROBES

ALL, UNIFORM, NO_PROBES = "calibrated", "one threshold for all", "without probes"
BY_VIDEO = "timesteps weighed by the video"

WEIGHED_SEED = 1000
"""Of the video that timesteps are weighed by: one of the two that calibration samples come from."""


@dataclass(frozen=True)
class Variant:
    """A way to choose thresholds from a predicted mean density. probes: of the op's calls."""

    name: str
    thresholds_at: Callable[[float], Thresholds]
    probes: int = DEFAULT_PROBES

    def at(self, density: float) -> Split:
        """The request with a predicted mean density."""
        return Split(self.thresholds_at(density), self.probes)


def allocated(sites: Sequence[SiteChoices], cost: CostModel, density: float) -> Thresholds:
    """The allocation with a predicted density; every site is split, as with `target_density`."""
    forced = [replace(site, forced=True) for site in sites]
    return thresholds_of(forced, solve_density(forced, density, cost))


def uniform(sites: Sequence[SiteChoices], density: float) -> Thresholds:
    """One threshold for every head, site and timestep, by the grid."""
    ladder = slice(1, sites[0].ladder)
    means = np.mean(
        [(s.weight[:, None] * s.density[:, ladder]).sum(0) / s.heads for s in sites], axis=0
    )
    at = np.interp(-math.log(density), -np.log(means), np.log(sites[0].threshold[ladder]))
    return {
        s.name: SiteThresholds(torch.full((len(s.shares), s.heads), math.exp(at))) for s in sites
    }


def tied(site: SiteChoices, group: Array) -> SiteChoices:
    """The same site where rows of one group must make the same choice. group: (R,) labels."""
    density, error, weighted = (
        site.density.copy(),
        site.error.copy(),
        site.weighted_error.copy(),
    )
    for label in np.unique(group):
        rows = group == label
        share = site.weight[rows] / site.weight[rows].sum()
        density[rows] = share @ site.density[rows]
        error[rows] = np.outer(share, site.error[rows].sum(0))
        weighted[rows] = np.outer(share, site.weighted_error[rows].sum(0))
    return replace(site, density=density, error=error, weighted_error=weighted)


def heads_tied(site: SiteChoices) -> SiteChoices:
    """One choice for all heads of a site."""
    return tied(site, np.repeat(np.arange(len(site.shares)), site.heads))


def timesteps_tied(site: SiteChoices) -> SiteChoices:
    """One choice for all timesteps of a head."""
    return tied(site, np.tile(np.arange(site.heads), len(site.shares)))


def by_grid(site: SiteChoices) -> SiteChoices:
    """The same site with the grid's order for all heads."""
    own = slice(site.ladder)
    return replace(
        site,
        threshold=site.threshold[own],
        density=site.density[:, own],
        error=site.error[:, own],
        weighted_error=site.weighted_error[:, own],
        order=site.order[own],
    )


def without_bias_weight(site: SiteChoices) -> SiteChoices:
    """The same site where a bias counts no more than noise."""
    return replace(site, weighted_error=site.error)


@dataclass
class Refined:
    """Refinement at each of some densities, as `freqopt.calibrate(target_density=...)` does it.

    And the strategy that is best in calls of the model, and the one that is best in the video.
    """

    refinement: Refinement
    sites: list[SiteChoices]
    densities: Sequence[float]
    video: GeneratedVideo
    in_calls: dict[float, Strategy] = field(default_factory=dict)
    in_video: dict[float, Strategy] = field(default_factory=dict)

    def nearest(self, density: float) -> float:
        """The density, of those refined at, whose strategies serve another."""
        return min(self.densities, key=lambda refined: abs(math.log(refined / density)))

    def strategies(self, density: float) -> list[Strategy]:
        """Strategies for a density."""
        forced = [replace(site, forced=True) for site in self.sites]
        return self.refinement.strategies_at_density(forced, density)

    def strategy(self, density: float) -> Strategy:
        """The strategy that is best in calls of the model."""
        at = self.nearest(density)
        if at not in self.in_calls:
            r = self.refinement
            best = best_at_density(self.strategies(at), r.fitted(1.0), at, r.bench)[0].strategy
            print(f"at a density of {at:g} in calls: {best.name}", flush=True)
            self.in_calls[at] = best
        return self.in_calls[at]

    def strategy_by_video(self, density: float) -> Strategy:
        """The strategy that is best in the video."""
        at = self.nearest(density)
        if at not in self.in_video:
            r, strategies = self.refinement, self.strategies(at)
            allocation = strategies[-1].solve_density(at, r.bench.cost)
            weighed = weighed_strategies(r, self.video, strategies[-1], allocation)
            every = [*strategies[:2], strategies[-1], *weighed]
            best = best_at_density(every, self.video, at, r.bench)[0].strategy
            print(f"at a density of {at:g} in the video: {best.name}", flush=True)
            self.in_video[at] = best
        return self.in_video[at]


def of_strategy(
    strategy_at: Callable[[float], Strategy],
    cost: CostModel,
    density: float,
    change: Callable[[SiteChoices], SiteChoices] | None = None,
) -> Thresholds:
    """Thresholds of a strategy with a predicted density, its sites changed."""
    strategy = strategy_at(density)
    if change is not None:
        strategy = replace(strategy, sites=[change(site) for site in strategy.sites], around=None)
    return thresholds_of(strategy.sites, strategy.solve_density(density, cost))


def make_variants(
    bench: Bench, calibration: Calibration, densities: Sequence[float]
) -> list[Variant]:
    """All ways to choose thresholds, those to compare with first. densities: those to refine at."""
    work, sites = calibration.bench, calibration.sites
    cost, counts = work.cost, work.samples.bucket_samples
    unweighted = [
        site_choices(site, np.ones_like(calibration.sensitivities[name]), counts)
        for name, site in work.survey.measurable().items()
    ]
    video = GeneratedVideo(work, bench.pipeline(WEIGHED_SEED), 20.0)
    refined = Refined(calibration.refinement(), sites, densities, video)
    changed = {
        "without orders per head": by_grid,
        "without budgets per head": heads_tied,
        "without budgets per timestep": timesteps_tied,
    }
    alone = {
        "without marginals": sites,
        "without marginals and downstream gains": unweighted,
        "without marginals and bias weight": [without_bias_weight(site) for site in sites],
    }
    return [
        Variant(ALL, partial(of_strategy, refined.strategy, cost)),
        Variant(UNIFORM, partial(uniform, sites)),
        Variant(BY_VIDEO, partial(of_strategy, refined.strategy_by_video, cost)),
        *(
            Variant(name, partial(of_strategy, refined.strategy, cost, change=change))
            for name, change in changed.items()
        ),
        *(Variant(name, partial(allocated, chosen, cost)) for name, chosen in alone.items()),
    ]


def variant_without_probes(calibration: Calibration) -> Variant:
    """The op without its probes, its curves measured anew; the sensitivities are those known."""
    bench = calibration.bench
    bare = Workbench(bench.runner, bench.progress, Checkpoint(None, ""))
    measure_sites(bare, probes=0, orders=calibration.orders)
    sites = [
        site_choices(site, calibration.sensitivities[name], bench.samples.bucket_samples)
        for name, site in bare.survey.measurable().items()
    ]
    return Variant(NO_PROBES, partial(allocated, sites, bench.cost), probes=0)
