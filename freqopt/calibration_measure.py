"""Measurement: what every choice costs and how far it is off, at every site, in the running model.

A private torch.compile backend puts a `Recorder` in place of each eligible attention. It measures
while the model runs and passes on either the dense or a split result; nothing outlives the call but
sums per head, so a model calibrates in the memory that it runs in.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from freqopt.config import DEFAULT_PROBES, KEY_BLOCK, MID_RATIO, SUB_BLOCK
from freqopt.grid import Grid

logger = logging.getLogger(__name__)

THRESHOLDS = tuple(0.003 * 10 ** (i * 4 / 11) for i in range(12))
"""The ladder of budgets tried at every head of every sample: four decades from 0.003 to 30."""

SPECTRUM_BINS = 32
CHUNK_BYTES = 256 * 2**20
"""Bound on float32 temporaries while errors and spectra are summed up."""

Mode = Literal["dense", "measure", "probe", "split"]


@dataclass
class Sums:
    """Sums over calls, [mid band off/on][rung][head] in float64; divide by `calls` for means.

    density; own: squared error relative to the head's output; site: the same relative to the whole
    site's; bias: signed share of the head's output lost; site_bias: squared bias relative to the
    site; probe: squared probe error. energy: [head] share of the site's output energy.
    """

    calls: int = 0
    energy: Tensor = field(default_factory=lambda: torch.zeros(0))
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

    def mean(self, name: str) -> Tensor:
        """Mean curve [mid][rung][head]."""
        return self.curves[name] / self.calls


@dataclass
class SpectrumSums:
    """Mean over calls of each head's key power per radial bin, [head][bin], shares of 1."""

    edges: list[float]
    cutoffs: tuple[float, float]
    calls: int = 0
    power: Tensor = field(default_factory=lambda: torch.zeros(0))
    low: Tensor = field(default_factory=lambda: torch.zeros(0))
    mid: Tensor = field(default_factory=lambda: torch.zeros(0))


@dataclass
class Measured:
    """Everything known about one site."""

    name: str
    heads: int = 0
    head_dim: int = 0
    tokens: int = 0
    grids: set[Grid] = field(default_factory=set)
    buckets: dict[int, Sums] = field(default_factory=dict)
    spectrum: SpectrumSums | None = None
    failure: str | None = None

    def total(self) -> Sums:
        """Sums over all timestep buckets."""
        total = Sums()
        for bucket in sorted(self.buckets):
            total = total.merged(self.buckets[bucket])
        return total


@dataclass
class Session:
    """What all recorders of one calibration share: the mode of this pass and what was measured.

    budgets: {site: (2, H) budget, or (buckets, 2, H)} used in mode "split" (other sites stay dense)
    and at the one site `probed` in mode "probe". densities: what the passes in mode "split" left,
    (H,) per call. probe_error: in mode "probe" the squared relative error of the site's output.
    """

    mode: Mode = "dense"
    bucket: int = 0
    probed: str = ""
    mid_bands: tuple[bool, ...] = (False, True)
    sites: dict[str, Measured] = field(default_factory=dict)
    dense_sites: dict[str, str] = field(default_factory=dict)
    budgets: dict[str, Tensor] = field(default_factory=dict)
    densities: dict[str, list[Tensor]] = field(default_factory=dict)
    probe_error: Tensor | None = None
    on_site: Callable[[], None] = lambda: None

    def budget(self, name: str) -> Tensor:
        """Budget (2, H) of a site in the timestep bucket of the pass under way."""
        found = self.budgets[name]
        return found if found.dim() == 2 else found[self.bucket]

    def measurable(self) -> dict[str, Measured]:
        """Sites that were reached and did not fail."""
        return {name: site for name, site in self.sites.items() if site.heads and not site.failure}


class Recorder:
    """Stands where a site's attention was; called with its tensors while the model runs."""

    def __init__(self, session: Session, name: str) -> None:
        self.session = session
        self.site = session.sites.setdefault(name, Measured(name))
        self.__name__ = self.__qualname__ = "freqopt_calibration_recorder"

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
        grid: Grid,
        text_before: int,
        text_after: int,
        scale: float,
    ) -> Tensor:
        """Attention of (B, H, N, D) tensors, dense or split as the session's mode says."""
        call = Call(query, key, value, key_mask, grid, text_before, text_after, scale)
        session, site = self.session, self.site
        _, site.heads, site.tokens, site.head_dim = query.shape
        try:
            if session.mode == "measure" and not site.failure:
                session.on_site()
                return self._measure(call)
            if session.mode == "probe" and session.probed == site.name:
                return self._probe(call)
            if session.mode == "split" and site.name in session.budgets:
                out, density, _ = call.split(session.budget(site.name))
                session.densities.setdefault(site.name, []).append(density.mean(0))
                return out
        except Exception as error:
            if session.mode == "split":
                raise
            site.failure = f"{type(error).__name__}: {error}"
            logger.warning("%s stays dense, measuring it failed: %s", site.name, site.failure)
        return call.dense()

    def _measure(self, call: Call) -> Tensor:
        site, session = self.site, self.session
        dense = call.dense()
        site.grids.add(call.grid)
        energy = head_energy(dense)
        total = energy.sum().clamp(min=1e-30)
        rows: dict[str, list[Tensor]] = {}
        routes = call.count_lifted() if dense.device.type == "cpu" else None
        done: dict[Any, dict[str, Tensor]] = {}
        for mid in session.mid_bands:
            for threshold in THRESHOLDS:
                lower = threshold * MID_RATIO if mid else threshold
                same = (threshold, lower) if routes is None else (routes(threshold), routes(lower))
                if same not in done:
                    exact = torch.full((site.heads,), threshold)
                    out, density, probe = call.split(
                        torch.stack([exact, exact * lower / threshold])
                    )
                    error, along = head_error(out, dense)
                    bias = along / energy.clamp(min=1e-30)
                    done[same] = {
                        "density": density.mean(0),
                        "own": error / energy.clamp(min=1e-30),
                        "site": error / total,
                        "bias": bias,
                        "site_bias": bias * along / total,
                        "probe": probe.square().mean(0),
                    }
                for name, value in done[same].items():
                    rows.setdefault(name, []).append(value)
        shape = (len(session.mid_bands), len(THRESHOLDS), site.heads)
        curves = {name: torch.stack(row).cpu().double() for name, row in rows.items()}
        site.buckets.setdefault(session.bucket, Sums()).add(
            (energy / total).cpu().double(),
            {name: curve.reshape(shape) for name, curve in curves.items()},
        )
        add_spectrum(site, call)
        return dense

    def _probe(self, call: Call) -> Tensor:
        dense = call.dense()
        out, _, _ = call.split(self.session.budget(self.site.name))
        error, _ = head_error(out, dense)
        self.session.probe_error = error.sum() / head_energy(dense).sum().clamp(min=1e-30)
        return out


@dataclass(frozen=True)
class Call:
    """The arguments of one attention: (B, H, N, D) query, (B, Hkv, N, D) key and value."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_mask: Tensor | None
    grid: Grid
    text_before: int
    text_after: int
    scale: float

    def dense(self) -> Tensor:
        """Exact attention, (B, H, N, D)."""
        mask = None if self.key_mask is None else self.key_mask[:, None, None, :]
        return F.scaled_dot_product_attention(
            self.query,
            self.key,
            self.value,
            attn_mask=mask,
            scale=self.scale,
            enable_gqa=self.query.shape[1] != self.key.shape[1],
        )

    def split(self, budget: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split attention: out (B, H, N, D), density (B, H), probe error (B, H)."""
        from freqopt.kernels.op import split_attention_op

        mid_band = bool((budget[0] != budget[1]).any())
        budget = budget.to(self.query.device)
        out, density, probe, _, _ = split_attention_op(
            self.query, self.key, self.value, budget, self.key_mask, list(self.grid),
            self.text_before, self.text_after, self.scale, 0.0, mid_band, DEFAULT_PROBES,
        )  # fmt: skip
        return out, density, probe

    def count_lifted(self) -> Callable[[float], tuple[int, ...]]:
        """How many pairs of each batch item and head score at least a threshold.

        Thresholds with equal counts give one and the same route, which saves a CPU half its time.
        """
        from freqopt.kernels.scores import route_scores

        scores = route_scores(
            self.query, self.key, self.value, grid=self.grid, text_before=self.text_before,
            text_after=self.text_after, scale=self.scale,
        )  # fmt: skip
        ordered = scores.flatten(0, 1).flatten(1).sort(-1).values

        def count(threshold: float) -> tuple[int, ...]:
            least = torch.full((ordered.shape[0], 1), threshold)
            return tuple(torch.searchsorted(ordered, least).flatten().tolist())

        return count


def head_chunks(x: Tensor) -> Iterator[slice]:
    """Slices of heads of (B, H, N, D) whose float32 copies stay within CHUNK_BYTES."""
    per_head = max(1, 4 * x.shape[0] * x.shape[2] * x.shape[3])
    step = max(1, CHUNK_BYTES // per_head)
    for start in range(0, x.shape[1], step):
        yield slice(start, start + step)


def head_energy(x: Tensor) -> Tensor:
    """Squared norm of each head of (B, H, N, D), summed over the batch: (H,) float32."""
    return torch.cat([x[:, part].float().square().sum((0, 2, 3)) for part in head_chunks(x)])


def head_error(out: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
    """Squared error of each head and its projection on the dense output, each (H,) float32."""
    errors, alongs = [], []
    for part in head_chunks(out):
        truth = dense[:, part].float()
        difference = out[:, part].float() - truth
        errors.append(difference.square().sum((0, 2, 3)))
        alongs.append((difference * truth).sum((0, 2, 3)))
    return torch.cat(errors), torch.cat(alongs)


def band_cutoffs(grid: Grid) -> tuple[float, float]:
    """Highest frequencies, in cycles per token, that means of a block and of a sub-block carry.

    A block of n tokens is a cube of side n**(1/dims): its means sample the lattice at that pitch.
    """
    dims = max(1, sum(extent > 1 for extent in grid))
    low, mid = (0.5 * size ** (-1.0 / dims) for size in (KEY_BLOCK, SUB_BLOCK))
    return low, mid


def add_spectrum(site: Measured, call: Call) -> None:
    """Add the keys' power over the token lattice, without its constant part, to the spectrum."""
    t, h, w = call.grid
    axes = [torch.fft.fftfreq(extent, device=call.key.device) for extent in (t, h, w)]
    f_t, f_h, f_w = (axis.square() for axis in axes)
    radius = (f_t[:, None, None] + f_h[:, None] + f_w).sqrt().flatten()
    dims = max(1, sum(extent > 1 for extent in call.grid))
    top = 0.5 * math.sqrt(dims)
    cutoffs = band_cutoffs(call.grid)
    bins = (radius / top * SPECTRUM_BINS).long().clamp(max=SPECTRUM_BINS - 1)
    video = call.key[:, :, call.text_before : call.text_before + t * h * w]
    powers = []
    for part in head_chunks(video):
        lattice = video[:, part].float()
        lattice = lattice.reshape(*lattice.shape[:2], t, h, w, -1)
        lattice = lattice - lattice.mean((2, 3, 4), keepdim=True)
        power = torch.fft.fftn(lattice, dim=(2, 3, 4)).abs().square().sum((0, -1)).flatten(1)
        powers.append(power / power.sum(1, keepdim=True).clamp(min=1e-30))
    power = torch.cat(powers)
    binned = power.new_zeros(power.shape[0], SPECTRUM_BINS).index_add_(1, bins, power)
    low, mid = (power[:, radius <= cut].sum(1).cpu().double() for cut in cutoffs)
    edges = [top * (i + 1) / SPECTRUM_BINS for i in range(SPECTRUM_BINS)]
    found = site.spectrum
    if found is None:
        found = site.spectrum = SpectrumSums(edges, cutoffs)
    first = not found.calls
    host = binned.cpu().double()
    found.power = host if first else found.power + host
    found.low = low if first else found.low + low
    found.mid = mid if first else found.mid + mid
    found.calls += 1


def private_backend(
    session: Session, grid: Grid | None
) -> Callable[[torch.fx.GraphModule, list[Any]], Callable[..., Any]]:
    """A torch.compile backend that replaces every eligible site by a recorder and runs eagerly."""
    from freqopt.passes.find import find_sites
    from freqopt.passes.rewrite import replace_site

    def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        for site in find_sites(gm, grid=grid):
            if not site.eligible:
                session.dense_sites[site.name] = site.reason
                continue
            graph, recorder = site.node.graph, Recorder(session, site.name)
            try:
                replace_site(gm, site, recorder, ())
            except Exception as error:
                for node in [n for n in graph.nodes if n.target is recorder and not n.users]:
                    graph.erase_node(node)
                session.sites.pop(site.name)
                session.dense_sites[site.name] = f"it could not be rewritten: {error}"
                logger.warning("%s stays dense, it could not be rewritten: %r", site.name, error)
        gm.recompile()
        return gm.forward

    return backend
