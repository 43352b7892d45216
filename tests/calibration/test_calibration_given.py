"""What a model is given: samples that it writes into, and random numbers that it draws."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from calibration_models import TinyVideo, make_sample
from torch import Tensor

import freqopt
from freqopt.calibration.given import GivenInputs, copied_arguments
from freqopt.calibration.randomness import seeded
from freqopt.calibration.samples import Sample
from freqopt.errors import CalibrationError
from freqopt.plan.plan import Plan

QUICK: dict[str, Any] = {"progress": False, "rounds": 0, "target_density": 0.5, "order": "grid"}
SAMPLES = [make_sample(i) for i in range(2)]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def calibrated(kind: type[TinyVideo], samples: Any = None) -> Plan:
    torch.manual_seed(0)
    return freqopt.calibrate(kind(), SAMPLES if samples is None else samples, **QUICK)


class Leaves(TinyVideo):
    def forward(self, video: Tensor, timestep: Tensor) -> dict[str, Tensor]:
        return super().forward(video * 0.9, timestep + 0.01)


class Writes(TinyVideo):
    def forward(self, video: Tensor, timestep: Tensor) -> dict[str, Tensor]:
        video.mul_(0.9)
        timestep += 0.01
        return super().forward(video, timestep)


class WritesInPieces(Writes):
    def forward(self, video: Tensor, timestep: Tensor) -> dict[str, Tensor]:
        video.mul_(0.9)
        torch._dynamo.graph_break()
        return TinyVideo.forward(self, video, timestep.add_(0.01))


@pytest.mark.parametrize("kind", [Writes, WritesInPieces])
@pytest.mark.parametrize("inference", [False, True])
def test_samples_stay_as_they_are(kind: type[TinyVideo], inference: bool) -> None:
    given = copy.deepcopy(SAMPLES)
    with torch.inference_mode(inference):
        found, expected = calibrated(kind, given), calibrated(Leaves)
        verified = found.verify(kind().eval(), given)
    for one, other in zip(given, SAMPLES, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in other)
    assert found.measured_error == pytest.approx(expected.measured_error, rel=1e-3)
    assert found.mean_density == pytest.approx(expected.mean_density, rel=1e-3)
    assert verified.measured_error > 0


def test_a_model_that_leaves_its_inputs_alone_gets_them() -> None:
    tensor, nested = torch.ones(2), {"scale": torch.ones(1)}
    sample = Sample((tensor,), {"options": nested})
    given = GivenInputs()
    with given.of(sample) as (args, kwargs):
        assert args[0] is not tensor and kwargs["options"] is not nested
    with given.of(sample) as (args, kwargs):
        assert args[0] is tensor and kwargs["options"] is nested
    assert given.is_tried(sample) and not given.writes(sample)


def test_every_way_of_writing_is_seen() -> None:
    def write(args: Any, kwargs: Any) -> None:
        args[0][0] = 5.0

    def pop(args: Any, kwargs: Any) -> None:
        kwargs["options"].pop("scale")

    def replace(args: Any, kwargs: Any) -> None:
        kwargs["options"]["scale"] = torch.ones(1)

    for change in (write, pop, replace):
        sample = Sample((torch.ones(2),), {"options": {"scale": torch.ones(1)}})
        given = GivenInputs()
        for _ in range(3):
            with given.of(sample) as call:
                assert float(call[0][0][0]) == 1 and "scale" in call[1]["options"]
                change(*call)
        assert given.writes(sample)
        assert float(sample.args[0][0]) == 1 and "scale" in sample.kwargs["options"]


def test_copies_look_like_what_they_are_of() -> None:
    """The compiler would make another graph for other strides, or for one tensor that is two."""
    tensor = torch.arange(24.0).view(2, 3, 4)
    views = tensor.mT, tensor[:, ::2], tensor[:, :1].expand(2, 5, 4), tensor.to_sparse()
    (copies, again), _ = copied_arguments(((views, views), {}))
    for view, made in zip(views, copies, strict=True):
        assert torch.equal(made.to_dense(), view.to_dense())
        assert made.is_sparse or made.stride() == view.stride()
    assert all(one is other for one, other in zip(copies, again, strict=True))
    assert copied_arguments(((torch.ones(1, requires_grad=True),), {}))[0][0].requires_grad


class Drawing(TinyVideo):
    """Draws a factor from a generator, whole or with a break in its graph."""

    by, broken = "python", False

    def forward(self, video: Tensor, timestep: Tensor) -> dict[str, Tensor]:
        if self.by == "python":
            factor = 1 + 0.3 * random.random()
        elif self.by == "numpy":
            factor = 1 + 0.3 * float(np.random.rand())
        else:
            factor = 1 + 0.3 * float(torch.rand(()))
        return super().forward(video * factor, timestep)


@pytest.mark.parametrize("by", ["python", "numpy", "torch"])
def test_random_numbers_are_the_same_in_every_run(by: str) -> None:
    kind = type("Drawing", (Drawing,), {"by": by})
    plans = []
    for seed in (0, 1):
        random.seed(seed)
        np.random.seed(seed)
        before = random.getstate()
        plans.append(calibrated(kind))
        assert random.getstate() == before
    assert plans[0].sites == plans[1].sites and plans[0].measured_error == plans[1].measured_error


def test_generators_are_left_as_they_were() -> None:
    for seed in (-(2**63), 2**64 - 1, 3):
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
        with seeded(seed):
            first = random.random(), np.random.rand(), float(torch.rand(()))
        with seeded(seed):
            assert first == (random.random(), np.random.rand(), float(torch.rand(())))
        assert random.getstate() == before[0] and np.random.get_state()[1].tolist() == before[1]
        assert torch.equal(torch.get_rng_state(), before[2])


class OwnGenerator(TinyVideo):
    """Its own generator makes noise at late timesteps only: the first samples come out alike."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = random.Random(0)

    def forward(self, video: Tensor, timestep: Tensor) -> dict[str, Tensor]:
        noise = self.generator.random() if float(timestep) > 0.5 else 0.0
        return super().forward(video * (1 + noise), timestep)


def test_a_generator_of_its_own_is_told_whichever_sample_shows_it() -> None:
    samples = [make_sample(i) for i in range(8)]
    with pytest.raises(CalibrationError, match="differ by .*generator of its own"):
        calibrated(OwnGenerator, samples)
