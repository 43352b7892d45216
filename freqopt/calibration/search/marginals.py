"""Marginals: what one head's error adds to the output's among the errors of all other heads.

Errors that heads make one at a time do not tell: some heads' errors point against those of the
others and undo a part of them, so that more of theirs is better, and some point the same way. So
from a working point, with everything split, one head at a time is moved and the output compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from freqopt.calibration.checkpoint import Journal
from freqopt.calibration.runner import Runner
from freqopt.calibration.search.allocate import Allocation, Array, SiteChoice, SiteChoices
from freqopt.calibration.search.sensitivity import MAX_PROBED_HEADS, MAX_PROBED_SITES, Dense
from freqopt.calibration.search.verify import budget_key, budgets
from freqopt.progress import Progress

STEP = 1.6
"""Factor that the density of a head is divided by, to see what its error adds."""

LEAST_MOVE = 0.01
"""Least relative change of the error that heads make alone from which a coupling is read."""

BOUNDS = -6.0, 12.0
"""Bounds of couplings in units of the error that the head makes alone: those of heads with next to
no error are read from next to no change."""


class Unit(NamedTuple):
    """What is moved at a time: a head of a site, or all of its heads (-1)."""

    site: int
    head: int


def marginal_units(sites: Sequence[SiteChoices], allocation: Allocation) -> list[Unit]:
    """Every head of the sites that are split, or with many heads some of these sites as a whole."""
    split = [index for index, choice in enumerate(allocation.choices) if not choice.dense]
    if sum(sites[index].heads for index in split) <= MAX_PROBED_HEADS:
        return [Unit(index, head) for index in split for head in range(sites[index].heads)]
    chosen = {round(x) for x in np.linspace(0, len(split) - 1, MAX_PROBED_SITES)}
    return [Unit(split[at], -1) for at in sorted(chosen)]


def moved(
    sites: Sequence[SiteChoices], allocation: Allocation, unit: Unit, bucket: int
) -> Allocation:
    """The allocation with a unit's density in a bucket divided by STEP, or nearly."""
    site, choice = sites[unit.site], allocation.choices[unit.site]
    index = choice.index.copy()
    for row in np.arange(site.heads)[heads_of(unit)] + bucket * site.heads:
        index[row] = _neighbour(site, int(row), int(choice.index[row]))
    choices = list(allocation.choices)
    choices[unit.site] = SiteChoice(index, choice.dense)
    return replace(allocation, choices=choices)


def _neighbour(site: SiteChoices, row: int, choice: int) -> int:
    """The choice whose density is nearest to that of `choice` over STEP.

    At the loose end, to that times STEP.
    """
    others = np.setdiff1d(np.arange(1, len(site.threshold)), choice)
    away = np.log(site.density[row, others] / site.density[row, choice])
    found = others[np.abs(away + np.log(STEP)).argmin()]
    if away.min() > -0.5 * np.log(STEP):
        found = others[np.abs(away - np.log(STEP)).argmin()]
    return int(found)


def own_errors(site: SiteChoices, choice: SiteChoice) -> Array:
    """Relative error of the output that each head makes alone, by timestep bucket: (buckets, H)."""
    square = site.error[np.arange(len(choice.index)), choice.index] / site.weight
    return np.sqrt(square).reshape(len(site.shares), site.heads)


def _squared_error(
    runner: Runner,
    sites: Sequence[SiteChoices],
    allocation: Allocation,
    number: int,
    reference: Dense,
    journal: Journal,
) -> float:
    chosen = budgets(sites, allocation)
    key = budget_key(f"marginal/{number}", chosen)
    entry = journal.find(key)
    if entry is None:
        runner.session.budgets = chosen
        entry = journal.keep(key, reference.error_of(runner.run(reference.sample, "split")))
    return float(entry.facts) ** 2


class Moves(NamedTuple):
    """What moving every unit of an allocation does in one sample.

    bucket: of the sample. coupling: (units,) in units of the relative error of the output, 0 where
    a unit could not be moved. known: (units,) bool.
    """

    bucket: int
    coupling: Array
    known: NDArray[np.bool_]


def measure_moves(
    runner: Runner,
    sites: Sequence[SiteChoices],
    allocation: Allocation,
    references: Sequence[Dense],
    errors: Sequence[float],
    progress: Progress,
    journal: Journal,
    used: Sequence[int] | None = None,
) -> list[Moves]:
    """Move every unit of `marginal_units` in turn, in each reference, and compare the output.

    An error a of a head alone changes the squared error of the output by a^2 + coupling x a, so of
    the change a^2 is taken off and the rest divided by the change of a.
    sites: as measured one head at a time. errors: of each reference at the allocation, relative to
    the dense output. used: which references, all by default.
    """
    units, samples = marginal_units(sites, allocation), runner.samples
    used = range(len(references)) if used is None else used
    found = []
    with progress.phase("probing marginals", len(used) * len(units)) as step:
        for number in used:
            reference = references[number]
            bucket = samples.bucket(reference.sample)
            base = errors[number] ** 2
            coupling, known = np.zeros(len(units)), np.zeros(len(units), dtype=bool)
            for at, unit in enumerate(units):
                other = moved(sites, allocation, unit, bucket)
                changed = _squared_error(runner, sites, other, number, reference, journal) - base
                step()
                here, then = (
                    own_errors(sites[unit.site], way.choices[unit.site])[bucket][heads_of(unit)]
                    for way in (allocation, other)
                )
                energy = float((here**2).sum())
                slope = float((here * (then - here)).sum())
                known[at] = abs(slope) > LEAST_MOVE * max(energy, 1e-30)
                if known[at]:
                    ratio = (changed - float((then**2 - here**2).sum())) / slope
                    coupling[at] = float(np.clip(ratio, *BOUNDS)) * math.sqrt(energy)
            found.append(Moves(bucket, coupling, known))
    return found


def couplings_of(
    sites: Sequence[SiteChoices], allocation: Allocation, moves: Sequence[Moves]
) -> list[Array]:
    """How the errors of each head go along with those of all others, at an allocation.

    Negative couplings are those of heads whose errors undo a part of the others'.
    moves: of any allocations that split the same sites; samples of a timestep bucket are averaged,
    and drawn towards the mean over the timesteps: 1 / (1 + n) of the way where n samples tell, as
    samples of a bucket differ about as much as buckets do.
    Returns (buckets, H) for every site, in units of the relative error of the output.
    """
    units = marginal_units(sites, allocation)
    own = [own_errors(sites[unit.site], allocation.choices[unit.site]) for unit in units]
    energy = np.stack([(x[:, heads_of(u)] ** 2).sum(1) for x, u in zip(own, units, strict=True)], 1)
    total, count = np.zeros(energy.shape), np.zeros(energy.shape)
    for move in moves:
        total[move.bucket] += move.coupling * move.known
        count[move.bucket] += move.known
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
    found, at = [], [unit.site for unit in units]
    for index, (site, choice) in enumerate(zip(sites, allocation.choices, strict=True)):
        own = own_errors(site, choice)
        known = {unit.head: column for column, unit in enumerate(units) if unit.site == index}
        if choice.dense or not units:
            ratios = np.zeros_like(own)
        elif known and -1 not in known:
            ratios = np.stack([ratio[:, known[head]] for head in range(site.heads)], 1)
        else:
            of_site = [np.interp(index, at, row) for row in ratio]
            ratios = np.repeat(np.array(of_site)[:, None], site.heads, 1)
        found.append(ratios * own)
    return found


def coupled(site: SiteChoices, coupling: Array) -> SiteChoices:
    """The site's choices with errors that count what they add among those of other heads.

    Damage is that too: how the signed parts of errors add up was measured along with it.
    """
    added = coupling.reshape(-1, 1) * np.sqrt(site.error * site.weight[:, None])
    return replace(site, error=site.error + added, damage=site.error + added)


def marginal_ratio(site: SiteChoices, choice: SiteChoice, coupling: Array) -> Array:
    """What the output's squared error changes by with each head, over what the head's own does.

    (buckets, H), at a choice; 1 where the head makes no error.
    """
    own = own_errors(site, choice)
    return 1.0 + 0.5 * coupling / np.where(own > 0.0, own, np.inf)
