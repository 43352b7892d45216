"""The time left of a whole calibration, by runs of the model: in a log and in a notebook."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from freqopt.calibration.estimate import runs_of
from freqopt.progress import Overall, in_words, open_progress

PAGE = Path(__file__).parents[2] / "docs" / "samples.md"


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_time_left_follows_the_runs_of_all_parts() -> None:
    clock = Clock()
    overall = Overall(parts=2, clock=clock)
    overall.begin("measuring", None)
    assert overall.left is None and overall.share is None
    overall.units, overall.total, clock.now = 3, 12, 60.0
    overall.of_unit = 2.0  # 6 of 24 runs
    overall.expect(54.0)  # and 54 more of the second part
    assert overall.expected == 108.0
    assert overall.left == pytest.approx(60 / 6 * 102)
    overall.units, clock.now = 12, 240.0
    overall.end()
    overall.begin("verifying", 3)
    assert overall.done == 24.0 and "verifying, 0 of 3" in str(overall)
    overall.units, clock.now = 3, 270.0
    overall.end()
    overall.begin("measuring", None)
    overall.units, overall.of_unit, clock.now = 3, 1.0, 300.0
    overall.expect(30.0)
    assert overall.expected == 57.0 and overall.share == pytest.approx(30 / 57)
    assert overall.left == pytest.approx(300 / 30 * 27)


def test_more_runs_than_expected_move_the_end() -> None:
    overall = Overall(clock=Clock())
    overall.begin("measuring", 4)
    overall.expect(2.0)
    overall.units = 3
    assert overall.share == 0.75


def test_a_log_gets_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    monkeypatch.setattr("freqopt.progress.time.monotonic", clock)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    with open_progress(True) as bars, bars.phase("probing", 100) as step:
        step.expect(100)
        for _ in range(100):
            clock.now += 1.0
            step()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "calibrate: 30% (probing, 30 of 100), about 70 s left"
    assert len(lines) == 4 and lines[-1] == "calibrate: probing: done in 100.0 s"


class Shell:
    kernel = object()


def test_a_notebook_gets_a_bar_without_widgets(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []

    class Picture:
        def update(self, page: Any) -> None:
            shown.append(page)

    def display(page: Any, *, display_id: bool) -> Picture:
        assert display_id
        shown.append(page)
        return Picture()

    notebook, pages = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    notebook.get_ipython = Shell  # type: ignore[attr-defined]
    pages.HTML, pages.display = str, display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", notebook)
    monkeypatch.setitem(sys.modules, "IPython.display", pages)
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    monkeypatch.setattr("freqopt.progress.DRAW_EVERY", 0.0)
    with open_progress(True) as bars, bars.phase("probing", 4) as step:
        step.expect(4)
        step(2)
    assert '<progress value="0.500">' in shown[-1] and "probing, 2 of 4" in shown[-1]


def test_the_page_states_times_by_the_formula() -> None:
    rows = [line.split("|") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    stated = [row for row in rows if row[1].strip().endswith(" s")]
    assert len(stated) == 3
    for row in stated:
        took = float(row[1].split()[0])
        runs = runs_of(fitted=16, held_out=16, sites=40, heads=1600, seconds_of_run=took)
        assert int(row[3]) == round(runs.total)
        assert row[4].strip() == in_words(runs.seconds(took))
