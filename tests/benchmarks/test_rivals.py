"""Rivals are called on the op's route, and none is left out in silence."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import orders, pages, results_pages, rival_calls, rivals
from benchmarks.natural import natural_attention
from benchmarks.rival_calls import Rival, Route, Source
from benchmarks.tensors import Attention
from freqopt.config import KEY_BLOCK, QUERY_TILE


def test_flex_is_given_the_listed_blocks_and_nothing_else() -> None:
    tokens = 297
    tiles, blocks = -(-tokens // QUERY_TILE), -(-tokens // KEY_BLOCK)
    exact = torch.rand(1, 2, tiles, blocks, generator=torch.Generator().manual_seed(0)) < 0.4
    column = torch.arange(blocks)
    listed = torch.where(exact, column, blocks).sort(-1).values.to(torch.int32)
    listed[listed == blocks] = 77  # past the count there may be anything
    counts = exact.sum(-1).to(torch.int32)
    mask = rival_calls.block_mask(tokens, listed, counts)
    assert torch.equal(mask.to_dense().bool(), exact)
    assert mask.BLOCK_SIZE == (QUERY_TILE, KEY_BLOCK) and mask.seq_lengths == (tokens, tokens)


def a_route(tokens: int, heads: int = 2) -> tuple[Route, torch.Tensor]:
    """A route, and which blocks (1, H, tiles, blocks) are in it."""
    tiles, blocks = -(-tokens // QUERY_TILE), -(-tokens // KEY_BLOCK)
    exact = torch.rand(1, heads, tiles, blocks, generator=torch.Generator().manual_seed(1)) < 0.4
    listed = torch.where(exact, torch.arange(blocks), blocks).sort(-1).values.to(torch.int32)
    return Route(float(exact.double().mean()), listed, exact.sum(-1).to(torch.int32)), exact


def of_lists(lists: rival_calls.Lists) -> torch.Tensor:
    """Which blocks lists name."""
    column = torch.arange(lists.index.shape[-1])
    found = torch.zeros(lists.index.shape, dtype=torch.bool)
    return found.scatter(-1, lists.index.long(), column < lists.counts[..., None])


def test_block_lists_are_the_route_in_blocks_of_a_kernel() -> None:
    tokens = 297  # two tiles and 41 tokens; four blocks of 64 and 41 tokens
    route, exact = a_route(tokens)
    small = rival_calls.block_lists(tokens, route, 64)
    assert small.tokens == 384 and small.sizes.tolist() == [64, 64, 64, 64, 41, 0]
    wide = torch.nn.functional.pad(exact, (0, 1))
    assert torch.equal(of_lists(small), wide.repeat_interleave(2, 2))
    large = rival_calls.block_lists(tokens, route, 128)
    assert large.sizes.tolist() == [128, 128, 41]
    assert torch.equal(of_lists(large), wide[..., ::2] | wide[..., 1::2])


def test_routes_are_the_ops_own() -> None:
    a = natural_attention((4, 8, 12), heads=2, dim=16, dtype=torch.float32, device="cpu")
    route = rivals.route_at(a, 0.4)
    assert route.counts.shape == (1, 2, 3) and 0.2 < route.density < 0.6
    shares = route.counts.double().mean() / 6
    assert float(shares) == pytest.approx(route.density)
    own = [[2 * tile, 2 * tile + 1] for tile in range(3)]
    for tile, blocks in enumerate(own):
        listed = route.exact_list[0, 0, tile, : route.counts[0, 0, tile]].tolist()
        assert set(blocks) <= set(listed) and listed == sorted(listed)


def test_of_two_orders_the_one_with_less_error_counts() -> None:
    rows = [
        {"name": "x", "setting": "topk 0.1, raster order", "l2": 0.3},
        {"name": "x", "setting": "topk 0.1, grid order", "l2": 0.2},
        {"name": "x", "setting": "topk 0.2, raster order", "l2": 0.1},
        {"name": "x", "setting": "topk 0.2, grid order", "failed": "no"},
    ]
    kept = rivals.better_order(rows)
    assert [row["setting"] for row in kept] == ["topk 0.1, grid order", "topk 0.2, raster order"]


def sage_like(folder: Path) -> None:
    """A made-up package of that name, which gives dense attention and wants its words."""
    (folder / "sageattention.py").write_text(
        "import torch.nn.functional as F\n"
        "def sageattn(q, k, v, tensor_layout, is_causal):\n"
        "    assert tensor_layout == 'HND' and not is_causal\n"
        "    return F.scaled_dot_product_attention(q, k, v)\n"
    )


def test_every_rival_is_a_row_a_failure_or_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sage_like(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "sageattention", raising=False)

    def wrong(a: Attention, routes: Sequence[Route]) -> Iterator[Rival]:
        yield Rival("zeros", 0.1, lambda: torch.zeros_like(a.query), setting="s")

        def fails() -> torch.Tensor:
            raise RuntimeError("no kernel image")

        yield Rival("fails", 0.1, fails, setting="s")

    sources = (
        *(s for s in rival_calls.SOURCES if s.name in ("dense", "SageAttention")),
        Source("wrong", "torch", "", wrong),
        Source("absent", "no_such_package_here", "pip install it", wrong),
    )
    monkeypatch.setattr(rival_calls, "SOURCES", sources)
    monkeypatch.setattr(rivals, "SMALL", (2, 8, 10))
    with pytest.raises(SystemExit):
        rivals.main(["--small"])
    rivals.main(["--small", "--densities", "0.6", "--out", str(tmp_path)])
    (problem,) = json.loads((tmp_path / "rivals.json").read_text())["problems"]
    rows = {row["name"]: row for row in problem["rows"]}
    assert {"dense", "sageattention", "freqopt, grid", f"freqopt, {orders.PER_HEAD}"} == set(rows)
    assert rows["sageattention"]["l2"] < 1e-5 and rows["sageattention"]["ms"] > 0
    assert 1e-5 < rows["freqopt, grid"]["l2"] < 0.5
    failed = {row["name"]: row["failed"] for row in problem["failed"]}
    assert "no kernel image" in failed["fails"] and "off by 1" in failed["zeros"]
    (missing,) = problem["missing"]
    assert missing["name"] == "absent" and "no_such_package_here" in missing["why"]
    assert (tmp_path / "rivals.png").read_bytes().startswith(b"\x89PNG")


def test_sources_name_what_brings_them() -> None:
    names = [source.name for source in rival_calls.SOURCES]
    assert len(names) == len(set(names)) >= 9
    assert all(source.install and source.module for source in rival_calls.SOURCES)


def test_rows_of_rivals_that_were_not_asked_for_stay_as_they_were() -> None:
    asked = {"tokens": 297, "heads": 2, "head_dim": 16, "dtype": "x"}

    def problem(grid: Sequence[int], *names: str, ms: float, **more: Any) -> dict[str, Any]:
        rows = [{"name": name, "setting": "", "ms": ms} for name in names]
        return {**asked, "grid": grid, "rows": rows, "failed": [], "missing": [], **more}

    gone = [{"name": "B", "install": "b"}, {"name": "C", "install": "c"}]
    old = {
        "environment": {"commit": "then", "command": "python -m benchmarks.rivals"},
        "problems": [
            problem([1, 9, 33], "freqopt, grid", "A", ms=1.0, missing=gone),
            problem([3, 9, 11], "A", ms=7.0),
        ],
    }
    new = {
        "environment": {"commit": "now", "command": "python -m benchmarks.rivals --only B"},
        "problems": [problem((1, 9, 33), "freqopt, grid", "B", ms=2.0)],
    }
    rivals.with_earlier(new, json.loads(json.dumps(old)), ["B"])
    (found,) = new["problems"]
    kept = [(row["name"], row["ms"], row.get("commit")) for row in found["rows"]]
    assert kept == [("freqopt, grid", 2.0, None), ("B", 2.0, None), ("A", 1.0, "then")]
    assert [each["name"] for each in found["missing"]] == ["C"]
    assert set(pages.commits(new)) == {"now", "then"}
    assert results_pages.commanded(new) == [
        "python -m benchmarks.rivals",
        "python -m benchmarks.rivals --only B",
    ]
