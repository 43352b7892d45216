"""Calls of served models that are under way, and what runs in them, thread by thread."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from freqopt.capture.under_way import Arguments
from freqopt.eager.again import Again
from freqopt.eager.by_hand import PutOff
from freqopt.eager.forms import Form, Look
from freqopt.eager.telling import Split


@dataclass
class Running:
    """A module with planned attention while it runs, and how many attentions it has met.

    put_off: what stands for calls in it that nobody has computed, as long as it is held.
    """

    module: nn.Module
    mode: TorchFunctionMode
    met: int = 0
    put_off: list[weakref.ref[PutOff]] = field(default_factory=list)


@dataclass
class Call:
    """One call of the model that is under way.

    again: it is one from before, of which a checkpoint runs a part once more in a backward pass.
    trains: gradients may be asked for. frame: `id` of the frame that it runs in.
    """

    arguments: Arguments
    form: Form
    look: Look | None
    again: Again | None = None
    trains: bool = field(default_factory=torch.is_grad_enabled)
    frame: int = 0
    stack: list[Running] = field(default_factory=list)
    split: list[Split] = field(default_factory=list)

    def leave(self, module: nn.Module | None = None) -> None:
        """A module is left, and what ran in it; without one, all that is still running."""
        while self.stack:
            left = self.stack.pop()
            left.mode.__exit__(None, None, None)
            if left.module is module:
                break


class _Calls(threading.local):
    """Calls under way in a thread and what serves them, innermost last; its share of heads.

    outside: how many modules run that are served in calls of their model alone, and are in none.
    """

    def __init__(self) -> None:
        self.stack: list[tuple[object, Call]] = []
        self.share: tuple[int, int] | None = None
        self.outside = 0


under_way = _Calls()


def is_serving() -> bool:
    """Whether a model that is served, or a module of one, is being called in this thread."""
    return bool(under_way.stack) or under_way.outside > 0


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
