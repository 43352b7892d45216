"""What the demo shows of two videos: how far apart they are, and pictures of both.

Videos are (3, T, H, W) float tensors in [-1, 1] throughout.
"""

from __future__ import annotations

import base64
import io
import math
from typing import Any

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
    rows = {
        "dense": as_images(dense),
        "rewritten": as_images(split),
        f"difference x {AMPLIFIED}": as_images(amplified(dense, split)),
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
    """Dense, rewritten and their amplified difference side by side, as a lossless animated PNG."""
    panels = as_images(dense), as_images(split), as_images(amplified(dense, split))
    gap = torch.full((dense.shape[1], dense.shape[2], 4, 3), 128, dtype=torch.uint8, device="cpu")
    first, second, third = panels
    frames = torch.cat([first, gap, second, gap, third], 2)
    return encoded(frames, duration=FRAME_MS)


def amplified(dense: Tensor, split: Tensor) -> Tensor:
    """The difference of two videos as a video: black where there is none, times AMPLIFIED."""
    return (split.float() - dense.float()).abs() * AMPLIFIED - 1


def encoded(images: Tensor, *, duration: int = 0) -> bytes:
    """Images (T, H, W, 3) uint8 as a PNG, animated with `duration` milliseconds a frame."""
    from PIL import Image

    first, *rest = [Image.fromarray(image.numpy()) for image in images]
    file = io.BytesIO()
    more: dict[str, Any] = {"save_all": True, "append_images": rest, "loop": 0} if rest else {}
    if rest:
        more["duration"] = duration
    first.save(file, format="PNG", **more)
    return file.getvalue()


def strip(video: Tensor, width: int) -> bytes:
    """All frames beside each other, each enlarged to about `width` pixels, as one PNG."""
    factor = max(round(width / video.shape[3]), 1)
    large = F.interpolate(
        video.float().transpose(0, 1), scale_factor=factor, mode="bicubic", align_corners=False
    )
    images = as_images(large.transpose(0, 1))
    return encoded(images.transpose(0, 1).flatten(1, 2)[None])


def player_html(dense: Tensor, split: Tensor, *, width: int = 416) -> str:
    """Both videos and their difference, playing in step, as self-contained HTML.

    They are strips of frames moved by CSS, as animations of a page start together and those of
    three image files do not.
    """
    frames, height, columns = dense.shape[1:]
    shown = {
        "exact": dense,
        "rewritten": split,
        f"their difference, {AMPLIFIED} times as bright": amplified(dense, split),
    }
    last = f"{100 * (frames - 1) / frames:.6f}%"
    style = f"--frames: {frames}; --length: {frames * FRAME_MS}ms; --last: -{last}"
    parts = [
        f'<div class="player" style="{style}"><input type="checkbox" id="pause">'
        '<label for="pause">pause</label><div class="films">'
    ]
    for name, video in shown.items():
        data = base64.b64encode(strip(video, width)).decode()
        parts.append(
            f'<figure><div class="film" style="aspect-ratio: {columns} / {height}">'
            f'<img style="width: {100 * frames}%" alt="The video, {name}" '
            f'src="data:image/png;base64,{data}"></div><figcaption>{name}</figcaption></figure>'
        )
    return "".join([*parts, "</div></div>"])


def spotlight(video: Tensor, tile: Tensor, looked: Tensor, patch: tuple[int, int, int]) -> Figure:
    """What the queries around a patch look at, over the frames of a video.

    tile, looked: (T, h, w) bool. Tokens looked at are in colour, all others dark and grey; queries
    are framed in orange.
    """
    images = as_images(video).float() / 255
    frames, height, width = images.shape[:3]
    grid = looked.shape[1:]
    size = (height // grid[0], width // grid[1])
    lit = looked.repeat_interleave(size[0], 1).repeat_interleave(size[1], 2)[..., None]
    grey = images.mean(-1, keepdim=True).expand_as(images) * 0.35
    images = torch.where(lit, images, grey)
    shown = _about(patch[0], frames, 8)
    columns = 4
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(10, rows * (10 / columns * height / width + 0.28)))
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes:
        ax.set_axis_off()
    for ax, frame in zip(axes, shown, strict=False):
        ax.imshow(images[frame].numpy(), interpolation="none")
        for row, column in tile[frame].nonzero().tolist():
            ax.add_patch(_frame(column * size[1], row * size[0], size))
        ax.set_title(f"frame {frame}", fontsize=9)
    figure.subplots_adjust(left=0, right=1, top=0.93, bottom=0, wspace=0.03, hspace=0.14)
    return figure


def _about(middle: int, frames: int, most: int) -> list[int]:
    """At most so many frames in a row, as evenly around a middle one as there are."""
    first = max(min(middle - most // 2, frames - most), 0)
    return list(range(first, min(first + most, frames)))


def _frame(x: float, y: float, size: tuple[int, int]) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(
        (x - 0.5, y - 0.5), size[1], size[0], fill=False, edgecolor="#ff8a2a", linewidth=0.8
    )
