"""The demo runs end to end on a tiny untrained model, and its figures mean what they say."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.natural import natural_attention
from freqopt.calibration.measure.attention import AttentionCall
from freqopt.calibration.measure.ladder import THRESHOLDS
from freqopt.calibration.measure.orders import key_order
from freqopt.config import KEY_BLOCK, QUERY_TILE
from freqopt.demo import closeup
from freqopt.demo import foreign as demo_foreign
from freqopt.demo import settings as demo_settings
from freqopt.demo import video as demo_video
from freqopt.demo.settings import default_settings
from freqopt.demo.shares import shares
from freqopt.demo.shipped import SHIPPED, shipped_plan
from freqopt.errors import InputError, OptionError
from freqopt.kernels import reference
from freqopt.kernels.chunked import orders_of, split_forward
from freqopt.kernels.layout import Inputs, Settings
from freqopt.models_zoo.video_dit import load_pretrained

ROOT = Path(__file__).parents[2]


def video(seed: int = 0, frames: int = 3, height: int = 24, width: int = 32) -> torch.Tensor:
    """A smooth moving pattern (3, T, H, W) in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    t, y, x = torch.meshgrid(*map(torch.arange, (frames, height, width)), indexing="ij")
    phase = torch.rand(3, 1, 1, 1, generator=generator) * 6
    return torch.sin(0.3 * x + 0.2 * y + 0.5 * t + phase) * 0.9


def test_psnr_is_its_definition() -> None:
    clean = video()
    assert demo_video.psnr(clean, clean) == math.inf
    # An error of 0.02 everywhere is 1 % of the range: 40 dB.
    assert demo_video.psnr(clean + 0.02, clean) == pytest.approx(40.0, abs=1e-4)
    per_frame = demo_video.psnr_per_frame(
        clean + torch.tensor([0.2, 0.02, 0.002])[:, None, None], clean
    )
    assert per_frame == pytest.approx([20.0, 40.0, 60.0], abs=1e-3)


def test_ssim_is_its_definition() -> None:
    """Against a direct evaluation at every window, and its behaviour under shift and noise."""
    clean = video(height=16, width=18)[:, :1]
    noisy = clean + 0.1 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    assert demo_video.ssim(clean, clean) == pytest.approx(1.0)
    at = np.arange(11) - 5.0
    line = np.exp(-(at**2) / (2 * 1.5**2))
    weight = np.outer(line, line) / line.sum() ** 2
    values = []
    for x, y in zip(noisy[:, 0].double() + 1, clean[:, 0].double() + 1, strict=True):
        for row in range(16 - 10):
            for column in range(18 - 10):
                a, b = (v[row : row + 11, column : column + 11].numpy() for v in (x, y))
                mean_a, mean_b = (weight * a).sum(), (weight * b).sum()
                var_a = (weight * (a - mean_a) ** 2).sum()
                var_b = (weight * (b - mean_b) ** 2).sum()
                both = (weight * (a - mean_a) * (b - mean_b)).sum()
                values.append(
                    (2 * mean_a * mean_b + 0.02**2)
                    * (2 * both + 0.06**2)
                    / ((mean_a**2 + mean_b**2 + 0.02**2) * (var_a + var_b + 0.06**2))
                )
    assert demo_video.ssim(noisy, clean) == pytest.approx(float(np.mean(values)), abs=1e-9)
    assert 0.3 < demo_video.ssim(noisy, clean) < 0.999
    assert demo_video.ssim(-clean, clean) < 0


def test_pictures_show_both_videos() -> None:
    from PIL import Image

    first, second = video(0, frames=5), video(1, frames=5)
    assert demo_video.as_images(torch.full((3, 1, 2, 2), 1.0)).unique().tolist() == [255]
    moving = Image.open(io.BytesIO(demo_video.animation(first, second)))
    assert moving.n_frames == 5 and moving.size == (3 * 32 + 2 * 4, 24)
    moving.seek(3)
    pixels = torch.from_numpy(np.array(moving.convert("RGB")))
    assert torch.equal(pixels[:, :32], demo_video.as_images(first)[3])
    assert torch.equal(pixels[:, 36:68], demo_video.as_images(second)[3])
    apart = demo_video.as_images(demo_video.amplified(first, second))[3]
    assert torch.equal(pixels[:, 72:], apart) and apart.max() > 100
    figure = demo_video.contact_sheet(first, second)
    assert len(figure.axes) == 3 * 5
    difference = figure.axes[10].images[0].get_array()
    expected = ((first - second).abs() * demo_video.AMPLIFIED - 1)[:, 0].permute(1, 2, 0)
    assert np.allclose(difference, (expected.clamp(-1, 1) + 1) * 127.5, atol=0.51)


@pytest.mark.smoke
def test_settings_are_checked() -> None:
    small = default_settings("cpu")
    assert small.inner == "eager" and small.dtype == "float32"
    assert default_settings("cpu", steps=3, seed=None).steps == 3
    assert small.calibrate == (not SHIPPED.exists())
    assert default_settings("cpu", density=0.2).calibrate
    assert default_settings("cpu", random_weights=True).calibrate
    with pytest.raises(OptionError, match="density"):
        default_settings("cpu", density=0.2, calibrate=False)
    with pytest.raises(OptionError, match="trained weights"):
        default_settings("cpu", random_weights=True, calibrate=False)
    for wrong, said in (
        ({"height": 50}, "multiple of 4"),
        ({"steps": 0}, "1 or more"),
        ({"dtype": "float64"}, "bfloat16"),
        ({"density": 1.5}, "outside"),
    ):
        with pytest.raises(OptionError, match=said):
            default_settings("cpu", **wrong)


def test_missing_weights_are_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(**unused: Any) -> None:
        raise FileNotFoundError("no weights at x")

    monkeypatch.setattr(demo_settings, "load_pretrained", missing)
    with pytest.raises(InputError, match="random-weights"):
        demo_settings.load_model(default_settings("cpu"))


def test_the_demo_end_to_end(tmp_path: Path) -> None:
    """From the command line: everything is written, and the figures agree with each other."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "freqopt",
            "demo",
            "--device",
            "cpu",
            "--random-weights",
            "--grid",
            "3,8,10",
            "--steps",
            "3",
            "--samples",
            "2",
            "--target-error",
            "0.1",
            "--out",
            tmp_path / "demo",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "demo/result.json").read_text())
    assert result["grid"] == [3, 8, 10] and result["tokens"] == 240
    assert result["environment"]["torch"] == torch.__version__
    assert (
        0 < result["density_here"] <= 1
        and 0 < result["mean_density"] <= 1
        and result["measured_error"] <= 0.1
    )
    assert result["sites_split"] == result["op_calls_per_step"] == 2
    assert float(result["psnr_db"]) > 15 and 0.2 < result["ssim"] <= 1
    assert len(result["psnr_db_per_frame"]) == 3
    assert result["speedup"] == pytest.approx(result["dense_seconds"] / result["split_seconds"])
    foreign = result["foreign"]
    assert foreign["model"] == "WanTransformer3DModel"
    assert foreign["split"] == foreign["calls"] == 3 and foreign["max_output"] > 0.1
    assert 0 <= foreign["max_error"] < 1e-4
    # The same seed's own steps: all three are kept, as fewer than four there are.
    assert [each["timestep"] for each in result["errors_here"]] == sorted(
        (each["timestep"] for each in result["errors_here"]), reverse=True
    )
    assert 0 < result["error_here"] <= 0.3
    spent = result["step_seconds"]
    assert spent["dense"]["finding"] == 0 < min(*spent["split"].values(), spent["dense"]["looking"])
    assert result["total_seconds"] == pytest.approx(sum(result["stages"].values()), abs=0.1)
    page = (tmp_path / "demo/report.html").read_text()
    for title in (
        "The videos",
        "What was approximated",
        "Where the time went",
        "Was the plan right?",
        "One head, closely",
        "Another model, not ours",
        "With your own model",
        "Environment",
        "The plan in all its detail",
        "Untrained weights",
    ):
        assert title in page
    assert page.count('class="film"') == 3 and "jump-none" in page
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)|url\(|@import|<script""", page)
    assert (tmp_path / "demo/videos.png").read_bytes().startswith(b"\x89PNG")
    assert "PSNR" in done.stdout


def test_a_wrong_rewrite_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison of the foreign model is able to fail: other keys give another output."""
    import freqopt.kernels.chunked as chunked

    honest = chunked.split_forward

    def wrong(inputs: Any, settings: Any) -> Any:
        return honest(inputs._replace(key=inputs.key.flip(1)), settings)

    monkeypatch.setattr(chunked, "split_forward", wrong)
    found = demo_foreign.compare_foreign(torch.device("cpu"), "eager")
    assert found.calls == 3 and found.max_error > 1e-2


@pytest.mark.smoke
@pytest.mark.skipif(
    not SHIPPED.exists(), reason="no plan ships yet: python -m benchmarks.demo_plan makes it"
)
def test_the_plan_that_ships_is_for_the_weights_that_ship() -> None:
    model, settings = load_pretrained(), default_settings("cpu")
    plan = shipped_plan(model)
    (tokens,) = {site.tokens for site in plan.sites.values()}
    here = settings.frames * (settings.height // 4) * (settings.width // 4)
    assert tokens <= here <= 8 * tokens  # plans carry over so far, and the demo measures them
    assert {site.decision for site in plan.sites.values()} == {"split"}
    assert len(plan.sites) == model.config.layers and plan.mean_density < 0.25


@pytest.mark.parametrize("chunk", [0, 256])
def test_what_a_patch_looks_at_is_what_the_op_attends(chunk: int) -> None:
    grid, patch = (5, 9, 11), (2, 4, 5)
    a = natural_attention(grid, heads=2, dim=16, dtype=torch.float32, device="cpu")
    call = AttentionCall(a.query, a.key, a.value, None, grid, 0, 0, 0.25)
    order = key_order(call, chunk) if chunk else None
    scores = closeup.head_tokens(call, 1, order).score
    threshold = float(scores[scores.isfinite()].median())
    tile, looked = closeup.around(call, 1, chunk, threshold, patch)
    assert tile[patch] and tile.sum() == QUERY_TILE and (tile & ~looked).sum() == 0
    assert 0 < looked.sum() < looked.numel()

    chunks = torch.tensor([chunk, chunk], dtype=torch.int32)
    inputs = Inputs(
        a.query,
        a.key,
        a.value,
        torch.tensor([threshold, threshold]),
        None,
        call.layout,
        chunks=chunks if chunk else None,
    )
    settings = Settings(0.25, 0.0, 0, chunk)
    route = split_forward(inputs, settings).split.route[0, 1]
    order = orders_of(inputs, settings).key
    places = call.layout.base_order(a.key.device) if order is None else order[0, 1]
    token = (patch[0] * grid[1] + patch[1]) * grid[2] + patch[2]
    at = int((places == token).nonzero()[0, 0])
    exact = (route[at // QUERY_TILE] == reference.EXACT).repeat_interleave(KEY_BLOCK)
    expected = torch.zeros(len(places), dtype=torch.bool)
    expected[places.long()] = exact[: len(places)]
    assert torch.equal(looked.flatten(), expected)


def test_a_spotlight_shows_what_is_looked_at_in_colour() -> None:
    shown = torch.full((3, 3, 8, 12), 0.2) * torch.tensor([1.0, -1.0, 2.0])[:, None, None, None]
    tile, looked = (torch.zeros(3, 2, 3, dtype=torch.bool) for _ in range(2))
    tile[1, 0, 1] = looked[1, 0, 1] = looked[2, 1, 2] = True
    figure = demo_video.spotlight(shown, tile, looked, (1, 0, 1))
    images = [np.asarray(ax.images[0].get_array()) for ax in figure.axes[:3]]
    coloured = [np.ptp(image, axis=-1) > 0.1 for image in images]
    assert not coloured[0].any()
    assert coloured[1][:4, 4:8].all() and coloured[1].sum() == 16
    assert coloured[2][4:, 8:].all() and coloured[2].sum() == 16
    assert [len(ax.patches) for ax in figure.axes[:3]] == [0, 1, 0]


def test_curves_are_read_at_a_threshold() -> None:
    curve = [1.0 / (1 + rung) for rung in THRESHOLDS]
    assert closeup.read_off(curve, 0.0) == 1.0
    assert closeup.read_off(curve, THRESHOLDS[5]) == pytest.approx(curve[5])
    assert curve[6] < closeup.read_off(curve, 0.6) < curve[5]


def test_the_player_shows_every_frame_of_both_videos_and_their_difference() -> None:
    from PIL import Image

    first, second = video(0, frames=4), video(1, frames=4)
    html = demo_video.player_html(first, second, width=32)
    strips = [base64.b64decode(part) for part in re.findall(r"base64,([^\"]+)", html)]
    shown = [torch.from_numpy(np.array(Image.open(io.BytesIO(png)))) for png in strips]
    for found, wanted in zip(
        shown, (first, second, demo_video.amplified(first, second)), strict=True
    ):
        assert torch.equal(found, demo_video.as_images(wanted).transpose(0, 1).flatten(1, 2))
    assert "--frames: 4" in html and "--last: -75.000000%" in html


def test_shares_tell_the_op_from_attention_itself() -> None:
    from freqopt import split_attention

    a = natural_attention((4, 8, 16), heads=1, dim=32, dtype=torch.float32, device="cpu")
    given = {"query": a.query, "key": a.key, "value": a.value}
    dense = shares(torch.nn.functional.scaled_dot_product_attention, given)
    assert dense.looking > 0 and dense.finding == 0
    split = shares(split_attention, {**given, "grid": (4, 8, 16), "threshold": 1.0})
    assert split.looking > 0 and split.finding > 0
