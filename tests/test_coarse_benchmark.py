"""The experiment on superblocks: without one it is the split, and more serve below more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import coarse
from freqopt.kernels import reference as ref


def test_without_superblocks_the_split_is_the_definitions() -> None:
    problem = coarse.make_problem((4, 16, 17))
    tile = coarse.look_at(problem, 3)
    _, rows = coarse.judge(problem, [tile], 2.0, [0, 0.5])
    tensors = [x[None, None] for x in problem[:3]]
    nothing = torch.zeros(1, 1, 0, coarse.HEAD_DIM)
    split = ref.split_tokens(
        *tensors, nothing, nothing, torch.zeros(1, 1, 1, 0), torch.full((2, 1), 2.0),
        scale=problem.scale, probes=0, dtype=torch.bfloat16,
    )  # fmt: skip
    assert torch.equal(split.route[0, 0, 3] == ref.EXACT, (tile.low.score[0, 0, 0] >= 2) | tile.own)
    found = coarse.attend(
        problem, tile, split.route[0, 0, 3] == ref.EXACT, torch.zeros(3, dtype=torch.bool)
    )
    wanted = split.out[0, 0, 3 * 128 : 4 * 128 : 16]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert rows["share"] == 0.5


def test_a_run_writes_rows(tmp_path: Path) -> None:
    coarse.main(["--grid", "4,16,32", "--tiles", "4", "--thresholds", "2", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "coarse.json").read_text())["rows"]
    assert [row["share"] for row in rows] == [0, 0.05, 0.1, 0.25, 0.5, 1]
    served = [row["coarse"] for row in rows]
    assert served[0] == 0 and served == sorted(served)
    assert rows[0]["columns"] == 1 and rows[-1]["columns"] == pytest.approx(1.125 - served[-1])
