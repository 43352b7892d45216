"""Served models that are called in each other's calls, and are served no more meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pieces_models as models
import pytest
import torch
from checkpointed import Checkpointed
from plans import plan_of
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

import freqopt
from freqopt.errors import SiteError
from freqopt.plan.plan import Plan

PLACES = ["blocks.1", "blocks.1.attn", "blocks.1.attn.q"]


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_of(models.make(), models.inputs(), 1.0)


def called(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**models.inputs())
    return out


def optimized(model: nn.Module, plan: Plan, **options: Any) -> freqopt.Handle:
    return freqopt.optimize(model, plan, route="eager", **options)


def far(first: Tensor, second: Tensor) -> float:
    return float((first - second).norm() / second.norm())


def outputs_of(plan: Plan) -> tuple[Tensor, Tensor]:
    """Dense and split."""
    model = models.make()
    with optimized(model, plan, strict=True):
        split = called(model)
    return called(model), split


def once(module: nn.Module, then: Callable[[], object]) -> None:
    """Have something happen as a module is called, the first time."""

    def hook(*_: Any) -> None:
        handle.remove()
        then()

    handle = module.register_forward_pre_hook(hook)


def is_bare(model: nn.Module) -> bool:
    return not any(
        m._forward_hooks or m._forward_pre_hooks or m._forward_hooks_always_called
        for m in model.modules()
    )


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("disabled", ["outer", "inner", "both"])
def test_the_call_of_another_model_goes_on_split(
    disabled: str, known: bool, place: str, plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    dense, split = outputs_of(plan)
    outer, inner = models.make(), models.make()
    handles = {"outer": optimized(outer, plan), "inner": optimized(inner, plan)}
    if known:  # else both calls are written down while they run
        assert torch.equal(called(outer), split) and torch.equal(called(inner), split)
    found: list[Tensor] = []

    def disable() -> None:
        for name, handle in handles.items():
            if disabled in (name, "both"):
                handle.disable()

    once(inner.get_submodule(place), disable)
    once(outer.get_submodule(place), lambda: found.append(called(inner)))
    results = {"outer": called(outer), "inner": found[0]}
    assert not _get_current_function_mode_stack()
    for name, model in (("outer", outer), ("inner", inner)):
        if disabled in (name, "both"):
            assert far(results[name], dense) > 1e-3 and far(results[name], split) > 1e-3
            assert is_bare(model) and torch.equal(called(model), dense)
        else:
            assert torch.equal(results[name], split) and torch.equal(called(model), split)
    assert "was called in no call" not in caplog.text


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("again", [True, False])
def test_a_call_in_another_thread_leaves_nothing(
    again: bool, place: str, known: bool, plan: Plan
) -> None:
    """It goes on dense, whether or not the model is served anew before it is over."""
    dense, split = outputs_of(plan)
    model = models.make()
    handle = optimized(model, plan)
    if known:
        called(model)
    waits, goes_on = threading.Event(), threading.Event()
    found: list[Any] = []

    def wait() -> None:
        waits.set()
        assert goes_on.wait(60)

    def run() -> None:
        found.append(called(model))
        found.append(_get_current_function_mode_stack())

    once(model.get_submodule(place), wait)
    thread = threading.Thread(target=run)
    thread.start()
    assert waits.wait(60)
    handle.disable()
    assert torch.equal(called(model), dense)
    if again:
        handle.enable()
        assert torch.equal(called(model), split)
    goes_on.set()
    thread.join()
    assert far(found[0], dense) > 1e-3 and far(found[0], split) > 1e-3
    assert found[1] == []
    assert torch.equal(called(model), split if again else dense)
    handle.disable()
    assert is_bare(model) and torch.equal(called(model), dense)


@pytest.mark.parametrize("place", PLACES)
def test_a_call_that_fails_after_it_was_disabled_says_why(place: str, plan: Plan) -> None:
    """PyTorch runs hooks of a call that failed while it looks through them."""
    dense, split = outputs_of(plan)
    model = models.make()
    own = [m.register_forward_hook(lambda *_: None) for m in model.modules()]
    handle = optimized(model, plan)

    def fail() -> None:
        handle.disable()
        raise ValueError("as the test wants it")

    once(model.get_submodule(place), fail)
    with pytest.raises(ValueError, match="as the test wants it"):
        called(model)
    assert not _get_current_function_mode_stack()
    assert torch.equal(called(model), dense)
    for each in own:
        each.remove()
    assert is_bare(model)
    with handle:
        assert torch.equal(called(model), split)


class Counting(TorchFunctionMode):
    """A mode of somebody else's."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("then", ["disabled", "called", "another"])
def test_an_interrupted_call_is_closed_under_what_came_after(
    then: str, known: bool, plan: Plan
) -> None:
    """As by Ctrl-C, for which PyTorch runs no hook."""
    dense, split = outputs_of(plan)
    model, another = models.make(), models.make()
    handle = optimized(model, plan, strict=True)
    if known:
        called(model)

    def interrupt() -> None:
        raise KeyboardInterrupt

    once(model.blocks[1].attn.q, interrupt)
    with pytest.raises(KeyboardInterrupt):
        called(model)
    mode = Counting()
    with mode, optimized(another, plan, strict=True):
        if then == "disabled":
            handle.disable()
        else:
            assert torch.equal(called(model if then == "called" else another), split)
        assert _get_current_function_mode_stack() == [mode]
        before = mode.count
        assert torch.equal(called(model), dense if then == "disabled" else split)
        assert mode.count > before
    handle.disable()
    assert is_bare(model) and torch.equal(called(model), dense)


@pytest.mark.parametrize("name", ["its forward", "a block"])
def test_a_part_that_is_called_in_another_models_call_says_that_it_is_dense(
    name: str, plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    dense, split = outputs_of(plan)
    outer, inner = models.make(), models.make()
    x = torch.randn(1, 180, models.WIDTH)

    def part() -> Tensor:
        inputs = models.inputs()
        with torch.no_grad():
            found = inner.blocks[0](x, inputs["text"]) if name == "a block" else None
            return inner.forward(**inputs) if found is None else found

    alone, found = part(), []
    with optimized(outer, plan, strict=True), optimized(inner, plan) as handle:
        for _ in range(2):
            once(outer.blocks[1].attn.q, lambda: found.append(part()))
            assert torch.equal(called(outer), split)
            assert torch.equal(found[-1], alone)
        assert caplog.text.count("blocks.0.attn was called in no call of the model") == 1
        handle.disable()
        with optimized(inner, plan, strict=True):
            once(outer.blocks[1].attn.q, part)
            with pytest.raises(SiteError, match=r"blocks.0.attn was called in no call"):
                called(outer)
            assert torch.equal(called(outer), split) and torch.equal(called(inner), split)
    assert not _get_current_function_mode_stack() and torch.equal(called(inner), dense)


def test_a_backward_pass_in_another_models_call_is_split_again(plan: Plan) -> None:
    def trained(model: models.Video, within: Callable[[Callable[[], None]], None]) -> Tensor:
        for index, block in enumerate(model.blocks):
            model.blocks[index] = Checkpointed(block)
        loss = model(**models.inputs()).square().mean()
        within(loss.backward)
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    def alone(then: Callable[[], None]) -> None:
        then()

    def inside(then: Callable[[], None]) -> None:
        def run() -> None:
            with torch.enable_grad():
                then()

        outer = models.make()
        with optimized(outer, plan, strict=True):
            split = called(outer)
            once(outer.blocks[1].attn.q, run)
            assert torch.equal(called(outer), split)

    gradients = []
    for within in (alone, inside):
        model = models.make()
        with optimized(model, plan, strict=True):
            gradients.append(trained(model, within))
    assert far(trained(models.make(), alone), gradients[0]) > 1e-3
    assert torch.equal(*gradients)


def test_served_anew_within_its_own_call_it_tells_that_the_rest_is_dense(
    plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    dense, split = outputs_of(plan)
    model = models.make()
    handle = optimized(model, plan)
    once(model.blocks[1], lambda: handle.disable() or handle.enable())
    partly = called(model)
    assert far(partly, dense) > 1e-3 and far(partly, split) > 1e-3
    assert caplog.text.count("blocks.1.attn was called in no call of the model") == 1
    assert not _get_current_function_mode_stack()
    assert torch.equal(called(model), split)
    handle.disable()
    assert is_bare(model) and torch.equal(called(model), dense)
