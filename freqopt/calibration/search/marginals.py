"""Marginals: what one head's error adds to the output's among the errors of all other heads.

Errors that heads make one at a time do not tell: some heads' errors point against those of the
others and undo a part of them, so that more of theirs is better, and some point the same way. So
from a working point, with everything split, one head at a time takes a neighbouring choice and the
output is compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from freqopt.calibration.measure.ladder import Array
from freqopt.calibration.measure.requests import Split, Thresholds
from freqopt.calibration.runner import Replays
from freqopt.calibration.search.allocate import Allocation, SiteChoice
from freqopt.calibration.search.choices import SiteChoices
from freqopt.calibration.search.sensitivity import MAX_PROBED_HEADS, MAX_PROBED_SITES
from freqopt.calibration.search.verify import thresholds_key, thresholds_of
from freqopt.calibration.search.workbench import Reference, Workbench

STEP = 1.6
"""Factor that the density of a head is divided by, to see what its error adds."""

LEAST_CHANGE = 0.01
"""Least relative change of the error that heads make alone from which a coupling is read."""

BOUNDS = -6.0, 12.0
"""Bounds of couplings in units of the error that the head makes alone: those of heads with next to
no error are read from next to no change."""


class Unit(NamedTuple):
    """What changes at a time: a head of a site, or all of its heads (-1)."""

    site: int
    head: int


def marginal_units(sites: Sequence[SiteChoices], allocation: Allocation) -> list[Unit]:
    """Every head of the sites that are split, or with many heads some of these sites as a whole."""
    split = [index for index, choice in enumerate(allocation.choices) if not choice.dense]
    if sum(sites[index].heads for index in split) <= MAX_PROBED_HEADS:
        return [Unit(index, head) for index in split for head in range(sites[index].heads)]
    chosen = {round(x) for x in np.linspace(0, len(split) - 1, MAX_PROBED_SITES)}
    return [Unit(split[at], -1) for at in sorted(chosen)]


def neighbour(
    sites: Sequence[SiteChoices], allocation: Allocation, unit: Unit, bucket: int
) -> Allocation:
    """The allocation with a unit's density in a bucket divided by STEP, or nearly."""
    site, choice = sites[unit.site], allocation.choices[unit.site]
    index, orders = choice.index.copy(), site.of_rows(site.orders_of(choice.index))
    for row in np.arange(site.heads)[heads_of(unit)] + bucket * site.heads:
        index[row] = _nearest(site, int(row), int(choice.index[row]), int(orders[row]))
    choices = list(allocation.choices)
    choices[unit.site] = SiteChoice(index, choice.dense)
    return replace(allocation, choices=choices)


def _nearest(site: SiteChoices, row: int, choice: int, order: int) -> int:
    """The choice in an order whose density is nearest to that of `choice` over STEP.

    At the loose end, to that times STEP.
    """
    others = np.setdiff1d(np.flatnonzero(site.open_in(order)), [0, choice])
    away = np.log(site.density[row, others] / site.density[row, choice])
    wanted = np.log(STEP) if away.min() > -0.5 * np.log(STEP) else -np.log(STEP)
    return int(others[np.abs(away - wanted).argmin()])


def own_errors(site: SiteChoices, choice: SiteChoice) -> Array:
    """Relative error of the output that each head makes alone, by timestep bucket: (buckets, H)."""
    square = site.error[np.arange(len(choice.index)), choice.index] / site.weight
    return np.sqrt(square).reshape(len(site.shares), site.heads)


def _squared_error(
    bench: Workbench, key: str, reference: Reference, replays: Replays, change: Change
) -> float:
    error = bench.kept(
        thresholds_key(key, change.thresholds),
        lambda: reference.error_of(replays.run(change.site, Split(change.thresholds)).output),
    )
    return float(error) ** 2


class Change(NamedTuple):
    """Thresholds that differ from others at one site."""

    site: str
    thresholds: Thresholds


class Neighbours(NamedTuple):
    """What every unit's neighbour of an allocation does in one sample.

    bucket: of the sample. coupling: (units,) in units of the relative error of the output, 0 where
    a unit has no neighbour that differs. measured: (units,) bool.
    """

    bucket: int
    coupling: Array
    measured: NDArray[np.bool_]


def measure_neighbours(
    bench: Workbench,
    sites: Sequence[SiteChoices],
    allocation: Allocation,
    working_points: Sequence[tuple[int, Reference, float]],
) -> list[Neighbours]:
    """Run the neighbour of every unit of `marginal_units` in turn, and compare the output.

    An error a of a head alone changes the squared error of the output by a^2 + coupling x a, so of
    the change a^2 is taken off and the rest divided by the change of a.
    sites: as measured one head at a time. working_points: references by number, with the error of
    each at the allocation, relative to the dense output.
    """
    units, rows = marginal_units(sites, allocation), []
    with bench.progress.phase("probing marginals", len(working_points) * len(units)) as step:
        for number, reference, error in working_points:
            bucket = bench.samples.bucket(reference.sample)
            coupling, measured = np.zeros(len(units)), np.zeros(len(units), dtype=bool)
            replays = bench.replays(reference, Split(thresholds_of(sites, allocation)))
            for at, unit in enumerate(units):
                other = neighbour(sites, allocation, unit, bucket)
                change = Change(sites[unit.site].name, thresholds_of(sites, other))
                key = f"marginal/{number}"
                changed = _squared_error(bench, key, reference, replays, change) - error**2
                step()
                here, then = (
                    own_errors(sites[unit.site], each.choices[unit.site])[bucket][heads_of(unit)]
                    for each in (allocation, other)
                )
                energy = float((here**2).sum())
                slope = float((here * (then - here)).sum())
                measured[at] = abs(slope) > LEAST_CHANGE * max(energy, 1e-30)
                if measured[at]:
                    ratio = (changed - float((then**2 - here**2).sum())) / slope
                    coupling[at] = float(np.clip(ratio, *BOUNDS)) * math.sqrt(energy)
            rows.append(Neighbours(bucket, coupling, measured))
    return rows


def couplings_of(
    sites: Sequence[SiteChoices], allocation: Allocation, neighbours: Sequence[Neighbours]
) -> list[Array]:
    """How the errors of each head go along with those of all others, at an allocation.

    Negative couplings are those of heads whose errors undo a part of the others'.
    neighbours: of any allocations that split the same sites; samples of a timestep bucket are
    averaged, and drawn towards the mean over the timesteps: 1 / (1 + n) of the way where n
    samples tell, as samples of a bucket differ about as much as buckets do.
    Returns (buckets, H) for every site, in units of the relative error of the output.
    """
    units = marginal_units(sites, allocation)
    own = [own_errors(sites[unit.site], allocation.choices[unit.site]) for unit in units]
    energy = np.stack([(x[:, heads_of(u)] ** 2).sum(1) for x, u in zip(own, units, strict=True)], 1)
    total, count = np.zeros(energy.shape), np.zeros(energy.shape)
    for each in neighbours:
        total[each.bucket] += each.coupling * each.measured
        count[each.bucket] += each.measured
    mean = total / np.maximum(count, 1.0) / np.sqrt(np.maximum(energy, 1e-30))
    weight = energy * (count > 0.0)
    shared = (weight * mean).sum(0) / np.maximum(weight.sum(0), 1e-30)
    ratio = (mean + (shared - mean) / (1.0 + count)).clip(*BOUNDS)
    return _spread(sites, allocation, units, ratio)


def heads_of(unit: Unit) -> slice:
    """The heads of a unit."""
    return slice(None) if unit.head < 0 else slice(unit.head, unit.head + 1)


def _spread(
    sites: Sequence[SiteChoices], allocation: Allocation, units: Sequence[Unit], ratio: Array
) -> list[Array]:
    """Couplings of all heads from the ratios (buckets, units) of some, interpolated over depth."""
    couplings, at = [], [unit.site for unit in units]
    for index, (site, choice) in enumerate(zip(sites, allocation.choices, strict=True)):
        own = own_errors(site, choice)
        columns = {unit.head: column for column, unit in enumerate(units) if unit.site == index}
        if choice.dense or not units:
            ratios = np.zeros_like(own)
        elif columns and -1 not in columns:
            ratios = np.stack([ratio[:, columns[head]] for head in range(site.heads)], 1)
        else:
            of_site = [np.interp(index, at, row) for row in ratio]
            ratios = np.repeat(np.array(of_site)[:, None], site.heads, 1)
        couplings.append(ratios * own)
    return couplings


def coupled(site: SiteChoices, coupling: Array) -> SiteChoices:
    """The site's choices with errors that count what they add among those of other heads.

    The weighted error is that too: how signed parts of errors add up was measured along with it.
    """
    added = coupling.reshape(-1, 1) * np.sqrt(site.error * site.weight[:, None])
    return replace(site, error=site.error + added, weighted_error=site.error + added)


def marginal_ratio(site: SiteChoices, choice: SiteChoice, coupling: Array) -> Array:
    """What the output's squared error changes by with each head, over what the head's own does.

    (buckets, H), at a choice; 1 where the head makes no error.
    """
    own = own_errors(site, choice)
    return 1.0 + 0.5 * coupling / np.where(own > 0.0, own, np.inf)
