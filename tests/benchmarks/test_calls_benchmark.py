"""The benchmark of calls measures our own work, not the graph's, and fails where it is too much."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import calls


@pytest.mark.parametrize("by_blocks", [False, True])
def test_work_outside_the_graph_is_measured(
    by_blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    replayed = []

    class Counting(calls.Replaying):
        def __call__(self, *arguments: object) -> object:
            replayed.append(1)
            return super().__call__(*arguments)

    monkeypatch.setattr(calls, "Replaying", Counting)
    assert calls.microseconds_a_call(2, by_blocks=by_blocks, repeat=3) > 0
    assert len(replayed) == 8 * (2 if by_blocks else 1)


def test_too_slow_is_an_exit_status(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def status(seconds: float, microseconds: float) -> int:
        monkeypatch.setattr(calls, "seconds_of_passes", lambda layers: seconds)
        monkeypatch.setattr(calls, "microseconds_a_call", lambda layers, by_blocks: microseconds)
        return calls.main(["--out", str(tmp_path)])

    assert (status(0.5, 20.0), status(1.5, 20.0), status(0.5, 60.0)) == (0, 1, 1)
    assert json.loads((tmp_path / "calls.json").read_text())["whole_us_40_layers"] == 60.0
