"""Sampling of the zoo's video DiT: Euler steps along the flow from noise to video."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

SHIFT = 3.0
"""Time shift towards noise, for long token sequences (Esser et al., arXiv 2403.03206, eq. 23)."""


def time_steps(steps: int, *, shift: float = SHIFT) -> Tensor:
    """steps + 1 falling times from 1 to 0, denser near noise for shift > 1."""
    t = torch.linspace(1, 0, steps + 1)
    return shift * t / (1 + (shift - 1) * t)


def initial_noise(
    batch: int, frames: int, height: int, width: int, *, seed: int, device: torch.device | str
) -> Tensor:
    """Gaussian noise (B, 3, T, H, W) float32, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, frames, height, width, generator=generator).to(device)


@torch.no_grad()
def sample(
    model: nn.Module,
    *,
    frames: int,
    height: int,
    width: int,
    steps: int = 25,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch: int = 1,
    callback: Callable[[int, int], None] | None = None,
    inputs: Callable[[dict[str, Any]], None] | None = None,
) -> Tensor:
    """Sample videos, (B, 3, T, H, W) float32 in [-1, 1].

    Args:
        model: called as model(video, timestep) with tensors of `dtype`.
        steps: Euler steps; the state is kept in float32.
        callback: told (steps done, steps) after each step.
        inputs: shown the model's arguments before each step.
    """
    state = initial_noise(batch, frames, height, width, seed=seed, device=device)
    times = time_steps(steps).tolist()
    for index in range(steps):
        now, then = times[index], times[index + 1]
        arguments = {
            "video": state.to(dtype),
            "timestep": torch.full((batch,), now, device=device, dtype=torch.float32),
        }
        if inputs is not None:
            inputs(arguments)
        velocity = model(arguments["video"], arguments["timestep"])
        state = state + (then - now) * velocity.float()
        if callback is not None:
            callback(index + 1, steps)
    return state.clamp(-1, 1)


def denoising_samples(
    model: nn.Module,
    count: int,
    *,
    frames: int,
    height: int,
    width: int,
    steps: int = 25,
    seed: int = 1000,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    callback: Callable[[int, int], None] | None = None,
) -> list[dict[str, Tensor]]:
    """Model inputs met while sampling, for calibration: `count` of them, spread over the steps.

    They are taken in turn from `trajectories(count)` of different seeds.
    """
    met: list[dict[str, Tensor]] = []
    videos = trajectories(count)
    for trajectory in range(videos):
        sample(
            model,
            frames=frames,
            height=height,
            width=width,
            steps=steps,
            seed=seed + trajectory,
            device=device,
            dtype=dtype,
            inputs=met.append,
            callback=callback,
        )
    chosen = [round((i + 0.5) * steps / count - 0.5) for i in range(count)]
    turn = [(i + (i // 4 if videos > 2 else 0)) % videos for i in range(count)]
    return [
        met[video * steps + min(max(at, 0), steps - 1)]
        for video, at in zip(turn, chosen, strict=True)
    ]


def trajectories(count: int) -> int:
    """Videos that inputs of `denoising_samples` come from: one for every eight, two at least.

    Calibration fits the first and the last of every four inputs, so with more than two the turn
    moves on by one after every four: else those fitted would be of two videos only.
    """
    return max(2, count // 8)
