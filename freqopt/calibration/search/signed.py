"""What the errors of many heads do to the output, from few runs with errors of random signs.

In run k head m has its error with a sign s[k, m], so the output is off by the sum over m of
s[k, m] u[m], where u[m] is what m does alone. The product of two runs' deviations is the sum of
s[k, m] s[l, m] |u[m]|^2, and products of different u, which random signs average away: K runs give
K (K - 1) / 2 such sums for the |u[m]|^2, so far fewer runs than heads tell all of them apart. What
they do not tell, they take from heads of the same site, from sites nearby and from other timesteps.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from freqopt.calibration.measure.ladder import Array

OF_SITES, NEARBY = 0.5, 0.15
"""Prior variance that sites of a model differ by from its mean, relative to that, and the share of
the depth over which they are alike."""

OF_HEADS = (0.1, 0.4, 1.0)
"""Prior variances that the heads of a site differ by; the likeliest is taken."""

COSINES = (0.01, 0.02, 0.04, 0.08, 0.15, 0.3)
"""Cosines of what two heads do to the output, which is the noise; the likeliest is taken."""

OF_BUCKETS = 0.8
"""Prior correlation of a head's sensitivities at two timesteps."""

LEAST = 0.05
"""Least squared sensitivity of a head, relative to the mean: noise may make some negative."""

TOLD_APART = 0.6
"""Relative standard error, at a cosine of 0.1 of any two heads, up to which heads are told apart;
with runs too few for that sites are."""

LEAST_SHARE = 0.1
"""Least share of an observed output error that is ascribed to the injection, not to rounding."""

MOST_EQUATIONS = 1500
"""Products of two runs' deviations that are solved for, about; their number counts cubed."""


class Group(NamedTuple):
    """Sites, from one to before another, that get errors in the same runs; how many runs."""

    first: int
    last: int
    draws: int


class Scheme(NamedTuple):
    """Where errors are injected. references: numbers of samples; passes: that all of it takes.

    groups: of each of these samples; none: every head of every site alone.
    """

    references: list[int]
    groups: list[list[Group]]
    passes: float


class Draws(NamedTuple):
    """What runs over one group showed in one sample.

    bucket: of the sample. first: number of the group's first head in the model. signs: (K, n).
    weights: (n,) squared error put in, relative to the site's output. products: (K, K) of the
    output's deviations, relative to its squared norm. rounding: relative error of the output that
    is there without any.
    """

    bucket: int
    first: int
    signs: Array
    weights: Array
    products: Array
    rounding: float

    @property
    def caused(self) -> Array:
        """(K,) squared deviations of the runs that are not rounding."""
        own = np.diag(self.products)
        found: Array = np.maximum(own - self.rounding**2, LEAST_SHARE * own)
        return found


class Estimate(NamedTuple):
    """Squared sensitivities (buckets, heads of the model), and their standard errors."""

    mean: Array
    deviation: Array


def scheme_of(
    heads: Sequence[int],
    shares: Sequence[float],
    references: int,
    passes: float | None,
    fixed: float,
) -> Scheme:
    """Where to inject errors, so that runs come to at most so many passes.

    Heads one by one in one sample come first, in more where passes allow it. With fewer runs heads
    are told apart by signs, in as few samples as tell them best; and with fewer still only sites.
    One run at one site is the least, however few passes there are.

    heads, shares: of each site, in the order of the model; the part of a pass that a run from there
    takes. passes: None: any number. fixed: passes that a sample takes besides.
    """
    alone = sum(n * share for n, share in zip(heads, shares, strict=True)) + 1.0 - shares[-1]
    alone += fixed
    whole = references if passes is None else min(max(int(passes // alone), 0), references)
    if passes is None or whole:
        return Scheme(_spaced(references, whole), [], whole * alone)
    most = int(min(references, max(1, passes // (2 * fixed))))
    best: tuple[float, list[list[Group]]] | None = None
    for used in range(1, most + 1):
        found = _groups_of_heads(heads, shares, passes / used - fixed, used)
        if found is not None and (best is None or found[0] < best[0]):
            best = found[0], [found[1]] * used
    if best is not None and best[0] <= TOLD_APART:
        every = best[1]
    else:
        every = _turns(shares, max(passes / most - fixed, 0.0), most)
    spent = sum(_passes_of(each, shares) + fixed for each in every)
    return Scheme(_spaced(references, len(every)), every, spent)


def _spaced(count: int, chosen: int) -> list[int]:
    """So many of the first whole numbers, evenly spaced."""
    return [int(i) for i in (np.arange(chosen) + 0.5) * count / chosen]


def _groups_of_heads(
    heads: Sequence[int], shares: Sequence[float], passes: float, samples: int
) -> tuple[float, list[Group]] | None:
    """Groups whose runs tell heads apart best, with the relative error at a cosine of 0.1.

    None where the passes are too few for any.
    """
    best: tuple[float, list[Group]] | None = None
    for count in range(1, len(heads) + 1):
        bounds = [len(heads) * i // count for i in range(count + 1)]
        walk = 1.0 - shares[bounds[-2]]
        draws = int((passes - walk) / sum(shares[first] for first in bounds[:-1]))
        draws = max(min(draws, int((2 * MOST_EQUATIONS / (samples * count)) ** 0.5)), 0)
        pairs = samples * draws * (draws - 1) / 2
        if pairs < 1:
            continue
        most = max(sum(heads[a:b]) for a, b in itertools.pairwise(bounds))
        noise = 0.1 * most / pairs**0.5
        if best is None or noise < best[0]:
            best = noise, [Group(a, b, draws) for a, b in itertools.pairwise(bounds)]
    return best


def _turns(shares: Sequence[float], passes: float, samples: int) -> list[list[Group]]:
    """Sites one at a time, each in as many samples as there are passes for, in turn.

    Where they are too few for one each, evenly spaced sites.
    """
    for count in range(len(shares), 0, -1):
        spaced = sorted({round(x) for x in np.linspace(0, len(shares) - 1, count)})
        for times in range(samples if count == len(shares) else 1, 0, -1):
            dealt = [
                [
                    Group(site, site + 1, 1)
                    for at, site in enumerate(spaced)
                    if (at - turn) % samples < times
                ]
                for turn in range(samples)
            ]
            if max(_passes_of(each, shares) for each in dealt) <= passes:
                return dealt
    middle = len(shares) // 2
    return [[Group(middle, middle + 1, 1)], *([] for _ in range(samples - 1))]


def _passes_of(groups: Sequence[Group], shares: Sequence[float]) -> float:
    """Passes that runs take, and going on from group to group."""
    if not groups:
        return 0.0
    return sum(g.draws * shares[g.first] for g in groups) + 1.0 - shares[groups[-1].first]


def estimate(draws: Sequence[Draws], heads: Sequence[int], buckets: int) -> Estimate:
    """The likeliest squared sensitivities: linear regression with what is known beforehand.

    heads: of each site. A head is taken to be like the mean of its timestep bucket, and to differ
    from it as its site does and by itself, which errors of sites nearby and at other timesteps
    tell of as well.
    """
    level = _levels(draws, buckets)
    equations = _equations(draws, level, sum(heads))
    best: tuple[float, Estimate] | None = None
    for of_heads, cosine in itertools.product(OF_HEADS, COSINES):
        found = _solve(equations, heads, buckets, of_heads, cosine)
        if best is None or found[0] > best[0]:
            best = found
    assert best is not None
    mean, deviation = best[1]
    return Estimate(
        level[:, None] * np.maximum(1.0 + mean, LEAST), level[:, None] * np.sqrt(deviation)
    )


class _Equations(NamedTuple):
    """Sums of relative sensitivities less 1: (P, heads) coefficients, and (P,) of all else.

    spread: variance of the noise over the squared cosine.
    """

    bucket: Array
    coefficients: Array
    value: Array
    spread: Array


def _levels(draws: Sequence[Draws], buckets: int) -> Array:
    """(buckets,) mean squared sensitivity in each of them; of all where there are no runs."""
    caused, put_in = np.zeros(buckets), np.zeros(buckets)
    for each in draws:
        caused[each.bucket] += float(each.caused.sum())
        put_in[each.bucket] += float((each.signs**2 @ each.weights).sum())
    every = max(caused.sum(), 1e-30) / max(put_in.sum(), 1e-30)
    found = caused / np.maximum(put_in, 1e-30)
    return np.where((caused > 0.0) & (put_in > 0.0), found, every)


def _equations(draws: Sequence[Draws], level: Array, heads: int) -> _Equations:
    rows, values, spreads, of = [], [], [], []
    for each in draws:
        expected = each.weights * level[each.bucket]
        for k, other in itertools.combinations_with_replacement(range(len(each.signs)), 2):
            own = each.signs[k] * each.signs[other] * expected
            row = np.zeros(heads)
            row[each.first : each.first + len(own)] = own
            rows.append(row)
            same = k == other
            product = each.caused[k] if same else each.products[k, other]
            values.append(float(product - own.sum()))
            spreads.append((1.0 + same) * max(float(np.abs(own).sum()), 1e-30) ** 2)
            of.append(each.bucket)
    return _Equations(np.array(of), np.array(rows), np.array(values), np.array(spreads))


def _solve(
    equations: _Equations, heads: Sequence[int], buckets: int, of_heads: float, cosine: float
) -> tuple[float, Estimate]:
    """Log likelihood, and (buckets, heads) relative differences from the mean with variances."""
    bucket, rows, value, spread = equations
    site = np.repeat(np.arange(len(heads)), heads)
    starts = np.concatenate([[0], np.cumsum(heads)[:-1]])
    sums = np.add.reduceat(rows, starts, axis=1)
    apart = np.abs(np.subtract.outer(np.arange(len(heads)), np.arange(len(heads))))
    near = OF_SITES * np.exp(-apart / (NEARBY * len(heads)))
    alike = np.where(np.equal.outer(bucket, bucket), 1.0, OF_BUCKETS)
    scale = 1.0 / np.sqrt(spread)  # all equations in units of their own size
    cov = alike * (sums @ near @ sums.T + of_heads * rows @ rows.T) * np.outer(scale, scale)
    factor = np.linalg.cholesky(cov + np.diag(np.full(len(value), cosine**2 + 1e-9)))
    white = np.linalg.solve(factor, value * scale)
    likelihood = -0.5 * float(white @ white) - float(np.log(np.diag(factor)).sum())
    inner = ((near @ sums.T)[site] + of_heads * rows.T) * scale  # (heads, P)
    means, variances = [], []
    for at in range(buckets):
        gain = inner * np.where(bucket == at, 1.0, OF_BUCKETS)
        told = np.linalg.solve(factor, gain.T)
        means.append(told.T @ white)
        variances.append(np.maximum(OF_SITES + of_heads - np.square(told).sum(0), 0.0))
    return likelihood, Estimate(np.array(means), np.array(variances))
