"""Two adapters see the same, and what is written of them is what happened."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import lora
from benchmarks.generations import attending, split
from freqopt.models_zoo.training.procedural import render_videos
from freqopt.models_zoo.video_dit import VideoDiT, VideoDiTConfig

CPU = torch.device("cpu")
SIZE, GRID = (3, 32, 40), (3, 8, 10)


def tiny() -> VideoDiT:
    torch.manual_seed(0)
    model = VideoDiT(VideoDiTConfig(width=32, layers=2, mlp_width=32, rope_axes=(4, 6, 6)))
    torch.nn.init.normal_(model.head.weight, std=0.3)  # untrained models end in zeros
    return model


def test_the_style_is_another_and_runs_back() -> None:
    clips = render_videos(1, 5, 24, 40, seed=3)
    found = lora.styled(clips)
    assert found.shape == clips.shape and found.abs().max() <= 1
    torch.testing.assert_close(found[:, :, 0], found[:, :, 4])
    torch.testing.assert_close(found[:, :, 1], found[:, :, 3])
    assert (found[:, :, 0] - found[:, :, 2]).abs().mean() > 0.02
    assert (found - clips).abs().mean() > 0.2


def test_an_exact_split_trains_as_dense_does() -> None:
    ways: lora.Ways = {
        "dense": nullcontext,
        "exact": lambda: attending(split(GRID, 1.0)),
        "split": lambda: attending(split(GRID, 0.5)),
    }
    learning = lora.learners(tiny(), ways, 2, 1e-2)
    lora.train(learning, SIZE, steps=4, batch=2, seconds=1e6, device=CPU)
    dense, exact, approximate = (torch.stack(each.losses) for each in learning.values())
    norms = [torch.stack(each.norms) for each in learning.values()]
    torch.testing.assert_close(dense, exact, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(norms[0], norms[1], atol=1e-5, rtol=1e-3)
    assert not torch.allclose(dense, approximate, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(norms[0], norms[2], atol=1e-6, rtol=1e-4)


def test_divergence_is_seen() -> None:
    learner = lora.learners(tiny(), {"dense": nullcontext}, 2, 1e-3)["dense"]
    learner.norms = list(torch.ones(30))
    learner.seconds = [1.0] * 30
    learner.losses = list(torch.cat([torch.ones(10), torch.full((20,), 0.5)]))
    found = lora.curves(learner)
    assert found["loss"] == [1.0, 0.5, 0.5] and not found["diverged"]
    learner.losses = list(torch.cat([torch.ones(20), torch.full((10,), 1.6)]))
    assert lora.curves(learner)["diverged"]
    learner.losses = list(torch.ones(30))
    learner.norms[3] = torch.tensor(torch.nan)
    assert lora.curves(learner)["diverged"]


def test_the_benchmark_on_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "load_pretrained", lambda **_: tiny())
    words = "--small --device cpu --height 32 --steps 24 --rate 0.01 --density 0.4"
    lora.main([*words.split(), "--out", str(tmp_path)])
    result = json.loads((tmp_path / "lora.json").read_text())
    assert result["steps"] == 24 and result["tokens"] == 240 and result["settings"]["rank"] == 4
    assert (tmp_path / "lora.png").stat().st_size > 10_000
    for row in result["trained"].values():
        assert len(row["loss"]) == len(row["gradient_norm"]) == 2  # 24 steps, a point for each ten
        assert row["held_out"]["dense"] < result["before"]["dense"]
    assert result["trained"]["dense"]["loss"] != result["trained"]["split"]["loss"]
    monkeypatch.setattr(lora, "load", lambda _: result)
    assert any(line.startswith("| split |") for line in lora.page())


def test_time_that_is_over_ends_both() -> None:
    ways: lora.Ways = {"dense": nullcontext, "split": lambda: attending(split(GRID, 0.5))}
    learning = lora.learners(tiny(), ways, 2, 1e-2)
    lora.train(learning, SIZE, steps=5, batch=1, seconds=-1.0, device=CPU)
    assert all(not each.losses for each in learning.values())
