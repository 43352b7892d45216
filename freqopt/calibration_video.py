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

from freqopt.calibration_allocation import SiteChoices
from freqopt.calibration_gains import nearest
from freqopt.calibration_journal import Journal
from freqopt.calibration_progress import Progress
from freqopt.calibration_run import Runner
from freqopt.calibration_search import Verdict, mean_densities, remembered
from freqopt.errors import CalibrationError

START = 0.03
"""Predicted error of the model's output that is tried first."""

COARSE = 0.02
"""Predicted error, over the calls of a timestep bucket, at which the bucket's effect is probed: of
the size that plans have. Effects of much larger errors saturate, those of the steps that matter
most first, and timesteps would seem more alike than they are."""


TRUST = 0.5
"""Power of the ratio of two buckets' effects that their weights differ by: halfway, on a
logarithmic scale, between equal weights and effects measured alone. Buckets together add up to
less, the early ones most of all: of eleven allocations sampled on an H200 this power predicts the
PSNR with a deviation of 0.5 dB, whole effects with 0.8 and equal weights with 0.7."""


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

    def __init__(
        self, runner: Runner, pipeline: Callable[[], Any], decibels: float, journal: Journal
    ) -> None:
        self.runner, self.pipeline, self.journal = runner, pipeline, journal
        self.target, self.start = relative_of(decibels), START
        self.reference = pixels(runner.generate(pipeline, "dense"))
        self.range = value_range(self.reference)
        again = self._error(pixels(runner.generate(pipeline, "dense")))
        if again > self.target:
            raise CalibrationError(
                f"two dense runs of the pipeline already differ by {decibels_of(again):.1f} dB, so "
                f"target_psnr {decibels:g} cannot be judged; seed everything random inside it "
                "(pass a torch.Generator, or rely on torch.manual_seed, which is set before it)"
            )

    def measure(self, budgets: dict[str, Tensor]) -> Verdict:
        """See `Criterion`."""
        return remembered(self.journal, "generated", budgets, self._run)

    def _run(self, budgets: dict[str, Tensor]) -> Verdict:
        session = self.runner.session
        session.budgets, session.densities, session.errors = budgets, {}, {}
        error = self._error(pixels(self.runner.generate(self.pipeline, "split")))
        return Verdict([error], mean_densities(session.densities))

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
        return error if math.isfinite(error) else math.inf


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
    found = _pixels(output)
    if not found:
        raise CalibrationError(
            f"the pipeline returned a {type(output).__name__} without tensors, arrays or images; "
            "with target_psnr it must return what it generated, such as `return pipe(...).frames`"
        )
    return found


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


def weigh_timesteps(
    criterion: GeneratedVideo, sites: list[SiteChoices], progress: Progress
) -> list[SiteChoices]:
    """Errors of the sites rescaled by how much those of each timestep bucket show in the video.

    An error at one denoising step is corrected by later ones, or carried on, so equal errors of the
    model's output do not count equally. One run of the pipeline per bucket tells, as far as TRUST.
    """
    buckets = len(sites[0].shares)
    if buckets == 1:
        return sites
    effects = []
    with progress.phase("probing timesteps", buckets) as step:
        for bucket in range(buckets):
            trial, predicted = _coarse_budgets(sites, bucket)
            effects.append(criterion.measure(trial).error ** 2 / max(predicted, 1e-30))
            step()
    mean = sum(effects) / buckets
    factor = np.array([max(effect / mean, 1e-3) ** TRUST for effect in effects])
    weighed = []
    for site in sites:
        rows = np.repeat(factor, site.heads)[:, None]
        weighed.append(replace(site, error=site.error * rows, damage=site.damage * rows))
    return weighed


def _coarse_budgets(sites: Sequence[SiteChoices], bucket: int) -> tuple[dict[str, Tensor], float]:
    """Budgets with one threshold in a bucket and exact elsewhere, and the squared error predicted.

    The threshold is the one whose predicted error over the bucket's calls is nearest to COARSE.
    """
    plain = np.flatnonzero(~sites[0].mid)
    predicted = []
    for choice in plain:
        square = 0.0
        for site in sites:
            row = slice(bucket * site.heads, (bucket + 1) * site.heads)
            square += float(site.error[row, choice].sum())
        predicted.append(square)
    wanted = sites[0].shares[bucket] * COARSE**2
    last = nearest(predicted, wanted)
    found = {}
    for site in sites:
        budget = torch.zeros(len(site.shares), 2, site.heads)
        budget[bucket] = float(site.threshold[plain[last]])
        found[site.name] = budget
    return found, predicted[last]
