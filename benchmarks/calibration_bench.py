"""The model under benchmarks of calibration: its error and density at given budgets, its videos."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from freqopt.calibration.measure.attention import AttentionShape
from freqopt.calibration.measure.requests import Dense, SiteThresholds, Split
from freqopt.calibration.outputs import relative_error
from freqopt.calibration.runner import Runner
from freqopt.calibration.samples import SampleSet
from freqopt.calibration.search.cost import CostModel, ProductCost
from freqopt.calibration.search.verify import mean_over_runs, thresholds_key
from freqopt.demo.settings import DTYPES, Settings
from freqopt.demo.video import psnr
from freqopt.models_zoo.sampling import denoising_samples, sample, trajectories
from freqopt.progress import Progress

VIDEO_SEED = 7


class Generated(NamedTuple):
    """A video at some thresholds.

    psnr: in dB, against the dense one. density: over its steps. cost: of its attention as modelled,
    over that of dense attention.
    """

    psnr: float
    density: float
    cost: float


@dataclass
class Bench:
    """What all measurements share.

    Attention runs in the recorders of calibration, so nothing compiles for new budgets. unseen:
    samples that calibration never saw. videos: dense ones by seed. cost: of attention on this
    device. known: results of `video`.
    """

    settings: Settings
    runner: Runner
    unseen: SampleSet
    references: list[list[Tensor]]
    videos: dict[int, Tensor] = field(default_factory=dict)
    cost: CostModel = field(default_factory=ProductCost)
    known: dict[str, Generated] = field(default_factory=dict)

    def error(self, request: Split) -> tuple[float, float]:
        """Root mean square error of the model's output over the unseen samples, and the density."""
        results = [self.runner.run(sample, request) for sample in self.unseen.fit]
        errors = [
            relative_error(result.output, reference)
            for result, reference in zip(results, self.references, strict=True)
        ]
        densities = mean_over_runs([result.densities for result in results])
        density = self.density(results[0].shapes, densities)
        return math.sqrt(float(np.mean(np.square(errors)))), density

    def video(self, request: Split, seed: int) -> Generated:
        """The video of a seed, split, against its dense twin."""
        key = thresholds_key(f"{seed}/{request.probes}", request.thresholds)
        if key not in self.known:
            video, result = self.runner.generate(self.pipeline(seed), request)
            densities = result.mean_densities()
            self.known[key] = Generated(
                psnr(video, self.videos[seed]),
                self.density(result.shapes, densities),
                self.relative_cost(result.shapes, densities, request.thresholds),
            )
        return self.known[key]

    def pipeline(self, seed: int) -> Callable[[], Tensor]:
        """Sampling of a video."""
        s = self.settings
        size = {"frames": s.frames, "height": s.height, "width": s.width}
        where: dict[str, Any] = {"device": s.device, "dtype": DTYPES[s.dtype]}
        return partial(sample, self.runner.model, **size, steps=s.steps, seed=seed, **where)

    def density(
        self, shapes: Mapping[str, AttentionShape], densities: Mapping[str, Tensor]
    ) -> float:
        """Over all attentions; dense ones count as 1."""
        return sum(float(densities[n].mean()) if n in densities else 1.0 for n in shapes) / len(
            shapes
        )

    def relative_cost(
        self,
        shapes: Mapping[str, AttentionShape],
        densities: Mapping[str, Tensor],
        thresholds: Mapping[str, SiteThresholds],
    ) -> float:
        """Modelled cost of the attention, orders included, over that of dense attention."""
        spent = dense = 0.0
        for name, shape in shapes.items():
            whole = self.cost.dense(shape) * shape.heads
            dense += whole
            if name in densities:
                whole = float(self.cost.split(shape, densities[name].numpy()).sum())
                chunks = thresholds[name].chunks
                if any(chunks):
                    whole += self.cost.order(shape, len(chunks), max(chunks))
            spent += whole
        return spent / dense


def make_bench(
    runner: Runner, settings: Settings, unseen: SampleSet, seeds: int, bars: Progress
) -> Bench:
    """A bench with its references: dense outputs for the unseen samples, and dense videos."""
    references = [runner.run(s, Dense()).output for s in unseen.fit]
    bench = Bench(settings, runner, unseen, references)
    with bars.phase("dense videos", seeds) as step:
        for seed in range(VIDEO_SEED, VIDEO_SEED + seeds):
            bench.videos[seed], _ = runner.generate(bench.pipeline(seed), Dense())
            step()
    return bench


def sampled_inputs(
    model: nn.Module, settings: Settings, counts: Sequence[tuple[int, int]], bars: Progress
) -> list[list[dict[str, Any]]]:
    """Inputs met while denoising, for each (count, first of the seeds)."""
    size = {"frames": settings.frames, "height": settings.height, "width": settings.width}
    where: dict[str, Any] = {"device": settings.device, "dtype": DTYPES[settings.dtype]}
    with bars.phase("inputs", sum(trajectories(n) for n, _ in counts) * settings.steps) as step:
        sampled = partial(denoising_samples, model, steps=settings.steps, **size, **where)
        return [
            sampled(count, seed=seed, callback=lambda done, total: step()) for count, seed in counts
        ]
