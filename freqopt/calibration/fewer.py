"""Fewer sites: what is tried before nothing is split, where a plan makes the whole model no faster.

A site may be faster by itself and not in the model, where launches, graph breaks or a fusion that
is lost cost what no time of the site shows. Such a cost is about as large at each of them, so those
that save least by themselves are dropped first, half of them a round.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from freqopt.calibration.search.allocate import Allocation, split_cost
from freqopt.calibration.search.choices import SiteChoices
from freqopt.calibration.search.cost import CostModel

ROUNDS = 3
"""Times that half of the sites are dropped, and the whole model timed again: an eighth remains."""

CLEARLY = 0.99
"""Time over dense that a plan of fewer sites must stay below: one of several tries is a little
faster by chance."""


def savings(
    sites: Sequence[SiteChoices],
    allocation: Allocation,
    times: Mapping[str, tuple[float, float]],
    cost: CostModel,
) -> dict[str, float]:
    """What each site that is split saves by itself, in the cost model's unit.

    times: (dense, split) in ms, as timed at the budgets; the cost model tells of others.
    """
    found = {}
    for site, choice in zip(sites, allocation.choices, strict=True):
        if choice.dense:
            continue
        modelled = cost.dense(site.shape) * site.heads, split_cost(site, choice.index, cost)
        dense, split = times.get(site.name, modelled)
        found[site.name] = dense - split
    return found


def halvings(saved: Mapping[str, float]) -> Iterator[list[str]]:
    """The sites to drop in each round: those that save least, half of what is left each time.

    Of one site none are.
    """
    ranked = sorted(saved, key=lambda name: saved[name])
    kept = len(ranked)
    for _ in range(ROUNDS):
        if kept < 2:
            return
        kept -= kept // 2
        yield ranked[: len(ranked) - kept]


def dropped_reason(slower: str, saved: float) -> str:
    """Why a site stays dense that was dropped."""
    return f"{slower}; splitting this site saves {saved:.3g} ms by itself, less than others do"


def only(sites: int) -> str:
    """How many sites a plan of fewer of them is tried with."""
    some = "site that saves most" if sites == 1 else f"{sites} sites that save most"
    return f"with only the {some}"
