"""Refinement: rounds of allocation and of marginals measured there, and the best of the ways.

Whatever is believed of errors, what budgets do is measured, on fitted samples or in the video, and
the way is taken that costs least at the target; one threshold for everything is always among them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from freqopt.calibration.checkpoint import Journal
from freqopt.calibration.runner import Runner
from freqopt.calibration.search.allocate import (
    Allocation,
    CostModel,
    SiteChoices,
    same_choices,
    total,
)
from freqopt.calibration.search.marginals import (
    Moves,
    Unit,
    coupled,
    couplings_of,
    marginal_ratio,
    marginal_units,
    measure_moves,
)
from freqopt.calibration.search.sensitivity import Array, Dense, probe_units
from freqopt.calibration.search.strategies import Way
from freqopt.calibration.search.verify import Criterion, OutputError, Verdict, budgets, mean_density
from freqopt.progress import Progress

logger = logging.getLogger(__name__)

ALONE, TIED = "heads one at a time", "one threshold for all"

ROUNDS = 3
"""Rounds of marginals, each as long as probing gains, in a model that is on a GPU and whose heads
are moved one by one; elsewhere one."""

ROUND_SAMPLES = (8, 8, 16)
"""Samples that heads are moved in, in each round, those of a timestep bucket in turn; the latest
that is known of every sample counts. Couplings carry over from round to round nearly as they are,
while those of samples differ a lot, so the first rounds take other samples instead of all."""

MAX_REFINED_SAMPLES = max(ROUND_SAMPLES)
"""Fitted samples that ways are made and compared on, shared out among the timestep buckets."""

REACH = (3.0, 2.0, 2.0)
"""Most that a density may change in each round: further away marginals tell nothing."""

SETTLED = 1.12
"""A trial whose error is within this factor of the wanted one is a working point."""

TRIES = 4
MOST_MOVED = 16.0
"""Trials of a way, and the most that one changes the predicted error by."""

FALL = 0.53
"""Power of the density that errors fall with, where two nearly equal densities are compared."""


@dataclass(frozen=True)
class Settled:
    """An allocation of a way near a target.

    predicted: what it was asked for. cost: by the cost model, at the densities that were measured,
    and carried to the target exactly.
    """

    way: Way
    allocation: Allocation
    verdict: Verdict
    predicted: float
    cost: float


def settle(
    way: Way, criterion: Criterion, cost: CostModel, start: float, tries: int = TRIES
) -> Settled:
    """Move the predicted error until the measured one is near the criterion's target."""
    predicted, target, low, high = start, criterion.target, 0.0, math.inf
    while True:
        allocation = way.solve(predicted, cost)
        verdict, tries = criterion.measure(budgets(way.sites, allocation)), tries - 1
        ratio = min(max(target / max(verdict.error, 1e-12), 1.0 / MOST_MOVED), MOST_MOVED)
        then = (predicted if ratio >= 1.0 else min(predicted, allocation.error)) * ratio
        if tries <= 0 or 1.0 / SETTLED < ratio < SETTLED:
            break
        if ratio >= 1.0:
            low = predicted
        else:
            high = min(predicted, allocation.error)
        predicted = then if low < then < high else math.sqrt(max(low, 1e-2 * high) * high)
    there = way.solve(then, cost)
    spent = spent_cost(way.sites, verdict, cost)
    if ratio < SETTLED:  # what is further from the target has nothing nearer to it
        spent *= there.cost / allocation.cost
    if ratio * SETTLED < 1.0 or (ratio < 1.0 and same_choices(there, allocation)):
        spent = math.inf  # it may not get there
    logger.info("%s: error %.3g at a cost of %.4g", way.name, verdict.error, spent)
    return Settled(way, allocation, verdict, then, spent)


def spent_cost(sites: Sequence[SiteChoices], verdict: Verdict, cost: CostModel) -> float:
    """Cost at the densities that were measured."""
    total = 0.0
    for site in sites:
        density = verdict.densities.get(site.name)
        if density is None:
            total += cost.dense(site.shape) * site.heads
        else:
            total += float(cost.split(site.shape, density.numpy()).sum())
    return total


@dataclass
class Refinement:
    """What rounds of refinement share. references: dense outputs of fitted samples.

    rounds: how many to make; None: as many as the model allows. moves: the latest that is known of
    each reference, by its number, where the units in `units` were moved.
    """

    runner: Runner
    cost: CostModel
    progress: Progress
    journal: Journal
    references: list[Dense]
    rounds: int | None = None
    units: list[Unit] = field(default_factory=list)
    moves: dict[int, Moves] = field(default_factory=dict)

    def fitted(self, target: float) -> OutputError:
        """The criterion that ways are compared by where the model's output counts."""
        samples = [reference.sample for reference in self.references]
        outputs = [reference.output for reference in self.references]
        return OutputError(self.runner, samples, outputs, target, self.journal, "fitted")

    def ways(self, sites: list[SiteChoices], target: float) -> list[Way]:
        """Ways to choose budgets for a relative error of the output.

        One threshold for all, as measured one head at a time, and one more with each round of
        marginals.
        """
        criterion, ways = self.fitted(target), simple_ways(sites)
        for number in range(self._rounds()):
            settled = settle(ways[-1], criterion, self.cost, ways[-1].start or criterion.start)
            reached = not number or math.isfinite(settled.cost)
            if not reached or not self._add_round(
                ways, settled.allocation, settled.verdict, number
            ):
                break
            ways[-1] = replace(ways[-1], start=target)
        return ways

    def ways_at_density(self, sites: list[SiteChoices], density: float) -> list[Way]:
        """The same for a mean density."""
        criterion, ways = self.fitted(1.0), simple_ways(sites)
        for number in range(self._rounds()):
            allocation = ways[-1].solve_density(density, self.cost)
            verdict = criterion.measure(budgets(sites, allocation))
            if not self._add_round(ways, allocation, verdict, number):
                break
        return ways

    def bucket_errors(self, sites: list[SiteChoices], allocation: Allocation) -> Array:
        """Squared relative error of the output by timestep bucket, with an allocation's budgets."""
        samples = self.runner.samples
        squares = np.square(self.fitted(1.0).measure(budgets(sites, allocation)).errors)
        of = np.array([samples.bucket(reference.sample) for reference in self.references])
        return np.array([squares[of == bucket].mean() for bucket in range(samples.buckets)])

    def _rounds(self) -> int:
        """Rounds to make: those asked for, or those that the model's size and device allow."""
        if self.rounds is not None:
            return self.rounds
        measured = list(self.runner.session.measurable().values())
        small = any(head >= 0 for _, head in probe_units(measured))
        return ROUNDS if small and self.runner.on_gpu else 1

    def _turn(self, number: int) -> list[int]:
        """The references of a round: of each timestep bucket as many, those that come next."""
        found: dict[int, list[int]] = {}
        for at, reference in enumerate(self.references):
            found.setdefault(self.runner.samples.bucket(reference.sample), []).append(at)
        shares = [max(1, most // len(found)) for most in ROUND_SAMPLES]
        at = min(number, len(shares) - 1)
        start, count = sum(shares[:at]), shares[at]
        return sorted(
            {inside[(start + i) % len(inside)] for inside in found.values() for i in range(count)}
        )

    def _moves(
        self, sites: list[SiteChoices], allocation: Allocation, errors: Sequence[float], number: int
    ) -> list[Moves]:
        """The latest moves of all references, those of this round's measured at an allocation.

        errors: of all references there.
        """
        units, turn = marginal_units(sites, allocation), self._turn(number)
        if not number or units != self.units:
            self.units, self.moves = units, {}
        found = measure_moves(
            self.runner, sites, allocation, self.references, errors, self.progress, self.journal,
            turn,
        )  # fmt: skip
        self.moves.update(zip(turn, found, strict=True))
        return list(self.moves.values())

    def _add_round(
        self, ways: list[Way], allocation: Allocation, verdict: Verdict, number: int
    ) -> bool:
        """Add the way that marginals at an allocation teach; not where nothing is split, or off."""
        if all(choice.dense for choice in allocation.choices) or verdict.error <= 0.0:
            return False
        sites = ways[0].sites
        moves = self._moves(sites, allocation, verdict.errors, number)
        couplings = couplings_of(sites, allocation, moves)
        believed = [coupled(site, c) for site, c in zip(sites, couplings, strict=True)]
        there = total(believed, allocation.choices, 0.0, self.cost).error
        factor = verdict.error / there if there > 0.0 else 1.0
        name = f"marginals, round {number + 1}"
        marginals = {
            site.name: marginal_ratio(site, choice, coupling)
            for site, choice, coupling in zip(sites, allocation.choices, couplings, strict=True)
            if not choice.dense
        }
        way = Way(name, believed, around=(allocation, REACH[min(number, 2)]), marginals=marginals)
        ways.append(way.scaled([factor] * len(believed)))
        return True


def simple_ways(sites: list[SiteChoices]) -> list[Way]:
    """What needs no more runs: one threshold for all, and errors as heads make them alone."""
    return [Way(TIED, sites, tied=True), Way(ALONE, sites)]


def cheapest(
    ways: Sequence[Way], criterion: Criterion, cost: CostModel, progress: Progress
) -> list[Settled]:
    """Ways near the criterion's target, that which costs least there first."""
    found: list[Settled] = []
    with progress.phase("comparing ways", len(ways)) as step:
        for way in ways:
            found.append(settle(way, criterion, cost, way.start or criterion.start))
            step()
    return sorted(found, key=lambda settled: settled.cost)


def best_at_density(
    ways: Sequence[Way], criterion: Criterion, density: float, cost: CostModel, progress: Progress
) -> list[Settled]:
    """Ways at a mean density, that with the least error there first."""
    found: list[tuple[float, Settled]] = []
    with progress.phase("comparing ways", len(ways)) as step:
        for way in ways:
            allocation = way.solve_density(density, cost)
            verdict = criterion.measure(budgets(way.sites, allocation))
            there = mean_density(way.sites, verdict.densities, cost)
            error = verdict.error * (there / density) ** FALL
            spent = spent_cost(way.sites, verdict, cost)
            found.append((error, Settled(way, allocation, verdict, allocation.error, spent)))
            logger.info("%s: error %.3g at a density of %.4g", way.name, verdict.error, there)
            step()
    return [settled for _, settled in sorted(found, key=lambda one: one[0])]
