"""Calls that are dense because the compiler compiles no more, and calls that only look like it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pieces_models import inputs, make
from plans import plan_of

from freqopt.errors import SiteError
from freqopt.plan.plan import Plan
from freqopt.telling import running
from freqopt.telling.limits import Limit, given_up
from freqopt.telling.running import Graph

SITES = 3


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_of(make(), inputs(), 1.0)


def graph_of_all() -> Graph:
    decisions = tuple((f"blocks.{i}", True, "") for i in range(SITES))
    return Graph(decisions, budgets=(-1,) * SITES)


@pytest.fixture
def graph(monkeypatch: pytest.MonkeyPatch) -> Graph:
    """A graph of all sites, the only one that there is."""
    found = graph_of_all()
    monkeypatch.setattr(running, "graphs", [found])
    return found


def reach_the_limit() -> None:
    torch._dynamo.reset()
    before = given_up()

    @torch.compile(backend="eager", dynamic=False)
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    with torch._dynamo.config.patch(recompile_limit=1):
        for size in (3, 4):
            double(torch.zeros(size))
    assert given_up() == before + 1


def nothing() -> None:
    pass


@pytest.mark.parametrize(
    ("meanwhile", "calls", "said"),
    [(nothing, 0, False), (reach_the_limit, 1, False), (reach_the_limit, 0, True)],
)
def test_a_call_is_told_of_that_reached_the_limit_and_split_too_little(
    meanwhile: Callable[[], None], calls: int, said: bool, plan: Plan, graph: Graph
) -> None:
    limit = Limit("Video", plan)
    graph.note([], None)
    limit.begin()
    meanwhile()
    for _ in range(calls):
        graph.note([], None)
    if said:
        with pytest.raises(SiteError, match="0 of 3 planned sites split in this call"):
            limit.end(strict=True)
    else:
        limit.end(strict=True)
    assert limit.reached == said
    limit.begin()
    graph.note([], None)
    limit.end(strict=True)  # what it has graphs for it runs as before


def test_graphs_that_are_forgotten_meanwhile_count_for_nothing(plan: Plan, graph: Graph) -> None:
    for _ in range(9):
        graph.note([], None)
    limit = Limit("Video", plan)
    limit.begin()
    reach_the_limit()
    again = graph_of_all()
    running.graphs[:] = [again]
    again.note([], None)
    limit.end(strict=True)
    assert not limit.reached
