"""A model whose heads attend to what is like them, and videos of things or of smooth fields."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GRID = (4, 16, 32)
FEATURES, DIM = 16, 128
MIXED = 4


class Likeness(nn.Module):
    """One site: every token attends to those whose features are like its own."""

    def __init__(self, heads: int, key_heads: int, sharpness: float) -> None:
        super().__init__()
        self.heads, self.key_heads = heads, key_heads
        self.patch = nn.Conv3d(FEATURES, FEATURES, 1)
        self.to_key = nn.Linear(FEATURES, key_heads * DIM, bias=False)
        self.to_value = nn.Linear(FEATURES, key_heads * DIM)
        self.out = nn.Linear(heads * DIM, FEATURES)
        nn.init.eye_(self.patch.weight.data.view(FEATURES, FEATURES))
        nn.init.orthogonal_(self.to_key.weight)
        self.to_key.weight.data *= sharpness

    def forward(self, video: Tensor) -> Tensor:
        x = self.patch(video).flatten(2).transpose(1, 2)
        key, value = (
            layer(x).unflatten(-1, (self.key_heads, DIM)).transpose(1, 2)
            for layer in (self.to_key, self.to_value)
        )
        query = key.repeat_interleave(self.heads // self.key_heads, 1)
        out = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        return self.out(out.transpose(1, 2).flatten(2))


def make_model(heads: int = 1, key_heads: int = 1, sharpness: float = 3.0) -> Likeness:
    torch.manual_seed(0)
    return Likeness(heads, key_heads, sharpness)


def things(seed: int, grid: tuple[int, int, int] = GRID, kinds: int = 12) -> dict[str, Tensor]:
    """Every token is of one of some kinds, a few of which are mixed in each part of the video."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randn(kinds, FEATURES, generator=torch.Generator().manual_seed(7))
    parts = torch.rand(2, 2, 4, kinds, generator=generator).argsort(-1)[..., :MIXED]
    for axis, extent in enumerate(grid):
        parts = parts.index_select(axis, torch.arange(extent) * parts.shape[axis] // extent)
    which = torch.randint(MIXED, (*grid, 1), generator=generator)
    of = parts.gather(-1, which).squeeze(-1)
    noise = 0.2 * torch.randn(*grid, FEATURES, generator=generator)
    return {"video": (kind[of] + noise).permute(3, 0, 1, 2)[None]}


def smooth(seed: int, grid: tuple[int, int, int] = GRID) -> dict[str, Tensor]:
    """Features change slowly over the video, and differ everywhere."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, FEATURES, 2, 3, 4, generator=generator)
    fine = 0.02 * torch.randn(1, FEATURES, *grid, generator=generator)
    return {"video": F.interpolate(coarse, grid, mode="trilinear") + fine}
