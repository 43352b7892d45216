"""Between the model's sequence and the split's: text taken apart, the other tokens in their order.

The op takes and returns tokens as the model numbers them; only the implementations see the order in
which they are cut into tiles and blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from freqopt.config import KEY_BLOCK
from freqopt.grid import Grid, token_order

PER_BYTE = 4
"""Pairs of a packed route to a byte, two bits each."""


class Settings(NamedTuple):
    """Constants of one call; as in `split_attention`.

    density: 0 where thresholds rule instead. largest_chunk: of the content orders, 0 for none.
    log_sum: whether the softmax sums' logarithms are wanted.
    """

    scale: float
    density: float
    probes: int
    largest_chunk: int = 0
    log_sum: bool = False


class TokenLayout(NamedTuple):
    """How a sequence of N tokens is laid out: text_before + t*h*w + text_after.

    grid: extents of the tokens that are split; (1, 1, T) where they have none, for memory order.
    """

    grid: Grid
    text_before: int
    text_after: int

    @classmethod
    def of(cls, extents: Sequence[int]) -> TokenLayout:
        """From (t, h, w, text_before, text_after)."""
        t, h, w, before, after = extents
        return cls((t, h, w), before, after)

    @property
    def tokens(self) -> int:
        """Number of video tokens."""
        return math.prod(self.grid)

    @property
    def text(self) -> int:
        """Number of text tokens, before and after together."""
        return self.text_before + self.text_after

    def base_order(self, device: torch.device) -> Tensor:
        """The order (T,) int32 by the grid alone, counted from the first token that is no text."""
        return token_order(self.grid, device)

    def video_of(self, x: Tensor, order: Tensor | None = None) -> Tensor:
        """Video tokens of (B, H, N, D), in an order (B, H, T), or in the base order."""
        video = x[:, :, self.text_before : self.text_before + self.tokens]
        if order is None:
            return video.index_select(2, self.base_order(x.device))
        return video.gather(2, order.long()[..., None].expand(-1, -1, -1, x.shape[-1]))

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

    def store(
        self, out: Tensor, video: Tensor, text: Tensor | None, order: Tensor | None = None
    ) -> None:
        """Write video (in `order`, or the base order) and text back into `out` (B, H, N, D)."""
        index = self.base_order(out.device)[None, None] if order is None else order
        item, head = (torch.arange(n, device=out.device) for n in out.shape[:2])
        where = index.long() + self.text_before
        out[item[:, None, None], head[:, None], where] = video.to(out.dtype)
        if text is not None:
            self.store_text(out, text)

    def store_text(self, out: Tensor, text: Tensor) -> None:
        """Write text tokens (B, H, X, D) back into `out` (B, H, N, D)."""
        out[:, :, : self.text_before] = text[:, :, : self.text_before]
        out[:, :, self.text_before + self.tokens :] = text[:, :, self.text_before :]


class Inputs(NamedTuple):
    """The op's tensors and how their tokens are laid out; as in `split_attention_op`.

    query_layout: None where the queries are the keys' own tokens.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    threshold: Tensor
    key_mask: Tensor | None
    layout: TokenLayout
    query_layout: TokenLayout | None = None
    chunks: Tensor | None = None
    key_order: Tensor | None = None
    query_order: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All of them, None for those that there are not."""
        of_queries = self.query, self.key, self.value, self.threshold, self.key_mask
        return *of_queries, self.chunks, self.key_order, self.query_order

    def heads(self, items: slice, kv: slice) -> Inputs:
        """Of some batch items and key heads, with the query heads that share them."""
        share = self.query.shape[1] // self.key.shape[1]
        own = slice(kv.start * share, kv.stop * share)

        def of(x: Tensor | None, heads: slice) -> Tensor | None:
            return None if x is None else x[items, heads]

        return self._replace(
            query=self.query[items, own],
            key=self.key[items, kv],
            value=self.value[items, kv],
            threshold=self.threshold[own],
            key_mask=None if self.key_mask is None else self.key_mask[items],
            chunks=None if self.chunks is None else self.chunks[kv],
            key_order=of(self.key_order, kv),
            query_order=of(self.query_order, own),
        )

    def order_memory(self, settings: Settings) -> tuple[Tensor | None, Tensor | None]:
        """Memory for the orders (B, Hkv, T) of keys and (B, H, Tq) of queries that are made."""
        if self.chunks is None or not settings.largest_chunk:
            return None, None
        of_keys = of_queries = None
        if self.key_order is None:
            shape = (*self.key.shape[:2], self.layout.tokens)
            of_keys = torch.empty(shape, device=self.key.device, dtype=torch.int32)
        if self.query_layout is not None and self.query_order is None:
            shape = (*self.query.shape[:2], self.query_layout.tokens)
            of_queries = torch.empty(shape, device=self.query.device, dtype=torch.int32)
        return of_keys, of_queries

    def log_sum_memory(self, settings: Settings) -> Tensor | None:
        """Memory for the logarithms (B, H, Nq) of the softmax sums, if they are wanted."""
        if not settings.log_sum:
            return None
        return torch.empty(self.query.shape[:3], device=self.query.device, dtype=torch.float32)


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """(B, Hkv, N, D) -> (B, H, N, D) for grouped-query attention."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def text_bias(mask: Tensor | None, text_key: Tensor) -> Tensor:
    """Additive bias (B, 1, 1, X) of the text keys: 0 where attended, -inf where masked."""
    batch, _, text, _ = text_key.shape
    bias = torch.zeros(batch, 1, 1, text, device=text_key.device, dtype=torch.float32)
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
