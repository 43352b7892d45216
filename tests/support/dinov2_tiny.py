"""A tiny ViT of DINOv2's form, and clips to show it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import dinov2_model as model
from benchmarks import film

WIDTH, LAYERS = 24, 2


def tiny_weights() -> dict[str, Tensor]:
    """Weights of a ViT of 2 layers with 6 heads of 4, that bfloat16 holds."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return (0.2 * torch.randn(shape, generator=generator)).bfloat16().float()

    found = {
        f"{model.PROJECTION}.weight": random(WIDTH, 3, model.PATCH, model.PATCH),
        f"{model.PROJECTION}.bias": random(WIDTH),
        model.POSITION_TABLE: random(1, model.POSITIONS**2, WIDTH),
    }
    for i in range(LAYERS):
        own = f"encoder.layer.{i}."
        for name in ("norm1", "norm2"):
            found |= {f"{own}{name}.weight": 1 + random(WIDTH), f"{own}{name}.bias": random(WIDTH)}
        for name in ("layer_scale1", "layer_scale2"):
            found[f"{own}{name}.lambda1"] = random(WIDTH)
        sizes = {
            "attention.attention.query": (WIDTH, WIDTH),
            "attention.attention.key": (WIDTH, WIDTH),
            "attention.attention.value": (WIDTH, WIDTH),
            "attention.output.dense": (WIDTH, WIDTH),
            "mlp.fc1": (4 * WIDTH, WIDTH),
            "mlp.fc2": (WIDTH, 4 * WIDTH),
        }
        for name, (out, into) in sizes.items():
            found |= {f"{own}{name}.weight": random(out, into), f"{own}{name}.bias": random(out)}
    return {name: x.bfloat16().float() for name, x in found.items()}


def clips(count: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name in film.CLIPS[:2]:
        small = torch.rand(1, 3, 4, 6, generator=generator)
        picture = 255 * F.interpolate(small, size=(112, 140), mode="bilinear")
        frame = picture.to(torch.uint8)[0].permute(1, 2, 0)
        found[name] = torch.stack([frame.roll(14 * i, 1) for i in range(count)])
    return found
