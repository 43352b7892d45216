"""Q, K and V to measure on: those of the trained zoo DiT in the middle of denoising a video.

Random tensors have no spectrum, so an error measured on them says nothing about a video model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from freqopt.models_zoo.video_dit import VideoDiT, load_pretrained

PATCH = 4
"""Pixels per token along height and width in the zoo DiT."""


class Attention(NamedTuple):
    """One attention problem: (1, heads, N, D) tensors over a grid (t, h, w)."""

    query: Tensor
    key: Tensor
    value: Tensor
    grid: tuple[int, int, int]


@contextmanager
def recorded_attention(into: list[tuple[Tensor, Tensor, Tensor]]) -> Iterator[None]:
    """Keep query, key and value of every F.scaled_dot_product_attention call made inside."""
    original = F.scaled_dot_product_attention

    def record(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        into.append((query, key, value))
        return original(query, key, value, *args, **kwargs)

    F.scaled_dot_product_attention = record
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


@torch.no_grad()
def zoo_attention(
    grid: tuple[int, int, int],
    *,
    timestep: float = 0.6,
    steps: int = 12,
    seed: int = 0,
    model: VideoDiT | None = None,
) -> Attention:
    """All layers' heads of the trained DiT stacked, at one denoising step of a sampled video.

    Args:
        grid: tokens (t, h, w); the video has 4 * h by 4 * w pixels.
        timestep: the first step at or below it is recorded; 1 is noise.
        model: where and in what type it samples; the pretrained one on the GPU in bfloat16 if None.
    """
    from freqopt.models_zoo.sampling import sample

    model = model or load_pretrained(device="cuda", dtype=torch.bfloat16)
    weight = next(model.parameters())
    frames, height, width = grid[0], grid[1] * PATCH, grid[2] * PATCH
    recorded: list[tuple[Tensor, Tensor, Tensor]] = []

    class Recorder(torch.nn.Module):
        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

        def forward(self, video: Tensor, timestep_now: Tensor) -> Tensor:
            if recorded or float(timestep_now[0]) > timestep:
                return model(video, timestep_now)
            with recorded_attention(recorded):
                return model(video, timestep_now)

    sample(
        Recorder(),
        frames=frames,
        height=height,
        width=width,
        steps=steps,
        seed=seed,
        device=weight.device,
        dtype=weight.dtype,
    )
    query, key, value = (torch.cat([x[i][:1] for x in recorded], 1) for i in range(3))
    return Attention(query, key, value, grid)
