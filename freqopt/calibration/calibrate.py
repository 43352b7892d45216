"""Calibration: an error target on the model's output in, a plan that holds it out.

Measures every choice at every site while the model runs on samples, spends the error where it buys
most, and verifies the result on samples that were not fitted. How: docs/design/calibration.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, overload

from torch import nn

from freqopt.calibration.asked import check_apart, checked
from freqopt.calibration.checkpoint import identity_of, open_checkpoint
from freqopt.calibration.measure.ladder import GRID_ALONE, ORDERS
from freqopt.calibration.phases import Calibration
from freqopt.calibration.runner import opened
from freqopt.calibration.samples import (
    MAX_BUCKETS,
    Samples,
    SampleSet,
    collect_samples,
    samples_by_model,
)
from freqopt.calibration.search.workbench import Workbench
from freqopt.calibration.team import is_first_process
from freqopt.capture.modules import module_of
from freqopt.errors import OptionError
from freqopt.grid import Grid
from freqopt.plan.folder import check_place, is_file
from freqopt.plan.plan import Plan
from freqopt.plan.plans import Plans
from freqopt.progress import Progress, open_progress

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Options(TypedDict, total=False):
    """Options of `calibrate`, which says what they are."""

    target_error: float | None
    quantile: float | None
    target_psnr: float | None
    target_density: float | None
    grid: Grid | None
    timestep: str | None
    timestep_buckets: int
    order: str
    clock: str
    rounds: int | None
    passes: int | None
    checkpoint: str | os.PathLike[str] | None
    output: str | os.PathLike[str] | None
    progress: bool
    seed: int


@overload
def calibrate(model: nn.Module, samples: Samples, **options: Unpack[Options]) -> Plan: ...


@overload
def calibrate(
    model: Mapping[str, nn.Module],
    samples: Samples | Mapping[str, Samples],
    **options: Unpack[Options],
) -> Plans: ...


def calibrate(
    model: nn.Module | Mapping[str, nn.Module],
    samples: Samples | Mapping[str, Samples],
    *,
    target_error: float | None = None,
    quantile: float | None = None,
    target_psnr: float | None = None,
    target_density: float | None = None,
    grid: Grid | None = None,
    timestep: str | None = None,
    timestep_buckets: int = MAX_BUCKETS,
    order: str = "auto",
    clock: str = "auto",
    rounds: int | None = None,
    passes: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    progress: bool = True,
    seed: int = 0,
) -> Plan | Plans:
    """Find the cheapest budgets that hold an error target on the model's output.

    The model runs a dozen or so times per sample where it is, without gradients, in evaluation
    mode; it is left as it was. One seed gives one plan. Where several processes share the heads of
    the model (Ulysses), all of them call this with the same samples, and get the same plan.

    Args:
        model: the model that will be compiled with ``backend="freqopt"``; or several that share the
            denoising steps, by name, such as ``{"transformer": a, "transformer_2": b}``.
        samples: keyword arguments of calls of the model as dicts, or (args, kwargs) pairs; or a
            callable that runs your own pipeline once, whose calls of `model` are then recorded
            (up to 16, evenly spaced). Every other one is held out for verification. For several
            models a callable that runs them all, or samples by the models' names.
        target_error: relative L2 error of the model's output against the dense model, without unit,
            in (0, 1); held on the held-out samples (root mean square over them). 0.03 where no
            target is given.
        quantile: the share of inputs, in (0, 1), that `target_error` is held for, instead of their
            root mean square: 0.9 lets a tenth of the held-out samples be further off.
        target_psnr: instead of `target_error`, the PSNR in dB of what the pipeline generates
            against what it generates with the dense model. `samples` must then be a callable that
            returns it (tensors, arrays or PIL images) and does the same every time: the
            global generators of PyTorch, NumPy and Python are seeded before each run.
        target_density: instead of either, the share of pairs to attend exactly, in (0, 1]; the plan
            has the least error within it, splits sites where dense attention is faster too (and
            says so), and states the error that was measured.
        grid: extents (t, h, w) of the video tokens where the graph does not tell them. Not needed
            where all samples hold the positions of the same grid (img_ids and the like).
        timestep: name of the model's timestep argument, where it is not found by a usual name
            (timestep, sigma, t and the like).
        timestep_buckets: ranges of the timestep with budgets of their own, at most; each needs a
            sample to fit and one held out. 1: the same budgets at all timesteps.
        order: "auto" chooses for each key head whether its tokens are ordered by the grid or by
            content, in chunks of 512, 1,024, 4,096 or all, and orders by content only where that
            gains more than it takes; "grid" leaves out the others, and measuring them.
        clock: how the model will run, on a GPU, so that costs include what a user waits for.
            "eager": launches count where the GPU waits for them; "compiled": by torch.compile,
            which the whole model is then timed with, dense and split; "graphs": in CUDA graphs,
            where no launch counts. "auto" is "eager", as compiling may take longer than all else;
            where the whole model then is no faster split, it is compiled and timed again.
            Whatever the clock, where a plan makes the whole model no faster, sites that save least
            are left dense, and where that does not help, all are.
        rounds: of measuring what each head's error adds among those of all others, and allocating
            anew. Each takes as long as probing sensitivities. By default 3 on a GPU for models of
            up to 64 heads in all, else 1; 0 leaves it out.
        passes: runs of the model that may be spent on finding out how errors at heads reach its
            output, beside measuring, comparing and verifying; of runs of a part of the model the
            parts count. By default 26 where a run takes a second or more on a GPU, elsewhere as
            many as all heads take, or 80 and rounds in models of more than 64 heads. With fewer,
            heads are probed in fewer samples, or many at once, and the plan says how well they are
            known.
        checkpoint: a file that keeps what was measured if calibration is interrupted. Called again
            with it, calibration goes on from there and ends with the same plan. It is removed when
            that is done, with `output` when the plan is on the disk.
        output: a file (.json) that the plan, or the plans, are saved to, or a folder, written as
            `Plan.save_pretrained` does; whether it can be written is tried before anything is
            measured.
        progress: show progress and time left.
        seed: seeds the generators of PyTorch, NumPy and Python before every run of the model.

    Returns:
        The plan, with the evidence for `freqopt.report`; for several models one for each, as a
        `Plans`, which goes into one file.

    Raises:
        CalibrationError: unusable samples (none, NaN, of another form), no site that can be split,
            a target below what even exact attention in another order of summation gives, or a
            checkpoint of another calibration.
        OptionError: a target outside its range, two of them, a density that the loosest budgets do
            not reach, a target_psnr without a pipeline or for several models, a quantile without a
            target_error, an order that there is not, fewer than one pass or timestep bucket,
            something that is no number where one is due, or a checkpoint that is the output.
        FileError: the output or the checkpoint cannot be written.
    """
    options = checked(
        {name: value for name, value in locals().items() if name not in ("model", "samples")}
    )
    if not isinstance(model, Mapping) and isinstance(samples, Mapping):
        raise OptionError(
            "samples is a dict, which belongs to several models by name; for one model pass a list "
            "of calls, or a callable that runs your pipeline"
        )
    if isinstance(model, Mapping):
        return _calibrate_each(model, samples, options)
    pipeline = None if options["target_psnr"] is None else _pipeline(model, samples)
    collected = _collected(model, samples, options)
    plan = _calibrate_one(model, collected, options, pipeline, keep=output is not None)
    if output is not None:
        _save(plan, output)
        _forget([checkpoint])
    return plan


def _collected(model: nn.Module, samples: Samples, options: Mapping[str, Any]) -> SampleSet:
    module_of(model, "calibrate")
    timestep, buckets = options["timestep"], options["timestep_buckets"]
    return collect_samples(model, samples, timestep=timestep, buckets=buckets)


def _calibrate_one(
    model: nn.Module,
    collected: SampleSet,
    options: Mapping[str, Any],
    pipeline: Callable[[], Any] | None = None,
    *,
    keep: bool = False,
    bars: Progress | None = None,
) -> Plan:
    """The plan of one model.

    pipeline: what a PSNR is of. keep: leave the checkpoint's file when it is done. bars: of a
    calibration of several models.
    """
    inner = module_of(model, "calibrate")
    psnr, density, grid = (options[name] for name in ("target_psnr", "target_density", "grid"))
    path, seed, identity = options["checkpoint"], options["seed"], ""
    orders = GRID_ALONE if options["order"] == "grid" else ORDERS
    if path is not None:
        identity = identity_of(
            inner, collected, grid=grid, seed=seed, orders=orders, clock=options["clock"]
        )
    with (
        opened(inner, collected, grid, seed) as runner,
        open_checkpoint(path, identity, keep=keep, team=runner.look()) as results,
        nullcontext(bars) if bars else _bars(options) as shown,
    ):
        bench = Workbench(runner, shown, results, options["rounds"], options["passes"])
        calibration = Calibration(bench, orders, options["clock"])
        if density is not None:
            return calibration.for_density(density)
        if pipeline is not None:
            return calibration.for_psnr(psnr, pipeline)
        return calibration.for_error(options["target_error"], options["quantile"])


def _calibrate_each(
    models: Mapping[str, nn.Module],
    samples: Samples | Mapping[str, Samples],
    options: Mapping[str, Any],
) -> Plans:
    """Plans of several models; each has a checkpoint named after it, until all are done."""
    if options["target_psnr"] is not None:
        raise OptionError(
            "target_psnr is for one model; for several pass target_error or target_density, or "
            "calibrate one at a time with the others dense"
        )
    path = options["checkpoint"]
    paths = {name: None if path is None else Path(f"{os.fspath(path)}.{name}") for name in models}
    check_apart(options["output"], paths.values())
    if options["output"] is not None:
        check_place(options["output"], models)
    calls = samples_by_model(models, samples)
    collected = {name: _collected(model, calls[name], options) for name, model in models.items()}
    with _bars(options, len(models)) as bars:
        plans = {
            name: _calibrate_one(
                model, collected[name], {**options, "checkpoint": paths[name]}, keep=True, bars=bars
            ).model_copy(update={"component": name})
            for name, model in models.items()
        }
    found = Plans(plans)
    if options["output"] is not None:
        _save(found, options["output"])
    _forget(paths.values())
    return found


def _bars(options: Mapping[str, Any], parts: int = 1) -> AbstractContextManager[Progress]:
    return open_progress(options["progress"] and is_first_process(), parts=parts)


def _save(found: Plan | Plans, output: str | os.PathLike[str]) -> None:
    if not is_first_process():
        return
    if is_file(output):
        found.save(output)
    else:
        found.save_pretrained(output)


def _forget(checkpoints: Iterable[str | os.PathLike[str] | None]) -> None:
    """Remove checkpoints whose plans are safe."""
    for path in checkpoints:
        if path is not None and is_first_process():
            Path(path).unlink(missing_ok=True)


def _pipeline(model: nn.Module, samples: Samples) -> Callable[[], Any]:
    if not callable(samples):
        raise OptionError(
            "target_psnr judges what a pipeline generates, so samples must be a callable that runs "
            "it and returns that, such as lambda: pipe(prompt, generator=...).frames"
        )
    if hasattr(model, "_orig_mod"):
        raise OptionError(
            "with target_psnr the pipeline must call the model itself and not a compiled wrapper; "
            "calibrate first and compile afterwards"
        )
    return samples
