"""Other ways to save time go onto a model, do what they say, and come off again."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("diffusers")

from benchmarks import composition, large
from benchmarks import composition_decoder as decoding
from benchmarks import composition_ways as ways
from freqopt.models_zoo.video_dit import VideoDiT, VideoDiTConfig

CPU = torch.device("cpu")
GRID = (3, 8, 10)
SIZE = large.Size(layers=3, heads=2, head_dim=24, mlp=64, text=32)


def tiny_zoo() -> VideoDiT:
    torch.manual_seed(0)
    model = VideoDiT(VideoDiTConfig(width=32, layers=3, mlp_width=32, rope_axes=(4, 6, 6))).eval()
    torch.nn.init.normal_(model.head.weight, std=0.3)  # untrained models end in zeros
    return model


def test_a_trajectory_is_of_one_video() -> None:
    calls = composition.trajectory(GRID, 3, SIZE, CPU, torch.float32)
    videos = [call["hidden_states"] for call in calls]
    assert videos[0].shape == (1, large.CHANNELS, 3, 16, 20)
    near = float((videos[1] - videos[0]).norm() / videos[0].norm())
    far = float((videos[2] - videos[0]).norm() / videos[0].norm())
    assert 0 < near < far < 0.2
    assert [float(call["timestep"]) for call in calls] == pytest.approx([600, 580, 560])


def test_the_threshold_is_that_of_the_density() -> None:
    model = large.build(SIZE, CPU, torch.float32)
    call = composition.trajectory(GRID, 1, SIZE, CPU, torch.float32)[0]
    threshold, density = composition.threshold_for(model, call, GRID, 0.75)
    assert density == pytest.approx(0.75, abs=0.1)
    sites: list[Any] = []
    composition.look_at_sites(model, call, 240, lambda *site: sites.append(site))
    assert len(sites) == 3  # text is not among them
    found = [composition.density_at(site, GRID, threshold) for site in sites]
    assert sum(found) / 3 == pytest.approx(density)
    with pytest.raises(RuntimeError, match="no attention over the 8 tokens"):
        composition.threshold_for(model, call, (2, 2, 2), 0.5)


@torch.no_grad()
def test_a_cache_skips_what_it_says_and_comes_off_again() -> None:
    model, video = tiny_zoo(), torch.randn(1, 3, 2, 16, 20)
    times = [torch.tensor([t]) for t in (0.8, 0.79, 0.1)]
    plain = [model(video, t) for t in times]
    for threshold, wanted in ((0.0, [True] * 3), (0.2, [True, False, True])):
        computed: list[bool] = []
        ways.make_cacheable(model)
        with ways.cached(model, threshold, computed):
            for _ in range(2):  # nothing is left of the first time
                with ways.anew(model):
                    found = [model(video, t) for t in times]
        assert computed == 2 * wanted
        for one, other, ran in zip(found, plain, wanted, strict=True):
            assert torch.allclose(one, other, atol=1e-6) == ran
    assert torch.equal(model(video, times[0]), plain[0])


def test_reasons_are_kept() -> None:
    def absent() -> dict[str, Any]:
        raise ways.Absent("bring it")

    def failing() -> dict[str, Any]:
        raise ValueError("first line\nsecond")

    assert ways.attempt(absent) == {"absent": "bring it"}
    assert ways.attempt(failing) == {"failed": "ValueError: first line"}
    assert ways.attempt(lambda: {"a": 1}) == {"a": 1}
    options = {"threshold": 0.1}
    assert ways.how_to_compile(None, ways.CACHE) == {}
    assert ways.how_to_compile(None, ways.GRAPHS) == {"mode": "reduce-overhead"}
    assert ways.how_to_compile(options, ways.GRAPHS) == {
        "backend": "freqopt",
        "options": {"threshold": 0.1, "mode": "reduce-overhead"},
    }


def test_eager_rows_of_both_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but inductor, which takes most of a minute: blocks run as graphs in Python."""
    how = ways.how_to_compile

    def eagerly(split: dict[str, Any] | None, addition: str) -> dict[str, Any]:
        found = how(split, addition)
        if split is None:
            return {"backend": "eager"}
        return {**found, "options": {**found["options"], "inner": "eager"}}

    monkeypatch.setattr(ways, "how_to_compile", eagerly)
    monkeypatch.setattr(composition, "load_pretrained", lambda **_: tiny_zoo())
    composition.main(
        ["--small", "--device", "cpu", "--cache-threshold", "0.5", "--out", str(tmp_path)]
    )
    result = json.loads((tmp_path / "composition.json").read_text())
    large_rows, zoo = (
        {(r["attention"], r["with"]): r for r in result[part]} for part in ("rows", "zoo")
    )
    assert len(large_rows) == 18 and len(zoo) == 7
    assert 0.3 < result["density"] < 0.9 and result["tokens"] == 240
    assert 0 < large_rows["split", ways.NOTHING]["error"] < 0.1
    assert large_rows["dense", ways.CACHE]["computed"] == pytest.approx(1 / 3)
    assert zoo["split", ways.CACHE]["computed"] <= 1 and zoo["split", ways.CACHE]["psnr_db"] > 15
    for addition in (ways.EAGER, ways.GUIDANCE, ways.BROADCAST):
        dense, split = (large_rows[name, addition] for name in ("dense", "split"))
        assert dense["error"] < split["error"] < 0.2, addition
    assert large_rows["dense", ways.GUIDANCE]["error"] == 0
    assert large_rows["dense", ways.EAGER]["error"] < 1e-5
    # Of three calls the broadcast computes the first and the third, in cross-attention as well.
    assert large_rows["split", ways.BROADCAST]["computed"] < 1
    cached = large_rows["split", ways.CACHE_DIT]
    if importlib.util.find_spec("cache_dit") is None:
        assert "pip install cache-dit" in cached["absent"]
    else:
        assert cached["computed"] == pytest.approx(1 / 3) and cached["error"] < 0.2
    decoded = {(r["attention"], r["with"]): r for r in result["decoded"]}
    assert len(decoded) == 4 and all(row["decode_s"] > 0 for row in decoded.values())
    assert decoded["dense", decoding.WHOLE]["error"] == 0
    assert 0 < decoded["split", decoding.WHOLE]["error"] < 0.2
    # Tiles overlap, and blend: what they change is their own, whatever the attention.
    tiles = decoded["dense", decoding.TILED]["error"]
    assert 0 < tiles < decoded["split", decoding.TILED]["error"] + 1e-3
    assert large_rows["split", ways.GRAPHS] == {
        "attention": "split",
        "with": ways.GRAPHS,
        "absent": "CUDA graphs need a GPU",
    }
    for addition in ways.QUANTISED:
        row = large_rows["split", addition]
        assert row.keys() & {"absent", "failed", "step_s"}
        if importlib.util.find_spec("torchao") is None:
            assert "pip install torchao" in row["absent"]
