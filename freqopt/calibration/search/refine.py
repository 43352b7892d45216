"""Refinement: rounds of allocation and of marginals measured there, and the best of the strategies.

Whatever is believed of errors, what thresholds do is measured, on fitted samples or in the video,
and the strategy is taken that costs least at the target; one threshold for everything is always
among them.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from freqopt.calibration.measure.ladder import Array
from freqopt.calibration.search.allocate import Allocation, order_cost, same_choices, total
from freqopt.calibration.search.choices import SiteChoices
from freqopt.calibration.search.cost import CostModel
from freqopt.calibration.search.marginals import (
    Neighbours,
    Unit,
    coupled,
    couplings_of,
    marginal_ratio,
    marginal_units,
    measure_neighbours,
)
from freqopt.calibration.search.sensitivity import probe_units
from freqopt.calibration.search.strategies import Strategy
from freqopt.calibration.search.verify import (
    ACCEPT,
    Criterion,
    OutputError,
    Verdict,
    mean_density,
    thresholds_of,
)
from freqopt.calibration.search.workbench import Reference, Workbench
from freqopt.plan.records import Comparison

logger = logging.getLogger(__name__)

ALONE, TIED = "heads one at a time", "one threshold for all"

ROUNDS = 3
"""Rounds of marginals, each as long as probing sensitivities, in a model that is on a GPU and whose
heads are moved one by one; elsewhere one."""

ROUND_SAMPLES = (8, 8, 16)
"""Samples that heads are moved in, in each round, those of a timestep bucket in turn; the latest
that is known of every sample counts. Couplings carry over from round to round nearly as they are,
while those of samples differ a lot, so the first rounds take other samples instead of all."""

MAX_REFINED_SAMPLES = max(ROUND_SAMPLES)
"""Fitted samples that strategies are made and compared on, shared out among timestep buckets."""

REACH = (3.0, 2.0, 2.0)
"""Most that a density may change in each round: further away marginals tell nothing."""

SETTLED = 1.12
"""A trial whose error is within this factor of the wanted one is a working point."""

TRIES = 4
MOST_MOVED = 16.0
"""Trials of a strategy, and the most that one changes the predicted error by."""

FALL = 0.53
"""Power of the density that errors fall with, where two nearly equal densities are compared."""


@dataclass(frozen=True)
class Candidate:
    """An allocation of a strategy near a target.

    predicted: what it was asked for. cost: by the cost model, at the densities that were measured,
    and carried to the target exactly.
    """

    strategy: Strategy
    allocation: Allocation
    verdict: Verdict
    predicted: float
    cost: float


def settle(
    strategy: Strategy, criterion: Criterion, cost: CostModel, start: float, tries: int = TRIES
) -> Candidate:
    """Move the predicted error until the measured one is near the criterion's target.

    Where the choices leave a gap around it, a trial that comes near from below counts.
    """
    predicted, target, low, high = start, criterion.target, 0.0, math.inf
    below: Candidate | None = None
    while True:
        allocation = strategy.solve(predicted, cost)
        verdict, tries = criterion.measure(thresholds_of(strategy.sites, allocation)), tries - 1
        ratio = min(max(target / max(verdict.error, 1e-12), 1.0 / MOST_MOVED), MOST_MOVED)
        then = (predicted if ratio >= 1.0 else min(predicted, allocation.error)) * ratio
        if 1.0 <= ratio <= 1.0 / ACCEPT:
            spent = spent_cost(strategy.sites, allocation, verdict, cost)
            below = Candidate(strategy, allocation, verdict, predicted, spent)
        if tries <= 0 or 1.0 / SETTLED < ratio < SETTLED:
            break
        if ratio >= 1.0:
            low = predicted
        else:
            high = min(predicted, allocation.error)
        predicted = then if low < then < high else math.sqrt(max(low, 1e-2 * high) * high)
    there = strategy.solve(then, cost)
    spent = spent_cost(strategy.sites, allocation, verdict, cost)
    if ratio < SETTLED:  # what is further from the target has nothing nearer to it
        spent *= there.cost / allocation.cost
    if ratio * SETTLED < 1.0 or (ratio < 1.0 and same_choices(there, allocation)):
        if below is not None:
            return below
        spent = math.inf  # it may not get there
    logger.info("%s: error %.3g at a cost of %.4g", strategy.name, verdict.error, spent)
    return Candidate(strategy, allocation, verdict, then, spent)


def spent_cost(
    sites: Sequence[SiteChoices], allocation: Allocation, verdict: Verdict, cost: CostModel
) -> float:
    """Cost of an allocation at the densities that were measured."""
    total = 0.0
    for site, choice in zip(sites, allocation.choices, strict=True):
        density = verdict.densities.get(site.name)
        if density is None:
            total += cost.dense(site.shape) * site.heads
        else:
            total += float(cost.split(site.shape, density.numpy()).sum())
            total += order_cost(site, choice.index, cost)
    return total


@dataclass
class Refinement:
    """What rounds of refinement share. references: dense outputs of fitted samples.

    rounds: how many to make; None: as many as the model allows. passes: runs of the model that may
    be spent on them; None: any number. quantile: see `Verdict`. neighbours: the latest that is
    known of each reference, by its number, for the units in `units`.
    """

    bench: Workbench
    references: list[Reference]
    rounds: int | None = None
    passes: float | None = None
    quantile: float | None = None
    units: list[Unit] = field(default_factory=list)
    neighbours: dict[int, Neighbours] = field(default_factory=dict)

    def fitted(self, target: float) -> OutputError:
        """The criterion that strategies are compared by where the model's output counts."""
        return OutputError(self.bench, self.references, target, "fitted", self.quantile)

    def strategies(self, sites: list[SiteChoices], target: float) -> list[Strategy]:
        """Ways to choose thresholds for a relative error of the output.

        One threshold for all, as measured one head at a time, and one more with each round of
        marginals.
        """
        criterion, strategies = self.fitted(target), simple_strategies(sites)
        for number in range(self._rounds()):
            last = strategies[-1]
            candidate = settle(last, criterion, self.bench.cost, last.start or criterion.start)
            if number and math.isinf(candidate.cost):
                break
            taught = self._taught(sites, candidate.allocation, candidate.verdict, number)
            if taught is None:
                break
            strategies.append(replace(taught, start=target))
        return strategies

    def strategies_at_density(self, sites: list[SiteChoices], density: float) -> list[Strategy]:
        """The same for a mean density."""
        criterion, strategies = self.fitted(1.0), simple_strategies(sites)
        for number in range(self._rounds()):
            allocation = strategies[-1].solve_density(density, self.bench.cost)
            verdict = criterion.measure(thresholds_of(sites, allocation))
            taught = self._taught(sites, allocation, verdict, number)
            if taught is None:
                break
            strategies.append(taught)
        return strategies

    def bucket_errors(self, sites: list[SiteChoices], allocation: Allocation) -> Array:
        """Squared relative error of the output by timestep bucket, at an allocation."""
        samples = self.bench.samples
        squares = np.square(self.fitted(1.0).measure(thresholds_of(sites, allocation)).errors)
        of = np.array([samples.bucket(reference.sample) for reference in self.references])
        return np.array([squares[of == bucket].mean() for bucket in range(samples.buckets)])

    def _rounds(self) -> int:
        """Rounds to make: those asked for, or what size and device allow, within the passes."""
        units = probe_units(list(self.bench.survey.measurable().values()))
        rounds = self.rounds
        if rounds is None:
            small = any(head >= 0 for _, head in units)
            rounds = ROUNDS if small and self.bench.runner.on_gpu else 1
        if self.passes is None:
            return rounds
        spent = itertools.accumulate(len(units) * len(self._turn(n)) for n in range(rounds))
        return sum(passes <= self.passes for passes in spent)

    def _turn(self, number: int) -> list[int]:
        """The references of a round: of each timestep bucket as many, those that come next."""
        buckets: dict[int, list[int]] = {}
        for at, reference in enumerate(self.references):
            buckets.setdefault(self.bench.samples.bucket(reference.sample), []).append(at)
        shares = [max(1, most // len(buckets)) for most in ROUND_SAMPLES]
        at = min(number, len(shares) - 1)
        start, count = sum(shares[:at]), shares[at]
        return sorted(
            {inside[(start + i) % len(inside)] for inside in buckets.values() for i in range(count)}
        )

    def _neighbours(
        self, sites: list[SiteChoices], allocation: Allocation, errors: Sequence[float], number: int
    ) -> list[Neighbours]:
        """The latest neighbours of all references, those of this round's at an allocation.

        errors: of all references there.
        """
        units, turn = marginal_units(sites, allocation), self._turn(number)
        if not number or units != self.units:
            self.units, self.neighbours = units, {}
        points = [(at, self.references[at], errors[at]) for at in turn]
        latest = measure_neighbours(self.bench, sites, allocation, points)
        self.neighbours.update(zip(turn, latest, strict=True))
        return list(self.neighbours.values())

    def _taught(
        self, sites: list[SiteChoices], allocation: Allocation, verdict: Verdict, number: int
    ) -> Strategy | None:
        """The strategy that marginals at an allocation teach; none where nothing is split, or off.

        sites: as measured one head at a time.
        """
        if all(choice.dense for choice in allocation.choices) or verdict.error <= 0.0:
            return None
        neighbours = self._neighbours(sites, allocation, verdict.errors, number)
        couplings = couplings_of(sites, allocation, neighbours)
        believed = [coupled(site, c) for site, c in zip(sites, couplings, strict=True)]
        there = total(believed, allocation.choices, 0.0, self.bench.cost).error
        factor = verdict.error / there if there > 0.0 else 1.0
        marginals = {
            site.name: marginal_ratio(site, choice, coupling)
            for site, choice, coupling in zip(sites, allocation.choices, couplings, strict=True)
            if not choice.dense
        }
        around = allocation, REACH[min(number, 2)]
        name = f"marginals, round {number + 1}"
        strategy = Strategy(name, believed, around=around, marginals=marginals)
        return strategy.scaled([factor] * len(believed))


def simple_strategies(sites: list[SiteChoices]) -> list[Strategy]:
    """What needs no more runs: one threshold for all, and errors as heads make them alone."""
    return [Strategy(TIED, sites, tied=True), Strategy(ALONE, sites)]


def cheapest(
    strategies: Sequence[Strategy], criterion: Criterion, bench: Workbench
) -> list[Candidate]:
    """Candidates near the criterion's target, that which costs least there first."""
    candidates: list[Candidate] = []
    with bench.progress.phase("comparing strategies", len(strategies)) as step:
        step.runs(criterion.runs)
        for strategy in strategies:
            start = strategy.start or criterion.start
            candidates.append(settle(strategy, criterion, bench.cost, start))
            step()
    return sorted(candidates, key=lambda candidate: candidate.cost)


def best_at_density(
    strategies: Sequence[Strategy], criterion: Criterion, density: float, bench: Workbench
) -> list[Candidate]:
    """Candidates at a mean density, that with the least error there first."""
    candidates: list[tuple[float, Candidate]] = []
    cost = bench.cost
    with bench.progress.phase("comparing strategies", len(strategies)) as step:
        step.runs(criterion.runs)
        for strategy in strategies:
            sites, allocation = strategy.sites, strategy.solve_density(density, cost)
            verdict = criterion.measure(thresholds_of(sites, allocation))
            there = mean_density(sites, verdict.densities, cost)
            error = verdict.error * (there / density) ** FALL
            spent = spent_cost(sites, allocation, verdict, cost)
            candidate = Candidate(strategy, allocation, verdict, allocation.error, spent)
            candidates.append((error, candidate))
            logger.info("%s: error %.3g at a density of %.4g", strategy.name, verdict.error, there)
            step()
    return [candidate for _, candidate in sorted(candidates, key=lambda one: one[0])]


def comparisons(
    candidates: Sequence[Candidate], taken: Strategy, cost: CostModel
) -> list[Comparison]:
    """What a plan tells of the strategies that were run on the same samples, as they are sorted."""
    found = []
    for candidate in candidates:
        sites, verdict = candidate.strategy.sites, candidate.verdict
        dense = sum(cost.dense(site.shape) * site.heads for site in sites)
        found.append(
            Comparison(
                name=candidate.strategy.name,
                taken=candidate.strategy is taken,
                predicted_error=candidate.allocation.error,
                measured_error=verdict.error,
                mean_density=mean_density(sites, verdict.densities, cost),
                cost=spent_cost(sites, candidate.allocation, verdict, cost) / max(dense, 1e-30),
            )
        )
    return found
