"""Launches the router: scores of (query tile, key block) pairs, and their bands."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from freqopt.config import QUERY_TILE, SUB_TILE
from freqopt.kernels.forward.call import Call, Route, Summaries
from freqopt.kernels.forward.density import threshold_of_density
from freqopt.kernels.hopper import launch as hopper
from freqopt.kernels.portable.glue import limits_kernel, probe_tiles_kernel
from freqopt.kernels.portable.prepare import route_kernel
from freqopt.kernels.portable.score import disperse_kernel, pool_tiles_kernel, score_kernel
from freqopt.kernels.split_launches import POOLED_TILES, ROUTE_BLOCKS
from freqopt.kernels.tape import queued


def score_tiles(
    call: Call,
    summaries: Summaries,
    score: Tensor,
    mass_term: Tensor,
    tile_list: Tensor | None = None,
) -> None:
    """Write scores (float32) and mass terms (float16) of tiles, both (B, H, tiles, blocks).

    tile_list: (tiles,) int32, which ones; all of them without it.
    """
    query, launches = call.query, call.launches
    tiles, blocks = score.shape[2:]
    heads, pairs = call.heads, call.batch * call.heads
    rows = triton.cdiv(tiles, POOLED_TILES) * POOLED_TILES * (QUERY_TILE // SUB_TILE)
    sub_mean, tile_square = (
        torch.empty(pairs, n, call.dim, device=query.device, dtype=query.dtype)
        for n in (rows, tiles)
    )
    listed = {} if tile_list is None else {"tile_list": tile_list}
    pool, disperse, score_ = launches["pool_tiles"], launches["disperse"], launches["score"]
    queued(pool_tiles_kernel, pool.grid(pairs=pairs, tiles=tiles))(
        query, call.query_order.index, sub_mean, tile_square,
        *query.stride()[:3], heads, call.queries, tiles, call.query_layout.text_before, call.scale,
        **pool.fixed, **listed, **call.query_side,
    )  # fmt: skip
    queued(disperse_kernel, disperse.grid(pairs=pairs, tiles=tiles, blocks=blocks))(
        tile_square, summaries.key_var, score, mass_term,
        heads, call.group_size, call.tokens, tiles, blocks, call.scale, **disperse.fixed,
    )  # fmt: skip
    if hopper.applies(query):
        hopper.score(call, sub_mean, summaries.low_key, summaries.spread, score, tile_list)
        return
    queued(score_kernel, score_.grid(pairs=pairs, tiles=tiles))(
        sub_mean, summaries.low_key, summaries.spread, score,
        heads, call.group_size, call.tokens, tiles, blocks, call.scale,
        **score_.fixed, **listed, queries=None if call.own else call.queries,
    )  # fmt: skip


def limits_of(call: Call, threshold: Tensor) -> Tensor:
    """Thresholds (B, H) from those of the heads, (H,)."""
    launch = call.launches["limits"]
    limits = torch.empty(call.per_head, device=threshold.device, dtype=torch.float32)
    queued(limits_kernel, launch.grid(pairs=call.pairs))(
        threshold.float().contiguous(), limits, call.heads, **launch.fixed
    )
    return limits


def make_route(
    call: Call,
    summaries: Summaries,
    threshold: Tensor,
    density: float = 0.0,
    limits: Tensor | None = None,
) -> Route:
    """Score every (query tile, key block) pair and choose its band.

    threshold: (H,), used where density is 0. limits: thresholds (B, H), where they are in hand.
    """
    blocks = summaries.low_key.shape[2]
    tiles = triton.cdiv(call.queries, QUERY_TILE)
    shape, device = (call.batch, call.heads, tiles, blocks), call.query.device
    score = torch.empty(shape, device=device, dtype=torch.float32)
    mass_term = torch.empty(shape, device=device, dtype=torch.float16)
    score_tiles(call, summaries, score, mass_term)
    if limits is None and density == 0.0:
        limits = limits_of(call, threshold)
    elif limits is None:
        limits = threshold_of_density(lambda: [(None, score)], shape, density, device, own=call.own)
    route = torch.empty(shape, device=device, dtype=torch.int8)
    exact_list = torch.empty(shape, device=device, dtype=torch.int32)
    counts = torch.empty(shape[:3], device=device, dtype=torch.int32)
    launch = call.launches["route"]
    queued(route_kernel, launch.grid(tiles=tiles, pairs=call.pairs))(
        score, limits, mass_term, route, exact_list, counts, tiles, blocks,
        **launch.fixed, BJ=route_step(blocks), OWN=call.own,
    )  # fmt: skip
    return Route(route, exact_list, counts, mass_term)


def route_step(blocks: int) -> int:
    """Key blocks that a program of the routing takes at a time."""
    return min(int(triton.next_power_of_2(blocks)), ROUTE_BLOCKS)


class ProbeRows(NamedTuple):
    """Memory for the bands of the probes alone, a row (B, H, probes, blocks) for each.

    tile_list: (probes,) int32, their tiles; score float32, route int8, mass_term float16.
    """

    tile_list: Tensor
    score: Tensor
    route: Tensor
    mass_term: Tensor


def probe_rows(call: Call, blocks: int, probes: int) -> ProbeRows:
    """Memory for `route_probes`."""
    shape, query = (*call.per_head, probes, blocks), call.query
    return ProbeRows(
        torch.empty(probes, device=query.device, dtype=torch.int32),
        torch.empty(shape, device=query.device, dtype=torch.float32),
        torch.empty(shape, device=query.device, dtype=torch.int8),
        torch.empty(shape, device=query.device, dtype=torch.float16),
    )


def route_probes(call: Call, summaries: Summaries, limits: Tensor, rows: ProbeRows) -> Route:
    """Bands of the probes' tiles, without lists: those that `make_route` finds.

    limits: thresholds (B, H). Results are in `rows`; what `score_tiles` allocates on the way
    stays on the stream that this is called on.
    """
    tiles = rows.tile_list
    list_probe_tiles(call, tiles)
    score_tiles(call, summaries, rows.score, rows.mass_term, tiles)
    route = Route(rows.route, tiles, tiles, rows.mass_term)
    route_listed(call, rows.score, limits, route, tiles, lists=False)
    return route


def list_probe_tiles(call: Call, tiles: Tensor) -> None:
    """Write the tiles of the probes, (probes,) int32."""
    launch = call.launches["probe_tiles"]
    queued(probe_tiles_kernel, launch.grid())(tiles, call.queries, len(tiles), **launch.fixed)


def route_listed(
    call: Call, score: Tensor, limits: Tensor, route: Route, tiles: Tensor, *, lists: bool
) -> None:
    """Write the bands of listed tiles (n,) int32 into a route with a row for each.

    score: (B, H, n, blocks) float32; limits: thresholds (B, H). lists: without them the route's
    list and counts are not written, and may be anything.
    """
    blocks, launch = score.shape[3], call.launches["route"]
    queued(route_kernel, launch.grid(tiles=len(tiles), pairs=call.pairs))(
        score, limits, route.mass_term, route.route, route.exact_list, route.counts,
        len(tiles), blocks,
        **launch.fixed, BJ=route_step(blocks), LISTS=lists, tile_list=tiles, OWN=call.own,
    )  # fmt: skip
