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

from freqopt.calibration.measure.ahead import compile_ahead
from freqopt.calibration.measure.attention import (
    AttentionCall,
    AttentionShape,
    head_energy,
)
from freqopt.calibration.measure.clock import has_clock, time_call, time_of, time_orders
from freqopt.calibration.measure.curves import measure_curves
from freqopt.calibration.measure.joining import joined_readings, joined_timing
from freqopt.calibration.measure.ladder import EVERY_RUNG, GRID_ALONE, THRESHOLDS
from freqopt.calibration.measure.readings import Reading
from freqopt.calibration.measure.tiles import SAMPLED_TILES
from freqopt.calibration.team import Heads
from freqopt.config import DEFAULT_PROBES
from freqopt.plan.records import SiteTiming

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
    (H,) for each call that was split. injected: by site (H,), the squared error that each head put
    into the site's output, relative to that. times: of one call, (dense, split) in ms. timings: of
    shapes of attention that were timed. failures: why measuring a site failed.
    """

    output: list[Tensor] = field(default_factory=list)
    shapes: dict[str, AttentionShape] = field(default_factory=dict)
    readings: list[Reading] = field(default_factory=list)
    densities: dict[str, list[Tensor]] = field(default_factory=dict)
    injected: dict[str, Tensor] = field(default_factory=dict)
    times: dict[str, tuple[float, float]] = field(default_factory=dict)
    timings: dict[AttentionShape, SiteTiming] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def mean_densities(self) -> dict[str, Tensor]:
        """(H,) of every site that was split, the mean over its calls."""
        return {name: torch.stack(rows).mean(0).cpu() for name, rows in self.densities.items()}


ALONE = Heads()
"""All heads are here."""

Splitting = Callable[[], tuple[Tensor, Tensor, Tensor]]
"""Runs `AttentionCall.split`."""


class Visit(NamedTuple):
    """One call of a site's attention in a run: which site, in which timestep bucket."""

    site: str
    bucket: int
    call: AttentionCall
    result: Result
    heads: Heads = ALONE

    @property
    def shape(self) -> AttentionShape:
        """Of the site in the whole model."""
        heads, tokens, head_dim = self.call.shape
        return AttentionShape(self.heads.total(heads), tokens, head_dim)

    def splitting(self, thresholds: Thresholds, probes: int) -> Splitting:
        """This call split as thresholds say for this timestep bucket, all that it takes there."""
        (rows, of_all), device = thresholds[self.site], self.call.query.device
        of_heads = self.heads.own_key_heads(of_all, self.call.key.shape[1])
        threshold = self.heads.own(rows if rows.dim() == 1 else rows[self.bucket])
        chunks = torch.tensor(of_heads, dtype=torch.int32, device="cpu") if any(of_heads) else None
        return partial(
            self.call.split,
            threshold.to(device, non_blocking=True),
            probes,
            None if chunks is None else chunks.to(device, non_blocking=True),
            max(of_heads, default=0),
        )


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
    which are measured. rungs: of the ladder, those measured. launches: see `time_call`. on_site:
    called at each site.
    """

    skipped: Collection[str] = ()
    timed: Collection[AttentionShape] = ()
    probes: int = DEFAULT_PROBES
    number: int = 0
    tiles: Mapping[str, int] = field(default_factory=dict)
    orders: Sequence[int] = GRID_ALONE
    rungs: Sequence[int] = EVERY_RUNG
    launches: bool = False
    on_site: Callable[[], None] = lambda: None
    lenient = True

    def attend(self, visit: Visit) -> Tensor:
        """See `Request`."""
        site, call, result = visit.site, visit.call, visit.result
        dense = call.dense()
        if site in self.skipped or site in result.failures:
            return dense
        self.on_site()
        tiles, heads = self.tiles.get(site, SAMPLED_TILES), visit.heads
        if dense.is_cuda:
            compile_ahead(call, self.orders, tiles, self.probes)
        settings = self.probes, self.number, tiles, self.orders, self.rungs
        own = partial(measure_curves, site, call, dense, *settings)
        energy = 0.0 if heads.share is None else float(head_energy(dense).double().sum())
        of_all = heads.team.together(lambda: (own(), energy))
        reading = joined_readings(heads, [each for each, _ in of_all], [e for _, e in of_all])
        known = visit.shape in self.timed or visit.shape in result.timings
        if has_clock(dense) and not known:
            density = heads.own(reading.curves["density"][0])
            timings = heads.team.together(
                lambda: (
                    time_call(call, THRESHOLDS, density, self.probes, launches=self.launches),
                    time_orders(call, self.orders),
                )
            )
            result.timings[visit.shape] = joined_timing(heads, *timings[0])
        result.readings.append(reading)
        return dense


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
        of_all = density.mean(0)
        if visit.heads.share is not None:
            of_all = visit.heads.joined(visit.heads.team.all(of_all.cpu()))
        result.densities.setdefault(site, []).append(of_all)
        return out


@dataclass(frozen=True)
class Time(Request):
    """Sites with thresholds are timed, dense and split; the model runs on dense attention.

    dense_ms: of shapes that were timed before, as dense attention takes as long whatever its data.
    launches: see `time_call`.
    """

    thresholds: Thresholds
    dense_ms: Mapping[AttentionShape, float] = field(default_factory=dict)
    probes: int = DEFAULT_PROBES
    launches: bool = False

    def attend(self, visit: Visit) -> Tensor:
        """See `Request`."""
        site, call, result, heads = visit.site, visit.call, visit.result, visit.heads
        if site in self.thresholds:
            run = visit.splitting(self.thresholds, self.probes)
            dense = self.dense_ms.get(visit.shape) or heads.times * max(
                heads.team.all(time_of(call.dense, TIMED_REPEATS, launches=self.launches))
            )
            split = heads.times * max(
                heads.team.all(time_of(run, TIMED_REPEATS, launches=self.launches))
            )
            result.times[site] = dense, split
        return call.dense()
