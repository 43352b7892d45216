"""Measures launch choices, one part of a call after the other, and keeps what is faster.

Nothing is tuned behind the user's back: a call takes what `freqopt.kernels.tuned` has on disk or
the shipped choice. A candidate counts only if its results are those of the shipped one.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from triton.errors import TritonError

from freqopt.config import DEFAULT_PROBES
from freqopt.kernels.forward.attention import attend
from freqopt.kernels.forward.call import Call, Fitted, Order, Route, Summaries, Target
from freqopt.kernels.forward.probe import fit_probes, probe_space
from freqopt.kernels.forward.routing import make_route
from freqopt.kernels.forward.summaries import summarise
from freqopt.kernels.hopper import launch as hopper
from freqopt.kernels.layout import TokenLayout
from freqopt.kernels.reference import EXACT
from freqopt.kernels.tiles import Launch

logger = logging.getLogger(__name__)

DENSITY = 0.1
"""At which the attention kernel is measured."""

TOLERANCE = 1e-2
"""Largest relative L2 difference between a candidate's results and the shipped choice's."""

WORTH = 0.97
"""A candidate replaces the choice so far only where its time is below this share of it."""


class Problem(NamedTuple):
    """The call that choices are measured on: random (1, heads, t*h*w, head_dim) tensors."""

    grid: tuple[int, int, int]
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def tokens(self) -> int:
        """Tokens of the grid."""
        return self.grid[0] * self.grid[1] * self.grid[2]


class Part(NamedTuple):
    """A part of a call: what may be chosen, and how it is run with a choice."""

    name: str
    candidates: list[dict[str, int]]
    run: Callable[[Launch], tuple[Tensor, ...]]


class Chosen(NamedTuple):
    """Outcome for one part. ms: with `fields`; shipped_ms: with the launch it began with.

    failed: candidates that do not compile or launch here; wrong: those whose results differ.
    """

    part: str
    fields: dict[str, int]
    ms: float
    shipped_ms: float
    tried: int
    failed: int
    wrong: int


def _every(**values: tuple[int, ...]) -> list[dict[str, int]]:
    """All combinations of the values of some fields."""
    return [dict(zip(values, found, strict=True)) for found in itertools.product(*values.values())]


def threshold_at(call: Call, summaries: Summaries, density: float) -> float:
    """One threshold for all heads at which their mean density is the given one, by bisection."""
    low, high = -6.0, 6.0
    for _ in range(24):
        middle = (low + high) / 2
        threshold = torch.full(
            (call.heads,), 10.0**middle, device=call.query.device, dtype=torch.float32
        )
        route = make_route(call, summaries, threshold)
        reached = float((route.route == EXACT).float().mean())
        low, high = (middle, high) if reached > density else (low, middle)
    return float(10.0**low)


def call_on(problem: Problem, shipped: Launch) -> Call:
    """The call on random tensors, in the grid's order."""
    shape = (1, problem.heads, problem.tokens, problem.head_dim)
    generator = torch.Generator(problem.device).manual_seed(0)
    query, key, value = (
        torch.randn(shape, generator=generator, device=problem.device, dtype=problem.dtype)
        for _ in range(3)
    )
    layout = TokenLayout(problem.grid, 0, 0)
    order = Order.shared(layout.base_order(problem.device))
    return Call(
        query, key, value, None, layout, order, layout, order, True, problem.head_dim**-0.5, shipped
    )


def parts_of(problem: Problem, shipped: Launch) -> Iterator[Part]:
    """Parts of a call on random tensors, in its order; each is run on what `shipped` makes."""
    call = call_on(problem, shipped)
    query, key, value = call.query, call.key, call.value
    summaries = summarise(call)
    threshold = torch.full(
        (call.heads,), threshold_at(call, summaries, DENSITY), dtype=torch.float32
    ).to(query.device)

    def routed(launch: Launch) -> Route:
        return make_route(call._replace(launch=launch), summaries, threshold)

    route = routed(shipped)

    def fitted(launch: Launch) -> tuple[Tensor, ...]:
        space = probe_space(call, route.route.shape[3], DEFAULT_PROBES)
        fit_probes(call._replace(launch=launch), summaries, route, space)
        return *space.fitted, space.error

    given = Fitted(*fitted(shipped)[:2])

    def attended(launch: Launch) -> tuple[Tensor, ...]:
        out = torch.empty_like(query)
        attend(call._replace(launch=launch), summaries, route, given, Target(out, None))
        return (out,)

    def summarised(launch: Launch) -> tuple[Tensor, ...]:
        return (summarise(call._replace(launch=launch)).h_bar,)

    def scored(launch: Launch) -> tuple[Tensor, ...]:
        # Means: a pair whose score is the threshold itself may fall on either side.
        found = routed(launch)
        return found.counts.float().mean((1, 2)), found.mass_term.float().mean((1, 2))

    if not hopper.prepares(key, value):
        yield Part("summaries", _every(first_stages=(1, 2, 3)), summarised)
    score = _every(score_tiles=(4, 8), score_wide=(64, 128), score_warps=(4, 8))
    score += _every(score_tiles=(2, 4), score_blocks=(32,), score_wide=(32,), score_warps=(4,))
    score += _every(score_tiles=(8, 16), score_blocks=(64, 128), score_warps=(8,))
    score += _every(score_stages=(1, 2, 3))
    if not hopper.applies(query):
        yield Part("scores", score, scored)
    probe = _every(probe_rows=(16, 32, 64))
    yield Part("probe", probe + _every(fit_rows=(16, 32, 64), fit_columns=(32, 64)), fitted)
    if not hopper.applies(query):
        tiles = _every(rows=(64, 128), warps=(4, 8), stages=(1, 2, 3, 4))
        yield Part("attention", tiles + _every(wide=(2,), stages=(1, 2), warps=(8,)), attended)


def agrees(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> bool:
    """Whether results are finite and the same to rounding."""
    for x, y in zip(found, wanted, strict=True):
        off = (x.float() - y.float()).norm()
        if not off <= TOLERANCE * y.float().norm():
            return False
    return True


def choose(
    part: Part,
    shipped: Launch,
    timer: Callable[[Callable[[], object]], float],
    step: Callable[[], object],
) -> Chosen:
    """Try a part's candidates on top of each other: each changes the best launch so far.

    timer: from a call to its time in ms. step: called after every candidate.
    """
    wanted = part.run(shipped)
    best = start = timer(lambda: part.run(shipped))
    fields: dict[str, int] = {}
    failed = wrong = 0
    for candidate in part.candidates:
        launch = shipped.changed({**fields, **candidate})
        try:
            if agrees(part.run(launch), wanted):
                time = timer(lambda launch=launch: part.run(launch))  # type: ignore[misc]
                if time < WORTH * best:
                    best, fields = time, {**fields, **candidate}
            else:
                wrong += 1
                logger.warning("%s: results with %s differ from the shipped", part.name, candidate)
        except TritonError as error:  # more registers or shared memory than there is
            failed += 1
            logger.info("%s: %s does not run here: %s", part.name, candidate, error)
        step()
    return Chosen(part.name, fields, best, start, len(part.candidates), failed, wrong)
