"""Benchmarks of orders: they call the op as users do, choose on other tensors, and run on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

import freqopt
from benchmarks import attention, cpu, orders, readme
from benchmarks.natural import natural_attention
from benchmarks.tensors import Attention
from freqopt.config import ALL


def problem(seed: int = 0) -> Attention:
    return natural_attention(
        (3, 10, 14), heads=2, dim=32, dtype=torch.float32, device="cpu", seed=seed
    )


def test_a_call_is_that_of_the_public_function() -> None:
    a = problem()
    chunks = torch.tensor([0, 256], dtype=torch.int32)
    mixed = orders.ordering("mixed", chunks, a.query.shape[2])
    cases = dict(zip(orders.CHUNKS, ("grid", "content", "content"), strict=True))
    sizes = dict(zip(orders.CHUNKS, (1024, 1024, "all"), strict=True))
    for each in (*orders.shared_orderings(a), mixed):
        wanted, stats = freqopt.split_attention(
            a.query,
            a.key,
            a.value,
            grid=a.grid,
            order=cases.get(each.name, chunks),
            chunk=sizes.get(each.name, 1024),
            threshold=1.0,
            return_stats=True,
        )
        found = each.call(a, threshold=1.0)
        assert torch.equal(found.out, wanted) and torch.equal(found.density, stats.density)
        assert (each.make(a.key, a.grid) is None) == (each.name == "grid")


def test_each_head_takes_what_is_better_on_the_tensors_of_the_choice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The grid's order is made to spoil head 0, content head 1."""
    a = problem()
    truth = F.scaled_dot_product_attention(a.query, a.key, a.value)

    def call(each: orders.Ordering, a: Attention, *, density: float) -> orders.Called:
        out = truth.clone()
        out[:, int(each.largest > 0)] *= 1.1
        return orders.Called(out, torch.ones(1, 2), torch.ones(1, 2))

    monkeypatch.setattr(orders.Ordering, "call", call)
    chosen = orders.chosen_per_head(a, truth, (0.3,))
    assert chosen.chunks.tolist() == [ALL, 0] and chosen.chunks.dtype == torch.int32


def test_errors_are_of_each_head() -> None:
    truth = torch.tensor([[[[3.0, 4.0]], [[1.0, 1.0]]]])
    l1, l2 = orders.head_errors(truth + torch.tensor([0.0, 1.0]), truth)
    assert l1.tolist() == pytest.approx([1 / 7, 1 / 2])
    assert l2.tolist() == pytest.approx([1 / 5, 0.5**0.5])


def test_a_threshold_reaches_the_density() -> None:
    a = problem()
    for each in orders.shared_orderings(a):
        threshold = orders.threshold_at(each, a, 0.7)
        reached = float(each.call(a, threshold=threshold).density.mean())
        assert reached > 0.7 >= float(each.call(a, threshold=1.01 * threshold).density.mean())
        assert orders.threshold_at(each, a, 1.0) == 0.0


def test_rows_of_all_orders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, other = problem(), problem(1)
    chosen = orders.chosen_per_head(other, attention.dense_attention(other), (0.5,))
    every = [*orders.shared_orderings(a), chosen]
    found = attention.measure(a, (0.7, 1.0), every)
    assert [row["order"] for row in found["rows"]] == [x.name for x in every for _ in range(2)]
    for row in found["rows"]:
        assert row["density"] == 1.0 or row["l2"] > 1e-3
        assert (row["order_ms"] > 0) == (row["order"] != "grid" and row["order_share"] > 0)
    attention.plot({"problems": [found], "environment": {"device": "a CPU"}}, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    lines = readme.attention({"problems": [found]})
    assert sum(line.startswith("| content") for line in lines) == 2
    assert not any(
        "content" in line
        for line in readme.summary(
            {"environment": {"device": "", "torch": "", "commit": ""}, "problems": [found]}
        )
    )


def test_a_row_that_fails_its_gate_has_no_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(attention, "relative_errors", lambda out, truth: (0.5, 0.5))
    assert attention.measure(problem(), (1.0,))["rows"] == []
    assert "FAILED its gate" in capsys.readouterr().out


def test_a_run_on_a_cpu_writes_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cpu.main(
        ["--grid", "2", "8", "16", "--rounds", "1", "--densities", "0.6", "--out", str(tmp_path)]
    )
    result = json.loads((tmp_path / "cpu.json").read_text())
    assert [row["order"] for row in result["rows"]] == list(orders.CHUNKS)
    assert result["tokens"] == 256 and result["threads"] == torch.get_num_threads()
    for row in result["rows"]:
        assert row["speedup"] == pytest.approx(row["dense_ms"] / row["ms"]) and 0 < row["l2"] < 1
    assert len(readme.cpu(result)) == 5


def test_turns_are_taken_and_the_first_is_not_counted() -> None:
    called: list[str] = []
    times = cpu.medians([lambda: called.append("a"), lambda: called.append("b")], 2)
    assert called == ["a", "b"] * 3 and len(times) == 2
