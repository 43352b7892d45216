"""The benchmark over lengths: its inputs, its error, its fit, and a run on a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks import common, scaling
from benchmarks.natural import POWER, natural_attention, natural_field


def test_power_of_natural_fields_falls_as_that_of_natural_video() -> None:
    field = natural_field((8, 32, 32), 24, torch.Generator().manual_seed(0))
    assert torch.allclose(field.mean(0), torch.zeros(24), atol=1e-5)
    assert torch.allclose(field.std(0), torch.ones(24), atol=1e-4)
    power = torch.fft.fftn(field.T.unflatten(1, (8, 32, 32)), dim=(1, 2, 3)).abs().square().mean(0)
    ratio = power[0, 0, 2] / power[0, 0, 8]
    expected = 4**POWER
    assert expected / 2 < float(ratio) < expected * 2  # but for the noise of 24 channels


def test_sampled_error_is_that_of_all_queries_where_all_are_sampled() -> None:
    a = natural_attention((3, 5, 7), heads=2, dim=32, dtype=torch.float32, device="cpu")
    truth = F.scaled_dot_product_attention(a.query, a.key, a.value)
    out = truth + 0.1 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(1))
    l1, l2 = scaling.sample_of(a).errors(out)
    off = out - truth
    assert l1 == pytest.approx(float(off.abs().sum() / truth.abs().sum()), rel=1e-4)
    assert l2 == pytest.approx(float(off.norm() / truth.norm()), rel=1e-4)


def test_growth_is_the_exponent_of_a_power_law() -> None:
    tokens = [1_000, 70_000, 200_000, 900_000]
    times = [3e-5 * n**1.3 for n in tokens]
    times[0] = 5.0  # below the range that is fitted
    assert scaling.growth(tokens, times, 65_536) == pytest.approx(1.3)
    assert scaling.growth(tokens[:2], times[:2], 65_536) is None
    assert scaling.ends(tokens, times, 65_536) == pytest.approx(1.3)
    assert scaling.ends(tokens[:2], times[:2], 65_536) is None


def test_a_run_writes_rows_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = ["grid", "content all"]
    scaling.main(
        [
            "--device",
            "cpu",
            "--sizes",
            "1K",
            "2K",
            "--fields",
            "2",
            "--out",
            str(tmp_path),
            "--orders",
            *made,
        ]
    )
    result = json.loads((tmp_path / "scaling.json").read_text())
    rows = [(row["tokens"], row["order"]) for row in result["rows"]]
    assert rows == [(tokens, order) for tokens in (1014, 2048) for order in made]
    assert all(row["l2"] < scaling.GATE * result["target"] for row in result["rows"])
    assert all(0.9 < row["sampled"]["l2"] / result["target"] <= 1 for row in result["rows"])
    for row in result["rows"]:
        first, second = (field["density"] for field in row["fields"])
        assert first != second
        assert row["density"] == pytest.approx((first * second) ** 0.5)
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_a_row_that_fails_its_gate_reports_no_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scaling.Sample, "errors", lambda sample, out: (0.5, 0.5))
    assert scaling.measure("1K", 0.06, torch.device("cpu"), 1, 1, ["grid"]) == []
    assert "FAILED its gate" in capsys.readouterr().out


def test_each_order_has_an_exponent_of_its_own() -> None:
    def row(tokens: int, order: str, power: float) -> dict[str, Any]:
        ms = 3e-5 * tokens**power
        return {
            "tokens": tokens,
            "order": order,
            "ms": ms,
            "sampled": {"ms": ms**1.1},
            "dense_ms": 1e-6 * tokens**2,
        }

    lengths = (1_000, 70_000, 200_000, 900_000)
    powers = {"grid": 1.6, "content all": 1.3}
    found = scaling.growths([row(n, o, p) for n in lengths for o, p in powers.items()])
    for order, power in powers.items():
        assert found[order]["all"] == pytest.approx(power)
        assert found[order]["ends"] == pytest.approx(power)
        assert found[order]["sampled_all"] == pytest.approx(1.1 * power)
    assert found["dense"]["all"] == pytest.approx(2)
    assert "| content all | 1.30 (1.30) | **1.43** (1.43) |" in scaling._growth_table(found)


def test_a_run_replaces_the_rows_that_it_measures_anew(tmp_path: Path) -> None:
    def row(tokens: int, order: str, ms: float) -> dict[str, Any]:
        return {"tokens": tokens, "order": order, "ms": ms}

    old = [row(10, "grid", 1.0), row(10, "content all", 2.0), row(20, "grid", 3.0)]
    joined = scaling.joined(old, [row(20, "content all", 4.0), row(10, "content all", 5.0)])
    assert [(each["tokens"], each["order"], each["ms"]) for each in joined] == [
        (10, "grid", 1.0),
        (10, "content all", 5.0),
        (20, "grid", 3.0),
        (20, "content all", 4.0),
    ]
    written = {"environment": {"commit": "abc"}, "target": 0.06, "heads": 1, "rows": old}
    (tmp_path / "scaling.json").write_text(json.dumps(written))
    kept = common.earlier("scaling", {"target": 0.06, "heads": 1}, tmp_path)["rows"]
    assert kept == [{"commit": "abc", **each} for each in old]
    more = common.earlier("scaling", {"heads": 1}, tmp_path, ("rows", "decoded"))
    assert more["decoded"] == []  # a part that the file is too old for
    other = {"target": 0.05, "heads": 1}  # another question
    assert common.earlier("scaling", other, tmp_path)["rows"] == []
