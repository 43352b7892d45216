"""The model under benchmarks of calibration: its error and density at given budgets, its videos."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from freqopt.calibration.runner import Runner, opened, relative_error
from freqopt.calibration.samples import SampleSet
from freqopt.calibration.search.allocate import AttentionShape, CostModel, ProductCost
from freqopt.calibration.search.verify import budget_key, mean_densities
from freqopt.demo.settings import DTYPES, Settings
from freqopt.demo.video import psnr
from freqopt.models_zoo.sampling import denoising_samples, sample, trajectories
from freqopt.progress import Progress

Budgets = dict[str, Tensor]
"""{site: (buckets, 2, H)}; a site without one stays dense."""

VIDEO_SEED = 7


class Generated(NamedTuple):
    """A video at some budgets.

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

    model: nn.Module
    settings: Settings
    runner: Runner
    unseen: SampleSet
    references: list[list[Tensor]]
    videos: dict[int, Tensor] = field(default_factory=dict)
    cost: CostModel = field(default_factory=ProductCost)
    known: dict[str, Generated] = field(default_factory=dict)

    def error(self, chosen: Budgets) -> tuple[float, float]:
        """Root mean square error of the model's output over the unseen samples, and the density."""
        self.choose(chosen)
        errors = [
            relative_error(self.runner.run(s, "split"), reference)
            for s, reference in zip(self.unseen.fit, self.references, strict=True)
        ]
        return math.sqrt(float(np.mean(np.square(errors)))), self.density()

    def video(self, chosen: Budgets, seed: int) -> Generated:
        """The video of a seed, split, against its dense twin."""
        key = budget_key(f"{seed}/{self.runner.session.probes}", chosen)
        if key not in self.known:
            self.choose(chosen)
            video = self.runner.generate(self.pipeline(seed), "split")
            self.known[key] = Generated(
                psnr(video, self.videos[seed]), self.density(), self.relative_cost()
            )
        return self.known[key]

    def pipeline(self, seed: int) -> Callable[[], Tensor]:
        """Sampling of a video."""
        s = self.settings
        return partial(
            sample, self.model, frames=s.frames, height=s.height, width=s.width, steps=s.steps,
            seed=seed, device=s.device, dtype=DTYPES[s.dtype],
        )  # fmt: skip

    def choose(self, chosen: Budgets) -> None:
        """Budgets of the runs that follow; their densities are collected from here on."""
        session = self.runner.session
        session.budgets, session.densities = chosen, {}

    def density(self) -> float:
        """Of the runs since budgets were chosen, over all attentions; dense ones count as 1."""
        found = mean_densities(self.runner.session.densities)
        sites = self.runner.session.sites
        return sum(float(found[n].mean()) if n in found else 1.0 for n in sites) / len(sites)

    def relative_cost(self) -> float:
        """Cost of the attention of those runs over that of dense attention, by the cost model."""
        session, spent, dense = self.runner.session, 0.0, 0.0
        found = mean_densities(session.densities)
        for name, site in session.sites.items():
            shape = AttentionShape(site.heads, site.tokens, site.head_dim)
            whole = self.cost.dense(shape) * site.heads
            dense += whole
            if name in found:
                split = self.cost.split(shape, found[name].numpy())
                whole = float(split.sum())
            spent += whole
        return spent / dense


@contextmanager
def open_bench(
    model: nn.Module, settings: Settings, unseen: SampleSet, seeds: int, bars: Progress
) -> Iterator[Bench]:
    """A bench with its references: dense outputs for the unseen samples, and dense videos."""
    with opened(model, unseen, None, 0) as runner:
        references = [runner.run(s, "dense") for s in unseen.fit]
        bench = Bench(model, settings, runner, unseen, references)
        with bars.phase("dense videos", seeds) as step:
            for seed in range(VIDEO_SEED, VIDEO_SEED + seeds):
                bench.videos[seed] = runner.generate(bench.pipeline(seed), "dense")
                step()
        yield bench


def sampled_inputs(
    model: nn.Module, settings: Settings, counts: Sequence[tuple[int, int]], bars: Progress
) -> list[list[dict[str, Any]]]:
    """Inputs met while denoising, for each (count, first of the seeds)."""
    size = {"frames": settings.frames, "height": settings.height, "width": settings.width}
    where: dict[str, Any] = {"device": settings.device, "dtype": DTYPES[settings.dtype]}
    with bars.phase("inputs", sum(trajectories(n) for n, _ in counts) * settings.steps) as step:
        return [
            denoising_samples(
                model, count, seed=seed, steps=settings.steps,
                callback=lambda done, total: step(), **size, **where,
            )
            for count, seed in counts
        ]  # fmt: skip
