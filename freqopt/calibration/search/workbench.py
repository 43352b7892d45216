"""The workbench: what goes through every phase of a calibration, from measuring to verifying."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from freqopt.calibration.checkpoint import Checkpoint
from freqopt.calibration.measure.readings import Survey
from freqopt.calibration.measure.requests import Dense, Request, Split, Thresholds
from freqopt.calibration.outputs import relative_error
from freqopt.calibration.runner import Replays, Runner
from freqopt.calibration.samples import Sample, SampleSet
from freqopt.calibration.search.cost import CostModel, cost_model
from freqopt.progress import Progress


@dataclass
class Workbench:
    """The model at hand, results so far, and where they are shown and kept.

    rounds, passes: as in `freqopt.calibrate`. survey: what was measured. references: by the
    identity of their samples.
    """

    runner: Runner
    progress: Progress
    checkpoint: Checkpoint
    rounds: int | None = None
    passes: int | None = None
    survey: Survey = field(default_factory=Survey)
    references: dict[int, Reference] = field(default_factory=dict)

    @property
    def samples(self) -> SampleSet:
        """Samples of the model, those to fit and those held out."""
        return self.runner.samples

    @property
    def cost(self) -> CostModel:
        """What choices cost on this device, as far as it was timed while measuring."""
        return cost_model(self.survey.timings.values())

    def reference(self, sample: Sample) -> Reference:
        """The dense output for a sample."""
        return self.references.setdefault(id(sample), Reference(self.runner, sample))

    def kept(self, key: str, step: Callable[[], Any]) -> Any:
        """What the checkpoint has of a step, or else what the step gives, which is kept.

        That must be something that JSON can express. Of several processes the first one's counts.
        """
        entry = self.checkpoint.find(key)
        return (entry or self.checkpoint.keep(key, self.runner.team.of_first(step()))).facts

    def split_error(self, reference: Reference, thresholds: Thresholds) -> float:
        """Relative L2 error of the model's output for a sample with these thresholds."""
        return reference.error_of(self.runner.run(reference.sample, Split(thresholds)).output)

    def replays(self, reference: Reference, base: Request) -> Replays:
        """Runs of a sample that are as `base` says up to a site; see `Replays`."""
        return self.runner.replays(reference.sample, base)


class Reference:
    """The dense output for a sample, computed when it is first needed."""

    def __init__(self, runner: Runner, sample: Sample) -> None:
        self.runner, self.sample = runner, sample
        self._dense: list[Tensor] | None = None

    def compute(self) -> list[Tensor]:
        """The dense output."""
        if self._dense is None:
            self._dense = self.runner.run(self.sample, Dense()).output
        return self._dense

    @property
    def known(self) -> bool:
        """Whether it needs no run."""
        return self._dense is not None

    def know(self, dense: list[Tensor]) -> None:
        """Take the dense output from a run that had another purpose, and attended densely."""
        if self._dense is None:
            self._dense = dense

    def error_of(self, output: list[Tensor]) -> float:
        """Relative L2 error of another output."""
        return relative_error(output, self.compute(), self.runner.team)


class Deviations:
    """How outputs for a sample are off its dense one, and the products of every two of them.

    They are kept on the CPU.
    """

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self._kept: list[list[Tensor]] = []

    def add(self, output: list[Tensor]) -> list[float]:
        """Products with all before it and with itself, over the dense output's squared norm."""
        dense, team = self.reference.compute(), self.reference.runner.team
        own = [x.float() - y.to(x.device).float() for x, y in zip(output, dense, strict=True)]
        self._kept.append([x.cpu() for x in own])
        found = [_product(own, other) for other in self._kept]
        energy = sum(float(x.double().square().sum()) for x in dense)
        *products, energy = (sum(parts) for parts in zip(*team.all((*found, energy)), strict=True))
        return [product / max(energy, 1e-30) for product in products]


def _product(one: list[Tensor], other: list[Tensor]) -> float:
    pairs = zip(one, other, strict=True)
    return sum(float((x * y.to(x.device)).sum(dtype=torch.float64)) for x, y in pairs)
