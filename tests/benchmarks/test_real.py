"""Plans on others' models are judged against dense features, beside what another backend makes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from dinov2_tiny import clips, tiny_weights

from benchmarks import dinov2_model, real


def test_features_are_judged_by_what_they_are_for() -> None:
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(1, 3 * 20, 8, generator=generator)
    subject = real.dinov2(
        dinov2_model.Source(tiny_weights(), {"a clip": torch.zeros(3, 56, 70, 3)}),
        torch.device("cpu"),
    )
    same = real.judged(subject, "a clip", dense, dense)
    assert same["l2"] == 0 and same["same_matches"] == 1 and same["cosine"] == pytest.approx(1)
    other = dense + torch.randn(dense.shape, generator=generator)
    noisy = real.judged(subject, "a clip", other, dense)
    assert noisy["l2"] == pytest.approx(1 / 1, rel=0.2) and 0 < noisy["same_matches"] < 0.8
    swapped = dense.unflatten(1, (3, 20)).clone()
    swapped[:, 1] = swapped[:, 1].flip(1)
    moved = real.matches(swapped.flatten(1, 2), 3)
    assert torch.equal(moved[0], 19 - real.matches(dense, 3)[0])


def test_the_benchmark_on_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = dinov2_model.Source(tiny_weights(), clips(3))
    named = list(source.clips)[:2]
    monkeypatch.setattr(
        dinov2_model,
        "from_packages",
        lambda *given: source._replace(clips={name: source.clips[name] for name in named}),
    )
    real.main(["--device", "cpu", "--targets", "0.2", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "real.json").read_text())["rows"]
    assert [row["clip"] for row in rows] == [named[0]] * 2 + [named[1]] * 2
    for floor, row in (rows[:2], rows[2:]):
        assert floor["target"] is None and floor["l2"] < 1e-5 <= row["l2"]
        assert row["target"] == 0.2 and 0 < row["density"] <= 1 and row["ms"] > 0


def test_one_clip_is_not_enough() -> None:
    with pytest.raises(SystemExit):
        real.main(["--clips", "bikes"])


def test_missing_packages_are_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="pip download"):
        real.main(["--packages", str(tmp_path)])
