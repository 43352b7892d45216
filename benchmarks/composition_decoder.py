"""What a step leaves as a picture: diffusers' Wan autoencoder, whole and in overlapping tiles.

Tiling takes memory from the decoder and none of the transformer's time, so all there is to see is
that both go together: the picture of a split step, decoded in tiles, beside that of a dense one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.large import Meter

WHOLE, TILED = "decoded whole", "decoded in tiles"

WIDTH = 96
"""Channels of the first level of Wan 2.1's autoencoder."""


def build(latent: Tensor, width: int) -> nn.Module:
    """The autoencoder with random weights, for latents (1, C, t, h, w) as these are.

    width: of its first level.
    """
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    channels = latent.shape[1]
    with torch.device(latent.device):
        decoder: nn.Module = AutoencoderKLWan(
            base_dim=width,
            z_dim=channels,
            latents_mean=[0.0] * channels,
            latents_std=[1.0] * channels,
        )
    return decoder.to(latent.dtype).eval()


def rows(
    latents: Mapping[str, Tensor], width: int, meter: Meter, tile: int | None = None
) -> Iterator[dict[str, Any]]:
    """A row for each attention, whole and in tiles.

    latents: what each attention's step leaves, "dense" first, which decoded whole is the truth.
    tile: side of a tile in pixels; the library's without it.
    """
    decoder: Any = build(latents["dense"], width)
    truth: Tensor | None = None
    for name, latent in latents.items():
        for how in (WHOLE, TILED):
            if how == TILED:
                strides = None if tile is None else tile * 3 // 4
                decoder.enable_tiling(tile, tile, strides, strides)
            else:
                decoder.disable_tiling()
            meter.forget()
            found: list[Tensor] = []

            def decode(latent: Tensor = latent, found: list[Tensor] = found) -> None:
                found[:] = [decoder.decode(latent, return_dict=False)[0]]

            with torch.no_grad():
                seconds = meter.seconds(decode)
            picture = found[0].float()
            truth = picture if truth is None else truth
            yield {
                "attention": name,
                "with": how,
                "decode_s": seconds,
                "peak_gib": meter.peak(),
                "error": float((picture - truth).norm() / truth.norm()),
            }
