"""Calls of served models that are under way, and what runs in them, thread by thread."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from freqopt.capture.modes import take_off
from freqopt.capture.repeated import in_backward
from freqopt.capture.under_way import Arguments, frames_below
from freqopt.eager.again import Again
from freqopt.eager.by_hand import PutOff
from freqopt.eager.forms import Form, Look
from freqopt.eager.telling import Split
from freqopt.passes.reasons import Why


@dataclass
class Running:
    """A module with planned attention while it runs, and how many attentions it has met.

    works: it has called what a module that attends calls; one that a step cache skips has not.
    put_off: what stands for calls in it that nobody has computed, as long as it is held.
    """

    module: nn.Module
    mode: TorchFunctionMode
    met: int = 0
    works: bool = False
    put_off: list[weakref.ref[PutOff]] = field(default_factory=list)


@dataclass
class Call:
    """One call of the model that is under way.

    again: it is one from before, of which a checkpoint runs a part once more in a backward pass.
    trains: gradients may be asked for. repeats: a backward pass is under way. frame: `id` of the
    frame that it runs in. dense: why planned sites were not split in it. entered: `id` of the
    modules with planned attention that ran in it.
    """

    arguments: Arguments
    form: Form
    look: Look | None = None
    again: Again | None = None
    trains: bool = field(default_factory=torch.is_grad_enabled)
    repeats: bool = field(default_factory=in_backward)
    frame: int = 0
    stack: list[Running] = field(default_factory=list)
    split: list[Split] = field(default_factory=list)
    dense: dict[str, Why] = field(default_factory=dict)
    entered: set[int] = field(default_factory=set)

    def leave(self, module: nn.Module | None = None) -> None:
        """A module is left, and what ran in it; without one, all that is still running."""
        while self.stack:
            left = self.stack.pop()
            take_off(left.mode)
            if left.module is module:
                break

    def abandon(self) -> None:
        """It is over before it was finished."""
        self.leave()
        self.arguments = {}
        if self.look is not None:
            self.look.abandon()


class _Calls(threading.local):
    """Calls under way in a thread and what serves them, innermost last; its share of heads.

    outside: `id` of modules that run, are served in calls of their model alone, and are in none.
    """

    def __init__(self) -> None:
        self.stack: list[tuple[object, Call]] = []
        self.share: tuple[int, int] | None = None
        self.outside: list[int] = []

    def call_of(self, server: object) -> Call | None:
        """The innermost call, if it is one that is served by this."""
        return self.stack[-1][1] if self.stack and self.stack[-1][0] is server else None

    def drop_interrupted(self, frame: FrameType | None) -> None:
        """Close what calls left open that were interrupted from the keyboard: no hook ran for them.

        Such a call is on Python's stack no more; one around what is called now is below its frame,
        which itself may be where the interrupted one's was. frame: the first one below.
        """
        if self.stack:
            there = set(frames_below(frame))
            while any(call.frame not in there for _, call in self.stack):
                self.stack.pop()[1].abandon()


under_way = _Calls()


def frames_of_all() -> set[int]:
    """Identities of the frames of all threads."""
    found: set[int] = set()
    for frame in sys._current_frames().values():
        found.update(frames_below(frame))
    return found


def is_serving() -> bool:
    """Whether a model that is served, or a module of one, is being called in this thread."""
    return bool(under_way.stack or under_way.outside)


@contextmanager
def share_of_heads(rank: int, ranks: int) -> Iterator[None]:
    """In the body, attention has the heads of one of several ranks, shared out evenly in order."""
    before, under_way.share = under_way.share, (rank, ranks)
    try:
        yield
    finally:
        under_way.share = before


def share_of(budget: Tensor) -> Tensor:
    """The rows of a budget (2, H) for the heads that are here.

    Where they do not divide (`ulysses_anything`), the last rank has fewer.
    """
    if under_way.share is None:
        return budget
    rank, ranks = under_way.share
    heads = -(-budget.shape[1] // ranks)
    return budget[:, rank * heads : (rank + 1) * heads]
