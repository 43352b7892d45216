"""Measurement: what every choice costs and how far it is off, at every site, in the running model.

A private torch.compile backend puts a `Recorder` in place of each eligible attention. It measures
while the model runs and passes on either the dense or a split result; nothing outlives the call but
sums per head, so a model calibrates in the memory that it runs in.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from freqopt.calibration.measure.attention import (
    Call,
    count_lifted,
    head_chunks,
    head_energy,
    head_error,
)
from freqopt.calibration.measure.readings import CURVES, FINE, Measured, Reading
from freqopt.calibration.measure.spectrum import key_spectrum
from freqopt.calibration.search.allocate import AttentionShape, ladder_choices
from freqopt.calibration.search.cost import has_clock, milliseconds, time_call
from freqopt.config import DEFAULT_PROBES
from freqopt.decisions import why_not
from freqopt.grid import Grid
from freqopt.passes.decision import Decision
from freqopt.passes.find import Grids
from freqopt.passes.manager import rewrite
from freqopt.passes.reasons import Reason
from freqopt.passes.rewrite.rewrite import replace_site
from freqopt.passes.site import Site
from freqopt.plan.records import SiteTiming

logger = logging.getLogger(__name__)

THRESHOLDS = (
    0.003, 0.015, 0.06, 0.15, 0.3, 0.5, 0.75, 1.05, 1.45, 2.0, 2.8, 4.0, 6.0, 10.0, 17.0, 30.0,
)  # fmt: skip
"""The ladder of budgets tried at every head of every sample: four decades, closest around 1, where
scores lie and densities fall from a half to a few per cent."""

CHOICES = tuple(ladder_choices(np.array(THRESHOLDS)).tolist())
"""Budgets whose densities are read off the scores, and among which allocation chooses."""

Mode = Literal["dense", "measure", "probe", "split", "time"]

INJECTED, MOST_AMPLIFIED = 0.2, 8.0
"""Relative error of a site's output that probes of the gain are amplified to, and how much at most.
One head's own error would drown in the rounding of a bfloat16 model."""

TIMED_REPEATS = 3
"""Repetitions of the times taken at every site, at the plan's budgets."""


@dataclass
class Session:
    """What all recorders of one calibration share: the mode of this pass and what was measured.

    budgets: {site: (H,) budget, or (buckets, H)} used in mode "split" (other sites stay dense)
    and at the one site `probed` in mode "probe". readings: of the pass under way in mode "measure".
    probed_head: its head that is given an error, -1 for all of them.
    densities: (H,) per call, of passes in mode "split". probe_error: in mode "probe" the squared
    relative error that was put into the site's output. times: of mode "time", (dense, split) in ms.
    timings: one for each shape of attention seen on a GPU.
    """

    mode: Mode = "dense"
    bucket: int = 0
    probed: str = ""
    probed_head: int = -1
    probes: int = DEFAULT_PROBES
    sites: dict[str, Measured] = field(default_factory=dict)
    dense_sites: dict[str, str] = field(default_factory=dict)
    budgets: dict[str, Tensor] = field(default_factory=dict)
    densities: dict[str, list[Tensor]] = field(default_factory=dict)
    probe_error: Tensor | None = None
    readings: list[Reading] = field(default_factory=list)
    times: dict[str, tuple[float, float]] = field(default_factory=dict)
    timings: dict[AttentionShape, SiteTiming] = field(default_factory=dict)
    on_site: Callable[[], None] = lambda: None

    def budget(self, name: str) -> Tensor:
        """Budget (H,) of a site in the timestep bucket of the pass under way."""
        found = self.budgets[name]
        return found if found.dim() == 1 else found[self.bucket]

    def split(self, call: Call, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """A site's call, split at its budget; see `Call.split`."""
        return call.split(self.budget(name), self.probes)

    def absorb(self, readings: Sequence[Reading], bucket: int) -> None:
        """Add readings of a pass over a sample in a timestep bucket to their sites."""
        for reading in readings:
            site = self.sites.setdefault(reading.site, Measured(reading.site))
            site.add(bucket, reading)

    def add_timing(self, timing: SiteTiming) -> None:
        """Add the times of attention of one shape."""
        shape = AttentionShape(timing.heads, timing.tokens, timing.head_dim)
        self.timings.setdefault(shape, timing)

    def measurable(self) -> dict[str, Measured]:
        """Sites that were reached and did not fail."""
        return {name: site for name, site in self.sites.items() if site.heads and not site.failure}


class Recorder:
    """Stands where a site's attention was; called with its tensors while the model runs."""

    def __init__(self, session: Session, name: str) -> None:
        self.session = session
        self.site = session.sites.get(name) or Measured(name)
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
        if not site.heads:
            _, site.heads, site.tokens, site.head_dim = query.shape
        try:
            if session.mode == "measure" and not site.failure:
                session.on_site()
                return self._measure(call)
            if session.mode == "probe" and session.probed == site.name:
                return self._probe(call)
            if session.mode == "split" and site.name in session.budgets:
                out, density, _ = session.split(call, site.name)
                session.densities.setdefault(site.name, []).append(density.mean(0))
                return out
            if session.mode == "time" and site.name in session.budgets:
                session.times[site.name] = self._time(call)
        except Exception as error:
            if session.mode in ("split", "time"):
                raise
            site.failure = f"{type(error).__name__}: {error}"
            logger.warning("%s stays dense, measuring it failed: %s", site.name, site.failure)
        return call.dense()

    def _measure(self, call: Call) -> Tensor:
        dense, session = call.dense(), self.session
        heads = dense.shape[1]
        energy = head_energy(dense)
        total = energy.sum().clamp(min=1e-30)
        rows: dict[str, list[Tensor]] = {name: [] for name in CURVES}
        ordered = call.ordered_scores()
        counts = {}
        if dense.device.type == "cpu":  # equal counts give one and the same route, and one run does
            lifted = count_lifted(ordered, THRESHOLDS).flatten(1).tolist()
            counts = dict(zip(THRESHOLDS, lifted, strict=True))
        done: dict[Any, dict[str, Tensor]] = {}
        for threshold in THRESHOLDS:
            same = tuple(counts.get(threshold, (threshold,)))
            if same not in done:
                budget = torch.full((heads,), threshold)
                out, density, probe = call.split(budget, session.probes)
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
                rows[name].append(value)
        curves = {name: torch.stack(row).cpu().double() for name, row in rows.items()}
        shape = AttentionShape(heads, call.query.shape[2], call.query.shape[3])
        if has_clock(dense) and shape not in session.timings:
            session.add_timing(time_call(call, THRESHOLDS, curves["density"], session.probes))
        reading = Reading(
            self.site.name,
            shape,
            call.grid,
            (energy / total).cpu().double(),
            {**curves, FINE: fine_densities(ordered).cpu().double()},
            key_spectrum(call.key, call.grid, call.text_before),
        )
        session.readings.append(reading)
        return dense

    def _time(self, call: Call) -> tuple[float, float]:
        """Milliseconds of dense attention and of the split at the site's budget."""
        session, name = self.session, self.site.name
        budget, probes = session.budget(name).to(call.query.device), session.probes
        return (
            milliseconds(call.dense, TIMED_REPEATS),
            milliseconds(lambda: call.split(budget, probes), TIMED_REPEATS),
        )

    def _probe(self, call: Call) -> Tensor:
        """Dense attention with the split's error, amplified, at the probed head or at all."""
        dense, session = call.dense(), self.session
        out, _, _ = session.split(call, self.site.name)
        error, _ = head_error(out, dense)
        if session.probed_head >= 0:
            at = torch.arange(len(error), device=error.device)
            error = torch.where(at == session.probed_head, error, 0.0)
        injected = error.sum() / head_energy(dense).sum().clamp(min=1e-30)
        factor = (INJECTED / injected.sqrt().clamp(min=1e-30)).clamp(1.0, MOST_AMPLIFIED)
        for part in head_chunks(out):
            truth, given = dense[:, part].float(), (error[part] > 0.0)[None, :, None, None]
            moved = truth + factor * (out[:, part].float() - truth) * given
            out[:, part] = moved.to(out.dtype)
        session.probe_error = injected * factor.square()
        return out


def fine_densities(ordered: Tensor) -> Tensor:
    """(choices, H) density at each of CHOICES, from `Call.ordered_scores`, mean over the batch."""
    return count_lifted(ordered, CHOICES).double().mean(1) / ordered.shape[-1]


def recording_backend(
    session: Session, grids: Grids
) -> Callable[[torch.fx.GraphModule, list[Any]], Callable[..., Any]]:
    """A torch.compile backend with a recorder for each site that can be split; it runs eagerly."""

    def decide(sites: Sequence[Site]) -> list[Decision]:
        problems = [why_not(site) for site in sites]
        return [
            Decision(site, problem is None, problem or Reason.MEASURED())
            for site, problem in zip(sites, problems, strict=True)
        ]

    def put(gm: torch.fx.GraphModule, decision: Decision) -> None:
        recorder = Recorder(session, decision.site.name)
        replace_site(gm, decision.site, recorder)
        session.sites[decision.site.name] = recorder.site

    def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        for decision in rewrite(gm, decide, put, grids).decisions:
            if not decision.split:
                session.dense_sites[decision.site.name] = decision.reason
        return gm.forward

    return backend
