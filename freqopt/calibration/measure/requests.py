"""Requests: what a run of the model is asked for at its attention sites, and what it answers.

A request says everything about a run; its `attend` stands at every site. What it notices goes into
the `Result` of that run, and nothing stays behind.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from freqopt.calibration.measure.attention import (
    AttentionCall,
    AttentionShape,
    head_chunks,
    head_energy,
    head_error,
)
from freqopt.calibration.measure.clock import has_clock, milliseconds, time_call, time_orders
from freqopt.calibration.measure.curves import measure_curves
from freqopt.calibration.measure.ladder import GRID_ALONE, THRESHOLDS
from freqopt.calibration.measure.readings import Reading
from freqopt.calibration.measure.tiles import SAMPLED_TILES
from freqopt.config import DEFAULT_PROBES
from freqopt.plan.records import SiteTiming

INJECTED, MOST_AMPLIFIED = 0.2, 8.0
"""Relative error of a site's output that injected errors are amplified to, and how much at most.
One head's own error would drown in the rounding of a bfloat16 model."""

TIMED_REPEATS = 3
"""Repetitions of the times taken at every site, at the plan's thresholds."""


class SiteThresholds(NamedTuple):
    """How a site is split.

    threshold: (H,) or (buckets, H). chunks: of the key heads, (Hkv,); empty: all by the grid.
    """

    threshold: Tensor
    chunks: tuple[int, ...] = ()


Thresholds = Mapping[str, SiteThresholds]
"""How sites are split, by name; a site that is not there stays dense."""


@dataclass
class Result:
    """What one run of the model showed, at the sites that it reached.

    output: floating-point tensors of the model. shapes: of every site reached, in order. densities:
    (H,) for each call that was split. injected: squared relative error that was put into a site's
    output, None if it was not reached. times: of one call, (dense, split) in ms. timings: of shapes
    of attention that were timed. failures: why measuring a site failed.
    """

    output: list[Tensor] = field(default_factory=list)
    shapes: dict[str, AttentionShape] = field(default_factory=dict)
    readings: list[Reading] = field(default_factory=list)
    densities: dict[str, list[Tensor]] = field(default_factory=dict)
    injected: Tensor | None = None
    times: dict[str, tuple[float, float]] = field(default_factory=dict)
    timings: dict[AttentionShape, SiteTiming] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def mean_densities(self) -> dict[str, Tensor]:
        """(H,) of every site that was split, the mean over its calls."""
        return {name: torch.stack(rows).mean(0).cpu() for name, rows in self.densities.items()}


Splitting = Callable[[], tuple[Tensor, Tensor, Tensor]]
"""Runs `AttentionCall.split`."""


class Visit(NamedTuple):
    """One call of a site's attention in a run: which site, in which timestep bucket."""

    site: str
    bucket: int
    call: AttentionCall
    result: Result

    def splitting(self, thresholds: Thresholds, probes: int) -> Splitting:
        """This call split as thresholds say for this timestep bucket, all that it takes there."""
        (rows, of_heads), device = thresholds[self.site], self.call.query.device
        threshold = rows if rows.dim() == 1 else rows[self.bucket]
        chunks = torch.tensor(of_heads, dtype=torch.int32, device="cpu") if any(of_heads) else None
        return partial(
            self.call.split, threshold.to(device, non_blocking=True), probes,
            None if chunks is None else chunks.to(device, non_blocking=True),
            max(of_heads, default=0),
        )  # fmt: skip


class Request(ABC):
    """What is done at every site. lenient: a site where that fails is dense, and noted."""

    lenient: ClassVar[bool] = False

    @abstractmethod
    def attend(self, visit: Visit) -> Tensor:
        """Attention (B, H, N, D) of a call, to be passed on."""


class Dense(Request):
    """The dense model."""

    def attend(self, visit: Visit) -> Tensor:
        """See `Request`."""
        return visit.call.dense()


@dataclass(frozen=True)
class Measure(Request):
    """Curves of all sites; the model runs on dense attention.

    skipped: sites to leave out, as measuring them failed before. timed: shapes whose times are
    known. number: of the run, as runs measure different tiles. tiles: query tiles of a site's call
    that errors are measured on, SAMPLED_TILES where none are given. orders: the first of ORDERS,
    which are measured. on_site: called at each site.
    """

    skipped: Collection[str] = ()
    timed: Collection[AttentionShape] = ()
    probes: int = DEFAULT_PROBES
    number: int = 0
    tiles: Mapping[str, int] = field(default_factory=dict)
    orders: Sequence[int] = GRID_ALONE
    on_site: Callable[[], None] = lambda: None
    lenient = True

    def attend(self, visit: Visit) -> Tensor:
        """See `Request`."""
        site, _, call, result = visit
        dense = call.dense()
        if site in self.skipped or site in result.failures:
            return dense
        self.on_site()
        tiles = self.tiles.get(site, SAMPLED_TILES)
        reading = measure_curves(site, call, dense, self.probes, self.number, tiles, self.orders)
        known = call.shape in self.timed or call.shape in result.timings
        if has_clock(dense) and not known:
            density = reading.curves["density"][0]
            timing = time_call(call, THRESHOLDS, density, self.probes)
            orders = time_orders(call, self.orders)
            result.timings[call.shape] = timing.model_copy(update={"orders": orders})
        result.readings.append(reading)
        return dense


@dataclass(frozen=True)
class Inject(Request):
    """Dense attention with the split's error, amplified, at one site: at a head, or -1 for all."""

    site: str
    head: int
    threshold: Tensor
    probes: int = DEFAULT_PROBES
    lenient = True

    def attend(self, visit: Visit) -> Tensor:
        """See `Request`."""
        site, _, call, result = visit
        dense = call.dense()
        if site != self.site:
            return dense
        out, _, _ = call.split(self.threshold, self.probes)
        error, _ = head_error(out, dense)
        if self.head >= 0:
            at = torch.arange(len(error), device=error.device)
            error = torch.where(at == self.head, error, 0.0)
        injected = error.sum() / head_energy(dense).sum().clamp(min=1e-30)
        factor = (INJECTED / injected.sqrt().clamp(min=1e-30)).clamp(1.0, MOST_AMPLIFIED)
        for part in head_chunks(out):
            truth, chosen = dense[:, part].float(), (error[part] > 0.0)[None, :, None, None]
            amplified = truth + factor * (out[:, part].float() - truth) * chosen
            out[:, part] = amplified.to(out.dtype)
        result.injected = injected * factor.square()
        return out


@dataclass(frozen=True)
class Split(Request):
    """Sites with thresholds are split, the others dense."""

    thresholds: Thresholds
    probes: int = DEFAULT_PROBES

    def attend(self, visit: Visit) -> Tensor:
        """See `Request`."""
        site, call, result = visit.site, visit.call, visit.result
        if site not in self.thresholds:
            return call.dense()
        out, density, _ = visit.splitting(self.thresholds, self.probes)()
        result.densities.setdefault(site, []).append(density.mean(0))
        return out


@dataclass(frozen=True)
class Time(Request):
    """Sites with thresholds are timed, dense and split; the model runs on dense attention.

    dense_ms: of shapes that were timed before, as dense attention takes as long whatever its data.
    """

    thresholds: Thresholds
    dense_ms: Mapping[AttentionShape, float] = field(default_factory=dict)
    probes: int = DEFAULT_PROBES

    def attend(self, visit: Visit) -> Tensor:
        """See `Request`."""
        site, _, call, result = visit
        if site in self.thresholds:
            run = visit.splitting(self.thresholds, self.probes)
            dense = self.dense_ms.get(call.shape) or milliseconds(call.dense, TIMED_REPEATS)
            split = milliseconds(run, TIMED_REPEATS)
            result.times[site] = dense, split
        return call.dense()
