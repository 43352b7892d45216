"""One calibration: its phases in order, from measuring the sites to the plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from freqopt.calibration.evidence import PlanFacts, build_plan, slower_reason
from freqopt.calibration.fewer import CLEARLY, dropped_reason, halvings, only, savings
from freqopt.calibration.measure.ladder import GRID_ALONE, Array
from freqopt.calibration.measure.requests import Dense, SiteThresholds, Thresholds, Time
from freqopt.calibration.search.allocate import solve, with_dense
from freqopt.calibration.search.choices import SiteChoices, site_choices
from freqopt.calibration.search.refine import (
    ALONE,
    MAX_REFINED_SAMPLES,
    Candidate,
    Refinement,
    best_at_density,
    cheapest,
    comparisons,
)
from freqopt.calibration.search.sensitivity import (
    PASSES_WHEN_SLOW,
    SLOW_PASS,
    measure_sensitivities,
    probed_samples,
)
from freqopt.calibration.search.verify import (
    ACCEPT,
    Criterion,
    Goal,
    Outcome,
    OutputError,
    Search,
    thresholds_key,
    thresholds_of,
    too_few,
)
from freqopt.calibration.search.video import GeneratedVideo, video_strategies
from freqopt.calibration.search.workbench import Reference, Workbench
from freqopt.calibration.survey import measure_sites
from freqopt.calibration.whole import ModelTimes, dense_pass, model_times
from freqopt.errors import CalibrationError
from freqopt.plan.plan import Plan
from freqopt.plan.records import Trial

UNLIKELY = 0.01
"""Error of the output with everything exact that is more than rounding makes of most models."""


class Calibration:
    """One calibration: its phases in order.

    clock: as in `freqopt.calibrate`. launches: see `time_call`. orders: to choose from, the first
    of ORDERS. sensitivities, rounding, spent: of `measure_sensitivities`. notes: what the plan
    should say. sites: what there is to choose from.
    """

    def __init__(
        self,
        bench: Workbench,
        orders: Sequence[int] = GRID_ALONE,
        clock: str = "auto",
    ) -> None:
        self.bench, self.orders = bench, orders
        self.clock, self.launches = clock, False
        self.sensitivities: dict[str, Array] = {}
        self.rounding = self.spent = 0.0
        self.notes: list[str] = []
        self.sites: list[SiteChoices] = []

    def for_error(self, target: float, quantile: float | None = None) -> Plan:
        """The plan that holds a relative error of the model's output, for a share of inputs."""
        few = "" if quantile is None else too_few(quantile, len(self.bench.samples.held_out))
        self.notes += [few] if few else []
        sites = self.choices()
        refinement = self.refinement(quantile)
        strategies = refinement.strategies(sites, target)
        best = cheapest(strategies, refinement.fitted(target), self.bench)
        return self._plan(best, self.held_out(target, quantile), Goal(target, quantile))

    def for_density(self, target: float) -> Plan:
        """The plan with the least error whose density is within a target."""
        self.sites = [replace(site, forced=True) for site in self.choices()]
        refinement = self.refinement()
        strategies = refinement.strategies_at_density(self.sites, target)
        best = best_at_density(strategies, refinement.fitted(1.0), target, self.bench)
        return self._plan(best, self.held_out(1.0), Goal(density=target))

    def for_psnr(self, target: float, pipeline: Callable[[], Any]) -> Plan:
        """The plan that holds a PSNR, in dB, of what a pipeline generates."""
        sites = self.choices()
        with self.bench.progress.phase("dense pipeline", 2) as step:
            criterion = GeneratedVideo(self.bench, pipeline, target)
            step(2)
        strategies = video_strategies(self.refinement(), criterion, sites)
        best = cheapest(strategies, criterion, self.bench)
        return self._plan(best, criterion, Goal(psnr=target))

    def choices(self) -> list[SiteChoices]:
        """Measure all sites and sensitivities: what there is to choose from at each of them."""
        bench = self.bench
        seen = dense_pass(bench)
        self.launches = seen is not None and self.clock != "graphs" and seen.launch_bound
        if bench.passes is None and seen is not None and seen.seconds >= SLOW_PASS:
            bench.passes = PASSES_WHEN_SLOW  # the first phase tells how long all of them take
        measure_sites(bench, orders=self.orders, launches=self.launches)
        probed = [bench.reference(sample) for sample in probed_samples(bench.samples)]
        found = measure_sensitivities(bench, probed, bench.passes)
        self.sensitivities, self.rounding, self.spent = found.values, found.rounding, found.passes
        self.notes += found.notes
        if self.rounding > UNLIKELY:
            self._check_repeats(probed)
        self.sites = [
            site_choices(site, self.sensitivities[name], bench.samples.bucket_samples)
            for name, site in bench.survey.measurable().items()
        ]
        return self.sites

    def _check_repeats(self, references: Sequence[Reference]) -> None:
        """Tell much rounding from a model whose outputs differ from call to call.

        All samples are run again, until one differs: what varies may come out alike by chance, or
        not vary at all in some of them.

        Raises:
            CalibrationError: they do.
        """
        for reference in references:
            again = reference.error_of(self.bench.runner.run(reference.sample, Dense()).output)
            if again > UNLIKELY:
                raise CalibrationError(
                    f"two dense runs of the model on one sample differ by {again:.1e}: it keeps "
                    "something from call to call (a step cache, a counter), or draws random "
                    "numbers from a generator of its own (those of PyTorch, NumPy and Python are "
                    "seeded before each run), so what an error does cannot be told. Calibrate it "
                    "without that"
                )

    def refinement(self, quantile: float | None = None) -> Refinement:
        """What rounds of refinement need; once all sites are measured."""
        bench = self.bench
        refined = probed_samples(bench.samples, MAX_REFINED_SAMPLES)
        references = [bench.reference(sample) for sample in refined]
        passes = None if bench.passes is None else max(0.0, bench.passes - self.spent)
        return Refinement(bench, references, bench.rounds, passes, quantile)

    def held_out(self, target: float, quantile: float | None = None) -> OutputError:
        """The criterion that a plan is verified by; runs the dense model on the samples."""
        samples = self.bench.samples.held_out
        references = [self.bench.reference(sample) for sample in samples]
        with self.bench.progress.phase("dense references", len(references)) as step:
            for reference in references:
                reference.compute()
                step()
        return OutputError(self.bench, references, target, "held out", quantile)

    def _plan(self, best: Sequence[Candidate], criterion: Criterion, goal: Goal) -> Plan:
        """Search for the goal along the best of the strategies, and write down what came of it."""
        bench = self.bench
        search = Search(best[0].strategy, bench, criterion)
        reasons: dict[str, str] = {}
        if goal.density is not None:
            outcome = search.run_density(goal.density)
            times = self._times(thresholds_of(self.sites, outcome.allocation))
        else:
            search, outcome = self._search(best, criterion)
            times = self._times(thresholds_of(self.sites, outcome.allocation))
            reasons = slow_sites(times)
        if reasons:
            sites = search.strategy.sites
            faster = with_dense(sites, outcome.allocation, reasons, bench.cost)
            outcome = search.try_out(faster, outcome.notes)
        notes = [*bench.samples.notes, *self.notes, *bench.runner.notes]
        if search.strategy.tied:
            notes.append("one threshold serves all heads and timesteps: no other way cost less")
        facts = PlanFacts(
            sites=self.sites,
            sensitivities=self.sensitivities,
            marginals=search.strategy.marginals,
            rounding=self.rounding,
            outcome=outcome,
            trials=search.trials,
            compared=comparisons(best, search.strategy, bench.cost),
            error=self._error_of(search, outcome, goal),
            goal=goal,
            times=times,
            whole=None,
            reasons=reasons,
            notes=[*notes, *outcome.notes],
        )
        return build_plan(bench, self._as_timed(facts, search))

    def _error_of(self, search: Search, outcome: Outcome, goal: Goal) -> Trial:
        """The trial of an outcome on the held-out samples."""
        if goal.psnr is None:
            return outcome.trial
        held_out = Search(search.strategy, self.bench, self.held_out(1.0))
        return held_out.try_out(outcome.allocation).trial

    def _as_timed(self, facts: PlanFacts, search: Search) -> PlanFacts:
        """The facts with the time of the whole model, and fewer sites split, or none, if slower."""
        found = self._model_times(facts)
        if found is None:
            return facts
        notes = [*facts.notes, *([found.note] if found.note else [])]
        facts = replace(facts, whole=found, notes=notes)
        if not found.slower:
            return facts
        if facts.goal.density is not None:
            return replace(facts, notes=[*notes, f"{found.slower}; the density asked for rules"])
        compiled = self._model_times(facts, "compiled") if self.clock == "auto" else None
        if compiled is not None and compiled.clock == "compiled" and not compiled.slower:
            told = f"{compiled.split:.4g} ms against {compiled.dense:.4g} ms dense"
            notes = [*notes, f"eager, {found.slower}; compiled it is faster: {told}"]
            return replace(facts, whole=compiled, notes=notes)
        return self._with_fewer(facts, search, found)

    def _model_times(self, facts: PlanFacts, clock: str | None = None) -> ModelTimes | None:
        """Times of the whole model as the facts split it; None without a clock or a split.

        clock: another than the calibration's own.
        """
        bench, thresholds = self.bench, thresholds_of(self.sites, facts.outcome.allocation)
        return model_times(bench, thresholds, clock or self.clock, lambda: build_plan(bench, facts))

    def _with_fewer(self, facts: PlanFacts, search: Search, slower: ModelTimes) -> PlanFacts:
        """The facts with those sites split that pay in the whole model; with none if none do.

        slower: times of the whole model with all of them.
        """
        cost, sites, allocation = self.bench.cost, search.strategy.sites, facts.outcome.allocation
        saved, notes = savings(sites, allocation, facts.times, cost), list(facts.notes)
        for dropped in halvings(saved):
            reasons = {name: dropped_reason(slower.slower, saved[name]) for name in dropped}
            fewer = with_dense(sites, allocation, reasons, cost)
            tried = replace(
                facts,
                outcome=replace(facts.outcome, allocation=fewer),
                reasons={**facts.reasons, **reasons},
            )
            found = self._model_times(tried)
            assert found is not None  # there is a clock, and something is split
            told = only(len(saved) - len(dropped))
            times = f"{found.split:.4g} ms against {found.dense:.4g} ms dense"
            if found.split >= CLEARLY * found.dense:
                notes.append(f"{told} the whole model is not clearly faster: {times}")
                continue
            outcome = search.try_out(fewer)
            if outcome.trial.measured_error > search.criterion.target:
                notes.append(f"{told} the whole model is faster and misses the target: {times}")
                continue
            return replace(
                tried,
                outcome=outcome,
                error=self._error_of(search, outcome, facts.goal),
                whole=found,
                notes=[*notes, f"{slower.slower}; {told} it is faster: {times}"],
            )
        reasons = {**facts.reasons, **dict.fromkeys(saved, slower.slower)}
        outcome = search.try_out(with_dense(sites, allocation, reasons, cost))
        return replace(
            facts,
            outcome=outcome,
            error=self._error_of(search, outcome, facts.goal),
            reasons=reasons,
            notes=[*notes, f"{slower.slower}, so every site stays dense"],
        )

    def _search(self, best: Sequence[Candidate], criterion: Criterion) -> tuple[Search, Outcome]:
        """The search that met the target, along the first strategy.

        Where that ends far from it, along that of heads alone, which reaches everything that can be
        reached.
        """
        met: tuple[Search, Outcome] | None = None
        alone = next(candidate for candidate in best if candidate.strategy.name == ALONE)
        for candidate in (best[0], alone):
            search = Search(candidate.strategy, self.bench, criterion)
            outcome = search.run(candidate.predicted)
            if outcome and (met is None or outcome.allocation.cost < met[1].allocation.cost):
                met = search, outcome
            if candidate is alone or (
                outcome and outcome.trial.measured_error >= ACCEPT * criterion.target
            ):
                break
        return met or (search, self._everything_dense(search, criterion))

    def _times(self, thresholds: Thresholds) -> dict[str, tuple[float, float]]:
        """Time (dense, split) of every site that is split, in ms; if costs were measured too."""
        bench, samples = self.bench, self.bench.samples.held_out
        if not bench.survey.timings or not thresholds:
            return {}
        middle = samples[len(samples) // 2]
        dense_ms = {shape: timing.dense_ms for shape, timing in bench.survey.timings.items()}
        times = bench.kept(
            thresholds_key("times", thresholds),
            lambda: (
                bench.runner.run(middle, Time(thresholds, dense_ms, launches=self.launches)).times
            ),
        )
        return {name: (dense, split) for name, (dense, split) in times.items()}

    def _everything_dense(self, search: Search, criterion: Criterion) -> Outcome:
        """The plan that splits nothing, unless exact attention misses the target as well."""
        exact = {
            site.name: SiteThresholds(torch.zeros(site.heads, dtype=torch.float32, device="cpu"))
            for site in self.sites
        }
        floor = max(criterion.measure(exact).errors)
        if floor > criterion.target:
            raise CalibrationError(
                f"the target {criterion.target:g} cannot be met: with every pair attended exactly "
                f"(threshold 0) the output already differs by {floor:.1e}, which is rounding "
                "amplified by the model; ask for more than that"
            )
        outcome = search.try_out(solve(self.sites, 0.0, search.cost))
        loosest = solve(self.sites, math.inf, search.cost)
        pays = not all(choice.dense for choice in loosest.choices)
        why = "no split met the target" if pays else "splitting is no faster anywhere"
        outcome.notes.append(f"{why}, so every site stays dense")
        return outcome


def slow_sites(times: dict[str, tuple[float, float]]) -> dict[str, str]:
    """Sites whose split, as timed at its thresholds, is no faster than dense; with the reason.

    Allocation goes by a line through a few times, which a short call may miss.
    """
    return {
        name: slower_reason(dense, split, "at its budgets")
        for name, (dense, split) in times.items()
        if split >= dense
    }
