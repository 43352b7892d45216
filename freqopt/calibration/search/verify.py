"""Verification: candidate budgets are run, and the multiplier moved until a criterion is met."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from freqopt.calibration.checkpoint import Journal
from freqopt.calibration.runner import Runner, relative_error
from freqopt.calibration.samples import Sample
from freqopt.calibration.search.allocate import (
    Allocation,
    CostModel,
    SiteChoices,
    same_choices,
)
from freqopt.calibration.search.strategies import Way
from freqopt.errors import OptionError
from freqopt.plan.records import Trial
from freqopt.progress import Progress

logger = logging.getLogger(__name__)

AIM = 0.93
"""Share of the target that verification aims for, to end between ACCEPT and 1."""

ACCEPT = 0.8
MAX_TRIALS = 8

NEAR = 0.95
"""A density between this share of the target and the target is near enough; trials aim between."""

DISBELIEF = 2.0
"""A trial this much worse than predicted has a site whose errors were taken too lightly: all sites
that it split are then believed to be worse than it was, by CAUTION, and dense ones keep their
chance. Below it, errors that add up instead of averaging out explain the difference."""

CAUTION = 1.3


@dataclass(frozen=True)
class Goal:
    """What a plan is for, one of three.

    error: relative L2, of the model's output. psnr: in dB, of what a pipeline generates. density:
    share of pairs attended exactly.
    """

    error: float | None = None
    psnr: float | None = None
    density: float | None = None


class Criterion(Protocol):
    """What an allocation is judged by.

    target: largest error to accept, in the unit of `measure`. start: predicted error of the model's
    output to try first. comparable: whether predicted errors have the same unit and meaning.
    """

    target: float
    start: float
    comparable: bool

    def measure(self, budgets: dict[str, Tensor]) -> Verdict:
        """Run the model with these budgets; sites without one stay dense."""


@dataclass(frozen=True)
class Verdict:
    """Errors of the runs of one trial, the mean square of which counts, and (H,) densities."""

    errors: list[float]
    densities: dict[str, Tensor]

    @property
    def error(self) -> float:
        """Root mean square over the runs."""
        return math.sqrt(sum(error * error for error in self.errors) / len(self.errors))


class OutputError:
    """Criterion: relative L2 error of the model's output on samples, those held out in the end.

    kind: which samples, as the journal calls them.
    """

    comparable = True

    def __init__(
        self,
        runner: Runner,
        samples: Sequence[Sample],
        references: Sequence[list[Tensor]],
        target: float,
        journal: Journal,
        kind: str,
    ) -> None:
        self.runner, self.samples, self.references = runner, samples, references
        self.journal, self.kind = journal, kind
        self.target, self.start = target, target * AIM

    def measure(self, budgets: dict[str, Tensor]) -> Verdict:
        """See `Criterion`."""
        return remembered(self.journal, self.kind, budgets, self._run)

    def _run(self, budgets: dict[str, Tensor]) -> Verdict:
        session = self.runner.session
        session.budgets, session.densities = budgets, {}
        errors = [
            relative_error(self.runner.run(sample, "split"), reference)
            for sample, reference in zip(self.samples, self.references, strict=True)
        ]
        return Verdict(errors, mean_densities(session.densities))


def mean_densities(found: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    """(H,) per site, the mean over calls."""
    return {name: torch.stack(rows).mean(0).cpu() for name, rows in found.items()}


def budget_key(kind: str, budgets: dict[str, Tensor]) -> str:
    """Key in the journal of what budgets led to."""
    digest = hashlib.sha256()
    for name, budget in budgets.items():
        digest.update(repr((name, budget.tolist())).encode())
    return f"{kind}/{digest.hexdigest()[:24]}"


def remembered(
    journal: Journal,
    kind: str,
    budgets: dict[str, Tensor],
    run: Callable[[dict[str, Tensor]], Verdict],
) -> Verdict:
    """The verdict about budgets that is in the journal, or that of a run, which is then kept."""
    key = budget_key(kind, budgets)
    entry = journal.find(key)
    if entry is None:
        verdict = run(budgets)
        entry = journal.keep(key, verdict.errors, verdict.densities)
    return Verdict(list(entry.facts), dict(entry.tensors))


@dataclass(frozen=True)
class Found:
    """What a search ended with. notes: what the plan should say about it."""

    allocation: Allocation
    trial: Trial
    densities: dict[str, Tensor]
    notes: list[str]


class Search:
    """Moves the predicted error until the measured one is within [ACCEPT, 1] of the target."""

    def __init__(
        self,
        way: Way,
        cost: CostModel,
        criterion: Criterion,
        progress: Progress,
    ) -> None:
        self.way, self.cost, self.criterion = way, cost, criterion
        self.sites, self.progress = way.sites, progress
        self.trials: list[Trial] = []

    def run(self, start: float | None = None) -> Found | None:
        """The cheapest allocation found that meets the target, None if none does.

        start: predicted error to try first, in place of the criterion's.
        """
        criterion, low, high = self.criterion, 0.0, math.inf
        predicted = criterion.start if start is None else start
        target, aim = criterion.target, criterion.target * AIM
        best: tuple[float, Found] | None = None
        believed = self.way
        loosest = self.way.solve(math.inf, self.cost).multiplier
        previous: Allocation | None = None
        with self.progress.phase("verifying", MAX_TRIALS) as step:
            for _ in range(MAX_TRIALS):
                allocation = believed.solve(predicted, self.cost)
                if previous is not None and same_choices(allocation, previous):
                    break
                previous = allocation
                found = self.try_out(allocation)
                measured = found.trial.measured_error
                step()
                if measured <= target:
                    low = predicted
                    if best is None or allocation.cost < best[1].allocation.cost:
                        best = (measured, found)
                    if measured >= ACCEPT * target or allocation.multiplier == loosest:
                        break
                elif criterion.comparable and measured > DISBELIEF * allocation.error > 0.0:
                    scale = CAUTION * measured / allocation.error
                    believed = believed.scaled(
                        [1.0 if choice.dense else scale for choice in allocation.choices]
                    )
                    predicted, low, high = criterion.start, 0.0, math.inf
                    continue
                else:  # nothing looser than this was tried, whatever was allowed
                    high = min(predicted, allocation.error)
                scaled = predicted * aim / max(measured, 1e-12)
                if high < math.inf:
                    inside = math.sqrt(max(low, high * 1e-2) * high)
                    scaled = scaled if low < scaled < high else inside
                predicted = min(max(scaled, predicted * 1e-2), predicted * 1e2)
        if best is None or all(choice.dense for choice in best[1].allocation.choices):
            return None
        if best[0] < ACCEPT * target:
            why = "no choice came closer without exceeding it"
            if best[1].allocation.multiplier == loosest:
                why = "even the loosest budgets do not reach it"
            best[1].notes.append(f"the error is well below the target: {why}")
        return best[1]

    def run_density(self, target: float) -> Found:
        """The allocation of the least predicted damage whose measured density is within a target.

        Raises:
            OptionError: even the loosest budgets need more.
        """
        predicted, best, lowest = target, None, math.inf
        previous: Allocation | None = None
        with self.progress.phase("verifying", MAX_TRIALS) as step:
            for _ in range(MAX_TRIALS):
                allocation = self.way.solve_density(predicted, self.cost)
                if previous is not None and same_choices(allocation, previous):
                    break
                previous = allocation
                found = self.try_out(allocation)
                measured = found.trial.mean_density
                lowest = min(lowest, measured)
                step()
                if measured <= target and (best is None or measured > best.trial.mean_density):
                    best = found
                if NEAR * target <= measured <= target:
                    break
                predicted = min(predicted * math.sqrt(NEAR) * target / measured, 1.0)
        if best is None:
            raise OptionError(
                f"a mean density of {target:g} cannot be reached: with the loosest budgets it is "
                f"{lowest:.3f} at this size; ask for more, or for longer sequences"
            )
        return best

    def try_out(self, allocation: Allocation, notes: Sequence[str] = ()) -> Found:
        """Run the model with an allocation's budgets; the trial is added to `trials`."""
        verdict = self.criterion.measure(budgets(self.sites, allocation))
        trial = Trial(
            multiplier=allocation.multiplier,
            predicted_error=allocation.error,
            measured_error=verdict.error,
            worst_error=max(verdict.errors),
            mean_density=mean_density(self.sites, verdict.densities, self.cost),
            sample_errors=verdict.errors,
        )
        self.trials.append(trial)
        logger.info("trial %s", trial)
        return Found(allocation, trial, verdict.densities, list(notes))


def mean_density(
    sites: Sequence[SiteChoices], found: Mapping[str, Tensor], cost: CostModel
) -> float:
    """Density over all sites, weighted by dense cost. found: (H,) by site, of those not dense."""
    density = dense = 0.0
    for site in sites:
        weight = cost.dense(site.shape) * site.heads
        density += weight * (float(found[site.name].mean()) if site.name in found else 1.0)
        dense += weight
    return density / dense


def budgets(sites: Sequence[SiteChoices], allocation: Allocation) -> dict[str, Tensor]:
    """Budgets (buckets, H) of the sites that an allocation splits."""
    found = {}
    for site, choice in zip(sites, allocation.choices, strict=True):
        if choice.dense:
            continue
        threshold = torch.tensor(site.threshold[choice.index], dtype=torch.float32)
        found[site.name] = threshold.unflatten(0, (len(site.shares), site.heads))
    return found
