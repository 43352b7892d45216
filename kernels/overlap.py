"""A second stream beside the caller's, for launches that need not wait for one another.

The probes' chain is bound by memory and by waiting, the scores by products: together they take
less than one after the other. Fork and join are events, so a CUDA graph of the caller's captures
both streams.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

from freqopt.kernels.tape import Tape, current

OVERLAP_ROWS = 1_500_000
"""Heads times video tokens from which the probes' chain runs beside the scores.

On an H200 24 x 75,600 tokens take 15.39 ms so and 15.52 in order, 24 x 32,760 take 3.34 to 3.37
and 3.28 to 3.33: there is little to hide behind, and the probes' tiles are scored twice.
"""

PRIORITY = -1
"""Of the side stream, high: its programs are few, and start as room appears instead of behind all
that the caller's stream has waiting."""


def pays(heads: int, tokens: int) -> bool:
    """Whether to overlap a call of so many heads, over its batch, and video tokens."""
    return heads * tokens >= OVERLAP_ROWS


@functools.cache
def _beside(device: torch.device, stream: int) -> torch.cuda.Stream:
    """The side stream of one of the caller's, by its handle; kept, as streams come from a pool.

    Each has its own: a stream that is being captured must not get another thread's launches, and
    calls on several streams do not wait for each other.
    """
    return torch.cuda.Stream(device, priority=PRIORITY)


@contextlib.contextmanager
def forked(device: torch.device) -> Iterator[AbstractContextManager[object]]:
    """A context to launch in on the side stream, behind all that the current stream has so far.

    When this one ends the current stream waits for both. What both streams use, or what is used
    afterwards, has to be allocated before and held until then, since the allocator knows it as the
    current stream's; what is allocated aside has to stay aside. Where there are no streams
    (Triton's interpreter) everything runs in the order it is called.
    """
    if device.type != "cuda":
        yield contextlib.nullcontext()
        return
    here = torch.cuda.current_stream(device)
    side = _beside(here.device, here.cuda_stream)
    side.wait_stream(here)
    tape = current()
    if tape is not None:
        tape.switched(functools.partial(_fork, device), forks=True)
    try:
        yield torch.cuda.stream(side) if tape is None else _noted(torch.cuda.stream(side), tape)
    finally:
        here.wait_stream(side)
        if tape is not None:
            tape.switched(_join, joins=True)


@contextlib.contextmanager
def _noted(beside: AbstractContextManager[object], tape: Tape) -> Iterator[None]:
    """A change of streams and back, on the tape too."""
    with beside:
        tape.switched(lambda streams: torch.cuda.set_stream(streams["side"]))
        yield
    tape.switched(lambda streams: torch.cuda.set_stream(streams["here"]))


def _fork(device: torch.device, streams: dict[str, Any]) -> None:
    """What `forked` begins with, of the stream that is current when a call is repeated."""
    here = torch.cuda.current_stream(device)
    side = _beside(here.device, here.cuda_stream)
    side.wait_stream(here)
    streams |= {"here": here, "side": side}


def _join(streams: dict[str, Any]) -> None:
    streams["here"].wait_stream(streams["side"])
