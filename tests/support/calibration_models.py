"""A small video model with timesteps, and samples of it, for the tests of calibration."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import freqopt

GRID = (4, 16, 8)


class Attention(nn.Module):
    """Self-attention that the tests, too, can run split: `budget` is a plan's, (2, H)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.budget = heads, None
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if self.budget is None:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            threshold, chunks = self.budget
            out = freqopt.split_attention(
                q, k, v, grid=GRID, order=chunks.int(), threshold=threshold
            )
        return self.out(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TinyVideo(nn.Module):
    def __init__(self, width: int = 32, heads: int = 2, layers: int = 2) -> None:
        super().__init__()
        self.patch = nn.Conv3d(3, width, (1, 2, 2), (1, 2, 2))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(width, 12)
        for block in self.blocks:  # sharper than random weights are, so that routing matters
            block.attn.qkv.weight.data[: 2 * width] *= 3

    def forward(self, video: Tensor, timestep: Tensor) -> dict[str, Tensor]:
        x = self.patch(video).flatten(2).transpose(1, 2) + timestep[:, None, None]
        for block in self.blocks:
            x = block(x)
        return {"velocity": self.head(self.dropout(x))}


def make_model() -> TinyVideo:
    torch.manual_seed(0)
    return TinyVideo()


def make_sample(seed: int) -> dict[str, Tensor]:
    """Smooth video with some noise on it: content of low and of high frequency."""
    generator = torch.Generator().manual_seed(seed)
    t, h, w = GRID
    coarse = torch.randn(1, 3, 2, 4, 4, generator=generator)
    fine = torch.randn(1, 3, t, 2 * h, 2 * w, generator=generator)
    video = F.interpolate(coarse, (t, 2 * h, 2 * w), mode="trilinear") + 0.1 * fine
    return {"video": video, "timestep": torch.tensor([(seed % 8) / 8])}


def as_video(tokens: Tensor) -> Tensor:
    """The model's velocity (B, tokens, 12) as pixels (B, 3, T, H, W)."""
    t, h, w = GRID
    patches = tokens.unflatten(1, (t, h, w)).unflatten(-1, (3, 2, 2))
    return patches.permute(0, 4, 1, 2, 5, 3, 6).flatten(3, 4).flatten(4, 5)
