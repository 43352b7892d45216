"""Attention inputs with the statistics of natural video, at any size.

Real models stop at some length; scaling has to be measured beyond it. Power over space and time
falls as 1 / f^3.3 (Dong and Atick, "Statistics of natural time-varying images", 1995: a
function of velocity over f^(m + 1), m = 2.3), which gives every octave of a three-dimensional
field about the same variance: such fields look alike at every scale, so that one measurement can
be compared across lengths.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.tensors import Attention

LATENTS = 6
"""Fields that a token's content is made of."""

POWER = 3.3
"""Exponent of the fall of power with frequency."""

CENTRE, OCTAVES = 0.4, 2.0
"""Scales at which channels tell tokens apart, in content of unit variance: the middle of their
range, and its width in octaves."""

SHARPNESS = 1.5
"""Gain of the queries. With it 90 % of a query's attention lies on about an eighth of the keys, as
in the median head of the zoo DiT (whose heads span 0.1 % to 65 %). Sharper attention is local and
the split trivial, flatter is close to uniform."""

OWN = 0.5
"""Amplitude of what queries and keys do not share, relative to what they do."""

CHANNELS_AT_ONCE = 16


def natural_field(grid: tuple[int, int, int], channels: int, generator: torch.Generator) -> Tensor:
    """(t*h*w, channels) float32 of unit variance, with power 1 / f^POWER over the lattice."""
    device = generator.device
    squared = torch.zeros(1, device=device)
    for axis, extent in enumerate(grid):
        shape = [1, 1, 1]
        shape[axis] = extent
        squared = squared + torch.fft.fftfreq(extent, device=device).square().view(shape)
    amplitude = squared.clamp(min=0.5 / max(grid) ** 2).pow(-POWER / 4)
    parts = []
    for start in range(0, channels, CHANNELS_AT_ONCE):
        count = min(CHANNELS_AT_ONCE, channels - start)
        noise = torch.randn(count, *grid, device=device, generator=generator)
        smooth = torch.fft.ifftn(torch.fft.fftn(noise, dim=(1, 2, 3)) * amplitude, dim=(1, 2, 3))
        flat = smooth.real.flatten(1)
        parts.append((flat - flat.mean(1, keepdim=True)) / flat.std(1, keepdim=True))
    return torch.cat(parts).T.contiguous()


def natural_features(content: Tensor, dim: int, seed: int) -> Tensor:
    """(N, dim) random Fourier features of (N, latents) content, the same map for every length.

    Their products are a kernel of the distance in content, near or far in the video, as a model
    looks for what is alike (Rahimi and Recht, "Random features", 2007); channels differ in how fast
    similarity falls with distance, over OCTAVES octaves.
    """
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(content.shape[1], dim, generator=generator)
    scale = CENTRE * 2 ** (OCTAVES * (torch.rand(dim, generator=generator) - 0.5))
    phase = 2 * math.pi * torch.rand(dim, generator=generator)
    angle = content @ (mixing * scale).to(content.device) + phase.to(content.device)
    return math.sqrt(2) * torch.cos(angle)


def natural_attention(
    grid: tuple[int, int, int],
    *,
    heads: int,
    dim: int,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int = 0,
) -> Attention:
    """Query, key and value (1, heads, N, dim), alike where content is; q and k of unit channels."""
    generator = torch.Generator(device).manual_seed(seed)

    def token_norm(x: Tensor) -> Tensor:
        return x * x.square().mean(-1, keepdim=True).rsqrt()

    queries, keys, values = [], [], []
    for head in range(heads):
        content = natural_field(grid, LATENTS, generator)
        shared = natural_features(content, dim, 2 * (seed + head))
        for into, gain in ((queries, SHARPNESS), (keys, 1.0)):
            own = natural_field(grid, dim, generator)
            into.append((gain * token_norm(shared + OWN * own)).to(dtype))
        # What is attended for being alike has like values, as it has in a model.
        own = natural_field(grid, dim, generator)
        values.append((natural_features(content, dim, 2 * (seed + head) + 1) + OWN * own).to(dtype))
    query, key, value = (torch.stack(x)[None] for x in (queries, keys, values))
    return Attention(query, key, value, grid)
