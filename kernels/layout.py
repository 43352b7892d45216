"""Between the model's sequence and the split's: text taken apart, video in token order.

The op takes and returns tokens in the model's own order; only the implementations see token order.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from freqopt.config import KEY_BLOCK
from freqopt.grid import Grid, token_order

PER_BYTE = 4
"""Pairs of a packed route to a byte, two bits each."""


class Settings(NamedTuple):
    """Constants of one call, in the order of the op's schema; as in `split_attention`.

    density: 0 where a budget rules instead.
    """

    scale: float
    density: float
    mid_band: bool
    probes: int


class Sequence(NamedTuple):
    """How one sequence of N tokens is laid out: text_before + t*h*w + text_after."""

    grid: Grid
    text_before: int
    text_after: int

    @property
    def tokens(self) -> int:
        """Number of video tokens."""
        return math.prod(self.grid)

    @property
    def text(self) -> int:
        """Number of text tokens, before and after together."""
        return self.text_before + self.text_after

    def video_of(self, x: Tensor) -> Tensor:
        """Video tokens of (B, H, N, D), in token order."""
        video = x[:, :, self.text_before : self.text_before + self.tokens]
        return video[:, :, token_order(self.grid, x.device).long()]

    def text_of(self, x: Tensor) -> Tensor:
        """Text tokens of (B, H, N, D), those before the video first."""
        return torch.cat(
            [x[:, :, : self.text_before], x[:, :, self.text_before + self.tokens :]], 2
        )

    def text_mask(self, key_mask: Tensor | None) -> Tensor | None:
        """Text columns (B, X) of a (B, N) key mask."""
        if key_mask is None:
            return None
        after = key_mask[:, self.text_before + self.tokens :]
        return torch.cat([key_mask[:, : self.text_before], after], 1)

    def sequence_mask(self, key_mask: Tensor | None) -> Tensor | None:
        """The (B, N) mask with every video key attended."""
        if key_mask is None:
            return None
        whole = key_mask.clone()
        whole[:, self.text_before : self.text_before + self.tokens] = True
        return whole

    def store(self, out: Tensor, video: Tensor, text: Tensor | None) -> None:
        """Write video (token order) and text tokens back into `out` (B, H, N, D)."""
        order = token_order(self.grid, out.device).long() + self.text_before
        out.index_copy_(2, order, video.to(out.dtype))
        if text is not None and self.text:
            out[:, :, : self.text_before] = text[:, :, : self.text_before]
            out[:, :, self.text_before + self.tokens :] = text[:, :, self.text_before :]


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """(B, Hkv, N, D) -> (B, H, N, D) for grouped-query attention."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def text_bias(mask: Tensor | None, text_key: Tensor) -> Tensor:
    """Additive bias (B, 1, 1, X) of the text keys: 0 where attended, -inf where masked."""
    batch, _, text, _ = text_key.shape
    bias = torch.zeros(batch, 1, 1, text, device=text_key.device)
    if mask is None:
        return bias
    return bias.masked_fill(~mask[:, None, None, :], -torch.inf)


def pack_route(route: Tensor) -> Tensor:
    """(B, H, tiles, blocks) int8 -> (B, H, tiles, ceil(blocks / 4)) uint8.

    The first of four blocks is in a byte's lowest bits.
    """
    missing = -route.shape[-1] % PER_BYTE
    fours = F.pad(route, (0, missing)).to(torch.uint8).unflatten(-1, (-1, PER_BYTE))
    packed = torch.zeros_like(fours[..., 0])
    for i in range(PER_BYTE):
        packed |= fours[..., i] << (2 * i)
    return packed


def unpack_route(route: Tensor, tokens: int) -> Tensor:
    """The (B, H, tiles, blocks) int8 route of so many video tokens, from either form."""
    if route.dtype == torch.int8:
        return route
    bands = torch.stack([(route >> (2 * i)) & 3 for i in range(PER_BYTE)], -1).flatten(-2)
    return bands[..., : -(-tokens // KEY_BLOCK)].to(torch.int8)
