"""Verification: candidate thresholds are run, and the multiplier moved until a criterion is met."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from freqopt.calibration.measure.requests import SiteThresholds, Split, Thresholds
from freqopt.calibration.search.allocate import Allocation, SiteChoice, same_choices
from freqopt.calibration.search.choices import SiteChoices
from freqopt.calibration.search.cost import CostModel
from freqopt.calibration.search.strategies import Strategy
from freqopt.calibration.search.workbench import Reference, Workbench
from freqopt.errors import OptionError
from freqopt.plan.records import Trial

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

    error: relative L2, of the model's output; quantile: the share of inputs that it is for, None
    for the root mean square. psnr: in dB, of what a pipeline generates. density:
    share of pairs attended exactly.
    """

    error: float | None = None
    quantile: float | None = None
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

    @property
    def runs(self) -> float:
        """Runs of the model that measuring takes, about."""

    def measure(self, thresholds: Thresholds) -> Verdict:
        """Run the model with these thresholds; sites without any stay dense."""


@dataclass(frozen=True)
class Verdict:
    """Errors of the runs of one trial, and (H,) densities.

    quantile: of the errors, which counts; None: their root mean square does.
    """

    errors: list[float]
    densities: dict[str, Tensor]
    quantile: float | None = None

    @property
    def error(self) -> float:
        """The error that counts."""
        if self.quantile is None:
            return root_mean_square(self.errors)
        return quantile_of(self.errors, self.quantile)


def root_mean_square(errors: Sequence[float]) -> float:
    """Root mean square."""
    return math.sqrt(sum(error * error for error in errors) / len(errors))


def quantile_of(errors: Sequence[float], share: float) -> float:
    """The least error that at least this share of them is within."""
    return sorted(errors)[max(math.ceil(share * len(errors) - 1e-9), 1) - 1]


def too_few(share: float, samples: int) -> str:
    """Why a share of so many samples is all of them, for the plan to say; empty where it is not."""
    if math.ceil(share * samples - 1e-9) < samples:
        return ""
    enough = math.ceil(1.0 / (1.0 - share) - 1e-9)
    return (
        f"{share:.3g} of {samples} held-out samples is all of them, so the worst of them counts; "
        f"with {enough} or more held out it would not"
    )


class OutputError:
    """Criterion: relative L2 error of the model's output on samples, those held out in the end.

    kind: which samples, as the checkpoint calls them. quantile: see `Verdict`.
    """

    def __init__(
        self,
        bench: Workbench,
        references: Sequence[Reference],
        target: float,
        kind: str,
        quantile: float | None = None,
    ) -> None:
        self.bench, self.references, self.kind = bench, references, kind
        self.target, self.start, self.quantile = target, target * AIM, quantile
        self.comparable = quantile is None

    @property
    def runs(self) -> float:
        """See `Criterion`."""
        return float(len(self.references))

    def measure(self, thresholds: Thresholds) -> Verdict:
        """See `Criterion`."""
        verdict = remembered(self.bench, self.kind, thresholds, self._run)
        return replace(verdict, quantile=self.quantile)

    def _run(self, thresholds: Thresholds) -> Verdict:
        request, errors, densities = Split(thresholds), [], []
        for reference in self.references:
            result = self.bench.runner.run(reference.sample, request)
            errors.append(reference.error_of(result.output))
            densities.append(result.densities)
        return Verdict(errors, mean_over_runs(densities))


def mean_over_runs(runs: Sequence[Mapping[str, list[Tensor]]]) -> dict[str, Tensor]:
    """(H,) per site, the mean over its calls in all runs."""
    names = dict.fromkeys(name for run in runs for name in run)
    return {
        name: torch.stack([row for run in runs for row in run.get(name, [])]).mean(0).cpu()
        for name in names
    }


def thresholds_key(kind: str, thresholds: Thresholds) -> str:
    """Key in the checkpoint of what thresholds led to."""
    digest = hashlib.sha256()
    for name, threshold in thresholds.items():
        digest.update(repr((name, threshold.threshold.tolist(), threshold.chunks)).encode())
    return f"{kind}/{digest.hexdigest()[:24]}"


def remembered(
    bench: Workbench, kind: str, thresholds: Thresholds, run: Callable[[Thresholds], Verdict]
) -> Verdict:
    """The verdict about thresholds that is in the checkpoint, or that of a run, which is kept."""
    key = thresholds_key(kind, thresholds)
    entry = bench.checkpoint.find(key)
    if entry is None:
        verdict = run(thresholds)
        entry = bench.checkpoint.keep(key, verdict.errors, verdict.densities)
    return Verdict(list(entry.facts), dict(entry.tensors))


@dataclass(frozen=True)
class Outcome:
    """What a search ended with. notes: what the plan should say about it."""

    allocation: Allocation
    trial: Trial
    densities: dict[str, Tensor]
    notes: list[str]


class Search:
    """Moves the predicted error until the measured one is within [ACCEPT, 1] of the target."""

    def __init__(self, strategy: Strategy, bench: Workbench, criterion: Criterion) -> None:
        self.strategy, self.criterion = strategy, criterion
        self.cost, self.progress = bench.cost, bench.progress
        self.trials: list[Trial] = []

    def run(self, start: float | None = None) -> Outcome | None:
        """The cheapest allocation tried that meets the target, None if none does.

        start: predicted error to try first, in place of the criterion's.
        """
        criterion, low, high = self.criterion, 0.0, math.inf
        predicted = criterion.start if start is None else start
        target, aim = criterion.target, criterion.target * AIM
        best: tuple[float, Outcome] | None = None
        believed = self.strategy
        loosest = self.strategy.solve(math.inf, self.cost).multiplier
        previous: Allocation | None = None
        with self.progress.phase("verifying", MAX_TRIALS) as step:
            step.runs(self.criterion.runs)
            for _ in range(MAX_TRIALS):
                allocation = believed.solve(predicted, self.cost)
                if previous is not None and same_choices(allocation, previous):
                    break
                previous = allocation
                outcome = self.try_out(allocation)
                measured = outcome.trial.measured_error
                step()
                if measured <= target:
                    low = predicted
                    if best is None or allocation.cost < best[1].allocation.cost:
                        best = (measured, outcome)
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

    def run_density(self, target: float) -> Outcome:
        """The allocation of the least predicted error whose measured density is within a target.

        Raises:
            OptionError: even the loosest budgets need more.
        """
        predicted, best, lowest = target, None, math.inf
        loosest = self.strategy.solve_density(0.0, self.cost)
        previous: Allocation | None = None
        with self.progress.phase("verifying", MAX_TRIALS) as step:
            step.runs(self.criterion.runs)
            for _ in range(MAX_TRIALS):
                allocation = self.strategy.solve_density(predicted, self.cost)
                while previous and same_choices(allocation, previous):
                    if best is not None or same_choices(allocation, loosest):
                        break
                    predicted *= NEAR
                    allocation = self.strategy.solve_density(predicted, self.cost)
                if previous is not None and same_choices(allocation, previous):
                    break
                previous = allocation
                outcome = self.try_out(allocation)
                measured = outcome.trial.mean_density
                lowest = min(lowest, measured)
                step()
                if measured <= target and (best is None or measured > best.trial.mean_density):
                    best = outcome
                if NEAR * target <= measured <= target:
                    break
                predicted = min(predicted * math.sqrt(NEAR) * target / measured, 1.0)
        if best is None:
            raise OptionError(
                f"a mean density of {target:g} cannot be reached: with the loosest budgets it is "
                f"{lowest:.3f} at this size; ask for more, or for longer sequences"
            )
        return best

    def try_out(self, allocation: Allocation, notes: Sequence[str] = ()) -> Outcome:
        """Run the model with an allocation's thresholds; the trial is added to `trials`."""
        verdict = self.criterion.measure(thresholds_of(self.strategy.sites, allocation))
        trial = Trial(
            multiplier=allocation.multiplier,
            predicted_error=allocation.error,
            measured_error=verdict.error,
            worst_error=max(verdict.errors),
            mean_density=mean_density(self.strategy.sites, verdict.densities, self.cost),
            sample_errors=verdict.errors,
        )
        self.trials.append(trial)
        logger.info("trial %s", trial)
        return Outcome(allocation, trial, verdict.densities, list(notes))


def mean_density(
    sites: Sequence[SiteChoices], densities: Mapping[str, Tensor], cost: CostModel
) -> float:
    """Density over all sites, weighted by dense cost. densities: (H,) of those not dense."""
    density = dense = 0.0
    for site in sites:
        weight = cost.dense(site.shape) * site.heads
        share = float(densities[site.name].mean()) if site.name in densities else 1.0
        density += weight * share
        dense += weight
    return density / dense


def thresholds_of(
    sites: Sequence[SiteChoices], allocation: Allocation
) -> dict[str, SiteThresholds]:
    """Thresholds (buckets, H) and chunks of the sites that an allocation splits."""
    thresholds = {}
    for site, choice in zip(sites, allocation.choices, strict=True):
        if choice.dense:
            continue
        threshold = torch.tensor(site.threshold[choice.index], dtype=torch.float32, device="cpu")
        by_bucket = threshold.unflatten(0, (len(site.shares), site.heads))
        thresholds[site.name] = SiteThresholds(by_bucket, chunks_of(site, choice))
    return thresholds


def chunks_of(site: SiteChoices, choice: SiteChoice) -> tuple[int, ...]:
    """Chunks of a site's key heads; none where all are by the grid."""
    chunks = tuple(site.chunks[order] for order in site.orders_of(choice.index))
    return chunks if any(chunks) else ()
