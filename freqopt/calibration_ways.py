"""Ways to choose budgets: per head and timestep by what was measured, or one threshold for all.

What was measured is never all that counts, so ways are compared by what their budgets do, and one
threshold for everything is among them: no plan costs more than that does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from freqopt.calibration_allocation import (
    Allocation,
    CostModel,
    SiteChoices,
    solve,
    solve_density,
    uniform,
)


@dataclass(frozen=True)
class Way:
    """A way to choose budgets. sites: what there is to choose from, with the errors believed in.

    tied: one threshold for all heads, sites and timesteps. around: the allocation at which errors
    were looked into, and the factor within which densities must stay of its own: further away they
    are not known. start: predicted error to try first, where that is known.
    """

    name: str
    sites: list[SiteChoices]
    tied: bool = False
    around: tuple[Allocation, float] | None = None
    start: float | None = None

    def solve(self, target: float, cost: CostModel) -> Allocation:
        """The cheapest allocation of this way whose predicted error is within a target."""
        if not self.tied:
            return solve(self._open(), target, cost)
        return self._last_before(lambda found: found.error > target, cost)

    def solve_density(self, density: float, cost: CostModel) -> Allocation:
        """The allocation of this way with the least damage within a predicted density.

        Where even the loosest allocation needs more, that one.
        """
        if not self.tied:
            return solve_density(self._open(), density, cost)
        return self._last_before(lambda found: found.density <= density, cost, beyond=True)

    def scaled(self, factors: Sequence[float]) -> Way:
        """The same way where errors of every site are larger by a factor."""
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
        """From everything exact towards the loosest, one site at a time to the next threshold: the
        last allocation before `stop`, or the first at which it holds, found by bisection."""
        count = len(self.sites)
        low, high = 0, (int(np.flatnonzero(~self.sites[0].mid)[-1])) * count

        def at(position: int) -> Allocation:
            return uniform(self.sites, position // count, cost, looser=position % count)

        while low < high:
            middle = (low + high + 1 - beyond) // 2
            if stop(at(middle)):
                high = middle - (not beyond)
            else:
                low = middle + beyond
        return at(low)
