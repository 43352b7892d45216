"""The forward pass of long sequences: query tiles go through one small workspace in chunks.

Scores, lists and mass terms of (tiles x blocks) would take several times the memory of the keys and
values. c and g need those of the probes' tiles only, so these come first; then each chunk of tiles
is scored, routed and attended before the next takes its place. Keys and values are read where they
are, row by row in token order. Results are those of `split.split_heads`, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from freqopt.config import MID_RATIO, QUERY_TILE
from freqopt.kernels.device import processors
from freqopt.kernels.forward import split
from freqopt.kernels.forward.probe import fit_probes, probe_space
from freqopt.kernels.hopper import launch as hopper
from freqopt.kernels.layout import PER_BYTE, Sequence, Settings
from freqopt.kernels.portable.long import rank_kernel, route_tiles_kernel
from freqopt.kernels.tiles import Launch
from freqopt.kernels.tuned import launch_on
from freqopt.kernels.workspace import chunk_tiles

RANK_BITS = ((11, 20), (10, 10), (10, 0))
"""Bits of a score that one pass over all scores finds of a density's threshold: how many, and how
many lower ones are left. The sign is no bit of a score."""

ROUTE_STEP = 1024


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

    def __init__(
        self, query: Tensor, summaries: split.Summaries, sequence: Sequence, scale: float,
        launch: Launch,
    ) -> None:  # fmt: skip
        batch, heads, _, dim = query.shape
        kv_heads, self.blocks = summaries.low_key.shape[1:3]
        self.query, self.summaries, self.sequence = query, summaries, sequence
        self.launch, self.scale = launch, scale
        self.heads = (batch, heads)
        self.tiles = triton.cdiv(sequence.tokens, QUERY_TILE)
        self.chunk = chunk_tiles(
            sequence.tokens, dim, query.element_size(), heads // kv_heads, processors(query.device)
        )
        self.every = torch.arange(self.tiles, device=query.device, dtype=torch.int32)
        self.packed = torch.empty(
            *self.heads, self.tiles, triton.cdiv(self.blocks, PER_BYTE),
            device=query.device, dtype=torch.uint8,
        )  # fmt: skip

    def space(self) -> Space:
        """A workspace for one chunk after the other."""
        cells = math.prod(self.heads) * self.chunk * self.blocks
        return Space(*(
            torch.empty(cells, device=self.query.device, dtype=dtype)
            for dtype in (torch.float32, torch.float16)
        ))  # fmt: skip

    def chunks(self) -> Iterator[Tensor]:
        """Lists of the tiles that go together."""
        yield from self.every.split(self.chunk)

    def scored(self, tiles: Tensor, space: Space) -> tuple[Tensor, Tensor]:
        """Scores and mass terms of listed tiles, (B, H, tiles, blocks) each, in the workspace."""
        shape = (*self.heads, len(tiles), self.blocks)
        score, mass_term = (x[: math.prod(shape)].view(shape) for x in space)
        split.score_tiles(
            self.query, self.summaries, score, mass_term, self.sequence,
            scale=self.scale, launch=self.launch, tile_list=tiles,
        )  # fmt: skip
        return score, mass_term

    def routed(self, tiles: Tensor, limits: Tensor, space: Space) -> split.Route:
        """Bands of listed tiles; the scores give way to the lists, the route goes to `packed`."""
        score, mass_term = self.scored(tiles, space)
        exact_list = score.view(torch.int32)
        counts = torch.empty(*self.heads, len(tiles), device=score.device, dtype=torch.int32)
        route_tiles_kernel[(len(tiles), math.prod(self.heads))](
            score, limits, mass_term, self.packed, exact_list, counts, tiles,
            len(tiles), self.tiles, self.blocks, self.packed.shape[-1], BJ=self.step, num_warps=4,
        )  # fmt: skip
        return split.Route(self.packed, exact_list, counts, mass_term)

    @property
    def step(self) -> int:
        """Blocks that a program of the routes and ranks takes at a time."""
        return max(min(int(triton.next_power_of_2(self.blocks)), ROUTE_STEP), PER_BYTE)

    def limits_of(self, density: float) -> Tensor:
        """Thresholds (B, H) of a density, as reference.threshold_for_density finds them.

        The threshold's bits are found from the top, by histograms: three times over all scores.
        """
        pairs = self.tiles * self.blocks
        wanted = min(max(math.ceil(density * pairs), 1), pairs)
        device = self.query.device
        heads = math.prod(self.heads)
        space = self.space()
        left = torch.full((heads, 1), wanted, device=device, dtype=torch.int32)
        prefix = torch.zeros(heads, device=device, dtype=torch.int32)
        for bits, below in RANK_BITS:
            histogram = torch.zeros(heads, 2**bits, device=device, dtype=torch.int32)
            for tiles in self.chunks():
                rank_kernel[(len(tiles), heads)](
                    self.scored(tiles, space)[0], tiles, prefix, histogram, len(tiles),
                    self.blocks, BITS=bits, BELOW=below, BJ=self.step, num_warps=8,
                )  # fmt: skip
            reached = histogram.flip(1).cumsum(1, dtype=torch.int32).flip(1)
            found = (reached >= left).sum(1, keepdim=True, dtype=torch.int64) - 1
            more = F.pad(reached, (0, 1)).gather(1, found + 1)
            left = left - more
            prefix = (prefix << bits) + found[:, 0].to(torch.int32)
        return prefix.view(torch.float32).view(self.heads)


def split_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    budget: Tensor,
    key_mask: Tensor | None,
    sequence: Sequence,
    settings: Settings,
    out: Tensor,
) -> split.Findings:
    """The forward pass of heads that go together, into `out` (B, H, N, D)."""
    scale, density, mid_band, probes = settings
    batch, heads, _, dim = query.shape
    launch = launch_on(query.device, query.dtype, dim, sequence.tokens)
    options: dict[str, Any] = {"scale": scale, "launch": launch}
    if hopper.applies(query):
        key, value = hopper.gatherable(key), hopper.gatherable(value)
    summaries = split.summarise(key, value, sequence, launch, ordered=False)
    walk = Walk(query, summaries, sequence, scale, launch)
    if density > 0.0:
        limits = walk.limits_of(density) * (MID_RATIO if mid_band else 1.0)
    else:
        limits = split.given_limits(budget, batch, mid_band)
    probes = min(probes, sequence.tokens)
    coefficients = torch.ones(batch, heads, 2, device=query.device)
    error = torch.full((batch, heads), torch.nan, device=query.device)
    if probes:
        space = probe_space(query, walk.blocks, probes)
        rows = split.probe_rows(query, walk.blocks, probes)
        fit_probes(
            query, key, value, key_mask, summaries,
            split.route_probes(query, summaries, limits, sequence, rows, **options),
            sequence, space, by_probe=True, **options,
        )  # fmt: skip
        coefficients, error = space.coefficients, space.error
        del space, rows
    # Not before: what the fit needed is free again.
    chunk, counts = walk.space(), []
    for tiles in walk.chunks():
        route = walk.routed(tiles, limits, chunk)
        split.attend(
            query, key, value, key_mask, summaries, route, coefficients, out, sequence,
            tile_list=tiles, **options,
        )  # fmt: skip
        counts.append(route.counts)
    split.store_text(query, key, value, key_mask, out, sequence, scale)
    reached = split.reached_density(torch.cat(counts, 2), walk.blocks)
    return split.Findings(reached, error, walk.packed, coefficients)
