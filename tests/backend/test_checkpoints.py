"""Activation checkpoints around and inside compiled blocks: gradients are those without."""

from __future__ import annotations

from typing import Any

import pieces_models as models
import pytest
import torch
import torch.nn.functional as F
from pieces_models import inputs_on as call
from plans import plan_of, timed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import freqopt
from freqopt.backend import freqopt_backend
from freqopt.capture.repeated import MOST_PENDING, Pending
from freqopt.errors import InputError
from freqopt.plan.plan import Plan

LOUD: dict[str, Any] = {"min_tokens": 0, "inner": "eager"}
WIDE, TALL = models.GRID, (3, 10, 6)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_of(models.make(), call(WIDE), 1.0)


class Around(nn.Module):
    """A block that runs once more in the backward pass."""

    def __init__(self, block: nn.Module, *, reentrant: bool = False) -> None:
        super().__init__()
        self.block, self.reentrant = block, reentrant

    def forward(self, *given: Tensor) -> Any:
        return checkpoint(self.block, *given, use_reentrant=self.reentrant)


class Inside(models.Block):
    """The same, in the graph of the block."""

    def forward(self, *given: Tensor) -> Any:
        return checkpoint(super().forward, *given, use_reentrant=False)


class Within(models.Attention):
    """Attention alone runs once more, inside the module that has the budget."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        keys = x if context is None else context
        given = ((self.q, x), (self.k, keys), (self.v, keys))
        parts = [f(each).unflatten(-1, (models.HEADS, -1)).transpose(1, 2) for f, each in given]
        attended = checkpoint(F.scaled_dot_product_attention, *parts, use_reentrant=False)
        return self.out(attended.transpose(1, 2).flatten(2))


def made(way: str, plan: Plan, place: str) -> Any:
    torch._dynamo.reset()
    freqopt.reset_counters()
    model = models.make()
    if plan.timestep_edges:
        model.__class__ = models.Timed
    if way == "attached":
        freqopt.attach(model, plan)
    options = LOUD if way == "attached" else {**LOUD, "plan": plan}
    for index, block in enumerate(model.blocks):
        if place == "inside":
            block.__class__ = Inside
        if place == "within":
            block.attn.__class__ = Within
        block.compile(backend=freqopt_backend, options=options)
        if place in ("around", "reentrant"):
            model.blocks[index] = Around(block, reentrant=place == "reentrant")
    return model


def gradients(model: Any, *grids: tuple[int, int, int]) -> Tensor:
    return gradients_of(model, *(call(grid) for grid in grids))


def gradients_of(
    model: Any, *calls: dict[str, Tensor], look: dict[str, Tensor] | None = None
) -> Tensor:
    """Of all calls at once. look: a further call that no gradient is asked of."""
    model.zero_grad()
    loss = sum(model(**given).square().mean() for given in calls)
    if look is not None:
        with torch.no_grad():
            model(**look)
    loss.backward()  # type: ignore[union-attr]
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.fixture(scope="module")
def plain(plan: Plan) -> dict[str, list[Tensor]]:
    """Gradients without checkpoints on two grids, by the way to bring in the plan."""
    return {
        way: [gradients(model, grid) for grid in (WIDE, TALL)]
        for way in ("attached", "plan")
        for model in [made(way, plan, "nowhere")]
    }


@pytest.mark.parametrize(
    ("way", "place"),
    [
        *((way, place) for way in ("attached", "plan") for place in ("around", "inside", "within")),
        ("attached", "reentrant"),
    ],
)
def test_gradients_are_those_without_checkpoints(
    way: str, place: str, plan: Plan, plain: dict[str, list[Tensor]]
) -> None:
    expected = plain[way]
    dense = gradients(models.make(), TALL)
    assert (expected[1] - dense).norm() > 1e-3 * dense.norm()
    model = made(way, plan, place)
    with torch.no_grad():
        model(**call((2, 9, 8)))  # a call that no gradient is asked of is none to be repeated
    for grid, wanted in zip((WIDE, TALL), expected, strict=True):
        got = gradients(model, grid)
        assert (got - wanted).norm() < 1e-5 * wanted.norm()


def test_a_block_first_compiled_in_a_backward_pass_is_refused(plan: Plan) -> None:
    """Which of the model's blocks it is cannot be told, where only the options have the plan."""
    with pytest.raises(InputError, match="call checkpoint with use_reentrant=False, or freqopt"):
        gradients(made("plan", plan, "reentrant"), WIDE)


def test_checkpoints_inside_are_told_as_split(plan: Plan, caplog: pytest.LogCaptureFixture) -> None:
    model = made("attached", plan, "inside")
    gradients(model, WIDE)
    assert "planned sites split" not in caplog.text  # it is said on INFO, and no warning
    assert {site.site for site in freqopt.counters().sites if site.split} == set(plan.sites)


def test_two_grids_before_one_backward_pass_are_not_guessed(plan: Plan) -> None:
    model = made("attached", plan, "around")
    with pytest.raises(InputError, match=r"several grids \(3x6x10, 3x10x6\) since"):
        gradients(model, WIDE, TALL)
    assert gradients(model, TALL).isfinite().all()


EARLY, LATE = ({**call(WIDE), "time": torch.tensor([time])} for time in (100.0, 900.0))


@pytest.fixture(scope="module")
def alone(plan: Plan) -> list[Tensor]:
    """Gradients of a call at each of two timesteps, without checkpoints."""
    return [
        gradients_of(made("attached", timed(plan), "nowhere"), given) for given in (EARLY, LATE)
    ]


@pytest.mark.parametrize("place", ["nowhere", "around", "reentrant", "inside"])
def test_a_backward_pass_has_the_budgets_of_its_own_call(
    place: str, plan: Plan, alone: list[Tensor]
) -> None:
    """The last call may have been at another timestep, whatever the backward pass runs again."""
    early, late, plan = EARLY, LATE, timed(plan)
    assert (alone[0] - alone[1]).norm() > 1e-3 * alone[0].norm()
    model = made("attached", plan, place)
    assert (gradients_of(model, early, look=late) - alone[0]).norm() < 1e-5 * alone[0].norm()
    if place in ("nowhere", "inside"):
        both = alone[0] + alone[1]
        assert (gradients_of(model, early, late) - both).norm() < 1e-5 * both.norm()
    else:
        with pytest.raises(InputError, match="it was called at several timesteps since"):
            gradients_of(model, early, late)
    freqopt.reset_counters()
    gradients_of(model, late)
    assert {site.site for site in freqopt.counters().sites if site.split} == set(plan.sites)


def test_what_few_of_many_calls_told_is_not_forgotten() -> None:
    pending: Pending[tuple[int, ...]] = Pending()
    pending.note((1, 2))
    for _ in range(2 * MOST_PENDING):
        pending.note((3, 4))
    assert pending.again() == [(1, 2), (3, 4)]
    pending.note((5, 6))
    assert pending.again() == [(5, 6)]
