"""Whole generations are compared with the dense one, and dropping the rest is what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import generations
from benchmarks.natural import natural_attention
from freqopt.config import KEY_BLOCK, QUERY_TILE
from freqopt.kernels import chunked, reference
from freqopt.kernels.layout import Inputs, Settings, TokenLayout
from freqopt.models_zoo.video_dit import VideoDiT, VideoDiTConfig


def test_dropping_is_attention_over_the_exact_blocks_alone() -> None:
    grid = (3, 9, 10)
    a = natural_attention(grid, heads=2, dim=16, dtype=torch.float32, device="cpu")
    out = generations.dropping(grid, 0.4)(a.query, a.key, a.value)
    layout = TokenLayout(grid, 0, 0)
    inputs = Inputs(a.query, a.key, a.value, torch.zeros(2), None, layout)
    route = chunked.split_forward(inputs, Settings(0.25, 0.4, 0)).split.route
    exact = route == reference.EXACT
    assert not exact.all()
    pairs = exact.repeat_interleave(QUERY_TILE, 2).repeat_interleave(KEY_BLOCK, 3)
    order, tokens = layout.base_order(a.key.device).long(), layout.tokens
    query, key, value = (x[:, :, order] for x in (a.query, a.key, a.value))
    wanted = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=pairs[:, :, :tokens, :tokens]
    )
    torch.testing.assert_close(out[:, :, order], wanted, atol=1e-5, rtol=1e-5)


def test_scales_see_structure() -> None:
    clean = torch.rand(3, 2, 48, 56, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert generations.scales_of_ssim(clean, clean) == pytest.approx(1.0)
    assert generations.scales_of_ssim(clean.flip(-1), clean) < 0.5


def tiny() -> VideoDiT:
    torch.manual_seed(0)
    config = VideoDiTConfig(width=32, layers=2, heads=2, mlp_width=32, rope_axes=(4, 6, 6))
    model = VideoDiT(config).eval()
    torch.nn.init.normal_(model.head.weight, std=0.3)  # untrained models end in zeros
    return model


def test_the_model_of_four_steps_gets_plans_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(generations, "PLANNED_ON", 4)
    monkeypatch.setattr(generations, "PASSES", 8)
    monkeypatch.setattr(
        generations, "load_distilled", lambda **given: asked.update(given) or tiny()
    )
    words = "--distilled --device cpu --frames 3 --height 32 --width 40 --seeds 1"
    words += " --warm 0 --densities 0.5 0.1"
    generations.main([*words.split(), "--adapter", "x.safetensors", "--out", str(tmp_path)])
    assert asked["path"] == Path("x.safetensors")
    result = json.loads((tmp_path / "generations_distilled.json").read_text())
    assert result["settings"]["steps"] == 4
    rows: dict[Any, Any] = {(r["method"], r.get("dense_steps")): r for r in result["rows"]}
    assert len(result["rows"]) == 6  # the floor, two methods at two densities, and one plan
    assert [why[:28] for why in result["without_plan"]] == ["density 0.1: a mean density "]
    own = rows["freqopt, own plan", 0]
    assert own["split_sites"] == 2 and 0.3 < own["planned_density"] <= 0.5
    assert 20 < own["psnr_db"] < rows["another dense backend", None]["psnr_db"]


def test_the_benchmark_on_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generations, "load_pretrained", lambda **given: tiny())
    generations.main(
        [
            "--device",
            "cpu",
            "--frames",
            "3",
            "--height",
            "32",
            "--width",
            "40",
            "--steps",
            "3",
            "--seeds",
            "1",
            "--densities",
            "0.5",
            "--warm",
            "0",
            "2",
            "5",
            "--out",
            str(tmp_path),
        ]
    )
    result = json.loads((tmp_path / "generations.json").read_text())
    rows: dict[Any, Any] = {(r["method"], r.get("dense_steps")): r for r in result["rows"]}
    assert len(rows) == 5 and result["tokens"] == 240  # five dense steps of three are left out
    floor = rows["another dense backend", None]["psnr_db"]
    ours = [rows["freqopt", steps]["psnr_db"] for steps in (0, 2)]
    dropped = [rows["the rest dropped", steps]["psnr_db"] for steps in (0, 2)]
    kept = {name: row["objects_kept"] for name, row in rows.items()}
    assert kept["another dense backend", None] == 1 and all(0 <= x <= 1 for x in kept.values())
    assert floor > ours[1] > ours[0] > 20 and dropped[1] > dropped[0]
    assert ours[0] > dropped[0] and ours[1] > dropped[1]
