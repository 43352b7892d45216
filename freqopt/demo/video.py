"""What the demo shows of two videos: how far apart they are, and pictures of both.

Videos are (3, T, H, W) float tensors in [-1, 1] throughout.
"""

from __future__ import annotations

import base64
import io
import math

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

RANGE = 2.0
"""Width of the interval that pixel values lie in."""

AMPLIFIED = 8
"""Factor of the difference in contact sheets."""

SHEET_FRAMES = 7
FRAME_MS = 140


def psnr(video: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB over all pixels; infinite for equal videos."""
    return decibels(float((video.double() - reference.double()).square().mean()))


def psnr_per_frame(video: Tensor, reference: Tensor) -> list[float]:
    """Peak signal-to-noise ratio of each frame, in dB."""
    error = (video.double() - reference.double()).square().mean((0, 2, 3))
    return [decibels(float(value)) for value in error]


def decibels(squared_error: float) -> float:
    """PSNR in dB of a mean squared error of values in [-1, 1]."""
    return math.inf if squared_error == 0 else 10 * math.log10(RANGE**2 / squared_error)


def ssim(video: Tensor, reference: Tensor, *, window: int = 11, sigma: float = 1.5) -> float:
    """Structural similarity (Wang et al., 2004), mean over frames, channels and pixels; 1 if equal.

    Gaussian window of `window` pixels, constants 0.01 and 0.03 of the range, no padding. Values are
    taken as light, from 0 (black): the index compares means, for which a negative sign is nonsense.
    """
    window = min(window, video.shape[-1], video.shape[-2])
    at = torch.arange(window, dtype=torch.float64, device=video.device) - (window - 1) / 2
    line = torch.exp(-(at**2) / (2 * sigma**2))
    weight = (line[:, None] * line)[None, None] / line.sum() ** 2
    # Frames and channels side by side as a batch of one-channel images.
    x, y = ((v.double() + 1).flatten(0, 1).unsqueeze(1) for v in (video, reference))

    def pooled(image: Tensor) -> Tensor:
        return F.conv2d(image, weight)

    mean_x, mean_y = pooled(x), pooled(y)
    var_x, var_y = pooled(x * x) - mean_x**2, pooled(y * y) - mean_y**2
    covariance = pooled(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * RANGE) ** 2, (0.03 * RANGE) ** 2
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return float((structure * (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)).mean())


def as_images(video: Tensor) -> Tensor:
    """(T, H, W, 3) uint8 on the CPU."""
    scaled = (video.detach().float().cpu().clamp(-1, 1) + 1) * 127.5
    return scaled.round().to(torch.uint8).permute(1, 2, 3, 0).contiguous()


def contact_sheet(dense: Tensor, split: Tensor) -> Figure:
    """Frames of the dense video, of the rewritten model's, and their amplified difference."""
    frames = dense.shape[1]
    shown = sorted({round(i * (frames - 1) / (SHEET_FRAMES - 1)) for i in range(SHEET_FRAMES)})
    difference = (split.float() - dense.float()).abs() * AMPLIFIED - 1
    rows = {
        "dense": as_images(dense),
        "rewritten": as_images(split),
        f"difference x {AMPLIFIED}": as_images(difference),
    }
    aspect = dense.shape[2] / dense.shape[3]
    width = 12.0
    figure = Figure(figsize=(width, len(rows) * (width / len(shown) * aspect + 0.12) + 0.3))
    axes = figure.subplots(len(rows), len(shown), squeeze=False)
    for row, (label, images) in zip(axes, rows.items(), strict=True):
        for ax, frame in zip(row, shown, strict=True):
            ax.imshow(images[frame].numpy(), interpolation="none")
            ax.set(xticks=[], yticks=[])
            for spine in ax.spines.values():
                spine.set_visible(False)
        row[0].set_ylabel(label, fontsize=10)
    for ax, frame in zip(axes[0], shown, strict=True):
        ax.set_title(f"frame {frame}", fontsize=9)
    figure.subplots_adjust(left=0.04, right=1, top=0.93, bottom=0.01, wspace=0.03, hspace=0.06)
    return figure


def frame_curve(values: list[float]) -> Figure:
    """PSNR over the frames."""
    figure = Figure(figsize=(7.4, 2.6))
    ax = figure.subplots()
    finite = [value if math.isfinite(value) else math.nan for value in values]
    ax.plot(range(len(values)), finite, "o-", color="#0b62a4", markersize=4)
    ax.set(xlabel="frame", ylabel="PSNR (dB)")
    ax.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]
    ax.grid(alpha=0.3)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    return figure


def animation(dense: Tensor, split: Tensor) -> bytes:
    """Both videos side by side, dense on the left, as a lossless animated PNG."""
    from PIL import Image

    gap = torch.full((dense.shape[1], dense.shape[2], 4, 3), 255, dtype=torch.uint8, device="cpu")
    both = torch.cat([as_images(dense), gap, as_images(split)], 2)
    first, *rest = [Image.fromarray(image.numpy()) for image in both]
    file = io.BytesIO()
    first.save(file, format="PNG", save_all=True, append_images=rest, duration=FRAME_MS, loop=0)
    return file.getvalue()


def image_html(png: bytes, caption: str, *, width: int) -> str:
    """A PNG as self-contained HTML. width: of the picture on the page, in CSS pixels."""
    from html import escape

    data = base64.b64encode(png).decode()
    style = f"width: {width}px; max-width: 100%; image-rendering: auto"
    return (
        f'<figure><img style="{style}" alt="{escape(caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )
