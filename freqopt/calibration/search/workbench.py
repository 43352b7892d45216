"""The workbench: what goes through every phase of a calibration, from measuring to verifying."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from freqopt.calibration.checkpoint import Checkpoint
from freqopt.calibration.measure.readings import Survey
from freqopt.calibration.measure.requests import Dense, Request, Split, Thresholds
from freqopt.calibration.runner import Replays, Runner, relative_error
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

    def error_of(self, output: list[Tensor]) -> float:
        """Relative L2 error of another output."""
        return relative_error(output, self.compute(), self.runner.team)
