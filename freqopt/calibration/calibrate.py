"""Calibration: an error target on the model's output in, a plan that holds it out.

Measures every choice at every site while the model runs on samples, spends the error where it buys
most, and verifies the result on samples that were not fitted. How: docs/design/calibration.md.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from freqopt.calibration.checkpoint import Entry, Journal, identity_of, open_journal
from freqopt.calibration.evidence import build_plan, slower_reason
from freqopt.calibration.measure.readings import Measured, pack, unpack
from freqopt.calibration.measure.recorder import Session
from freqopt.calibration.runner import Runner, opened
from freqopt.calibration.samples import MAX_BUCKETS, Sample, Samples, collect_samples
from freqopt.calibration.search.allocate import (
    CostModel,
    SiteChoices,
    solve,
    with_dense,
)
from freqopt.calibration.search.choices import site_choices
from freqopt.calibration.search.cost import cost_model
from freqopt.calibration.search.refine import (
    ALONE,
    MAX_REFINED_SAMPLES,
    Refinement,
    Settled,
    best_at_density,
    cheapest,
)
from freqopt.calibration.search.sensitivity import Array, Dense, measure_gains, probed_samples
from freqopt.calibration.search.verify import (
    ACCEPT,
    Criterion,
    Found,
    Goal,
    OutputError,
    Search,
    budget_key,
    budgets,
)
from freqopt.calibration.search.video import GeneratedVideo, decibels_of, video_ways
from freqopt.errors import CalibrationError, OptionError
from freqopt.grid import Grid
from freqopt.plan.plan import Plan
from freqopt.plan.records import SiteTiming
from freqopt.progress import Progress, open_progress

logger = logging.getLogger(__name__)


def calibrate(
    model: nn.Module,
    samples: Samples,
    *,
    target_error: float = 0.03,
    target_psnr: float | None = None,
    target_density: float | None = None,
    grid: Grid | None = None,
    timestep: str | None = None,
    timestep_buckets: int = MAX_BUCKETS,
    rounds: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
    seed: int = 0,
) -> Plan:
    """Find the cheapest budgets that hold an error target on the model's output.

    The model runs a dozen or so times per sample where it is, without gradients, in evaluation
    mode; it is left as it was. One seed gives one plan.

    Args:
        model: the model that will be compiled with ``backend="freqopt"``.
        samples: keyword arguments of calls of the model as dicts, or (args, kwargs) pairs; or a
            callable that runs your own pipeline once, whose calls of `model` are then recorded
            (up to 16, evenly spaced). Every other one is held out for verification.
        target_error: relative L2 error of the model's output against the dense model, without unit,
            in (0, 1); held on the held-out samples (root mean square over them).
        target_psnr: instead of `target_error`, the PSNR in dB of what the pipeline generates
            against what it generates with the dense model. `samples` must then be a callable that
            returns it (tensors, arrays or PIL images) and does the same every time: PyTorch's
            generators are seeded before each run.
        target_density: instead of either, the share of pairs to attend exactly, in (0, 1]; the plan
            has the least error within it, splits sites where dense attention is faster too (and
            says so), and states the error that was measured.
        grid: extents (t, h, w) of the video tokens where the graph does not tell them. Not needed
            where all samples hold the positions of the same grid (img_ids and the like).
        timestep: name of the model's timestep argument, where it is not found by a usual name
            (timestep, sigma, t and the like).
        timestep_buckets: ranges of the timestep with budgets of their own, at most; each needs a
            sample to fit and one held out. 1: the same budgets at all timesteps.
        rounds: of measuring what each head's error adds among those of all others, and allocating
            anew. Each takes as long as probing gains. By default 3 on a GPU for models of up to 64
            heads in all, else 1; 0 leaves it out.
        checkpoint: a file that keeps what was measured if calibration is interrupted. Called again
            with it, calibration goes on from there and ends with the same plan. It is removed then.
        progress: show progress and time left.
        seed: seeds PyTorch's generators before every run of the model.

    Returns:
        The plan, with the evidence for `freqopt.report`.

    Raises:
        CalibrationError: unusable samples (none, NaN, of another form), no site that can be split,
            a target below what even exact attention in another order of summation gives, or a
            checkpoint of another calibration.
        OptionError: a target outside its range, two of them, a density that the loosest budgets do
            not reach, a target_psnr without a pipeline, or fewer than one timestep bucket.
    """
    if not 0.0 < target_error < 1.0:
        raise OptionError(
            f"target_error {target_error} is outside (0, 1): it is the relative L2 error of the "
            "model's output; 0.01 is very close, 0.03 the default, 0.1 visible"
        )
    if target_density is not None and not 0.0 < target_density <= 1.0:
        raise OptionError(
            f"target_density {target_density} is outside (0, 1]: it is the share of pairs to "
            "attend exactly; 0.1 is typical for long sequences"
        )
    if target_density is not None and target_psnr is not None:
        raise OptionError("target_density and target_psnr were both given; pass one of them")
    if rounds is not None and rounds < 0:
        raise OptionError(f"rounds {rounds} must be 0 (no marginals) or more")
    if timestep_buckets < 1:
        raise OptionError(f"timestep_buckets {timestep_buckets} must be 1 (no buckets) or more")
    inner = getattr(model, "_orig_mod", model)
    pipeline: Callable[[], Any] | None = None
    if target_psnr is not None:
        pipeline = _pipeline(model, samples, target_psnr)
    sample_set = collect_samples(model, samples, timestep=timestep, buckets=timestep_buckets)
    identity = "" if checkpoint is None else identity_of(inner, sample_set, grid=grid, seed=seed)
    with (
        open_journal(checkpoint, identity) as journal,
        opened(inner, sample_set, grid, seed) as runner,
        open_progress(progress) as bars,
    ):
        calibration = Calibration(runner, bars, journal, rounds)
        if target_density is not None:
            return calibration.for_density(target_density)
        if pipeline is not None and target_psnr is not None:
            return calibration.for_psnr(target_psnr, pipeline)
        return calibration.for_error(target_error)


def _pipeline(model: nn.Module, samples: Samples, target_psnr: float) -> Callable[[], Any]:
    if not callable(samples):
        raise OptionError(
            "target_psnr judges what a pipeline generates, so samples must be a callable that runs "
            "it and returns that, such as lambda: pipe(prompt, generator=...).frames"
        )
    if not 5.0 <= target_psnr <= 100.0:
        raise OptionError(
            f"target_psnr {target_psnr} is outside 5 to 100 dB; 30 is similar, 40 very close"
        )
    if hasattr(model, "_orig_mod"):
        raise OptionError(
            "with target_psnr the pipeline must call the model itself and not a compiled wrapper; "
            "calibrate first and compile afterwards"
        )
    return samples


class Calibration:
    """One calibration: its phases in order, and what they share."""

    def __init__(
        self, runner: Runner, progress: Progress, journal: Journal, rounds: int | None = None
    ) -> None:
        self.runner, self.progress, self.journal = runner, progress, journal
        self.rounds = rounds
        self.session: Session = runner.session
        self.notes = list(runner.samples.notes)
        self.gains: dict[str, Array] = {}
        self.rounding = 0.0
        self.sites: list[SiteChoices] = []
        self.references: list[list[Tensor]] = []
        known = {id(sample): Dense(runner, sample) for sample in runner.samples.fit}
        self.probed = [known[id(sample)] for sample in probed_samples(runner.samples)]
        refined = probed_samples(runner.samples, MAX_REFINED_SAMPLES)
        self.fitted = [known[id(sample)] for sample in refined]

    def for_error(self, target: float) -> Plan:
        """The plan that holds a relative error of the model's output."""
        sites = self.choices()
        refinement = self.refinement()
        ways = refinement.ways(sites, target)
        best = cheapest(ways, refinement.fitted(target), self.cost(), self.progress)
        return self._plan(best, self.held_out(target), Goal(error=target))

    def for_density(self, target: float) -> Plan:
        """The plan with the least error whose density is within a target."""
        self.sites = [replace(site, forced=True) for site in self.choices()]
        refinement = self.refinement()
        ways = refinement.ways_at_density(self.sites, target)
        best = best_at_density(ways, refinement.fitted(1.0), target, self.cost(), self.progress)
        return self._plan(best, self.held_out(1.0), Goal(density=target))

    def for_psnr(self, target: float, pipeline: Callable[[], Any]) -> Plan:
        """The plan that holds a PSNR, in dB, of what a pipeline generates."""
        sites = self.choices()
        with self.progress.phase("dense pipeline", 2) as step:
            criterion = GeneratedVideo(self.runner, pipeline, target, self.journal)
            step(2)
        ways = video_ways(self.refinement(), criterion, sites)
        best = cheapest(ways, criterion, self.cost(), self.progress)
        return self._plan(best, criterion, Goal(psnr=target))

    def choices(self) -> list[SiteChoices]:
        """Measure all sites and gains: what there is to choose from at each of them."""
        self.measure()
        self.gains, self.rounding = measure_gains(
            self.runner, self.probed, self.progress, self.journal
        )
        counts = self.runner.samples.bucket_samples
        self.sites = [
            site_choices(site, self.gains[name], counts)
            for name, site in self.session.measurable().items()
        ]
        return self.sites

    def refinement(self) -> Refinement:
        """What rounds of refinement need; once all sites are measured."""
        return Refinement(
            self.runner, self.cost(), self.progress, self.journal, self.fitted, self.rounds
        )

    def held_out(self, target: float) -> OutputError:
        """The criterion that a plan is verified by."""
        return OutputError(
            self.runner, self.runner.samples.held_out, self.dense_references(), target,
            self.journal, "held out",
        )  # fmt: skip

    def cost(self) -> CostModel:
        """What choices cost on this device, as far as it was timed while measuring."""
        return cost_model(list(self.session.timings.values()))

    def dense_references(self) -> list[list[Tensor]]:
        """The dense model's outputs for the held-out samples."""
        held_out = self.runner.samples.held_out
        if self.references:
            return self.references
        with self.progress.phase("dense references", len(held_out)) as step:
            for sample in held_out:
                self.references.append(self.runner.run(sample, "dense"))
                step()
        return self.references

    def measure(self) -> None:
        """Run the fitted samples, those that the journal knows excepted."""
        fit, session = self.runner.samples.fit, self.session
        known = len(session.sites)
        with self.progress.phase("measuring sites", None) as step:
            session.on_site = step
            for index, sample in enumerate(fit):
                key = f"measure/{index}"
                before = self.journal.find(key)
                entry = before or self.journal.keep(key, *self._measure_one(index, sample))
                self._absorb(entry, self.runner.samples.bucket(sample))
                known = known or len(session.measurable())
                step.total(known * len(fit))
                if before is not None:
                    step(known)
        if not session.measurable():
            raise CalibrationError(self._nothing_found())

    def _measure_one(self, index: int, sample: Sample) -> tuple[Any, dict[str, Tensor]]:
        """One measuring pass, as the facts and tensors that `_absorb` takes."""
        session = self.session
        session.readings = []
        output = self.runner.run(sample, "measure")
        if not all(bool(torch.isfinite(x).all()) for x in output):
            raise CalibrationError(
                f"sample {index} (of those fitted): the dense model's own output has NaN "
                "or infinite values; calibration needs samples that the model can serve"
            )
        if not any(bool(x.any()) for x in output):
            raise CalibrationError(
                f"sample {index} (of those fitted): the dense model's output is zero "
                "everywhere, so no relative error exists; are its weights loaded?"
            )
        readings, tensors = pack(session.readings)
        facts = {
            "readings": readings,
            "failures": {name: site.failure for name, site in session.sites.items()},
            "dense": session.dense_sites,
            "timings": [timing.model_dump() for timing in session.timings.values()],
        }
        return facts, tensors

    def _absorb(self, entry: Entry, bucket: int) -> None:
        """Take in a measuring pass, of this run or of one before it."""
        facts, session = entry.facts, self.session
        for name, failure in facts["failures"].items():
            session.sites.setdefault(name, Measured(name)).failure = failure
        session.dense_sites.update(facts["dense"])
        for timing in facts["timings"]:
            session.add_timing(SiteTiming.model_validate(timing, strict=False))
        session.absorb(unpack(facts["readings"], dict(entry.tensors)), bucket)

    def _nothing_found(self) -> str:
        reasons = dict(self.session.dense_sites)
        reasons.update({n: s.failure for n, s in self.session.sites.items() if s.failure})
        if not reasons:
            return (
                "no attention was found in the model's graph: it may be of a form that is not "
                "recognised, or the compiler may have left its frame; "
                "freqopt.inspect(model, ...) tells which"
            )
        listed = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:3])
        return f"none of the {len(reasons)} attention sites can be split ({listed})"

    def _plan(self, ways: Sequence[Settled], criterion: Criterion, goal: Goal) -> Plan:
        """Search for the goal along the best of the ways, and write down what was found."""
        cost, sites = self.cost(), self.sites
        search = Search(ways[0].way, cost, criterion, self.progress)
        reasons: dict[str, str] = {}
        if goal.density is not None:
            found = search.run_density(goal.density)
            self._time(budgets(sites, found.allocation))
        else:
            search, found = self._search(ways, criterion)
            self._time(budgets(sites, found.allocation))
            reasons = self._slow_sites()
        if reasons:
            found = search.try_out(
                with_dense(search.sites, found.allocation, reasons, cost), found.notes
            )
        notes = [*self.notes, *found.notes]
        if search.way.tied:
            notes.append("one threshold serves all heads and timesteps: no other way cost less")
        error = found.trial
        if goal.psnr is not None:
            held_out = Search(search.way, cost, self.held_out(1.0), self.progress)
            error = held_out.try_out(found.allocation).trial
        return build_plan(
            self.runner.model, self.session, self.runner.samples, sites, self.gains,
            search.way.marginals, found, search.trials, cost=cost, reasons=reasons, error=error,
            goal=goal,
            measured_psnr=None if goal.psnr is None else decibels_of(found.trial.measured_error),
            seed=self.runner.seed, notes=notes, rounding=self.rounding,
        )  # fmt: skip

    def _search(self, ways: Sequence[Settled], criterion: Criterion) -> tuple[Search, Found]:
        """The search that met the target, along the first way.

        Where that ends far from it, along that of heads alone, which reaches everything that can be
        reached.
        """
        best: tuple[Search, Found] | None = None
        alone = next(settled for settled in ways if settled.way.name == ALONE)
        for settled in (ways[0], alone):
            search = Search(settled.way, self.cost(), criterion, self.progress)
            found = search.run(settled.predicted)
            if found and (best is None or found.allocation.cost < best[1].allocation.cost):
                best = search, found
            if settled is alone or (
                found and found.trial.measured_error >= ACCEPT * criterion.target
            ):
                break
        return best or (search, self._everything_dense(self.sites, search, criterion))

    def _time(self, chosen: dict[str, Tensor]) -> None:
        """Time every site that is split, at its budgets; only where costs were measured too."""
        session, samples = self.session, self.runner.samples.held_out
        if not session.timings or not chosen:
            return
        key = budget_key("times", chosen)
        entry = self.journal.find(key)
        if entry is None:
            session.budgets = chosen
            self.runner.run(samples[len(samples) // 2], "time")
            entry = self.journal.keep(key, session.times)
        session.times = {name: (dense, split) for name, (dense, split) in entry.facts.items()}

    def _slow_sites(self) -> dict[str, str]:
        """Sites whose split, as timed at its budgets, is no faster than dense; with the reason.

        Allocation goes by a line through a few times, which a short call may miss.
        """
        return {
            name: slower_reason(dense, split, "at its budgets")
            for name, (dense, split) in self.session.times.items()
            if split >= dense
        }

    def _everything_dense(
        self, sites: list[SiteChoices], search: Search, criterion: Criterion
    ) -> Found:
        """The plan that splits nothing, unless exact attention misses the target as well."""
        exact = {site.name: torch.zeros(2, site.heads) for site in sites}
        floor = max(criterion.measure(exact).errors)
        if floor > criterion.target:
            raise CalibrationError(
                f"the target {criterion.target:g} cannot be met: with every pair attended exactly "
                f"(threshold 0) the output already differs by {floor:.1e}, which is rounding "
                "amplified by the model; ask for more than that"
            )
        found = search.try_out(solve(sites, 0.0, search.cost))
        pays = not all(choice.dense for choice in solve(sites, math.inf, search.cost).choices)
        why = "no split met the target" if pays else "splitting is no faster anywhere"
        found.notes.append(f"{why}, so every site stays dense")
        return found
