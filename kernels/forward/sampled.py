"""The forward pass on a few query tiles, at any threshold: what calibration measures errors on.

All pairs are scored once, by the op's own kernels. A threshold then costs the attention of the
tiles asked for and a fit of the probes; keys and values are read where they are, so that a call
takes little memory beside its scores.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from freqopt.config import QUERY_TILE
from freqopt.kernels.forward.attention import attend
from freqopt.kernels.forward.call import Route, Target
from freqopt.kernels.forward.probe import fit_probes, probe_space
from freqopt.kernels.forward.routing import (
    PROBE_TILES,
    ROUTE_WARPS,
    limits_of,
    route_step,
    score_tiles,
)
from freqopt.kernels.forward.split import call_of, on_device, readable
from freqopt.kernels.forward.summaries import summarise
from freqopt.kernels.hopper import launch as hopper
from freqopt.kernels.layout import Inputs, Settings
from freqopt.kernels.portable.glue import probe_tiles_kernel
from freqopt.kernels.portable.prepare import route_kernel


class SampledCall:
    """A call whose queries are its keys' tokens, all its pairs scored.

    score: (B, H, tiles, blocks) float32, of pairs that are exact at any threshold too.
    """

    def __init__(self, inputs: Inputs, settings: Settings) -> None:
        """inputs: on one GPU; of their threshold only the device counts."""
        inputs = readable(inputs)
        with on_device(inputs.query):
            call = call_of(inputs, settings, *inputs.order_memory(settings))
            if hopper.applies(call.query):
                key, value = hopper.gatherable(call.key), hopper.gatherable(call.value)
                call = call._replace(key=key, value=value)
            self.call, self.summaries = call, summarise(call, ordered=False)
            self.tiles = triton.cdiv(call.queries, QUERY_TILE)
            self.blocks = self.summaries.low_key.shape[2]
            shape, device = (*call.per_head, self.tiles, self.blocks), call.query.device
            self.score = torch.empty(shape, device=device, dtype=torch.float32)
            self._mass_term = torch.empty(shape, device=device, dtype=torch.float16)
            score_tiles(call, self.summaries, self.score, self._mass_term)
        self.probes = min(settings.probes, call.queries)
        # The Hopper kernel's result leaves through shared memory of the queries' type.
        kept = call.query.dtype if hopper.applies(call.query) else torch.float32
        batch, heads, length, dim = call.query.shape
        out = torch.empty(batch, length, heads, dim, device=device, dtype=kept)
        self._target = Target(out.transpose(1, 2), None)

    def fit(self, threshold: float) -> tuple[Tensor, Tensor]:
        """The probes' scalars (B, H, 2) and the error (B, H) that they report at a threshold."""
        call, device = self.call, self.call.query.device
        if not self.probes:
            ones = torch.ones(*call.per_head, 2, device=device, dtype=torch.float32)
            return ones, torch.full_like(ones[..., 0], torch.nan)
        with on_device(call.query):
            space = probe_space(call, self.blocks, self.probes)
            tiles = torch.empty(self.probes, device=device, dtype=torch.int32)
            probe_tiles_kernel[(1,)](
                tiles, call.queries, self.probes, ROWS=PROBE_TILES, num_warps=1
            )
            route = self._routed(tiles, threshold, lists=False)
            fit_probes(call, self.summaries, route, space, by_probe=True)
        return space.coefficients, space.error

    def attend(self, tiles: Tensor, threshold: float, coefficients: Tensor) -> Tensor:
        """Split attention of listed tiles (n,) int32: (B, H, n * 128, D), rows in token order.

        Rows past the end are the last token's. coefficients: of `fit` at the same threshold.
        """
        call = self.call
        with on_device(call.query):
            route = self._routed(tiles, threshold, lists=True)
            attend(call, self.summaries, route, coefficients, self._target, tiles)
        row = tiles.long()[:, None] * QUERY_TILE + torch.arange(QUERY_TILE, device=tiles.device)
        row = row.flatten().clamp(max=call.queries - 1)
        order = call.query_order
        if order.row:
            of_keys = order.index.view(call.batch, call.kv_heads, -1)[..., row]
            token = of_keys.repeat_interleave(call.group_size, 1)
        else:
            token = order.index[row].expand(*call.per_head, -1)
        token = token.long() + call.query_layout.text_before
        return self._target.out.gather(2, token[..., None].expand(-1, -1, -1, call.dim))

    def _routed(self, tiles: Tensor, threshold: float, *, lists: bool) -> Route:
        """Bands of listed tiles at one threshold for all heads."""
        call, device = self.call, tiles.device
        at = tiles.long()
        score, mass_term = self.score[:, :, at], self._mass_term[:, :, at]
        thresholds = torch.full((call.heads,), threshold, device=device, dtype=torch.float32)
        limits = limits_of(thresholds, call.batch)
        route = torch.empty(score.shape, device=device, dtype=torch.int8)
        exact_list, counts = tiles, tiles
        if lists:
            exact_list = torch.empty(score.shape, device=device, dtype=torch.int32)
            counts = torch.empty(score.shape[:3], device=device, dtype=torch.int32)
        route_kernel[(len(tiles), call.pairs)](
            score, limits, mass_term, route, exact_list, counts, len(tiles), self.blocks,
            BJ=route_step(self.blocks), LISTS=lists, tile_list=tiles, OWN=call.own,
            num_warps=ROUTE_WARPS,
        )  # fmt: skip
        return Route(route, exact_list, counts, mass_term)
