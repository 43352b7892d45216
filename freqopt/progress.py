"""Progress of calibration with the time left: rich where it is installed, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

PRINT_EVERY = 5.0
"""Seconds between plain lines."""


class Step:
    """Called as units of work of a phase are done; `total` tells how many there are when known."""

    def __call__(self, units: int = 1) -> None:
        """So many units are done."""

    def total(self, units: int) -> None:
        """Set the number of units."""


class Progress(Protocol):
    """Shows one phase after another."""

    def phase(self, title: str, total: int | None) -> AbstractContextManager[Step]:
        """A phase of `total` units (None: told later); its `Step` is called as they are done."""


@contextmanager
def open_progress(show: bool) -> Iterator[Progress]:
    """The progress display: silent, rich, or plain lines on standard error."""
    if not show:
        yield _Silent()
        return
    try:
        from rich import progress as rich_progress
        from rich.console import Console
    except ImportError:
        yield _Plain()
        return
    with rich_progress.Progress(
        rich_progress.TextColumn("{task.description:<18}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TextColumn("left"),
        rich_progress.TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as bars:
        yield _Rich(bars)


class _Silent:
    @contextmanager
    def phase(self, title: str, total: int | None) -> Iterator[Step]:
        yield Step()


class _Rich:
    def __init__(self, bars: Any) -> None:
        self.bars = bars

    @contextmanager
    def phase(self, title: str, total: int | None) -> Iterator[Step]:
        bars, task = self.bars, self.bars.add_task(title, total=total)

        class RichStep(Step):
            def __call__(self, units: int = 1) -> None:
                bars.advance(task, units)

            def total(self, units: int) -> None:
                bars.update(task, total=units)

        yield RichStep()
        done = bars.tasks[bars.task_ids.index(task)].completed
        bars.update(task, total=max(done, 1), completed=max(done, 1))


class _Plain:
    @contextmanager
    def phase(self, title: str, total: int | None) -> Iterator[Step]:
        step = _PlainStep(title, total)
        yield step
        step.say(f"done in {time.monotonic() - step.start:.1f} s")


class _PlainStep(Step):
    def __init__(self, title: str, units: int | None) -> None:
        self.title, self.units, self.done = title, units, 0
        self.start = self.last = time.monotonic()

    def __call__(self, units: int = 1) -> None:
        self.done += units
        now = time.monotonic()
        if now - self.last < PRINT_EVERY:
            return
        self.last = now
        if self.units is None:
            self.say(f"{self.done} done")
            return
        left = (now - self.start) / self.done * max(self.units - self.done, 0)
        self.say(f"{self.done} of {self.units}, about {left:.0f} s left")

    def total(self, units: int) -> None:
        self.units = units

    def say(self, text: str) -> None:
        print(f"calibrate: {self.title}: {text}", file=sys.stderr, flush=True)
