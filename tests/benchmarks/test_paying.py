"""The benchmark of whether plans pay: its table, and a run on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks import common, paying


def test_runs_of_a_size_stand_beside_one_another() -> None:
    row = {"tokens": 1_950, "attention_share": 0.21, "dense_ms": 4.0, "split_ms": 4.0}
    row |= {"split": 0, "sites": 12, "error": 0.0, "run": 0, "commit": "a"}
    faster = {**row, "split_ms": 2.0, "split": 9, "error": 0.03, "run": 1}
    said = list(paying.rows({"rows": [row, {**faster, "tokens": 32_760}, faster]}))
    assert said[2] == (
        "| 1,950 | 21% | 4.00, 4.00 ms | 4.00, 2.00 ms | 1.00x, 2.00x | 0 of 12, 9 of 12 | "
        "0.0000, 0.0300 | a |"
    )
    assert said[3].startswith("| 32,760 | 21% | 4.00 ms | 2.00 ms | 2.00x | 9 of 12 |")


def test_rows_of_an_earlier_run_are_kept_with_their_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"frames": 5, "height": 48, "width": 64, "run": 0}
    other = {**row, "run": 1, "commit": "another"}
    kept = {"environment": {"commit": "first"}, "target_error": 0.2, "rows": [row, other]}
    (tmp_path / "paying.json").write_text(json.dumps(kept))
    assert common.earlier("paying", {"target_error": 0.1}, tmp_path)["rows"] == []
    found = common.earlier("paying", {"target_error": 0.2}, tmp_path)["rows"]
    assert [each["commit"] for each in found] == ["first", "another"]
    made: list[int] = []

    def row_of(settings: object, run: int, target_error: float) -> dict[str, object]:
        made.append(run)
        return {"commit": "now", **row, "run": run, "tokens": 960, "attention_share": 0.5}

    monkeypatch.setattr(paying, "row_of", row_of)
    monkeypatch.setattr(paying, "rows", lambda result: [])
    paying.main(
        [
            *("--device", "cpu", "--random-weights", "--sizes", "5x48x64", "--runs", "3"),
            *("--target-error", "0.2", "--out", str(tmp_path)),
        ]
    )
    after = json.loads((tmp_path / "paying.json").read_text())["rows"]
    assert made == [2] and [each["commit"] for each in after] == ["first", "another", "now"]


@pytest.mark.slow
def test_a_small_run(tmp_path: Path) -> None:
    paying.main(
        [
            *("--device", "cpu", "--random-weights", "--sizes", "5x48x64", "--runs", "2"),
            *("--samples", "4", "--steps", "4", "--target-error", "0.2", "--out", str(tmp_path)),
        ]
    )
    found = json.loads((tmp_path / "paying.json").read_text())["rows"]
    assert [row["run"] for row in found] == [0, 1]
    for row in found:
        assert row["tokens"] == 960 and row["split"] and 0.0 < row["error"] < 0.2
        assert (
            row["dense_ms"] > 0.0 and row["split_ms"] > 0.0 and 0.0 < row["attention_share"] < 1.0
        )
