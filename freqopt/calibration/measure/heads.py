"""Heads of a call in one order, as errors of their query tiles are found: by float32 or by kernels.

Both give the same quantities. In float32 a head is taken by itself, on any device: the exact
attention of a tile is summed up by key block, which serves all thresholds at once. On a GPU the
op's own kernels attend the tiles of many heads at each threshold, in a small part of that time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from freqopt.calibration.measure.attention import AttentionCall
from freqopt.calibration.measure.tiles import (
    CHUNK_BYTES,
    HeadTokens,
    TileErrors,
    fit_probes,
    tile_errors,
)
from freqopt.config import KEY_BLOCK, QUERY_TILE
from freqopt.kernels import reference
from freqopt.kernels.layout import Inputs, Settings, text_bias

GROUP_BYTES = 2**30
"""Bound on what heads that go together take on a GPU, all orders at a time."""


class HeadsInOrder(Protocol):
    """Some heads of a call in one order, at the thresholds of a ladder.

    score: (B, H, tiles, blocks) float32, infinite for pairs that are exact at any threshold.
    probe_error: (rungs, H), mean square over the batch of what the op's probes report.
    """

    score: Tensor
    probe_error: Tensor

    def errors(self, tiles: Tensor) -> TileErrors:
        """Of query tiles (n,) int64 at every threshold."""


Making = Callable[[Tensor | None], HeadsInOrder]
"""Makes the heads of a group in an order (B, Hkv, T) of all key heads; None for the grid's."""


def groups(
    call: AttentionCall, orders: int, thresholds: Sequence[float], probes: int
) -> Iterator[tuple[slice, Making]]:
    """Query heads of a call that are measured together, and what makes them.

    orders: how many of each group are held at a time.
    """
    heads, key_heads = call.query.shape[1], call.key.shape[1]
    share = heads // key_heads
    if not call.query.is_cuda:
        for head in range(heads):

            def alone(order: Tensor | None, head: int = head) -> HeadsInOrder:
                return HeadAlone(head_tokens(call, head, order), thresholds, probes)

            yield slice(head, head + 1), alone
        return
    step = max(GROUP_BYTES // (_bytes_per_head(call, orders) * share), 1)
    for start in range(0, key_heads, step):
        of_keys = slice(start, min(start + step, key_heads))
        own = slice(of_keys.start * share, of_keys.stop * share)

        def together(
            order: Tensor | None, own: slice = own, of_keys: slice = of_keys
        ) -> HeadsInOrder:
            query, key, value = call.query[:, own], call.key[:, of_keys], call.value[:, of_keys]
            part = replace(call, query=query, key=key, value=value)
            return HeadsTogether(
                part, None if order is None else order[:, of_keys], thresholds, probes
            )

        yield own, together


def _bytes_per_head(call: AttentionCall, orders: int) -> int:
    """An output, what sorts the scores of an order, and those of each order with mass terms."""
    batch, _, tokens, dim = call.query.shape
    pairs = -(-tokens // QUERY_TILE) * -(-tokens // KEY_BLOCK)
    return batch * (tokens * dim * call.query.element_size() + pairs * (12 + 6 * orders))


def head_tokens(call: AttentionCall, head: int, order: Tensor | None = None) -> HeadTokens:
    """A head's tokens in an order (B, Hkv, T) or by the grid, and how its router scores them."""
    layout = call.layout
    at = head // (call.query.shape[1] // call.key.shape[1])
    query, key, value = (
        x[:, i : i + 1].float() for x, i in ((call.query, head), (call.key, at), (call.value, at))
    )
    of_head = None if order is None else order[:, at : at + 1]
    video = [layout.video_of(x, of_head) for x in (query, key, value)]
    text_key = layout.text_of(key)
    summary = reference.summarise(video[1], video[2], KEY_BLOCK)
    scores = reference.score_pairs(video[0], summary, call.scale, call.query.dtype)
    tiles, blocks = scores.score.shape[2:]
    own = reference.own_blocks(tiles, blocks, scores.score.device)
    return HeadTokens(
        query=video[0],
        key=video[1],
        value=video[2],
        text_key=text_key,
        text_value=layout.text_of(value),
        text_bias=text_bias(layout.text_mask(call.key_mask), text_key),
        summary=summary,
        score=scores.score.masked_fill(own, torch.inf),
        mass_term=scores.mass_term,
        scale=call.scale,
    )


class HeadAlone:
    """One head in float32, see `HeadsInOrder`."""

    def __init__(self, tokens: HeadTokens, thresholds: Sequence[float], probes: int) -> None:
        self.tokens, self.score = tokens, tokens.score
        self.thresholds = torch.tensor(thresholds, device=tokens.score.device, dtype=torch.float32)
        self._probe = fit_probes(tokens, self.thresholds, probes)
        self.probe_error = self._probe.error.double().square().mean(0)[:, None]

    def errors(self, tiles: Tensor) -> TileErrors:
        """See `HeadsInOrder`."""
        found = tile_errors(self.tokens, self.thresholds, tiles, self._probe)
        return TileErrors(*(x[:, None] for x in found))


class HeadsTogether:
    """Heads by the op's kernels, see `HeadsInOrder`. On Hopper outputs are of the tensors' type."""

    def __init__(
        self, call: AttentionCall, order: Tensor | None, thresholds: Sequence[float], probes: int
    ) -> None:
        """order: (B, Hkv, T) int32; None for the grid's."""
        from freqopt.kernels.forward.sampled import SampledCall

        limits = torch.zeros(call.query.shape[1], device=call.query.device, dtype=torch.float32)
        inputs = Inputs(
            call.query, call.key, call.value, limits, call.key_mask, call.layout, key_order=order
        )
        self._call = SampledCall(inputs, Settings(call.scale, 0.0, probes))
        self._tokens, self._thresholds = call.layout.tokens, thresholds
        self.score = self._call.score
        self._fitted, reported = self._call.fit(thresholds)
        self.probe_error = reported.double().square().mean(1)

    def errors(self, tiles: Tensor) -> TileErrors:
        """See `HeadsInOrder`."""
        row = tiles[:, None] * QUERY_TILE + torch.arange(QUERY_TILE, device=tiles.device)
        real, listed = (row < self._tokens)[..., None], tiles.to(torch.int32)

        def of_tiles(rows: Tensor) -> Tensor:
            return rows.float().view(*rows.shape[:2], *row.shape, -1) * real

        truth = of_tiles(self._call.exact(listed))
        errors = torch.empty(
            len(self._thresholds),
            truth.shape[1],
            len(tiles),
            device=tiles.device,
            dtype=torch.float32,
        )
        alongs = torch.empty_like(errors)
        at_once, held = max(CHUNK_BYTES // (8 * truth.numel()), 1), list[Tensor]()
        for rung, rows in self._call.attend(listed, self._thresholds, self._fitted):
            held.insert(0, of_tiles(rows))
            if len(held) == at_once or not rung:  # the last one
                wrong = torch.stack(held).sub_(truth)
                own = slice(rung, rung + len(held))
                alongs[own] = (wrong * truth).sum((1, -2, -1))
                errors[own] = wrong.square_().sum((1, -2, -1))
                held.clear()
        return TileErrors(errors, alongs)
