"""Probe errors of calls of several sizes, and timesteps: what is kept, and when it is looked at."""

from __future__ import annotations

import threading

import pytest
import torch
from small_plans import full_plan

from freqopt.plan.plan import Plan
from freqopt.telling.running import Graph
from freqopt.telling.watching import (
    BETWEEN_LOOKS,
    FIRST_LOOKS,
    MOST_KEPT,
    ProbeErrors,
    TimestepRange,
    next_look,
)


def test_errors_of_several_batches_are_joined() -> None:
    errors = ProbeErrors([2, 3])
    calls = [torch.rand(5), torch.rand(2, 5), torch.rand(5)]
    by_site: list[list[torch.Tensor]] = [[], []]
    for call in calls:
        table = call.view(-1, 5)
        by_site[0].append(table[:, :2])
        by_site[1].append(table[:, 2:])
        errors.add(torch.cat([table[:, :2].flatten(), table[:, 2:].flatten()]))
    for i, parts in enumerate(by_site):
        expected = torch.stack([part.square().mean() for part in parts]).mean().sqrt()
        torch.testing.assert_close(errors.means()[i], expected)
        torch.testing.assert_close(errors.worst()[i], torch.stack([p.max() for p in parts]).max())


def test_sums_of_inference_mode_go_on_outside() -> None:
    errors = ProbeErrors([2])
    with torch.inference_mode():
        errors.add(torch.ones(2))
    errors.add(torch.ones(2) * 2)
    torch.testing.assert_close(errors.means(), torch.tensor([2.5]).sqrt())


def test_what_measured_nothing_is_left_out() -> None:
    errors = ProbeErrors([2, 1])
    nothing = float("nan")
    for call in ([0.3, 0.4, 1.0], [nothing, nothing, 2.0], [0.5, nothing, nothing]):
        errors.add(torch.tensor(call))
    squares = torch.tensor([(0.09 + 0.16 + 0.25) / 3, (1.0 + 4.0) / 2])
    torch.testing.assert_close(errors.means(), squares.sqrt())
    torch.testing.assert_close(errors.worst(), torch.tensor([0.5, 2.0]))


def graph(most_kept: int = MOST_KEPT) -> Graph:
    """Of one site with one head, without a budget of its own."""
    decisions = (("attn", True, ""),)
    return Graph(decisions, measured=(0,), heads=(1,), budgets=(-1,), most_kept=most_kept)


def test_calls_wait_with_their_errors_and_no_more_than_so_many() -> None:
    together, at_once = graph(), graph(most_kept=1)
    memory = torch.zeros(1)
    for number in range(3000):
        together.note([], torch.full((1,), float(number)))
        memory.fill_(float(number))  # written anew at each call, as by CUDA graphs
        at_once.note([], memory)
        assert len(together._waiting) < MOST_KEPT and not at_once._waiting
    expected = torch.arange(3000.0).square().mean().sqrt()
    for each in (together, at_once):
        (calls,) = each.calls.values()
        assert calls.count == 3000 and calls.errors is not None and calls.errors.calls == 3000
        torch.testing.assert_close(calls.errors.means(), expected[None])
        assert calls.errors.worst() == 2999
        each.forget()
        assert not each.calls


def test_calls_of_a_gradient_keep_no_graph_of_it() -> None:
    noting, weight = graph(), torch.ones(1, requires_grad=True)
    for _ in range(11):
        noting.note([], weight * 2)
    assert noting._waiting and all(e is None or e.grad_fn is None for _, e in noting._waiting)


def test_threads_that_count_and_ask_lose_nothing() -> None:
    noting = graph()

    def work() -> None:
        for _ in range(2000):
            noting.note([], torch.ones(1))
            if not noting._waiting:
                list(noting.calls.values())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (calls,) = noting.calls.values()
    assert calls.count == 8000 and calls.errors is not None and calls.errors.calls == 8000


def test_looks_get_rarer() -> None:
    looks = [next_look(0)]
    while looks[-1] < 40:
        looks.append(next_look(looks[-1]))
    assert looks == [1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64]
    assert next_look(6) == next_look(7) == 8


def timed_plan(decision: str = "split") -> Plan:
    """A plan for timesteps 0.2 to 0.8 whose one split site is split, or none."""
    plan = full_plan()
    assert {site.decision for site in plan.sites.values()} >= {"split"}
    sites = plan.sites
    if decision == "dense":
        sites = {n: s.model_copy(update={"decision": "dense"}) for n, s in sites.items()}
    timed = {"timestep_name": "time", "timestep_range": (0.2, 0.8), "sites": sites}
    return plan.model_copy(update=timed)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_on_a_device_a_step_outside_is_seen_by_the_next_look(
    batch: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched, looks = TimestepRange(timed_plan()), []
    monkeypatch.setattr(watched, "judge", lambda low, high: looks.append((low, high)))
    inside, outside = torch.ones(batch).to(dtype), torch.full((batch,), 7).to(dtype)
    outside[0] = -3
    for call in range(FIRST_LOOKS + 3 * BETWEEN_LOOKS):
        times = outside if call == FIRST_LOOKS + 2 else inside
        seen = watched._seen_on_device(times)
        if seen is not None:
            watched.judge(*seen)
    expected = (-3.0, 1.0 if batch == 1 else 7.0)
    assert looks == [(1.0, 1.0)] * FIRST_LOOKS + [expected] * 3


def test_a_step_that_is_no_number_hides_no_other() -> None:
    watched = TimestepRange(timed_plan())
    watched._seen_on_device(torch.tensor([0.5]))
    assert watched._seen_on_device(torch.tensor([torch.nan])) == [0.5, 0.5]


@pytest.mark.parametrize("decision", ["split", "dense"])
def test_steps_of_a_plan_that_splits_nothing_are_not_watched(
    decision: str, caplog: pytest.LogCaptureFixture
) -> None:
    TimestepRange(timed_plan(decision)).note(torch.tensor([5.0]))
    assert ("its error was not verified there" in caplog.text) == (decision == "split")


def test_calls_of_no_batch_items_measure_nothing() -> None:
    """Their means were no numbers, and the handle that asked for them could not be disabled."""
    errors = ProbeErrors([2, 1])
    errors.add(torch.empty(0))
    assert errors.calls == 0 and errors.glance() is None
    errors.add(torch.tensor([3.0, 4.0, 1.0]), torch.empty(0))
    assert errors.calls == 1 and errors.worst().tolist() == [4.0, 1.0]
    assert errors.means().tolist() == pytest.approx([12.5**0.5, 1.0])
