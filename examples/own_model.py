"""A model of one's own: nothing of it has to be known to freqopt, written out or registered.

python examples/own_model.py
"""

import torch
from torch import Tensor, nn

import freqopt

GRID = (4, 12, 16)


class Block(nn.Module):
    """Attention over all tokens."""

    def __init__(self, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, width)."""
        parts = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)
        # Attention by hand is found as well, by what it computes.
        weights = (query @ key.transpose(2, 3) * query.shape[-1] ** -0.5).softmax(-1)
        return x + self.out((weights @ value).transpose(1, 2).flatten(2))


class Model(nn.Module):
    """Patches of 1 x 4 x 4 pixels, and two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv3d(3, 32, (1, 4, 4), (1, 4, 4))
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, video: Tensor) -> Tensor:
        """video: (B, 3, T, H, W)."""
        return self.blocks(self.patches(video).flatten(2).transpose(1, 2))


def main() -> None:
    torch.manual_seed(0)
    model = Model().eval()
    samples = [{"video": torch.randn(1, 3, 4, 48, 64)} for _ in range(4)]

    print(freqopt.inspect(model, min_tokens=1, **samples[0]))  # the grid is read in the graph
    plan = freqopt.calibrate(model, samples, target_error=0.05, rounds=0, progress=False)
    assert plan.grids == [GRID]
    compiled = torch.compile(model, backend="freqopt", options={"plan": plan, "inner": "eager"})
    with torch.no_grad():
        compiled(**samples[0])
    print(freqopt.counters())


if __name__ == "__main__":
    main()
