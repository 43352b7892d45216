"""The call under way: asked once a call, its own in every model, thread and nesting of calls."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pieces_models as models
import pytest
import torch
from pieces_models import inputs_on as call
from plans import plan_of
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

import freqopt
from freqopt.backend import freqopt_backend
from freqopt.capture import feeding, under_way
from freqopt.plan.plan import Plan

LOUD: dict[str, Any] = {"min_tokens": 0, "inner": "eager"}
WIDE, TALL = models.GRID, (3, 10, 6)
WAYS = ["attached", pytest.param("plan", marks=pytest.mark.slow), "pieces"]
"""By blocks with budgets on the modules, or a plan among the options, which pieces have as well."""


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_of(models.make(), call(WIDE), 1.0)


def expert(number: int) -> nn.Module:
    """One of two models of a class, with weights of its own."""
    model = models.make()
    for parameter in model.parameters():
        parameter.data *= 1.0 + 0.1 * number
    return model


def parted(way: str, plan: Plan, model: nn.Module) -> Any:
    """A model whose blocks, or pieces between graph breaks, share graphs with others' of its class.

    way: "attached", or "plan" among the options, by blocks; or "pieces".
    """
    if way == "pieces":
        models.breaking_linears(model)
        options = {**LOUD, "plan": plan}
        return torch.compile(model, backend=freqopt_backend, options=options)
    if way == "attached":
        freqopt.attach(model, plan)
    options = LOUD if way == "attached" else {**LOUD, "plan": plan}
    for block in model.blocks:  # type: ignore[union-attr]
        block.compile(backend=freqopt_backend, options=options)  # type: ignore[operator]
    return model


_known: dict[tuple[int, Any], Tensor] = {}


def whole(plan: Plan, number: int, grid: tuple[int, int, int]) -> Tensor:
    """Output of an expert in a call on a grid, compiled whole; nothing compiled is left."""
    torch._dynamo.reset()
    if (number, grid) not in _known:
        options = {**LOUD, "plan": plan}
        compiled = torch.compile(expert(number), backend=freqopt_backend, options=options)
        with torch.no_grad():
            _known[number, grid] = compiled(**call(grid))
        torch._dynamo.reset()
    freqopt.reset_counters()
    return _known[number, grid]


def distance(first: Tensor, second: Tensor) -> float:
    return float((first - second).norm() / second.norm())


@pytest.mark.parametrize("way", WAYS)
def test_two_models_of_one_class_share_graphs_and_no_grids(way: str, plan: Plan) -> None:
    expected = [whole(plan, n, grid) for n, grid in ((0, WIDE), (1, TALL), (0, TALL))]
    first, second = (parted(way, plan, expert(n)) for n in range(2))
    with torch.no_grad():
        got = [first(**call(WIDE)), second(**call(TALL)), first(**call(TALL))]
    for out, wanted in zip(got, expected, strict=True):
        assert distance(out, wanted) < 1e-5
    found = freqopt.counters()
    assert found.split == 9 and not any("tell no grid" in site.reason for site in found.sites)
    assert {site.site for site in found.sites if site.split} == set(plan.sites)


@pytest.mark.parametrize("way", WAYS)
def test_the_model_that_a_graph_was_made_for_may_be_gone(way: str, plan: Plan) -> None:
    expected = whole(plan, 1, TALL)
    first = parted(way, plan, expert(0))
    with torch.no_grad():
        first(**call(WIDE))
        gone = weakref.ref(first if way != "pieces" else first._orig_mod)
        del first
        gc.collect()
        assert gone() is None
        assert distance(parted(way, plan, expert(1))(**call(TALL)), expected) < 1e-5


def test_a_model_inside_the_call_of_another_has_its_own_grid(plan: Plan) -> None:
    class Outer(nn.Module):
        """A model that asks another one between its blocks."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.own = expert(0)
            self.__dict__["inner"], self.found = inner, []

        def forward(self, **given: Tensor) -> Tensor:
            found: Tensor = self.own(**given)
            return found

        def ask(self, module: nn.Module, args: object, output: object) -> None:
            self.found.append(self.inner(**call(TALL)))

    inner = parted("attached", plan, expert(1))
    outer = Outer(inner)
    parted("attached", plan, outer.own)
    outer.own.blocks[1].register_forward_hook(torch.compiler.disable(outer.ask))
    expected = [whole(plan, n, grid) for n, grid in ((0, WIDE), (1, TALL))]
    with torch.no_grad():
        for _ in range(2):
            assert distance(outer(**call(WIDE)), expected[0]) < 1e-5
    assert len(outer.found) == 2
    assert all(distance(each, expected[1]) < 1e-5 for each in outer.found)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_call_that_was_broken_off_tells_nothing(
    error: type[BaseException], plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    model = parted("attached", plan, expert(0))
    expected = whole(plan, 0, WIDE)

    @torch.compiler.disable
    def fail(module: nn.Module, args: object) -> None:
        raise error

    with torch.no_grad():
        model(**call(TALL))
        failing = model.blocks[1].register_forward_pre_hook(fail)
        with pytest.raises(error):
            model(**call(TALL))
        failing.remove()
        caplog.clear()
        x = torch.randn(1, models.WIDTH, 180).transpose(1, 2)  # as patches are
        model.blocks[0](x, torch.randn(1, 12, models.WIDTH))
        assert "tells no grid of tokens in this call" in caplog.text
        assert distance(model(**call(WIDE)), expected) < 1e-5
    assert not under_way._own.calls


def test_threads_have_calls_of_their_own(plan: Plan) -> None:
    cases = [(0, WIDE), (1, WIDE), (0, TALL)]
    expected = [whole(plan, n, grid) for n, grid in cases]
    experts = [parted("attached", plan, expert(n)) for n in range(2)]
    worst = [0.0, 0.0, 0.0]

    def work(place: int) -> None:
        number, grid = cases[place]
        with torch.no_grad():
            for _ in range(8):
                found = distance(experts[number](**call(grid)), expected[place])
                worst[place] = max(worst[place], found)

    with torch.no_grad():
        for model in experts:
            model(**call(WIDE))
    threads = [threading.Thread(target=work, args=(place,)) for place in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(worst) < 1e-5
    assert freqopt.counters().split == 3 * (2 + 3 * 8)


class Counting(TorchDispatchMode):
    """Counts operators of PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += 1
        return func(*args, **kwargs or {})


class Replayed:
    """A graph that computes once."""

    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        self.forward, self.result = gm.forward, None

    def __call__(self, *arguments: Any) -> Any:
        if self.result is None:
            self.result = self.forward(*arguments)
        return self.result


def test_a_call_walks_the_stack_once_and_waits_for_no_tensor(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    freqopt.reset_counters()
    model, operators = expert(0), Counting()
    walks = {"modules": 0, "frames": 0}

    def counting(of: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            walks[of] += 1
            return function(*arguments)

        return counted

    monkeypatch.setattr(feeding, "calls_under_way", counting("modules", feeding.calls_under_way))
    monkeypatch.setattr(under_way, "frames_below", counting("frames", under_way.frames_below))

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> Any:
        run = freqopt_backend(gm, example_inputs, options={**LOUD, "inner": Replayed})

        def watched(*arguments: Any) -> Any:
            with operators:
                return run(*arguments)

        return watched

    freqopt.attach(model, plan)
    for block in model.blocks:  # type: ignore[union-attr]
        block.compile(backend=backend)  # type: ignore[operator]
    given = call(WIDE)
    with torch.no_grad():
        model(**given)
        for start in (5, 200):  # calls of blocks wait to be counted, up to as many as there were
            while freqopt.counters().sites[0].calls < start:
                model(**given)
            walks.update(modules=0, frames=0)
            operators.count = 0
            for _ in range(3):
                model(**given)
            assert walks == {"modules": 3, "frames": 3}
            assert operators.count == 0
    assert freqopt.counters().sites[0].calls == 203
