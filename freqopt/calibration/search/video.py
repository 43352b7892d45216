"""Generated videos as a criterion: PSNR of what a pipeline returns against its dense twin.

The error of single calls of the model says little about how errors add up over denoising steps; a
run of the pipeline, same seed, says it all.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from freqopt.calibration.measure.ladder import Array
from freqopt.calibration.measure.requests import Dense, Split, Thresholds
from freqopt.calibration.search.allocate import Allocation, total
from freqopt.calibration.search.choices import SiteChoices
from freqopt.calibration.search.refine import ALONE, Refinement, settle, simple_strategies
from freqopt.calibration.search.strategies import Strategy
from freqopt.calibration.search.verify import Verdict, remembered, thresholds_of
from freqopt.calibration.search.workbench import Workbench
from freqopt.errors import CalibrationError

START = 0.03
"""Predicted error of the model's output that is tried first."""

POWERS = (0.5, 1.0)
"""Powers of the ratio of two timestep buckets' effects that their weights are tried to differ by.
Effects of buckets alone overstate the differences, as errors of neighbouring steps are alike: half
of them, on a logarithmic scale, is mostly best."""

REACH = 3.0
"""Most that the weights may change a density."""


def relative_of(decibels: float) -> float:
    """Root mean square error in units of the range, of a PSNR in dB."""
    return math.pow(10.0, -decibels / 20.0)


def decibels_of(relative: float) -> float:
    """PSNR in dB of a root mean square error in units of the range; infinite for 0."""
    return math.inf if relative <= 0.0 else -20.0 * math.log10(relative)


class GeneratedVideo:
    """Criterion: the pipeline's output against that of the dense model, same seed.

    Its errors are root mean squares in units of the output's range (see `value_range`).
    """

    comparable = False

    def __init__(self, bench: Workbench, pipeline: Callable[[], Any], decibels: float) -> None:
        self.bench, self.pipeline = bench, pipeline
        self.target, self.start = relative_of(decibels), START
        self.runs = float(len(bench.samples.fit) + len(bench.samples.held_out))
        self.reference = pixels(bench.runner.generate(pipeline, Dense())[0])
        self.range = value_range(self.reference)
        again = self._error(pixels(bench.runner.generate(pipeline, Dense())[0]))
        if again > self.target:
            raise CalibrationError(
                f"two dense runs of the pipeline already differ by {decibels_of(again):.1f} dB, so "
                f"target_psnr {decibels:g} cannot be judged; seed everything random inside it "
                "(pass a torch.Generator, or rely on the global ones of PyTorch, NumPy and Python)"
            )

    def measure(self, thresholds: Thresholds) -> Verdict:
        """See `Criterion`."""
        return remembered(self.bench, "generated", thresholds, self._run)

    def _run(self, thresholds: Thresholds) -> Verdict:
        output, result = self.bench.runner.generate(self.pipeline, Split(thresholds))
        return Verdict([self._error(pixels(output))], result.mean_densities())

    def _error(self, output: list[Tensor]) -> float:
        if [x.shape for x in output] != [x.shape for x in self.reference]:
            raise CalibrationError(
                f"the pipeline returned {[tuple(x.shape) for x in output]} and before "
                f"{[tuple(x.shape) for x in self.reference]}; it must do the same every time"
            )
        squares = sum(
            float((x - y).square().sum()) for x, y in zip(output, self.reference, strict=True)
        )
        error = math.sqrt(squares / sum(x.numel() for x in output)) / self.range
        return self.bench.runner.team.of_first(error if math.isfinite(error) else math.inf)


def value_range(output: Sequence[Tensor]) -> float:
    """Width of the interval that values lie in: 1, 2 or 255 by the usual conventions."""
    low, high = min(float(x.min()) for x in output), max(float(x.max()) for x in output)
    for start, width in ((0.0, 1.0), (-1.0, 2.0), (0.0, 255.0)):
        if start <= low and high <= start + width:
            return width
    return high - low


def pixels(output: Any) -> list[Tensor]:
    """All numbers of what a pipeline returned, as float64 tensors on the CPU.

    Tensors, arrays and PIL images are understood, and sequences, dicts and dataclasses of them.

    Raises:
        CalibrationError: there are none.
    """
    tensors = _pixels(output)
    if not tensors:
        raise CalibrationError(
            f"the pipeline returned a {type(output).__name__} without tensors, arrays or images; "
            "with target_psnr it must return what it generated, such as `return pipe(...).frames`"
        )
    return tensors


def _pixels(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output.detach().double().cpu()] if output.numel() else []
    if isinstance(output, np.ndarray) and output.dtype.kind in "fiu":
        return [torch.from_numpy(output.astype(np.float64))] if output.size else []
    if hasattr(output, "convert") and hasattr(output, "getbands"):  # a PIL image
        return _pixels(np.asarray(output))
    if isinstance(output, dict):
        output = list(output.values())
    elif dataclasses.is_dataclass(output):
        output = [getattr(output, f.name) for f in dataclasses.fields(output)]
    if isinstance(output, (list, tuple)):
        return [tensor for item in output for tensor in _pixels(item)]
    return []


def video_strategies(
    refinement: Refinement, criterion: GeneratedVideo, sites: list[SiteChoices]
) -> list[Strategy]:
    """Ways to choose thresholds for what is generated.

    Those for single calls of the model, at errors that come to the target in the video, and weighed
    by how much each timestep bucket shows.
    """
    cost = refinement.bench.cost
    first = settle(Strategy(ALONE, sites), criterion, cost, criterion.start)
    level = refinement.fitted(1.0).measure(thresholds_of(sites, first.allocation)).error
    if level <= 0.0:
        return simple_strategies(sites)
    believed = replace(refinement.strategies(sites, level)[-1], start=level)
    last = settle(believed, criterion, cost, level)
    weighed = weighed_strategies(refinement, criterion, believed, last.allocation)
    return [*simple_strategies(sites), believed, *weighed]


def weighed_strategies(
    refinement: Refinement, criterion: GeneratedVideo, strategy: Strategy, allocation: Allocation
) -> list[Strategy]:
    """A strategy with the errors of each timestep bucket rescaled by what the video shows of them.

    An error at one denoising step is corrected by later ones, or carried on, so equal errors of the
    model's output do not count equally. One run of the pipeline per bucket tells, in which that
    bucket alone has its thresholds and the others are exact.
    """
    sites, shares = strategy.sites, np.array(strategy.sites[0].shares)
    if len(shares) == 1 or all(choice.dense for choice in allocation.choices):
        return []
    called = shares * refinement.bucket_errors(sites, allocation)
    chosen, effects = thresholds_of(sites, allocation), []
    with refinement.bench.progress.phase("probing timesteps", len(shares)) as step:
        for bucket in range(len(shares)):
            alone = {
                name: site._replace(threshold=torch.zeros_like(site.threshold))
                for name, site in chosen.items()
            }
            for name, site in chosen.items():
                alone[name].threshold[bucket] = site.threshold[bucket]
            effects.append(criterion.measure(alone).error ** 2)
            step()
    ratio = np.array(effects) / np.maximum(called, 1e-30)
    ratio = np.maximum(ratio / (ratio * shares).sum(), 1e-3)
    return [_weighed(refinement, strategy, allocation, ratio, power) for power in POWERS]


def _weighed(
    refinement: Refinement, strategy: Strategy, allocation: Allocation, ratio: Array, power: float
) -> Strategy:
    """The strategy with errors of each timestep bucket larger by a power of a ratio."""
    sites = []
    for site in strategy.sites:
        row = np.repeat(ratio**power, site.heads)[:, None]
        error, weighted = site.error * row, site.weighted_error * row
        sites.append(replace(site, error=error, weighted_error=weighted))
    start = total(sites, allocation.choices, 0.0, refinement.bench.cost).error
    return replace(
        strategy,
        name=f"{strategy.name}, timesteps by the video to the power {power:g}",
        sites=sites,
        around=(allocation, REACH),
        start=start or None,
    )
