"""Processes that share the heads of one model while it is calibrated, as under Ulysses.

Each measures the heads that it has. What decides anything is brought together right away, so that
all of them go through the same steps and end with the same plan, which counts the model's heads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from freqopt.errors import CalibrationError
from freqopt.passes.axes.heads import process_group
from freqopt.passes.site import Share

T = TypeVar("T")


def is_first_process() -> bool:
    """Whether this process writes files and prints, where torchrun started several."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


@dataclass(frozen=True)
class Team:
    """The processes of one group. group: its name; None where there is only this process."""

    group: str | None = None

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files."""
        return self.group is None or dist.get_rank(self._group()) == 0

    @property
    def size(self) -> int:
        """How many processes there are."""
        return 1 if self.group is None else dist.get_world_size(self._group())

    def all(self, item: T) -> list[T]:
        """What every process has, in the order of the ranks; anything that can be pickled."""
        if self.group is None:
            return [item]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, item, group=self._group())
        return found

    def of_first(self, item: T) -> T:
        """What the first process has, for all."""
        return self.all(item if self.first else None)[0]  # type: ignore[return-value]

    def together(self, step: Callable[[], T]) -> list[T]:
        """What a step gives on every process; where it fails on one, it fails on all."""
        if self.group is None:
            return [step()]
        problem: Exception | None = None
        result: Any = None
        try:
            result = step()
        except Exception as error:
            problem = error
        told = None if problem is None else f"{type(problem).__name__}: {problem}"
        found = self.all((result, told))
        if problem is not None:
            raise problem
        for rank, (_, failure) in enumerate(found):
            if failure is not None:
                raise CalibrationError(f"on rank {rank}: {failure}")
        return [each for each, _ in found]

    def agree(self, item: object, what: str) -> None:
        """Hold all processes to have the same.

        Raises:
            CalibrationError: they have not.
        """
        if len(set(self.all(digest_of(item)))) > 1:
            raise CalibrationError(
                f"the {self.size} processes that share the heads of this model were given "
                f"different {what}: all of them must run the same calls; load the samples from one "
                "file, or seed what makes them"
            )

    def _group(self) -> dist.ProcessGroup:
        assert self.group is not None
        return process_group(self.group)


def digest_of(item: object) -> str:
    """Hash of all tensors and numbers in something."""
    digest = hashlib.sha256()
    for leaf in pytree.tree_leaves(item):
        if isinstance(leaf, Tensor):
            real = torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf
            digest.update(repr((leaf.dtype, tuple(leaf.shape))).encode())
            flat = real.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().tobytes())
        elif isinstance(leaf, (int, float, str, bool, type(None))):
            digest.update(repr(leaf).encode())
    return digest.hexdigest()


class Heads:
    """The heads of a site: all of the model's, or those that this process has of them."""

    def __init__(self, share: Share | None = None) -> None:
        self.share = share if share is not None and share.heads else None
        self.team = Team() if self.share is None else Team(self.share.group)

    def total(self, own: int) -> int:
        """How many heads the model has, where `own` are here."""
        return own if self.share is None else self.share.heads

    def key_heads(self, own: int) -> int:
        """How many key heads the model has, where `own` are here."""
        if self.share is None:
            return own
        per_head = len(self.share.numbers) // own
        return self.share.heads // per_head

    @property
    def times(self) -> int:
        """How many times as long all heads would take one process."""
        return 1 if self.share is None else self.share.heads // len(self.share.numbers)

    def own(self, of_all: Tensor) -> Tensor:
        """Of values (..., H) of all heads those of the heads here."""
        if self.share is None or of_all.shape[-1] == len(self.share.numbers):
            return of_all
        return of_all[..., list(self.share.numbers)]

    def own_key_heads(self, of_all: Sequence[int], own: int) -> tuple[int, ...]:
        """Of values of all key heads those of the `own` that are here."""
        if self.share is None or len(of_all) in (0, own):
            return tuple(of_all)
        per_key = self.share.heads // len(of_all)
        first = self.share.numbers[:: len(self.share.numbers) // own]
        return tuple(of_all[number // per_key] for number in first)

    def local(self, head: int) -> int:
        """Where a head of the model is here; -2 where another process has it. -1, all, stays."""
        if self.share is None or head < 0:
            return head
        return self.share.numbers.index(head) if head in self.share.numbers else -2

    def joined(self, parts: Sequence[Tensor], dim: int = 0) -> Tensor:
        """Values of all heads from those of every process, given in the order of the ranks."""
        if self.share is None:
            return parts[0]
        joined, order = torch.cat(list(parts), dim), self._order
        return joined if order is None else joined.index_select(dim, order.to(joined.device))

    def by_key(self, parts: Sequence[Tensor]) -> Tensor:
        """The same of values (Hkv, ...) of key heads, which are dealt out as query heads are."""
        if self.share is None:
            return parts[0]
        if self._order is not None and len(parts[0]) != len(self.share.numbers):
            raise CalibrationError(
                "heads are dealt out one by one and key heads are fewer: calibrate on one process"
            )
        return self.joined(parts)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.share is None:
            return value
        return torch.stack([each.to(value.device) for each in self.team.all(value.cpu())]).sum(0)

    @property
    def _order(self) -> Tensor | None:
        """Where the heads of the model, in order, are among those of all ranks; None: in place."""
        assert self.share is not None
        own, ranks = len(self.share.numbers), self.share.ranks
        if self.share.numbers == tuple(range(self.share.numbers[0], self.share.numbers[0] + own)):
            return None
        numbers = [n for each in self.team.all(self.share.numbers) for n in each]
        assert len(numbers) == own * ranks
        return torch.tensor(numbers, dtype=torch.int64, device="cpu").argsort()
