"""Parts of `pieces_models` whose attention is given a mask over the video and a text behind it."""

from __future__ import annotations

import pieces_models as models
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Masked(models.Attention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (
            linear(x).unflatten(-1, (models.HEADS, -1)).transpose(1, 2)
            for linear in (self.q, self.k, self.v)
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(out.transpose(1, 2).flatten(2))


class Block(models.Block):
    def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        return x + self.attn(torch.cat([x, text], 1), mask)[:, : x.shape[1]]


def make_model_of(video: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> models.Video:
    """A model of a class derived from `Video`, with these blocks."""
    for name, part in (("Attention", Masked), ("Block", Block), ("Video", video)):
        monkeypatch.setattr(models, name, part)
    return models.make()
