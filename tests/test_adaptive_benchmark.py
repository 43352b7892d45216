"""benchmarks/adaptive.py: its arithmetic, its contents, and a small run of the whole."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks import adaptive
from benchmarks.adaptive import CONTENTS, clip, main, pinned, summary

SIZE = (9, 16, 24)


@pytest.mark.parametrize("exponent", [0.2, 0.5, 1.5])
def test_pinned_finds_the_factor_of_a_density(exponent: float) -> None:
    """Density falls with the factor to some power, error rises with it."""
    tried: list[float] = []

    def run(factor: float) -> tuple[float, float]:
        tried.append(factor)
        return 0.1 * factor, 0.2 * factor**-exponent

    error, density = pinned(run, 0.3)
    assert density == pytest.approx(0.3, rel=0.02)
    assert error == pytest.approx(0.1 * (0.2 / 0.3) ** (1 / exponent), rel=0.1)
    assert tried[0] == 1.0 and len(tried) <= adaptive.PINS


def test_pinned_returns_the_nearest_run_where_a_density_cannot_be_reached() -> None:
    runs = iter([(0.1, 0.2), (0.2, 0.15), (0.3, 0.18), (0.4, 0.3), (0.5, 0.4)])
    assert pinned(lambda factor: next(runs), 0.05) == (0.2, 0.15)


def test_summary_is_by_content_with_the_spread_between_contents() -> None:
    keys = ("density", "error", "adapted_density", "adapted_error", "pinned_density",
            "pinned_error")  # fmt: skip
    rows = [
        {"content": content, **dict.fromkeys(keys, scale * (1.0 + i))}
        for i, content in enumerate(CONTENTS)
        for scale in (0.1, 0.3)
    ]
    found = summary(rows)
    assert list(found) == [*CONTENTS, "largest / smallest"]
    for i, content in enumerate(CONTENTS):
        assert found[content] == pytest.approx(dict.fromkeys(keys, 0.2 * (1.0 + i)))
    assert found["largest / smallest"] == pytest.approx(dict.fromkeys(keys, len(CONTENTS)))


def test_contents_are_what_they_are_called() -> None:
    def steps(content: str) -> list[float]:
        """Mean change from frame to frame."""
        found = clip(content, 3, SIZE, "cpu")
        assert found.shape == (1, 3, *SIZE)
        return found.diff(dim=2).abs().mean((0, 1, 3, 4)).tolist()

    assert max(steps("still")) == max(steps("still again")) == 0.0
    moving, cuts = steps("moving"), steps("cuts")
    assert min(moving) > 0.0
    largest = sorted(range(len(cuts)), key=lambda i: -cuts[i])[: adaptive.SCENES - 1]
    lengths = [len(part) for part in torch.arange(SIZE[0]).tensor_split(adaptive.SCENES)]
    borders = {sum(lengths[:i]) - 1 for i in range(1, adaptive.SCENES)}
    assert set(largest) == borders


def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--frames", "5", "--height", "32", "--width", "32", "--steps", "2", "--samples", "2"]
    common = ["--device", "cpu", "--random-weights", "--quiet", "--each", "1", "--out"]
    main([*size, *common, str(tmp_path), "--target-error", "0.3"])
    found = json.loads((tmp_path / "adaptive.json").read_text())
    assert [row["content"] for row in found["rows"]] == list(CONTENTS)
    for row in found["rows"]:
        assert math.isfinite(row["error"]) and 0.0 < row["density"] <= 1.0
        assert 0.0 < row["factor"] <= 1.0
    first, last = found["rows"][0], found["rows"][-1]
    assert first["error"] == pytest.approx(last["error"], rel=1e-5)  # the same input again
    assert first["adapted_error"] == first["error"]  # nothing is known before the first call
    assert (tmp_path / "adaptive.png").stat().st_size > 10_000
    assert "largest / smallest" in capsys.readouterr().out


def test_nothing_to_adapt_is_said(tmp_path: Path) -> None:
    size = ["--frames", "1", "--height", "16", "--width", "16", "--steps", "2", "--samples", "2"]
    with pytest.raises(SystemExit, match="every site dense at .*larger video or target"):
        main([*size, "--device", "cpu", "--random-weights", "--quiet", "--out", str(tmp_path)])
