"""One attention of the demo's video seen closely: what its split costs, and what a patch looks at.

The curves are measured as calibration measures them, at one site and one step of this very video.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from freqopt.calibration.measure.attention import AttentionCall
from freqopt.calibration.measure.curves import measure_curves
from freqopt.calibration.measure.heads import head_tokens
from freqopt.calibration.measure.ladder import THRESHOLDS
from freqopt.calibration.measure.orders import key_order
from freqopt.calibration.measure.requests import Request, SiteThresholds, Split, Visit
from freqopt.calibration.runner import opened
from freqopt.calibration.samples import collect_samples
from freqopt.config import DEFAULT_PROBES, KEY_BLOCK, QUERY_TILE
from freqopt.kernels.layout import TokenLayout
from freqopt.plan.plan import Plan
from freqopt.reporting.style import BLUE, GREY, ORANGE, percent_axis, styled


@dataclass(frozen=True)
class CloseUp:
    """What one head of one site does at one step.

    density, error (rungs,): share of pairs attended exactly and relative L2 error of the head's
    output, at a ladder of thresholds. at: (density, error) at the plan's own threshold, both read
    off these curves. planned: the same as the plan states them. patch: (t, h, w) of a token. tile,
    looked (T, H, W) bool: the tokens that are queries beside it, and those they attend exactly.
    mean_density: share of pairs that all sites together attend exactly in the steps looked at;
    shares: the same by site and head.
    """

    site: str
    head: int
    chunk: int
    timestep: float
    density: list[float]
    error: list[float]
    at: tuple[float, float]
    planned: tuple[float, float]
    patch: tuple[int, int, int]
    tile: Tensor
    looked: Tensor
    mean_density: float
    shares: dict[str, list[float]]

    @property
    def share(self) -> float:
        """Share of all tokens that the tile attends exactly."""
        return float(self.looked.double().mean())


@dataclass(frozen=True)
class Watch(Request):
    """Dense attention; the calls of one site are kept, with their outputs."""

    site: str
    seen: list[tuple[AttentionCall, Tensor]] = field(default_factory=list)

    def attend(self, visit: Visit) -> Tensor:
        """See `Request`."""
        dense = visit.call.dense()
        if visit.site == self.site:
            self.seen.append((visit.call, dense))
        return dense


def look_closely(
    model: nn.Module, inputs: Sequence[dict[str, Any]], plan: Plan, *, seed: int = 0
) -> CloseUp | None:
    """The middle one of the plan's split sites, at the first of the inputs; None if none is split.

    inputs: keyword arguments of calls of the model.
    """
    split = [name for name, site in plan.sites.items() if site.decision == "split"]
    if not split:
        return None
    site = split[len(split) // 2]
    watch = Watch(site)
    samples = collect_samples(model, list(inputs), buckets=1)
    found = []
    with opened(model, samples, None, seed) as runner:
        runner.run(samples.fit[0], watch)
        for sample in (*samples.fit, *samples.held_out):
            request = Split(budgets(plan, bucket_of(plan, sample.timestep)))
            found.append(runner.run(sample, request).mean_densities())
    call, dense = watch.seen[0]
    shares = {name: torch.stack([each[name] for each in found]).mean(0).tolist() for name in split}
    timestep = samples.fit[0].timestep
    bucket = bucket_of(plan, timestep)
    return see(site, call, dense, plan, bucket, timestep or 0.0, shares)


def bucket_of(plan: Plan, timestep: float | None) -> int:
    """The bucket of a plan's budgets that serves a timestep."""
    return 0 if timestep is None else sum(timestep > edge for edge in plan.timestep_edges)


def budgets(plan: Plan, bucket: int) -> dict[str, SiteThresholds]:
    """A plan's budgets of one bucket, as runs under calibration take them."""
    return {
        name: SiteThresholds(plan.budget(name, bucket)[0], tuple(site.chunks))
        for name, site in plan.sites.items()
        if site.decision == "split"
    }


def mean_density(plan: Plan, shares: dict[str, list[float]]) -> float:
    """Share of pairs attended exactly, over all sites of a plan; dense ones count whole."""
    exact = pairs = 0.0
    for name, site in plan.sites.items():
        own = site.tokens**2 * site.heads
        exact += own * (sum(shares[name]) / site.heads if name in shares else 1.0)
        pairs += own
    return exact / pairs


def see(
    site: str,
    call: AttentionCall,
    dense: Tensor,
    plan: Plan,
    bucket: int,
    timestep: float,
    shares: dict[str, list[float]],
) -> CloseUp:
    """A call (of one item), with its output (1, H, N, D), under a plan's budgets of a bucket.

    shares: densities by site and head, see `CloseUp`.
    """
    thresholds, chunks = plan.budget(site, bucket)
    planned = plan.sites[site]
    mean = mean_density(plan, shares)
    head = min(range(planned.heads), key=lambda h: abs(shares[site][h] - mean))
    chunk, threshold = int(chunks[head]), float(thresholds[head])
    orders = (0, chunk) if chunk else (0,)
    curves = measure_curves(site, call, dense, DEFAULT_PROBES, orders=orders).curves
    density = curves["density"][-1, :, head].tolist()
    error = curves["own"][-1, :, head].sqrt().tolist()
    patch = (call.grid[0] // 2, call.grid[1] // 2, call.grid[2] // 2)
    tile, looked = around(call, head, chunk, threshold, patch)
    return CloseUp(
        site,
        head,
        chunk,
        timestep,
        density,
        error,
        (read_off(density, threshold), read_off(error, threshold)),
        (planned.density[head], planned.error[head]),
        patch,
        tile,
        looked,
        mean,
        shares,
    )


def read_off(curve: Sequence[float], threshold: float) -> float:
    """A curve over the ladder at a threshold, between its rungs on logarithmic axes."""
    import numpy as np

    if threshold <= 0:
        return 1.0
    logs = np.log(np.maximum(curve, 1e-12))
    return float(math.exp(np.interp(math.log(threshold), np.log(THRESHOLDS), logs)))


def around(
    call: AttentionCall, head: int, chunk: int, threshold: float, patch: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """The queries of a patch's tile, and the keys that they attend exactly: (T, H, W) bool each."""
    layout = call.layout
    order = key_order(call, chunk) if chunk else None
    scores = head_tokens(call, head, order).score[0, 0]
    shared = head // (call.query.shape[1] // call.key.shape[1])
    places = layout.base_order(call.key.device) if order is None else order[0, shared]
    _, rows, columns = layout.grid
    token = (patch[0] * rows + patch[1]) * columns + patch[2]
    row = int((places == token).nonzero()[0, 0]) // QUERY_TILE
    blocks = (scores[row] >= threshold).nonzero()[:, 0].tolist()
    tile = _marked(places[row * QUERY_TILE : (row + 1) * QUERY_TILE], layout)
    keys = [places[block * KEY_BLOCK : (block + 1) * KEY_BLOCK] for block in blocks]
    return tile, _marked(torch.cat(keys), layout)


def _marked(tokens: Tensor, layout: TokenLayout) -> Tensor:
    """(T, H, W) bool, true at the tokens with these numbers."""
    found = torch.zeros(layout.tokens, dtype=torch.bool, device="cpu")
    found[tokens.long().cpu()] = True
    return found.view(layout.grid)


@styled
def curve_figure(seen: CloseUp) -> Figure:
    """Error against density of the head, with the plan's choice as stated and as found here."""
    figure = Figure(figsize=(6.6, 3.4), layout="constrained")
    ax = figure.subplots()
    shown = [(d, e) for d, e in zip(seen.density, seen.error, strict=True) if e > 1e-4]
    if shown:
        ax.plot(*zip(*shown, strict=True), "-", color=BLUE, lw=2, label="measured on this video")
    ax.plot(*seen.at, "o", color=ORANGE, markersize=9, label="the plan's choice, here")
    ax.plot(*seen.planned, "D", color=GREY, markersize=7, label="as the plan states it")
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="density: share of pairs looked at one by one",
        ylabel="error of this head",
    )
    percent_axis(ax)
    low, high = ax.get_ylim()
    ax.yaxis.set_major_formatter("{x:.3g}")
    if high < 10 * low:  # no power of ten may be in sight
        ax.yaxis.set_minor_formatter("{x:.3g}")
    ax.legend(loc="lower left")
    return figure
