"""A model that is used outside of what its plan was verified for says so once, and what that is."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from passes_toys import HEADS, Toy, video
from torch import Tensor, nn

import freqopt
import freqopt.parallel
from freqopt.backend import freqopt_backend
from freqopt.capture.conditions import adapters_of, dtype_of
from freqopt.exporters.program import make_program
from freqopt.plan.plan import Plan, model_fingerprint
from freqopt.plan.records import Budget, Evidence, ModelIdentity, SitePlan, Verified, Versions
from freqopt.plan.text import scope_of

GRID, PORTRAIT = (3, 6, 10), (3, 10, 6)


class Timed(Toy):
    """The toy, called with a timestep that it does not mind."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * (1 + 0 * timestep.mean())


class Adapted(nn.Linear):
    """A layer that names its adapters as PEFT's do, and has none that changes anything."""

    def __init__(self, *names: str) -> None:
        super().__init__(2, 2)
        self.active_adapters, self.merged_adapters = list(names), []
        self.disable_adapters = False


def plan_of(model: nn.Module, **fields: Any) -> Plan:
    budget = Budget(threshold=[0.5] * HEADS)
    site = SitePlan(
        heads=HEADS,
        head_dim=8,
        tokens=180,
        decision="split",
        reason="",
        budgets=[budget],
        density=[0.5] * HEADS,
        error=[0.5] * HEADS,
    )
    verified = Verified(sample_errors=[0.1], spread=0.0, dtype="float32", adapters=[])
    given: dict[str, Any] = {
        "model": ModelIdentity(class_name="Timed", fingerprint=model_fingerprint(model)),
        "grids": [GRID],
        "verified": verified.model_copy(update=fields.pop("verified", {})),
        "sites": {"blocks.0": site, "blocks.1": site},
        **fields,
    }
    return Plan(
        device="cpu",
        versions=Versions(freqopt="0", torch="0"),
        target_error=0.1,
        measured_error=0.1,
        worst_error=0.1,
        mean_density=0.5,
        evidence=Evidence(samples=2, held_out=2),
        **given,
    )


@pytest.fixture
def heard(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, "freqopt"):
        yield caplog


def warnings(heard: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in heard.records if record.levelno >= logging.WARNING]


def run(model: nn.Module, plan: Plan, *grids: tuple[int, int, int], time: float = 5.0) -> None:
    """Compiled with a plan, called twice on each grid."""
    options = {"inner": "eager", "plan": plan}
    compiled = torch.compile(model, backend=freqopt_backend, options=options, dynamic=False)
    with torch.no_grad():
        for grid in grids:
            for _ in range(2):
                compiled(video(grid), torch.tensor([time]))


def test_as_verified_nothing_is_said(heard: pytest.LogCaptureFixture) -> None:
    model = Timed()
    run(model, plan_of(model, timestep_name="timestep", timestep_range=(0.0, 10.0)), GRID)
    assert not warnings(heard)


def test_another_dtype_is_told_once_with_what_was_verified(
    heard: pytest.LogCaptureFixture,
) -> None:
    model = Timed()
    plan = plan_of(model, verified={"dtype": "bfloat16"})
    run(model, plan, GRID)
    run(model, plan, GRID)
    (told,) = warnings(heard)
    assert "Timed: its parameters are float32." in told
    assert "verified for grids 3x6x10; bfloat16; no adapter" in told
    run(model, plan_of(model, verified={"dtype": "float16"}), GRID)
    assert len(warnings(heard)) == 2, "another plan was verified for something else"


def test_a_portrait_of_as_many_tokens_is_another_grid(heard: pytest.LogCaptureFixture) -> None:
    model = Timed()
    run(model, plan_of(model), GRID, PORTRAIT)
    (told,) = warnings(heard)
    assert "its tokens lie on a grid of 3x10x6." in told and "for grids 3x6x10" in told


def test_another_length_is_told_with_the_error_to_expect_and_no_second_time(
    heard: pytest.LogCaptureFixture,
) -> None:
    model = Timed()
    run(model, plan_of(model), (3, 6, 12))
    (told,) = warnings(heard)
    assert "used at 216 tokens" in told and "expected" in told


def test_timesteps_are_told_once_for_all_graphs_of_a_model(
    heard: pytest.LogCaptureFixture,
) -> None:
    model = Timed()
    fields = {"timestep_name": "timestep", "timestep_range": (920.0, 1000.0)}
    run(model, plan_of(model, **fields), GRID)
    assert len(warnings(heard)) == 1
    torch._dynamo.reset()
    run(model, plan_of(model, **fields), GRID)
    (told,) = warnings(heard)
    assert "is used at 5" in told and "timestep 920 to 1000; float32; no adapter" in told


@pytest.mark.parametrize(
    ("here", "there", "words"),
    [
        (["style"], [], "it has the adapter style."),
        ([], ["style"], "it lacks the adapter style."),
        (["new"], ["old"], "it has the adapter new and it lacks the adapter old."),
        (["style"], ["style"], ""),
        (["style"], None, ""),
    ],
)
def test_adapters_that_were_not_there_are_told(
    heard: pytest.LogCaptureFixture, here: list[str], there: list[str] | None, words: str
) -> None:
    model = Timed()
    model.extra = Adapted(*here)
    run(model, plan_of(model, verified={"adapters": there}), GRID)
    told = warnings(heard)
    assert len(told) == bool(words) and all(words in line for line in told)


def test_a_plan_of_before_says_nothing_of_what_it_does_not_know(
    heard: pytest.LogCaptureFixture,
) -> None:
    model = Timed()
    model.extra = Adapted("style")
    plan = plan_of(model).model_copy(update={"verified": None})
    run(model, plan, GRID)
    assert not warnings(heard) and scope_of(plan) == "grids 3x6x10"


def test_a_wrapper_is_not_taken_for_the_model(heard: pytest.LogCaptureFixture) -> None:
    """Its first parameter may be another model's."""

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text = nn.Linear(2, 2).double()
            self.model = Timed()

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            out: Tensor = self.model(x, timestep)
            return out

    model = Wrapper()
    run(model, plan_of(model.model), GRID)
    assert not warnings(heard)


def test_without_a_compiler_the_same_is_told(heard: pytest.LogCaptureFixture) -> None:
    model = Timed()
    plan = plan_of(model, verified={"dtype": "bfloat16"})
    with freqopt.optimize(model, plan, route="eager"), torch.no_grad():
        for grid in (GRID, GRID, PORTRAIT, (3, 6, 12), (3, 6, 12)):
            model(video(grid), torch.tensor([5.0]))
    told = warnings(heard)
    assert sum("its parameters are float32" in line for line in told) == 1
    assert sum("lie on a grid of" in line for line in told) == 1


def test_what_a_model_computes_in_is_read_off_its_layers() -> None:
    model = nn.Sequential(nn.Linear(2, 2).half(), Adapted("b", "a"), Adapted("a"))
    assert dtype_of(model) == "float16" and adapters_of(model) == ["a", "b"]
    model[1].disable_adapters = True
    model[1].merged_adapters = ["c"]
    assert adapters_of(model) == ["a"]
    model[1].disable_adapters = False
    assert adapters_of(model) == ["a", "b", "c"]
    assert dtype_of(nn.ReLU()) == "none" and adapters_of(nn.ReLU()) == []


def test_files_and_ranks_are_told_of_too(heard: pytest.LogCaptureFixture) -> None:
    model = Timed()
    plan = plan_of(model, verified={"dtype": "bfloat16"})
    make_program(model, (video(GRID), torch.tensor([5.0])), {}, plan=plan)
    assert "its parameters are float32" in warnings(heard)[0]
    other = plan_of(model, verified={"adapters": ["style"]})
    with freqopt.parallel.over_all_keys(model, other):
        assert "it lacks the adapter style" in warnings(heard)[1]
    assert len(warnings(heard)) == 2
