"""What a running model tells about itself, without being waited for: probe errors and timesteps.

Sums stay on the device that the model runs on. What has to be judged is copied to the host beside
the computation and looked at a call later.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from freqopt.plan.text import scope_of
from freqopt.telling.outside import TIMESTEPS, is_first
from freqopt.telling.said import warn

if TYPE_CHECKING:
    from freqopt.plan.plan import Plan


MOST_KEPT = 1024
"""Calls of a graph that wait to be counted, each with its probes' errors, (B, H) floats."""


FIRST_LOOKS, BETWEEN_LOOKS = 16, 16
"""Calls of a model on a GPU after each of which its timesteps are looked at, and calls from one
look to the next after that."""


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


def next_look(calls: int) -> int:
    """The next number of calls after which to look: 1, 2, 4, 8 and so on, and one later each."""
    return 1 << calls.bit_length() if calls & (calls - 1) else calls + 1


@dataclass
class _Sum:
    """Over calls, (n,) each: squared errors, how many there were, and the largest error."""

    squares: Tensor
    seen: Tensor
    worst: Tensor


class ProbeErrors:
    """Errors that the probes of a graph's sites measured.

    heads: of the sites, in the order in which their errors come.
    """

    def __init__(self, heads: Sequence[int]) -> None:
        self.heads = list(heads)
        self.calls, self._look = 0, 1
        self._sums: dict[int, _Sum] = {}
        self._peek = Peek()

    def add(self, *several: Tensor) -> bool:
        """Take in the errors of some calls: (B, H) of every site, flattened and joined.

        NaN of what measured nothing is left out, and calls of no batch items. Returns whether it is
        time to look at the means.
        """
        several = tuple(errors for errors in several if errors.numel())
        self.calls += len(several)
        with torch.inference_mode(False), torch.no_grad():
            for size in {errors.numel() for errors in several}:
                table = torch.stack([errors for errors in several if errors.numel() == size])
                found = self._sums.get(size)
                if found is None:
                    found = self._sums[size] = _Sum(*table.new_zeros(3, size).unbind())
                found.squares.add_(table.square().nansum(0))
                found.seen.add_(table.isnan().logical_not_().sum(0))
                torch.maximum(found.worst, table.nan_to_num_().amax(0), out=found.worst)
        if not several or self.calls < self._look:
            return False
        self._look = next_look(self.calls)
        return True

    def means(self) -> Tensor:
        """(sites,) root mean square over calls, batch and heads, on the device; NaN of none."""
        sums = self._sums.values()
        total = torch.stack([self._by_site(s.squares, "mean") for s in sums]).sum(0)
        return (total / torch.stack([self._by_site(s.seen, "mean") for s in sums]).sum(0)).sqrt()

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
        if all(site.decision == "dense" for site in plan.sites.values()):
            self.told = True  # what splits nothing is right at any step
        self._ends: Tensor | None = None
        self._signs: Tensor | None = None
        self._calls = 0
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
            if times.is_cuda:
                seen = self._seen_on_device(times.detach())
            else:
                seen = [float(end) for end in times.detach().to(torch.float32).aminmax()]
        if seen is not None:
            self.judge(*seen)

    def _seen_on_device(self, times: Tensor) -> list[float] | None:
        """The extremes of all calls until lately, where it is time to look at them.

        A launch takes as long as a few lines of Python, and this runs at every call of a model: so
        both extremes are one tensor, the lower with its sign turned, and are copied now and then.
        """
        if self._ends is None or self._signs is None or self._ends.device != times.device:
            with torch.inference_mode(False):
                kind: dict[str, Any] = {"dtype": torch.float32, "device": times.device}
                self._signs = torch.arange(-1, 2, 2, **kind)
                self._ends = torch.full((2,), -math.inf, **kind)
        flat = times.reshape(-1)
        if len(flat) == 1:
            ends = self._signs * flat
        else:
            ends = (self._signs[:, None] * flat).amax(1)
        torch.fmax(self._ends, ends, out=self._ends)
        self._calls += 1
        if self._calls > FIRST_LOOKS and self._calls % BETWEEN_LOOKS:
            return None
        found = self._peek(self._ends)
        return None if found is None else [-float(found[0]), float(found[1])]

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
