"""Budgets belong to a call: threads take turns, abandoned calls block nobody, errors undo all."""

from __future__ import annotations

import copy
import pickle
import threading
import time
from typing import Any

import pytest
import torch
from plans import plan_of
from torch import Tensor, nn

import freqopt
from freqopt import regional
from freqopt.capture.budgets import BUDGET
from freqopt.errors import PlanError
from freqopt.models_zoo.video_dit import VideoDiT, VideoDiTConfig
from freqopt.plan.plan import Plan
from freqopt.turns import Turns

LOW, HIGH = 0.25, 1.5


@pytest.fixture(scope="module")
def model() -> VideoDiT:
    torch.manual_seed(0)
    config = VideoDiTConfig(width=32, layers=2, mlp_width=32, rope_axes=(4, 6, 6))
    return VideoDiT(config).eval()


def call(timestep: float) -> dict[str, Tensor]:
    return {"video": torch.zeros(1, 3, 2, 12, 12), "timestep": torch.tensor([timestep])}


@pytest.fixture(scope="module")
def plan(model: VideoDiT) -> Plan:
    """Every threshold is LOW until 0.5, and HIGH after it."""
    found = plan_of(model, call(0.0), 1.0)
    sites = {}
    for name, site in found.sites.items():
        budgets = [{"threshold": [limit] * site.heads} for limit in (LOW, HIGH)]
        sites[name] = {**site.model_dump(), "budgets": budgets}
    content = {**found.model_dump(), "sites": sites, "timestep_name": "timestep"}
    made = Plan.model_validate({**content, "timestep_edges": [0.5]})
    assert len(made.sites) == 2
    return made


def run(*threads: threading.Thread) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def test_threads_at_different_timesteps_have_their_own_budgets(model: VideoDiT, plan: Plan) -> None:
    """Budgets lay in buffers that the next call overwrote, and 16 of 50 outputs were another's."""
    seen: list[tuple[int, float]] = []

    def look(module: nn.Module, *rest: Any) -> None:
        time.sleep(0.002)
        seen.append((threading.get_ident(), float(getattr(module, BUDGET)[0, 0])))

    hooks = [block.attn.register_forward_pre_hook(look) for block in model.blocks]
    wanted = {}

    def generate(timestep: float, limit: float) -> None:
        wanted[threading.get_ident()] = limit
        for _ in range(8):
            model(**call(timestep))

    try:
        with freqopt.attach(model, plan), torch.no_grad():
            run(
                threading.Thread(target=generate, args=(0.1, LOW)),
                threading.Thread(target=generate, args=(0.9, HIGH)),
            )
    finally:
        for hook in hooks:
            hook.remove()
    assert len(seen) == 2 * 8 * 2 and all(wanted[thread] == limit for thread, limit in seen)


@pytest.mark.parametrize("route", ["eager", "regional"])
def test_a_timestep_without_a_value_has_the_most_exact_budgets(
    route: str, model: VideoDiT, plan: Plan
) -> None:
    """Of a batch of nothing, or on meta."""
    own = copy.deepcopy(model)
    nothing = {name: x[:0] for name, x in call(0.9).items()}
    with freqopt.optimize(own, plan, route=route, inner="eager"), torch.no_grad():
        own(**call(0.9))
        out = own(**nothing)
        assert out.shape[0] == 0
        budgets = [m.freqopt_budget[0] for m in own.modules() if "freqopt_budget" in vars(m)]
        assert len(budgets) == 2 and all((b == LOW).all() for b in budgets)
        weights = own.state_dict()
        own.to("meta")
        assert own(**{name: x.to("meta") for name, x in call(0.9).items()}).is_meta
        own.load_state_dict(weights, assign=True)


def test_budgets_of_a_call_are_in_memory_of_their_own(model: VideoDiT, plan: Plan) -> None:
    """The kernels of a call on another stream may not have read theirs yet."""
    with freqopt.attach(model, plan), torch.no_grad():
        budget = getattr(model.blocks[0].attn, BUDGET)
        model(**call(0.1))
        before = budget.data
        model(**call(0.9))
        assert getattr(model.blocks[0].attn, BUDGET) is budget, "who it is tells the layer"
        assert before.data_ptr() != budget.data_ptr()
        assert before[0, 0] == LOW and budget[0, 0] == HIGH


def test_a_call_that_fails_gives_its_turn_back(model: VideoDiT, plan: Plan) -> None:
    with freqopt.attach(model, plan), torch.no_grad():
        with pytest.raises(RuntimeError):
            model(video=torch.zeros(3), timestep=torch.tensor([0.1]))
        with pytest.raises(PlanError, match="selects budgets by the argument"):
            model(call(0.1)["video"], None)
        run(threading.Thread(target=lambda: model(**call(0.9))))


def test_an_abandoned_call_does_not_keep_the_turn() -> None:
    """Ctrl-C leaves a call without its end being told."""
    turns = Turns()

    def hook() -> None:
        turns.begin()

    def abandoned() -> None:
        hook()

    abandoned()
    done = []
    run(threading.Thread(target=lambda: (hook(), done.append(1), turns.end())))
    assert done


def test_one_at_a_time() -> None:
    turns, inside, most = Turns(), [0], [0]

    def hook() -> None:
        turns.begin()

    def work() -> None:
        for _ in range(20):
            hook()
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.0005)
            inside[0] -= 1
            turns.end()

    run(*(threading.Thread(target=work) for _ in range(4)))
    assert most == [1]


def test_models_are_copied_and_pickled_with_it(model: VideoDiT, plan: Plan) -> None:
    with freqopt.attach(model, plan), torch.no_grad():
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            twin(**call(0.9))
            assert getattr(twin.blocks[1].attn, BUDGET)[0, 0] == HIGH


def test_half_an_attachment_is_taken_back(
    model: VideoDiT, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(regional, "watch", fail)
    with pytest.raises(KeyboardInterrupt):
        freqopt.attach(model, plan)
    monkeypatch.undo()
    for module in model.modules():
        assert not any(name.startswith("freqopt") for name in module.__dict__)
        assert not module._forward_pre_hooks and not module._forward_hooks
    freqopt.attach(model, plan).remove()


def test_casts_and_moves_leave_budgets_alone(model: VideoDiT, plan: Plan) -> None:
    twin = copy.deepcopy(model)
    with torch.device("meta"):
        handle = freqopt.attach(twin, plan)
    budget = getattr(twin.blocks[0].attn, BUDGET)
    assert budget.device.type == "cpu"
    for change in (lambda: twin.half(), lambda: twin.to("meta"), lambda: twin.double()):
        change()
        found = getattr(twin.blocks[0].attn, BUDGET)
        assert found.dtype == torch.float32 and found.device.type == "cpu"
    handle.remove()
