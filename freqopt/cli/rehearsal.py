"""`freqopt calibrate --dry-run`: what would be calibrated, on what, and in how many passes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

import freqopt
from freqopt.calibration.estimate import runs_of
from freqopt.calibration.measure.ladder import THRESHOLDS
from freqopt.calibration.samples import Call, collect_samples
from freqopt.grid import Grid
from freqopt.inspection import InspectedSite
from freqopt.progress import in_words


def rehearsed(
    model: nn.Module, calls: Sequence[Call], grid: Grid | None, timestep: str | None, buckets: int
) -> str:
    """What a calibration would do, how long it takes and in how much memory.

    Runs the model three times, on the first sample.

    Raises:
        CalibrationError: samples that calibration would refuse.
    """
    samples = collect_samples(model, calls, timestep=timestep, buckets=buckets)
    args, kwargs = calls[0]
    found = freqopt.inspect(model, *args, grid=grid, min_tokens=0, **kwargs)
    split = [site for site in found.sites if site.eligible]
    eligible = len(split)
    first = next(model.parameters(), None)
    on_gpu = first is not None and first.is_cuda
    took = _seconds_of(model, args, kwargs, on_gpu)
    runs = runs_of(
        fitted=len(samples.fit), held_out=len(samples.held_out), sites=eligible,
        heads=sum(site.heads for site in split), seconds_of_run=took, on_gpu=on_gpu,
    )  # fmt: skip
    span = samples.timestep_range
    times = "no timestep among the arguments"
    if span is not None:
        times = f"{samples.timestep_name} {span[0]:g} to {span[1]:g} in {samples.buckets} range(s)"
    lines = [
        str(found),
        "",
        f"{len(samples.fit)} samples to fit and {len(samples.held_out)} held out; {times}",
        f"would measure {eligible} sites on {len(samples.fit)} samples, each at up to "
        f"{len(THRESHOLDS)} thresholds, then run the model on the held-out ones for every plan "
        "that is tried",
        f"that is about {runs.total:.0f} runs of the model; one took {took:.3g} s here, so about "
        f"{in_words(runs.seconds(took))} in all",
        f"memory: the model has {_gib(_bytes_of(model)):.3g} GiB, the samples "
        f"{_gib(sum(map(_bytes_in, calls))):.3g} GiB, and measuring a site a few copies of its "
        f"tensors, {_gib(_largest(split)):.3g} GiB",
        *(f"note: {note}" for note in samples.notes),
    ]
    return "\n".join(lines)


COPIES = 6
"""Of queries, keys and values that measuring a site holds, in float32."""


def _seconds_of(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], gpu: bool) -> float:
    """Seconds of a dense run, which is not the first."""
    with torch.no_grad():
        start = time.perf_counter()
        model(*args, **kwargs)
        if gpu:
            torch.cuda.synchronize()
    return time.perf_counter() - start


def _bytes_of(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def _bytes_in(call: Call) -> int:
    leaves = [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, torch.Tensor)]
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves)


def _largest(sites: Sequence[InspectedSite]) -> int:
    sizes = (3 * COPIES * 4 * site.heads * site.head_dim * site.key_length for site in sites)
    return max(sizes, default=0)


def _gib(size: int) -> float:
    return size / 2**30
