"""What training says while it runs: the loss curve as CSV, and progress with time left.

A bar where there is a terminal and rich, plain lines every few seconds elsewhere.
"""

from __future__ import annotations

import csv
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

LOG_EVERY = 20
"""Steps between points of the loss curve: reading a loss makes the host wait for the device."""

LINE_SECONDS = 10.0


class Row(NamedTuple):
    """A point of the loss curve: mean loss of the last steps, seconds of training so far."""

    step: int
    stage: int
    loss: float
    seconds: float


class Report:
    """Progress with time left, and train_log.csv."""

    def __init__(self, total_seconds: float, path: Path) -> None:
        self.total = total_seconds
        fresh = not path.exists()
        self.file = path.open("a", newline="")
        self.rows = csv.writer(self.file)
        if fresh:
            self.rows.writerow(Row._fields)
        self.printed = time.monotonic()
        self.bar: Any = None
        if sys.stdout.isatty():
            try:
                from rich.progress import Progress, TextColumn, TimeRemainingColumn
            except ImportError:
                return
            self.bar = Progress(
                *Progress.get_default_columns()[:2],
                TimeRemainingColumn(),
                TextColumn("{task.fields[said]}"),
            )
            self.bar.start()
            self.task = self.bar.add_task("training", total=total_seconds, said="")

    def row(self, row: Row, step_ms: float) -> None:
        """Note one point of the loss curve."""
        self.rows.writerow(row)
        self.file.flush()
        said = f"stage {row.stage + 1}  step {row.step}  loss {row.loss:.4f}  {step_ms:.0f} ms/step"
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(self.task, completed=row.seconds, said=said)
        elif now - self.printed > LINE_SECONDS:
            self.printed = now
            print(f"{said}  {max(self.total - row.seconds, 0):.0f} s left", flush=True)

    def close(self) -> None:
        """End the bar and the file."""
        if self.bar is not None:
            self.bar.stop()
        self.file.close()
