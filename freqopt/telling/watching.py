"""What a running model tells about itself, without being waited for: probe errors and timesteps.

Sums stay on the device that the model runs on. What has to be judged is copied to the host beside
the computation and looked at a call later.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from freqopt.plan.text import scope_of
from freqopt.telling.outside import TIMESTEPS, is_first
from freqopt.telling.said import warn

if TYPE_CHECKING:
    from freqopt.plan.plan import Plan


class Peek:
    """Values of a small tensor on the host, later."""

    def __init__(self) -> None:
        self._host: Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    def __call__(self, tensor: Tensor) -> Tensor | None:
        """What was copied before, if it has arrived; starts the next copy. At once on a CPU."""
        if not tensor.is_cuda:
            return tensor.detach().cpu()
        if torch.cuda.is_current_stream_capturing():
            return None
        seen = None
        if self._host is not None and self._copied is not None:
            if not self._copied.query():
                return None
            seen = self._host.clone()
        if self._host is None or self._host.shape != tensor.shape:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._host.copy_(tensor, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()
        return seen


def is_due(calls: int) -> bool:
    """Whether to look after so many calls: 1, 2, 4, 8 and so on, and a call later at what came."""
    return not calls & (calls - 1) or not (calls - 1) & (calls - 2)


@dataclass
class _Sum:
    """Over calls, (n,) each: squared errors and the largest error."""

    squares: Tensor
    worst: Tensor
    calls: int = 0


class ProbeErrors:
    """Errors that the probes of a graph's sites measured.

    heads: of the sites, in the order in which their errors come.
    """

    def __init__(self, heads: Sequence[int]) -> None:
        self.heads = list(heads)
        self.calls = 0
        self._sums: dict[int, _Sum] = {}
        self._peek = Peek()

    def add(self, errors: Tensor) -> None:
        """Take in the errors of one call: (B, H) of every site, flattened and joined."""
        with torch.inference_mode(False), torch.no_grad():
            found = self._sums.get(errors.numel())
            if found is None:
                empty = torch.zeros_like(errors, requires_grad=False)
                found = self._sums[errors.numel()] = _Sum(empty, empty.clone())
        with torch.no_grad():
            found.squares.addcmul_(errors, errors)
            torch.maximum(found.worst, errors, out=found.worst)
        found.calls += 1
        self.calls += 1

    def means(self) -> Tensor:
        """(sites,) root mean square over calls, batch and heads, on the device."""
        total = torch.stack([self._by_site(s.squares, "mean") for s in self._sums.values()])
        return (total.sum(0) / self.calls).sqrt()

    def worst(self) -> Tensor:
        """(sites,) the largest error of a head in a call, on the device."""
        return torch.stack([self._by_site(s.worst, "amax") for s in self._sums.values()]).amax(0)

    def _by_site(self, values: Tensor, reduce: str) -> Tensor:
        batch = values.numel() // sum(self.heads)
        parts = values.split([batch * heads for heads in self.heads])
        return torch.stack([getattr(part, reduce)() for part in parts])

    def glance(self) -> Tensor | None:
        """`means` on the host, if they have arrived; see `Peek`."""
        return self._peek(self.means()) if self.calls else None

    def clear(self) -> None:
        """Start anew."""
        self._sums, self.calls = {}, 0


class TimestepRange:
    """The timesteps that a plan was calibrated at; says once where a model is called outside.

    owner: the model, of which it is said once however many graphs it has.
    """

    def __init__(self, plan: Plan, owner: nn.Module | None = None) -> None:
        self.plan = plan
        self.owner = None if owner is None else weakref.ref(owner)
        self.name = plan.timestep_name
        self.range = plan.timestep_range
        self.told = self.range is None
        self.margin = 0.0
        if self.range is not None:  # the mean distance of its samples, as any step may be sampled
            count = plan.evidence.samples + plan.evidence.held_out
            self.margin = (self.range[1] - self.range[0]) / max(count - 1, 1) + 1e-6
        self._ends: Tensor | None = None
        self._peek = Peek()

    def note(self, times: Tensor | float) -> None:
        """Look at the timesteps of a call, on the device they are on."""
        if self.told:
            return
        if not isinstance(times, Tensor):
            self.judge(float(times), float(times))
            return
        if type(times) not in (Tensor, torch.nn.Parameter) or not times.numel():
            return
        with torch.no_grad():
            low, high = times.detach().to(torch.float32).aminmax()
            ends = torch.stack([low, high])
            if times.is_cuda:
                ends = self._extremes(ends)
            seen = self._peek(ends)
        if seen is not None:
            self.judge(*seen.tolist())

    def _extremes(self, ends: Tensor) -> Tensor:
        if self._ends is None:
            with torch.inference_mode(False):
                self._ends = ends.clone()
        torch.minimum(self._ends[0], ends[0], out=self._ends[0])
        torch.maximum(self._ends[1], ends[1], out=self._ends[1])
        return self._ends

    def judge(self, low: float, high: float) -> None:
        """Say once where timesteps are outside."""
        assert self.range is not None
        outside = [t for t in (low, high) if not self.covers(t)]
        if not outside or not all(map(math.isfinite, outside)):
            return
        self.told = True
        if not is_first(None if self.owner is None else self.owner(), self.plan, TIMESTEPS):
            return
        first, last = self.range
        warn(
            f"the plan was calibrated at {self.name} {first:g} to {last:g} and is used at "
            f"{outside[0]:g}: its error was not verified there, but for {scope_of(self.plan)}. "
            "Calibrate with samples of these steps; where two models share the denoising (two "
            "experts), each needs its own plan"
        )

    def covers(self, time: float) -> bool:
        """Whether a timestep is inside, or about as near as the samples were to each other."""
        assert self.range is not None
        return self.range[0] - self.margin <= time <= self.range[1] + self.margin
