"""Progress of long work with the time left: one bar for all of it, and one for the phase under way.

rich draws them in a terminal, HTML in a notebook; anywhere else there is a plain line now and then.
"""

from __future__ import annotations

import html
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

logger = logging.getLogger(__name__)

PRINT_EVERY = 30.0
"""Seconds between plain lines."""

DRAW_EVERY = 1.0
"""Seconds between pictures of the bar in a notebook."""

NAME = "calibrate"


class Step:
    """Called as units of work of a phase are done."""

    def __call__(self, units: int = 1) -> None:
        """So many units are done."""

    def total(self, units: int) -> None:
        """Set the number of units, once it is known."""

    def runs(self, of_unit: float) -> None:
        """Set how many runs of the model a unit takes; 1 if it is never said."""

    def expect(self, runs: float) -> None:
        """Set how many runs this part of the work takes from here to its end, this phase's too."""


class Progress(Protocol):
    """Shows one phase after another."""

    def phase(self, title: str, total: int | None) -> AbstractContextManager[Step]:
        """A phase of `total` units (None: told later); its `Step` is called as they are done."""


class Overall:
    """The whole work in runs of the model, and the time left by what a run took so far.

    parts: how many pieces of about the same size the work has, of which each tells what it takes.
    """

    def __init__(self, parts: int = 1, clock: Callable[[], float] | None = None) -> None:
        self.parts, self.clock = parts, clock or time.monotonic
        self.start = self.clock()
        self.seen, self.expected, self.finished = 0, 0.0, 0.0
        self.title, self.units, self.total, self.of_unit = "", 0, 0, 1.0

    def begin(self, title: str, total: int | None) -> None:
        """A phase begins."""
        self.title, self.units, self.total, self.of_unit = title, 0, total or 0, 1.0

    def end(self) -> None:
        """The phase is over."""
        self.finished, self.units, self.total = self.done, 0, 0

    def expect(self, runs: float) -> None:
        """A part takes so many runs; those to come are taken to be alike."""
        self.seen = min(self.seen + 1, self.parts)
        self.expected = self.finished + runs * (self.parts - self.seen + 1)

    @property
    def done(self) -> float:
        """Runs so far."""
        return self.finished + self.units * self.of_unit

    @property
    def elapsed(self) -> float:
        """Seconds so far."""
        return self.clock() - self.start

    @property
    def share(self) -> float | None:
        """How much is done, 0 to 1; None until it is known what there is."""
        return min(self.done / self._least(), 0.99) if self.expected else None

    @property
    def left(self) -> float | None:
        """Seconds left; None until it is known."""
        if not self.expected or not self.done:
            return None
        return self.elapsed / self.done * (self._least() - self.done)

    def _least(self) -> float:
        """All runs: those expected, and at least what the phase under way has."""
        rest = max(self.total - self.units, 0) * self.of_unit
        return max(self.expected, self.done + rest)

    def __str__(self) -> str:
        count = f"{self.units} of {self.total}" if self.total else f"{self.units} done"
        if self.share is None or self.left is None:
            return f"{self.title}, {count}"
        return f"{self.share:.0%} ({self.title}, {count}), about {in_words(self.left)} left"


def in_words(seconds: float) -> str:
    """A time as people say it: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@contextmanager
def open_progress(show: bool, parts: int = 1) -> Iterator[Progress]:
    """The progress display: silent, in a terminal, in a notebook, or plain lines on standard error.

    parts: pieces of the work, see `Overall`.
    """
    if not show:
        yield _Silent()
        return
    try:
        from rich.console import Console
    except ImportError:
        yield _Notebook(parts) if _in_notebook() else _Plain(parts)
        return
    console = Console(stderr=True)
    if (console.is_jupyter or _in_notebook()) and not _has_widgets():
        yield _Notebook(parts)
    elif not (console.is_terminal or console.is_jupyter):
        yield _Plain(parts)
    else:
        with _rich_bars(console) as bars:
            yield _Rich(bars, parts)


def _rich_bars(console: Any) -> Any:
    from rich import progress as rich_progress

    return rich_progress.Progress(
        rich_progress.TextColumn("{task.description:<18}"),
        rich_progress.BarColumn(),
        rich_progress.TextColumn("{task.fields[count]}"),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TextColumn("{task.fields[left]}"),
        console=console,
    )


def _in_notebook() -> bool:
    """Whether what is displayed is shown in a notebook's page."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


def _has_widgets() -> bool:
    try:
        import ipywidgets  # type: ignore[import-not-found,unused-ignore]  # noqa: F401
    except ImportError:
        return False
    return True


@contextmanager
def _logged(title: str) -> Iterator[None]:
    """Log how long a phase took."""
    start = time.monotonic()
    try:
        yield
    finally:
        logger.info("%s took %.3g s", title, time.monotonic() - start)


class _Silent:
    @contextmanager
    def phase(self, title: str, total: int | None) -> Iterator[Step]:
        with _logged(title):
            yield Step()


class _Shown:
    """What is shown of phases and of the whole; subclasses show it."""

    def __init__(self, parts: int) -> None:
        self.overall = Overall(parts)

    @contextmanager
    def phase(self, title: str, total: int | None) -> Iterator[Step]:
        self.overall.begin(title, total)
        self.begin()
        with _logged(title):
            yield _ShownStep(self)
        self.end()
        self.overall.end()

    def begin(self) -> None:
        """A phase begins."""

    def show(self) -> None:
        """Something is done."""

    def end(self) -> None:
        """The phase is over."""


class _ShownStep(Step):
    def __init__(self, shown: _Shown) -> None:
        self.shown = shown

    def __call__(self, units: int = 1) -> None:
        self.shown.overall.units += units
        self.shown.show()

    def total(self, units: int) -> None:
        self.shown.overall.total = units
        self.shown.show()

    def runs(self, of_unit: float) -> None:
        self.shown.overall.of_unit = of_unit

    def expect(self, runs: float) -> None:
        self.shown.overall.expect(runs)
        self.shown.show()


class _Rich(_Shown):
    def __init__(self, bars: Any, parts: int) -> None:
        super().__init__(parts)
        self.bars, self.all, self.task = bars, None, None

    def begin(self) -> None:
        over = self.overall
        total = over.total or None
        self.task = self.bars.add_task(over.title, total=total, count="", left="")

    def show(self) -> None:
        over = self.overall
        count = f"{over.units}/{over.total}" if over.total else str(over.units)
        total = over.total or None
        self.bars.update(self.task, completed=over.units, total=total, count=count)
        if over.share is not None:
            if self.all is None:
                self.all = self.bars.add_task(f"{NAME}, all", total=1.0, count="", left="")
            left = "" if over.left is None else f"about {in_words(over.left)} left"
            count = f"{over.share:.0%}"
            self.bars.update(self.all, completed=over.share, count=count, left=left)

    def end(self) -> None:
        done = max(self.overall.units, 1)
        self.bars.update(self.task, total=done, completed=done)


class _Plain(_Shown):
    def __init__(self, parts: int) -> None:
        super().__init__(parts)
        self.last = self.started = time.monotonic()

    def begin(self) -> None:
        self.started = time.monotonic()

    def show(self) -> None:
        now = time.monotonic()
        if now - self.last >= PRINT_EVERY:
            self.last = now
            self.say(str(self.overall))

    def end(self) -> None:
        self.say(f"{self.overall.title}: done in {time.monotonic() - self.started:.1f} s")

    def say(self, text: str) -> None:
        print(f"{NAME}: {text}", file=sys.stderr, flush=True)


class _Notebook(_Shown):
    """A bar in a notebook's page, drawn again in its place; needs no widgets."""

    def __init__(self, parts: int) -> None:
        super().__init__(parts)
        from IPython.display import HTML, display

        self.html = HTML
        self.picture = display(HTML(self.text()), display_id=True)
        self.last = time.monotonic()

    def show(self) -> None:
        now = time.monotonic()
        if now - self.last >= DRAW_EVERY:
            self.last = now
            self.picture.update(self.html(self.text()))

    def end(self) -> None:
        self.picture.update(self.html(self.text()))

    def text(self) -> str:
        """The bar as HTML."""
        share = self.overall.share
        value = "" if share is None else f' value="{share:.3f}"'
        return f"<progress{value}></progress> {html.escape(f'{NAME}: {self.overall}')}"
