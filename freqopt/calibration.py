"""Calibration: an error target on the model's output in, a plan that holds it out.

Measures every choice at every site while the model runs on samples, spends the error where it buys
most, and verifies the result on samples that were not fitted. The method is in docs/calibration.md.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from freqopt.calibration_allocation import (
    Allocation,
    CostModel,
    HeadCurves,
    ProductCost,
    SiteChoices,
    join_curves,
    make_choices,
    same_choices,
    solve,
)
from freqopt.calibration_evidence import build_plan
from freqopt.calibration_gains import Array, measure_gains, output_tensors, relative_error
from freqopt.calibration_measure import THRESHOLDS, Measured, Mode, Session, private_backend
from freqopt.calibration_progress import Progress, open_progress
from freqopt.calibration_samples import (
    MAX_BUCKETS,
    Sample,
    Samples,
    SampleSet,
    collect_samples,
)
from freqopt.config import MID_RATIO
from freqopt.errors import CalibrationError, FreqoptError, OptionError
from freqopt.grid import Grid
from freqopt.plan import Plan, Trial

logger = logging.getLogger(__name__)

AIM = 0.93
"""Share of the target that verification aims for, to end between ACCEPT and 1."""

ACCEPT = 0.8
MAX_TRIALS = 8

DISBELIEF = 1.3
"""A trial this much worse than predicted has a site whose errors were taken too lightly: all sites
that it split are then believed to be worse than it was, and dense ones keep their chance."""

BIAS_WEIGHT = 4.0
"""How much more a squared bias counts than noise: it adds up over layers and denoising steps."""

RECOMPILE_LIMIT = 256


def calibrate(
    model: nn.Module,
    samples: Samples,
    *,
    target_error: float = 0.03,
    grid: Grid | None = None,
    timestep: str | None = None,
    timestep_buckets: int = MAX_BUCKETS,
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
        grid: extents (t, h, w) of the video tokens where the graph does not tell them.
        timestep: name of the model's timestep argument, where it is not found by a usual name
            (timestep, sigma, t and the like).
        timestep_buckets: ranges of the timestep with budgets of their own, at most; each needs a
            sample to fit and one held out. 1: the same budgets at all timesteps.
        progress: show progress and time left.
        seed: seeds PyTorch's generators before every run of the model.

    Returns:
        The plan, with the evidence for `freqopt.report`.

    Raises:
        CalibrationError: unusable samples (none, NaN, of another form), no site that can be split,
            or a target below what even exact attention in another order of summation gives.
        OptionError: a target_error outside (0, 1), or fewer than one timestep bucket.
    """
    if not 0.0 < target_error < 1.0:
        raise OptionError(
            f"target_error {target_error} is outside (0, 1): it is the relative L2 error of the "
            "model's output; 0.01 is very close, 0.03 the default, 0.1 visible"
        )
    if timestep_buckets < 1:
        raise OptionError(f"timestep_buckets {timestep_buckets} must be 1 (no buckets) or more")
    inner = getattr(model, "_orig_mod", model)
    sample_set = collect_samples(model, samples, timestep=timestep, buckets=timestep_buckets)
    with _evaluation(inner), open_progress(progress) as bars:
        try:
            return _Calibration(inner, sample_set, target_error, grid, seed, bars).run()
        finally:
            _forget_compiled(inner)


class _Calibration:
    """One run of `calibrate`: its phases in order, and what they share."""

    def __init__(
        self,
        model: nn.Module,
        samples: SampleSet,
        target: float,
        grid: Grid | None,
        seed: int,
        progress: Progress,
    ) -> None:
        self.model, self.samples, self.target, self.seed = model, samples, target, seed
        self.progress = progress
        self.cost: CostModel = ProductCost()
        self.session = Session()
        self.compiled = torch.compile(
            model, backend=private_backend(self.session, grid), dynamic=False
        )
        self.notes = list(samples.notes)
        self.references: list[list[Tensor]] = []
        self.densities: dict[str, Tensor] = {}
        self.chosen_densities: dict[str, Tensor] = {}
        self.rounding = 0.0
        self.trials: list[Trial] = []
        self.chosen: Trial | None = None

    def run(self) -> Plan:
        self._measure()
        gains, self.rounding = measure_gains(self.session, self.samples, self._run, self.progress)
        sites = [
            site_choices(site, gains[name], self.samples.bucket_samples)
            for name, site in self.session.measurable().items()
        ]
        with self.progress.phase("dense references", len(self.samples.held_out)) as step:
            for sample in self.samples.held_out:
                self.references.append(self._run(sample, "dense"))
                step()
        allocation = self._search(sites)
        return build_plan(
            self.model, self.session, self.samples, sites, gains, allocation, self.trials,
            target=self.target, seed=self.seed, notes=self.notes, cost=self.cost,
            chosen=self.chosen, densities=self.chosen_densities, rounding=self.rounding,
        )  # fmt: skip

    def _run(self, sample: Sample, mode: Mode) -> list[Tensor]:
        """Floating-point output tensors of one run of the model in a mode of the session."""
        self.session.mode, self.session.bucket = mode, self.samples.bucket(sample)
        devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
        try:
            with torch.no_grad(), torch.random.fork_rng(devices), _many_recompiles():
                torch.manual_seed(self.seed)
                output = self.compiled(*sample.args, **sample.kwargs)
        except Exception as error:
            cause = getattr(error, "inner_exception", None) or error.__cause__
            if isinstance(cause, FreqoptError):
                raise cause from None
            raise
        return output_tensors(output)

    def _measure(self) -> None:
        fit = self.samples.fit
        known = len(self.session.sites)
        with self.progress.phase("measuring sites", None) as step:
            self.session.on_site = step
            for index, sample in enumerate(fit):
                output = self._run(sample, "measure")
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
                known = known or len(self.session.measurable())
                step.total(known * len(fit))
        if not self.session.measurable():
            raise CalibrationError(self._nothing_found())

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

    def _search(self, sites: list[SiteChoices]) -> Allocation:
        """Move the predicted error until the measured one is within [ACCEPT, 1] of the target."""
        aim = self.target * AIM
        predicted, low, high = aim, 0.0, math.inf
        best: tuple[float, Allocation] | None = None
        believed = list(sites)
        loosest = solve(sites, math.inf, self.cost).multiplier
        previous: Allocation | None = None
        with self.progress.phase("verifying", MAX_TRIALS) as step:
            for _ in range(MAX_TRIALS):
                allocation = solve(believed, predicted, self.cost)
                if previous is not None and same_choices(allocation, previous):
                    break
                previous = allocation
                measured = self._verify(sites, allocation)
                step()
                if measured <= self.target:
                    low = predicted
                    if best is None or allocation.cost < best[1].cost:
                        best = (measured, allocation)
                        self.chosen, self.chosen_densities = self.trials[-1], self.densities
                    if measured >= ACCEPT * self.target or allocation.multiplier == loosest:
                        break
                elif measured > DISBELIEF * allocation.error > 0.0:
                    scale = DISBELIEF * measured / allocation.error
                    believed = [
                        site if choice.dense else site.scaled(scale)
                        for site, choice in zip(believed, allocation.choices, strict=True)
                    ]
                    predicted, low, high = aim, 0.0, math.inf
                    continue
                else:
                    high = predicted
                scaled = predicted * aim / max(measured, 1e-12)
                if high < math.inf:
                    inside = math.sqrt(max(low, high * 1e-2) * high)
                    scaled = scaled if low < scaled < high else inside
                predicted = min(max(scaled, predicted * 1e-2), predicted * 1e2)
        if best is None or all(choice.dense for choice in best[1].choices):
            return self._everything_dense(sites)
        if best[0] < ACCEPT * self.target:
            why = "no choice came closer without exceeding it"
            if best[1].multiplier == loosest:
                why = "even the loosest budgets do not reach it"
            self.notes.append(f"the error is well below the target: {why}")
        return best[1]

    def _everything_dense(self, sites: list[SiteChoices]) -> Allocation:
        """The plan that splits nothing, unless exact attention misses the target as well."""
        self.session.budgets = {site.name: torch.zeros(2, site.heads) for site in sites}
        floor = max(self._errors())
        if floor > self.target:
            raise CalibrationError(
                f"target_error {self.target:g} cannot be met: with every pair attended exactly "
                f"(threshold 0) the output already differs by {floor:.1e}, which is rounding "
                "amplified by the model; ask for more than that"
            )
        self.notes.append("no split met the target, so every site stays dense")
        allocation = solve(sites, 0.0, self.cost)
        self._verify(sites, allocation)
        self.chosen, self.chosen_densities = self.trials[-1], self.densities
        return allocation

    def _verify(self, sites: list[SiteChoices], allocation: Allocation) -> float:
        """Measured error of an allocation over the held-out samples; appends to the trials."""
        self.session.budgets = budgets(sites, allocation)
        errors = self._errors()
        measured = math.sqrt(sum(e * e for e in errors) / len(errors))
        density = dense = 0.0
        for site in sites:
            weight = self.cost.dense(site.shape) * site.heads
            found = self.densities.get(site.name)
            density += weight * (1.0 if found is None else float(found.mean()))
            dense += weight
        self.trials.append(
            Trial(
                multiplier=allocation.multiplier,
                predicted_error=allocation.error,
                measured_error=measured,
                worst_error=max(errors),
                mean_density=density / dense,
                sample_errors=errors,
            )
        )
        logger.info("trial %s", self.trials[-1])
        return measured

    def _errors(self) -> list[float]:
        """Error of each held-out sample with the session's budgets; fills `densities`."""
        self.session.densities = {}
        errors = []
        for sample, reference in zip(self.samples.held_out, self.references, strict=True):
            errors.append(relative_error(self._run(sample, "split"), reference))
        self.densities = {
            name: torch.stack(rows).mean(0).cpu() for name, rows in self.session.densities.items()
        }
        return errors


def site_choices(site: Measured, gains: Array, samples: Sequence[int]) -> SiteChoices:
    """The choices of a site from what was measured, errors carried to the model's output.

    Args:
        gains: (buckets, H), from `measure_gains`.
        samples: fitted samples in each timestep bucket. A site that was not reached in one of them
            is taken to behave there as it does on average.
    """
    shares = [count / sum(samples) for count in samples]
    total = site.total()
    rows: list[list[HeadCurves]] = []
    for bucket, share in enumerate(shares):
        sums, weight = site.buckets.get(bucket, total), np.square(gains[bucket])[:, None]
        density, error, bias = (
            sums.mean(name).transpose(1, 2).numpy() for name in ("density", "site", "site_bias")
        )
        damage = error + (BIAS_WEIGHT - 1.0) * bias
        scale = share * weight
        rows.append(
            [
                HeadCurves(bool(mid), density[mid], scale * error[mid], scale * damage[mid])
                for mid in range(len(density))
            ]
        )
    ladder = np.array(THRESHOLDS)
    curves = [join_curves(buckets) for buckets in zip(*rows, strict=True)]
    return make_choices(site.name, site.tokens, site.head_dim, ladder, curves, shares)


def budgets(sites: list[SiteChoices], allocation: Allocation) -> dict[str, Tensor]:
    """Budgets (buckets, 2, H) of the sites that an allocation splits."""
    found = {}
    for site, choice in zip(sites, allocation.choices, strict=True):
        if choice.dense:
            continue
        exact = torch.tensor(site.threshold[choice.index], dtype=torch.float32)
        mid = torch.tensor(site.mid[choice.index])
        rows = torch.stack([exact, torch.where(mid, exact * MID_RATIO, exact)])
        found[site.name] = rows.unflatten(1, (len(site.shares), site.heads)).transpose(0, 1)
    return found


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _forget_compiled(model: nn.Module) -> None:
    """Drop the recorders' graphs, which hold what was measured and count as recompilations."""
    code = getattr(model.forward, "__code__", None)
    if code is not None:
        torch._dynamo.eval_frame.remove_from_cache(code)


def _many_recompiles() -> Any:
    """Samples of many shapes each need their own graph; hitting the limit would skip sites."""
    for name in ("recompile_limit", "cache_size_limit"):
        if hasattr(torch._dynamo.config, name):
            return torch._dynamo.config.patch({name: RECOMPILE_LIMIT})
    return nullcontext()
