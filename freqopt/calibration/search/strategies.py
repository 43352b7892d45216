"""Strategies: thresholds per head and timestep by what was measured, or one threshold for all.

What was measured is never all that counts, so strategies are compared by what their thresholds do,
and one threshold for everything is among them: no plan costs more than that does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from freqopt.calibration.measure.ladder import Array
from freqopt.calibration.search.allocate import (
    Allocation,
    SiteChoice,
    solve,
    solve_density,
    split_cost,
    total,
)
from freqopt.calibration.search.choices import SiteChoices
from freqopt.calibration.search.cost import CostModel


@dataclass(frozen=True)
class Strategy:
    """A way to choose thresholds. sites: what there is to choose from, with the errors believed in.

    tied: one threshold for all heads, sites and timesteps. around: the allocation at which errors
    were looked into, and the factor within which densities must stay of its own: further away they
    are not known. start: predicted error to try first, where that is known. marginals: by site
    (buckets, H), see `SitePlan`.
    """

    name: str
    sites: list[SiteChoices]
    tied: bool = False
    around: tuple[Allocation, float] | None = None
    start: float | None = None
    marginals: Mapping[str, Array] = field(default_factory=dict)

    def solve(self, target: float, cost: CostModel) -> Allocation:
        """The cheapest allocation of this strategy whose predicted error is within a target."""
        if not self.tied:
            return solve(self._open(), target, cost)
        return self._last_before(lambda allocation: allocation.error > target, cost)

    def solve_density(self, density: float, cost: CostModel) -> Allocation:
        """The allocation of this strategy with the least error within a predicted density.

        Where even the loosest allocation needs more, that one.
        """
        if not self.tied:
            return solve_density(self._open(), density, cost)
        return self._last_before(
            lambda allocation: allocation.density <= density, cost, beyond=True
        )

    def scaled(self, factors: Sequence[float]) -> Strategy:
        """The same strategy where errors of every site are larger by a factor."""
        sites = [site.scaled(f) for site, f in zip(self.sites, factors, strict=True)]
        return replace(self, sites=sites)

    def _open(self) -> list[SiteChoices]:
        """The choices that may be taken."""
        if self.around is None:
            return self.sites
        allocation, factor = self.around
        return [
            site.near(choice.index, factor)
            for site, choice in zip(self.sites, allocation.choices, strict=True)
        ]

    def _last_before(
        self, stop: Callable[[Allocation], bool], cost: CostModel, *, beyond: bool = False
    ) -> Allocation:
        """From everything exact towards the loosest, one site at a time to the next threshold.

        The last allocation before `stop`, or `beyond` the first at which it holds, by bisection.
        """
        count = len(self.sites)
        low, high = 0, (self.sites[0].ladder - 1) * count

        def at(position: int) -> Allocation:
            return uniform(self.sites, position // count, cost, looser=position % count)

        while low < high:
            middle = (low + high + 1 - beyond) // 2
            if stop(at(middle)):
                high = middle - (not beyond)
            else:
                low = middle + beyond
        return at(low)


def uniform(
    sites: Sequence[SiteChoices], column: int, cost: CostModel, *, looser: int = 0
) -> Allocation:
    """One choice for all heads and timesteps; the first `looser` sites have the next choice.

    Sites where dense attention is cheaper stay dense. The multiplier is the reciprocal of the
    threshold, which says no more than which of two is stricter.
    """
    choices = []
    for at, site in enumerate(sites):
        chosen = column + (at < looser)
        index = np.full(len(site.density), chosen)
        cheaper = cost.dense(site.shape) * site.heads <= split_cost(site, index, cost)
        choices.append(SiteChoice(index, not chosen if site.forced else bool(cheaper)))
    strict, loose = sites[0].threshold[[column, column + bool(looser)]]
    share = looser / len(sites)
    threshold = float(strict) * (1.0 - share) + float(loose) * share
    return total(sites, choices, 1.0 / max(threshold, 1e-30), cost)
