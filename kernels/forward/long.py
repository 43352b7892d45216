"""The forward pass of long sequences: query tiles go through one small workspace in chunks.

Scores, lists and mass terms of (tiles x blocks) would take several times the memory of the keys and
values. c and g need those of the probes' tiles only, so these come first; then each chunk of tiles
is scored, routed and attended before the next takes its place. Keys and values are read where they
are, row by row in their order. Results are those of `short.split_heads`, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from freqopt.config import QUERY_TILE
from freqopt.kernels.device import processors
from freqopt.kernels.forward.attention import attend, store_text
from freqopt.kernels.forward.call import Call, Findings, Route, Summaries, Target
from freqopt.kernels.forward.density import RANK_BITS_ANEW, threshold_of_density
from freqopt.kernels.forward.probe import fit_probes, probe_space, unfitted
from freqopt.kernels.forward.routing import limits_of, probe_rows, route_probes, score_tiles
from freqopt.kernels.forward.short import reached_density
from freqopt.kernels.forward.summaries import summarise_in_place
from freqopt.kernels.layout import PER_BYTE, Settings
from freqopt.kernels.portable.long import route_tiles_kernel
from freqopt.kernels.split_launches import LONG_ROUTE_BLOCKS
from freqopt.kernels.tape import queued
from freqopt.kernels.workspace import chunk_tiles


class Space(NamedTuple):
    """The workspace, flat: each chunk uses as much of it as it needs.

    score: float32, and the exact lists as int32; mass_term: float16.
    """

    score: Tensor
    mass_term: Tensor


class Walk:
    """What is the same for all chunks of one call.

    every: (tiles,) int32, all tiles; packed: the route, of which each chunk writes its tiles.
    """

    def __init__(self, call: Call, summaries: Summaries) -> None:
        self.call, self.summaries = call, summaries
        self.blocks = summaries.low_key.shape[2]
        self.tiles = triton.cdiv(call.queries, QUERY_TILE)
        device = call.query.device
        self.chunk = chunk_tiles(
            call.tokens,
            call.queries,
            call.dim,
            call.query.element_size(),
            call.group_size,
            processors(device),
        )
        self.every = torch.arange(self.tiles, device=device, dtype=torch.int32)
        self.packed = torch.empty(
            *call.per_head,
            self.tiles,
            triton.cdiv(self.blocks, PER_BYTE),
            device=device,
            dtype=torch.uint8,
        )

    def space(self) -> Space:
        """A workspace for one chunk after the other."""
        cells, device = self.call.pairs * self.chunk * self.blocks, self.call.query.device
        return Space(
            torch.empty(cells, device=device, dtype=torch.float32),
            torch.empty(cells, device=device, dtype=torch.float16),
        )

    def chunks(self) -> Iterator[Tensor]:
        """Lists of the tiles that go together."""
        yield from self.every.split(self.chunk)

    def scored(self, tiles: Tensor, space: Space) -> tuple[Tensor, Tensor]:
        """Scores and mass terms of listed tiles, (B, H, tiles, blocks) each, in the workspace."""
        shape = (*self.call.per_head, len(tiles), self.blocks)
        score, mass_term = (x[: math.prod(shape)].view(shape) for x in space)
        score_tiles(self.call, self.summaries, score, mass_term, tiles)
        return score, mass_term

    def routed(self, tiles: Tensor, limits: Tensor, space: Space) -> Route:
        """Bands of listed tiles; the scores give way to the lists, the route goes to `packed`."""
        score, mass_term = self.scored(tiles, space)
        exact_list = score.view(torch.int32)
        counts = torch.empty(
            *self.call.per_head, len(tiles), device=score.device, dtype=torch.int32
        )
        step = max(min(int(triton.next_power_of_2(self.blocks)), LONG_ROUTE_BLOCKS), PER_BYTE)
        launch = self.call.launches["route_tiles"]
        queued(route_tiles_kernel, launch.grid(tiles=len(tiles), pairs=self.call.pairs))(
            score, limits, mass_term, self.packed, exact_list, counts, tiles,
            len(tiles), self.tiles, self.blocks, self.packed.shape[-1],
            **launch.fixed, BJ=step, OWN=self.call.own,
        )  # fmt: skip
        return Route(self.packed, exact_list, counts, mass_term)

    def limits_of(self, density: float) -> Tensor:
        """Thresholds (B, H) of a density: everything is scored anew for each of its bits."""
        space = self.space()

        def scores() -> Iterator[tuple[Tensor, Tensor]]:
            for tiles in self.chunks():
                yield tiles, self.scored(tiles, space)[0]

        shape = (*self.call.per_head, self.tiles, self.blocks)
        return threshold_of_density(
            scores,
            shape,
            density,
            self.call.query.device,
            own=self.call.own,
            rank_bits=RANK_BITS_ANEW,
        )


def split_heads(call: Call, threshold: Tensor, settings: Settings, target: Target) -> Findings:
    """Attend into `target`; threshold: (H,), used where there is no density."""
    device = call.query.device
    call, summaries = summarise_in_place(call)
    walk = Walk(call, summaries)
    if settings.density > 0.0:
        limits = walk.limits_of(settings.density)
    else:
        limits = limits_of(call, threshold)
    probes = min(settings.probes, call.queries)
    if not probes:
        fitted = unfitted(call, summaries)
        error = torch.full(call.per_head, torch.nan, device=device, dtype=torch.float32)
    else:
        probing = probe_space(call, walk.blocks, probes)
        rows = probe_rows(call, walk.blocks, probes)
        route = route_probes(call, summaries, limits, rows)
        fit_probes(call, summaries, route, probing, by_probe=True)
        fitted, error = probing.fitted, probing.error
        del probing, rows, route
    # Not before: what the fit needed is free again.
    chunk, counts = walk.space(), []
    for tiles in walk.chunks():
        route = walk.routed(tiles, limits, chunk)
        attend(call, summaries, route, fitted, target, tiles)
        counts.append(route.counts)
    store_text(call, target)
    reached = reached_density(torch.cat(counts, 2), walk.blocks)
    return Findings(reached, error, walk.packed, *fitted)
