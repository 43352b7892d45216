"""The experiment on the mid band: its shares of blocks add up to the definition's output."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import mid_band
from benchmarks.natural import natural_attention
from freqopt.config import MID_RATIO
from freqopt.kernels import reference as ref


@pytest.mark.parametrize("ratio", [MID_RATIO, 1.0])
def test_all_queries_together_are_the_definition(
    ratio: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mid_band, "QUERIES", 128)
    grid = (3, 8, 15)  # the last tile and block are ragged
    a = natural_attention(grid, heads=1, dim=32, dtype=torch.bfloat16, device="cpu")
    query, key, value = mid_band.in_order(a[:3], grid, 0)
    found = mid_band.judge(mid_band.look_at(query, key, value, range(3)), 1.5, ratio)
    nothing = torch.zeros(1, 1, 0, 32)
    split = ref.split_tokens(
        query[None, None], key[None, None], value[None, None], nothing, nothing,
        torch.zeros(1, 1, 1, 0), torch.tensor([[1.5], [1.5 * ratio]]), scale=32**-0.5,
        mid_band=ratio < 1, probes=360, dtype=torch.bfloat16,
    )  # fmt: skip
    assert found.density == pytest.approx(float(split.density), abs=1e-6)
    assert found.error == pytest.approx(float(split.probe.error), rel=2e-3)
    assert (found.mid > 0) == (ratio < 1)


def test_a_run_writes_rows(tmp_path: Path) -> None:
    mid_band.main(
        ["--sizes", "1K", "--tiles", "4", "--grid", "4,9,13", "--densities", "0.4",
         "--zoo-tiles", "2", "--out", str(tmp_path)]
    )  # fmt: skip
    found = json.loads((tmp_path / "mid_band.json").read_text())
    tried = [(row["bare"], row["ratio"]) for row in found["natural"]]
    with_terms, without = list(mid_band.RATIOS), list(mid_band.RATIOS[1:])
    assert tried == [(False, r) for r in with_terms] + [(True, r) for r in without]
    assert all(row["error"] <= mid_band.TARGET for row in found["natural"])
    assert [(row["bare"], row["ratio"]) for row in found["zoo"]] == tried
    assert all((row["mid"] > 0) == (row["ratio"] < 1) for row in found["zoo"])
    assert all(row["error_chosen_by_head"] <= row["error"] for row in found["zoo"])


def test_the_docs_tables_are_those_of_the_result_file() -> None:
    assert mid_band.rewrite_docs(check=True)
