"""What heads cost by a plan's own model of costs, and how evenly ranks are loaded with them.

Every layer ends in an exchange, so it takes as long as its slowest rank: the imbalance of a plan is
the sum of those over the sum of the means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from freqopt.calibration.measure.attention import AttentionShape
from freqopt.calibration.search.cost import cost_model
from freqopt.errors import OptionError
from freqopt.plan.plan import Plan

SWAPS = 1000
"""Most swaps of two units between ranks; each makes the slowest rank faster."""


def head_costs(plan: Plan, name: str) -> list[float]:
    """Expected cost of each head of a site, in the units of the plan's model of costs."""
    site, cost = plan.sites[name], cost_model(plan.evidence.timings)
    shape = AttentionShape(site.heads, site.tokens, site.head_dim)
    if site.decision == "dense":
        return [cost.dense(shape)] * site.heads
    return [float(c) for c in cost.split(shape, np.array(site.density))]


def key_heads(plan: Plan, name: str) -> int:
    """Number of key heads of a site, which heads that share one must stay with."""
    evidence = plan.evidence.sites.get(name)
    known = None if evidence is None else evidence.key_heads
    return known or len(plan.sites[name].chunks) or plan.sites[name].heads


def loads(costs: Sequence[float], degree: int) -> list[float]:
    """Cost of each of so many ranks, which have equal runs of the heads."""
    share = len(costs) // degree
    return [sum(costs[r * share : (r + 1) * share]) for r in range(degree)]


def imbalance(plan: Plan, degree: int, orders: Mapping[str, Sequence[int]] | None = None) -> float:
    """How much longer attention takes than with equal ranks: 1 where all are equal.

    Sites whose heads do not divide among the ranks are left out.

    Args:
        plan: the plan.
        degree: number of ranks that share the heads.
        orders: heads of sites in the order that ranks take them; as they are where it has none.

    Raises:
        OptionError: fewer than one rank.
    """
    if degree < 1:
        raise OptionError(f"degree {degree} must be 1 or more: how many ranks share the heads")
    slowest = mean = 0.0
    for name, site in plan.sites.items():
        if site.heads % degree:
            continue
        costs = head_costs(plan, name)
        if orders and name in orders:
            costs = [costs[head] for head in orders[name]]
        of_ranks = loads(costs, degree)
        slowest += max(of_ranks)
        mean += sum(of_ranks) / degree
    return slowest / mean if mean else 1.0


def order_of(plan: Plan, name: str, degree: int) -> tuple[list[int], str]:
    """The order of a site's heads in which ranks have equal work, and why there is none."""
    costs, groups = head_costs(plan, name), key_heads(plan, name)
    heads = len(costs)
    if heads % degree:
        return [], (
            f"{heads} heads do not divide among {degree} ranks; attention over all keys "
            "(freqopt.parallel.over_all_keys) does not share them out"
        )
    if groups % degree:
        return [], (
            f"{groups} key heads do not divide among {degree} ranks, and the {heads} heads that "
            "share them stay together"
        )
    share = heads // groups
    of_groups = [sum(costs[g * share : (g + 1) * share]) for g in range(groups)]
    order = balanced_order(of_groups, degree)
    return [g * share + i for g in order for i in range(share)], ""


def imbalances(plan: Plan, degree: int) -> tuple[float, float]:
    """`imbalance` of a plan as its heads are, and as `balance` would put them."""
    found = {name: order_of(plan, name, degree)[0] for name in plan.sites}
    orders = {name: order for name, order in found.items() if order}
    return imbalance(plan, degree), imbalance(plan, degree, orders)


def balanced_order(costs: Sequence[float], degree: int) -> list[int]:
    """Units in the order that ranks take them, equally many each, so that the slowest is fast.

    The dearest first, each to the rank that has least and room; then two units change places as
    long as that helps the slowest rank.
    """
    room = len(costs) // degree
    ranks: list[list[int]] = [[] for _ in range(degree)]
    total = [0.0] * degree
    for unit in sorted(range(len(costs)), key=lambda u: (-costs[u], u)):
        rank = min((r for r in range(degree) if len(ranks[r]) < room), key=lambda r: (total[r], r))
        ranks[rank].append(unit)
        total[rank] += costs[unit]
    for _ in range(SWAPS):
        if not _swap(ranks, total, costs):
            break
    return [unit for rank in ranks for unit in sorted(rank)]


def _swap(ranks: list[list[int]], total: list[float], costs: Sequence[float]) -> bool:
    """Swap the pair of units that helps the slowest rank most; whether one does."""
    slow = max(range(len(ranks)), key=lambda r: total[r])
    best: tuple[float, int, int, int] | None = None
    for other in range(len(ranks)):
        for i, mine in enumerate(ranks[slow]) if other != slow else ():
            for j, theirs in enumerate(ranks[other]):
                moved = costs[mine] - costs[theirs]
                after = max(total[slow] - moved, total[other] + moved)
                if after < total[slow] * (1 - 1e-9) and (best is None or after < best[0]):
                    best = after, other, i, j
    if best is None:
        return False
    _, other, i, j = best
    moved = costs[ranks[slow][i]] - costs[ranks[other][j]]
    ranks[slow][i], ranks[other][j] = ranks[other][j], ranks[slow][i]
    total[slow] -= moved
    total[other] += moved
    return True
