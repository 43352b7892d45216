"""The forward pass on a few query tiles, at any threshold: what calibration measures errors on.

All pairs are scored once, by the op's own kernels. A threshold then costs the attention of the
tiles asked for and a fit of the probes; keys and values are read where they are, so that a call
takes little memory beside its scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import triton
from torch import Tensor

from freqopt.config import QUERY_TILE
from freqopt.kernels.forward.attention import attend
from freqopt.kernels.forward.call import Fitted, Route, Target
from freqopt.kernels.forward.probe import fit_probes, probe_space, unfitted
from freqopt.kernels.forward.routing import list_probe_tiles, route_listed, score_tiles
from freqopt.kernels.forward.split import call_of, on_device, readable
from freqopt.kernels.forward.summaries import summarise_in_place
from freqopt.kernels.hopper import launch as hopper
from freqopt.kernels.layout import Inputs, Settings
from freqopt.kernels.reference import own_blocks


class SampledCall:
    """A call whose queries are its keys' tokens, all its pairs scored.

    score: (B, H, tiles, blocks) float32, infinite for pairs that are exact at any threshold.
    """

    def __init__(self, inputs: Inputs, settings: Settings) -> None:
        """inputs: on one GPU; of their threshold only the device counts."""
        inputs = readable(inputs)
        with on_device(inputs.query):
            call = call_of(inputs, settings, *inputs.order_memory(settings))
            call, summaries = self.call, self.summaries = summarise_in_place(call)
            tiles, self.blocks = triton.cdiv(call.queries, QUERY_TILE), summaries.spread.shape[2]
            shape, device = (*call.per_head, tiles, self.blocks), call.query.device
            self.score = torch.empty(shape, device=device, dtype=torch.float32)
            self._mass_term = torch.empty(shape, device=device, dtype=torch.float16)
            score_tiles(call, summaries, self.score, self._mass_term)
        self.score.masked_fill_(own_blocks(tiles, self.blocks, device), torch.inf)
        self.probes = min(settings.probes, call.queries)

    def fit(self, thresholds: Sequence[float]) -> tuple[Fitted, Tensor]:
        """What the probes give, (rungs, ...), and the errors (rungs, B, H) that they report.

        thresholds: ascending, each for all heads.
        """
        call, device, rungs = self.call, self.call.query.device, len(thresholds)
        errors = _rows_of(call.per_head, rungs, device).fill_(torch.nan)
        if not self.probes:
            alike = (x.expand(rungs, *x.shape) for x in unfitted(call, self.summaries))
            return Fitted(*alike), errors
        coefficients = _rows_of((*call.per_head, 2), rungs, device)
        shape = (rungs, *call.per_head, call.dim, call.dim)
        matrices = torch.empty(shape, device=device, dtype=call.query.dtype)
        with on_device(call.query):
            tiles = torch.empty(self.probes, device=device, dtype=torch.int32)
            list_probe_tiles(call, tiles)
            score, route = self._rows(tiles, lists=False)
            space = probe_space(call, self.blocks, self.probes)
            for rung, limits in self._descending(thresholds):
                route_listed(call, score, limits, route, tiles, lists=False)
                fitted = Fitted(coefficients[rung], matrices[rung])
                own = space._replace(fitted=fitted, error=errors[rung])
                fit_probes(call, self.summaries, route, own, by_probe=True)
        return Fitted(coefficients, matrices), errors

    def exact(self, tiles: Tensor) -> Tensor:
        """Exact attention of listed tiles, as `attend` yields it."""
        fitted = Fitted(*(x[None] for x in unfitted(self.call, self.summaries)))
        ((_, out),) = self.attend(tiles, [0.0], fitted)
        return out

    def attend(
        self, tiles: Tensor, thresholds: Sequence[float], fitted: Fitted
    ) -> Iterator[tuple[int, Tensor]]:
        """Split attention of listed tiles (n,) int32 at every threshold, from the highest down.

        thresholds: ascending, each for all heads. fitted: of `fit` at these. Yields the threshold's
        number and (B, H, n * 128, D), rows in token order, those past the end the last token's.
        """
        call, token = self.call, self._tokens(tiles)
        # The Hopper kernel's result leaves through shared memory of the queries' type.
        kept = call.query.dtype if hopper.applies(call.query) else torch.float32
        batch, heads, length, dim = call.query.shape
        out = torch.empty(batch, length, heads, dim, device=tiles.device, dtype=kept)
        target = Target(out.transpose(1, 2), None)
        index = token[..., None].expand(-1, -1, -1, dim)
        with on_device(call.query):
            score, route = self._rows(tiles, lists=True)
            for rung, limits in self._descending(thresholds):
                route_listed(call, score, limits, route, tiles, lists=True)
                own = Fitted(fitted.coefficients[rung], fitted.matrix[rung])
                attend(call, self.summaries, route, own, target, tiles)
                yield rung, target.out.gather(2, index)

    def _tokens(self, tiles: Tensor) -> Tensor:
        """Numbers (B, H, n * 128) in the sequence of the tokens of listed tiles."""
        call, order = self.call, self.call.query_order
        row = tiles.long()[:, None] * QUERY_TILE + torch.arange(QUERY_TILE, device=tiles.device)
        row = row.flatten().clamp(max=call.queries - 1)
        if order.row:
            of_keys = order.index.view(call.batch, call.kv_heads, -1)[..., row]
            token = of_keys.repeat_interleave(call.group_size, 1)
        else:
            token = order.index[row].expand(*call.per_head, -1)
        return token.long() + call.query_layout.text_before

    def _rows(self, tiles: Tensor, *, lists: bool) -> tuple[Tensor, Route]:
        """Scores (B, H, n, blocks) of listed tiles, and memory for their route.

        It is written at one threshold after another, from the highest down: pairs that were exact
        at one stay marked in the mass terms, and are exact at the next too. lists: whether the
        tiles are to be attended.
        """
        at = tiles.long()
        score, mass_term = self.score[:, :, at], self._mass_term[:, :, at]
        route = torch.empty(score.shape, device=tiles.device, dtype=torch.int8)
        exact_list, counts = tiles, tiles
        if lists:
            exact_list = torch.empty(score.shape, device=tiles.device, dtype=torch.int32)
            counts = torch.empty(score.shape[:3], device=tiles.device, dtype=torch.int32)
        return score, Route(route, exact_list, counts, mass_term)

    def _descending(self, thresholds: Sequence[float]) -> Iterator[tuple[int, Tensor]]:
        """Numbers of the thresholds from the highest down, and each for all (B, H)."""
        limits = _rows_of((self.call.pairs,), len(thresholds), self.score.device)
        limits.copy_(torch.tensor(thresholds, dtype=torch.float32, device="cpu")[:, None])
        for rung in reversed(range(len(thresholds))):
            yield rung, limits[rung]


def _rows_of(shape: tuple[int, ...], count: int, device: torch.device) -> Tensor:
    """Memory (count, *shape) whose rows are aligned alike: kernels are compiled for alignment."""
    length = math.prod(shape)
    rows = torch.empty(count, -(-length // 4) * 4, device=device, dtype=torch.float32)
    found: Tensor = rows[:, :length].unflatten(1, shape)
    return found
