"""Calibration: an error target on the model's output in, a plan that holds it out.

Measures every choice at every site while the model runs on samples, spends the error where it buys
most, and verifies the result on samples that were not fitted. How: docs/design/calibration.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from torch import nn

from freqopt.calibration.checkpoint import identity_of, open_checkpoint
from freqopt.calibration.phases import Calibration
from freqopt.calibration.runner import opened
from freqopt.calibration.samples import MAX_BUCKETS, Samples, collect_samples
from freqopt.calibration.search.workbench import Workbench
from freqopt.errors import OptionError
from freqopt.grid import Grid
from freqopt.plan.plan import Plan
from freqopt.progress import open_progress


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
            anew. Each takes as long as probing sensitivities. By default 3 on a GPU for models of
            up to 64 heads in all, else 1; 0 leaves it out.
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
        open_checkpoint(checkpoint, identity) as results,
        opened(inner, sample_set, grid, seed) as runner,
        open_progress(progress) as bars,
    ):
        calibration = Calibration(Workbench(runner, bars, results), rounds)
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
