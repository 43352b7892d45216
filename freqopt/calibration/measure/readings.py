"""What calibration knows about sites: readings of single calls, their sums, and all of a model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from freqopt.calibration.measure.attention import AttentionShape
from freqopt.calibration.measure.spectrum import spectrum_axes
from freqopt.grid import Grid
from freqopt.passes.site import Known, Source
from freqopt.plan.records import SiteTiming

CURVES = ("density", "own", "site", "bias", "site_bias", "probe", "variance")
"""Curves of a reading over the ladder; see `Reading`."""

FINE = "fine"
"""The curve of a reading over all choices between the ladder's rungs."""

SPECTRA = ("power", "low")


@dataclass(frozen=True)
class Reading:
    """What one call of a site showed; float64 on the CPU.

    energy: (H,) share of the site's output energy. curves: by name, [order][rung][head]: density;
    own: squared error relative to the head's output; site: the same relative to the whole site's;
    bias: signed share of the head's output lost; site_bias: squared bias relative to the site;
    probe: squared probe error; variance: of `site`, as only some tiles are measured; fine: density
    at each of `ladder_choices` in place of the rungs; orders are the first of ORDERS. spectrum: as
    `key_spectrum` returns it. key_heads: which query heads share, and with them an order.
    """

    site: str
    shape: AttentionShape
    grid: Grid
    energy: Tensor
    curves: dict[str, Tensor]
    spectrum: tuple[Tensor, Tensor]
    key_heads: int


def pack(readings: Sequence[Reading]) -> tuple[list[Any], dict[str, Tensor]]:
    """Readings as JSON and named tensors; `unpack` undoes it."""
    facts = [
        [reading.site, list(reading.shape), list(reading.grid), reading.key_heads]
        for reading in readings
    ]
    tensors: dict[str, Tensor] = {}
    for index, reading in enumerate(readings):
        parts = {"energy": reading.energy, **reading.curves}
        parts.update(zip(SPECTRA, reading.spectrum, strict=True))
        tensors.update({f"{index}/{name}": tensor for name, tensor in parts.items()})
    return facts, tensors


def unpack(facts: Sequence[Any], tensors: dict[str, Tensor]) -> list[Reading]:
    """Readings that `pack` packed."""
    readings = []
    for index, (site, (heads, tokens, head_dim), (t, h, w), key_heads) in enumerate(facts):
        power, low = (tensors[f"{index}/{name}"] for name in SPECTRA)
        curves = {name: tensors[f"{index}/{name}"] for name in (*CURVES, FINE)}
        shape, energy = AttentionShape(heads, tokens, head_dim), tensors[f"{index}/energy"]
        spectrum = power, low
        readings.append(Reading(site, shape, (t, h, w), energy, curves, spectrum, key_heads))
    return readings


@dataclass
class Sums:
    """Sums of readings' energies and curves; divide by `calls` for means."""

    calls: int = 0
    energy: Tensor = field(
        default_factory=lambda: torch.zeros(0, dtype=torch.float32, device="cpu")
    )
    curves: dict[str, Tensor] = field(default_factory=dict)

    def add(self, energy: Tensor, curves: dict[str, Tensor]) -> None:
        """Add one call's values."""
        self.energy = self.energy + energy if self.calls else energy
        for name, value in curves.items():
            self.curves[name] = self.curves[name] + value if self.calls else value
        self.calls += 1

    def merged(self, other: Sums) -> Sums:
        """Sums over the calls of both."""
        if not (self.calls and other.calls):
            return self if self.calls else other
        curves = {name: self.curves[name] + other.curves[name] for name in self.curves}
        return Sums(self.calls + other.calls, self.energy + other.energy, curves)

    def mean(self, name: str, order: int = 0) -> Tensor:
        """Mean curve [rung][head] in one of ORDERS."""
        return self.curves[name][order] / self.calls

    @property
    def orders(self) -> int:
        """How many orders were measured, the first of ORDERS."""
        return len(self.curves["density"])

    def deviation(self, order: int = 0) -> Tensor:
        """Standard error [rung][head] of the mean curve `site`."""
        return self.curves["variance"][order].sqrt() / self.calls


@dataclass
class SpectrumSums:
    """Sums over calls of each head's key power per radial bin, [head][bin], shares of 1."""

    edges: list[float]
    cutoff: float
    power: Tensor
    low: Tensor
    calls: int = 1


@dataclass
class MeasuredSite:
    """Everything known about one site.

    key_heads: once it is measured. failure: why measuring it failed.
    """

    name: str
    shape: AttentionShape
    grids: set[Grid] = field(default_factory=set)
    buckets: dict[int, Sums] = field(default_factory=dict)
    spectrum: SpectrumSums | None = None
    key_heads: int = 0
    failure: str | None = None

    @property
    def heads(self) -> int:
        """Number of heads."""
        return self.shape.heads

    def add(self, bucket: int, reading: Reading) -> None:
        """Add what one call in a timestep bucket showed."""
        self.grids.add(reading.grid)
        self.key_heads = reading.key_heads
        self.buckets.setdefault(bucket, Sums()).add(reading.energy, reading.curves)
        power, low = reading.spectrum
        if self.spectrum is None:
            self.spectrum = SpectrumSums(*spectrum_axes(reading.grid), power, low)
            return
        sums = self.spectrum
        sums.power, sums.low = sums.power + power, sums.low + low
        sums.calls += 1

    def total(self) -> Sums:
        """Sums over all timestep buckets."""
        total = Sums()
        for bucket in sorted(self.buckets):
            total = total.merged(self.buckets[bucket])
        return total


class Layouts(dict[str, dict[Known, None]]):
    """How the tokens of each site lay, by its name."""

    def note(self, name: str, layout: Known) -> None:
        """Keep a layout, unless one that was seen says as much."""
        known, around = self.setdefault(name, {}), (layout.before, layout.after)
        tokens = sum(around) + math.prod(layout.grid)
        if not any(
            (k.grid, k.mask, k.around(tokens)) == (layout.grid, layout.mask, around) for k in known
        ):
            known[layout] = None

    def unexplained(self) -> set[tuple[str, Known]]:
        """Those of which it is not known where the grid comes from, by the site's name."""
        return {(name, k) for name, known in self.items() for k in known if not k.sources}

    def explain(self, name: str, layout: Known, sources: tuple[Source, ...]) -> None:
        """Note where the grid of a layout comes from."""
        self[name] = {replace(k, sources=sources) if k == layout else k: None for k in self[name]}

    def packed(self) -> dict[str, list[Any]]:
        """As plain lists, for a checkpoint."""
        return {
            name: [
                [[*each.grid, each.before, each.after, each.mask], list(map(list, each.sources))]
                for each in known
            ]
            for name, known in self.items()
        }

    def take_in(self, packed: Mapping[str, Sequence[Any]]) -> None:
        """Note what another run has packed."""
        for name, layouts in packed.items():
            for (t, h, w, before, after, mask), sources in layouts:
                found = tuple(Source(*source) for source in sources)
                self.note(name, Known((t, h, w), before, after, mask, found))


@dataclass
class Survey:
    """What was measured of a model.

    sites: those that runs reached, in order. dense_sites: attention that cannot be split, with the
    reason. timings: one for each shape of attention seen on a GPU. layouts: how the tokens of each
    site lay.
    """

    sites: dict[str, MeasuredSite] = field(default_factory=dict)
    dense_sites: dict[str, str] = field(default_factory=dict)
    timings: dict[AttentionShape, SiteTiming] = field(default_factory=dict)
    layouts: Layouts = field(default_factory=Layouts)

    def add_sites(self, shapes: Mapping[str, Sequence[int]], failures: Mapping[str, str]) -> None:
        """Add the sites that a run reached, and why measuring some of them failed."""
        for name, shape in shapes.items():
            self.sites.setdefault(name, MeasuredSite(name, AttentionShape(*shape)))
        for name, failure in failures.items():
            self.sites[name].failure = failure

    def add_readings(self, readings: Sequence[Reading], bucket: int) -> None:
        """Add readings of a run over a sample in a timestep bucket to their sites."""
        for reading in readings:
            self.add_sites({reading.site: reading.shape}, {})
            self.sites[reading.site].add(bucket, reading)

    def add_timing(self, timing: SiteTiming) -> None:
        """Add the times of attention of one shape."""
        shape = AttentionShape(timing.heads, timing.tokens, timing.head_dim)
        self.timings.setdefault(shape, timing)

    def measurable(self) -> dict[str, MeasuredSite]:
        """Sites that did not fail."""
        return {name: site for name, site in self.sites.items() if not site.failure}

    def failures(self) -> dict[str, str]:
        """Why measuring sites failed."""
        return {name: site.failure for name, site in self.sites.items() if site.failure}
