"""The demo runs end to end on a tiny untrained model, and its figures mean what they say."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from freqopt.demo import foreign as demo_foreign
from freqopt.demo import settings as demo_settings
from freqopt.demo import video as demo_video
from freqopt.demo.settings import default_settings
from freqopt.errors import InputError, OptionError

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
                    (2 * mean_a * mean_b + 0.02**2) * (2 * both + 0.06**2)
                    / ((mean_a**2 + mean_b**2 + 0.02**2) * (var_a + var_b + 0.06**2))
                )  # fmt: skip
    assert demo_video.ssim(noisy, clean) == pytest.approx(float(np.mean(values)), abs=1e-9)
    assert 0.3 < demo_video.ssim(noisy, clean) < 0.999
    assert demo_video.ssim(-clean, clean) < 0


def test_pictures_show_both_videos() -> None:
    from PIL import Image

    first, second = video(0, frames=5), video(1, frames=5)
    assert demo_video.as_images(torch.full((3, 1, 2, 2), 1.0)).unique().tolist() == [255]
    moving = Image.open(io.BytesIO(demo_video.animation(first, second)))
    assert moving.n_frames == 5 and moving.size == (32 + 4 + 32, 24)
    moving.seek(3)
    pixels = torch.from_numpy(np.array(moving.convert("RGB")))
    assert torch.equal(pixels[:, :32], demo_video.as_images(first)[3])
    assert torch.equal(pixels[:, 36:], demo_video.as_images(second)[3])
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
        [sys.executable, "-m", "freqopt", "demo", "--device", "cpu", "--random-weights",
         "--grid", "3,8,10", "--steps", "3", "--samples", "2", "--target-error", "0.1",
         "--out", tmp_path / "demo"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "demo/result.json").read_text())
    assert result["grid"] == [3, 8, 10] and result["tokens"] == 240
    assert result["environment"]["torch"] == torch.__version__
    assert 0 < result["mean_density"] <= 1 and result["measured_error"] <= 0.1
    assert result["sites_split"] == result["op_calls_per_step"] == 2
    assert float(result["psnr_db"]) > 15 and 0.2 < result["ssim"] <= 1
    assert len(result["psnr_db_per_frame"]) == 3
    assert result["speedup"] == pytest.approx(result["dense_seconds"] / result["split_seconds"])
    foreign = result["foreign"]
    assert foreign["model"] == "WanTransformer3DModel"
    assert foreign["split"] == foreign["calls"] == 3 and foreign["max_output"] > 0.1
    assert 0 <= foreign["max_error"] < 1e-4
    page = (tmp_path / "demo/report.html").read_text()
    for title in ("The video, dense and rewritten", "Times", "Another model class", "Environment"):
        assert title in page
    assert "http://" not in page.replace("http://www.w3.org", "")
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
