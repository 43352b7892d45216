"""Split attention on the GPU: launches the Triton kernels around a little PyTorch glue.

Nothing here waits for the device: routes, list lengths and the probe's scalars stay there, so a
call can be captured in a CUDA graph and replayed with other content.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from freqopt.config import KEY_BLOCK, QUERY_TILE, SUB_TILE
from freqopt.grid import token_order
from freqopt.kernels import reference as ref
from freqopt.kernels.forward.probe import fit_probes, probe_space
from freqopt.kernels.hopper import launch as hopper
from freqopt.kernels.layout import Sequence, Settings
from freqopt.kernels.overlap import forked, pays
from freqopt.kernels.portable.attend import attend_kernel
from freqopt.kernels.portable.glue import (
    centre_kernel,
    limits_kernel,
    order_kernel,
    probe_tiles_kernel,
    total_kernel,
)
from freqopt.kernels.portable.prepare import (
    first_order_kernel,
    route_kernel,
    summarise_kernel,
)
from freqopt.kernels.portable.score import LANES, disperse_kernel, pool_tiles_kernel, score_kernel
from freqopt.kernels.tiles import Launch, padded_dim
from freqopt.kernels.tuned import launch_on
from freqopt.kernels.workspace import bytes_per_key_head, is_long, turns

GROUP = 4
"""Key blocks per program of the summaries."""

SUMMARY_WARPS = 1
"""A block's sums then stay inside a warp: between warps they go through shared memory, and waiting
for that took more time than the reading."""

TOTAL_COLS = 32
TOTAL_ROWS = 128
"""Channels per program of a head's sums, which so spread over more of the GPU, and groups per
step."""

CENTRE_BLOCKS = 32
"""Key blocks per program of the centring."""

ORDER_GROUP = 32
"""Key blocks per program of the first-order products: amortises their (D, D) sum."""

POOLED_TILES = int(LANES.value)
"""Tiles whose pooled queries lie together."""

ROUTE_BLOCKS = 512
ROUTE_WARPS = 2
"""Key blocks per step of the routing, and its warps: 0.06 ms of 24 heads x 75,600 tokens, where
1,024 and 4 took 0.08."""

ORDER_CELLS = 1024
PROBE_TILES = 64


class Summaries(NamedTuple):
    """Ordered keys and values (B, Hkv, J * 64, D) and their summaries, per key head.

    in_place: key and value are the model's own instead, (B, Hkv, N, D) of any strides. key_shift
    (.., D) float32: the mean key, on which low_key is centred; key_var (.., J, D) in the keys'
    type; spread (.., J) float32; low_order (.., D, D): H-bar before scaling.
    """

    in_place: bool
    key: Tensor
    value: Tensor
    key_shift: Tensor
    key_var: Tensor
    spread: Tensor
    low_key: Tensor
    low_value: Tensor
    low_order: Tensor


def summarise(
    key: Tensor, value: Tensor, sequence: Sequence, launch: Launch, *, ordered: bool = True
) -> Summaries:
    """Reorder keys and values and summarise them, in one pass over memory.

    ordered: without it nothing is reordered, and who needs keys and values reads them in place.
    """
    batch, heads, _, dim = key.shape
    tokens = sequence.tokens
    blocks = triton.cdiv(tokens, KEY_BLOCK)
    per_head = (batch, heads)

    def single(*shape: int) -> Tensor:
        return torch.empty(*per_head, *shape, device=key.device, dtype=torch.float32)

    def native(*shape: int) -> Tensor:
        return torch.empty(*per_head, *shape, device=key.device, dtype=key.dtype)

    order = token_order(sequence.grid, key.device)
    key_out, value_out = key, value
    in_place: dict[str, Any] = {}
    if ordered:
        key_out, value_out = native(blocks * KEY_BLOCK, dim), native(blocks * KEY_BLOCK, dim)
    else:
        in_place = {"order": order, "heads": heads, "text_before": sequence.text_before}
        for name, x in (("k", key), ("v", value)):
            in_place |= {f"stride_{name}{at}": x.stride(i) for i, at in enumerate("bhn")}
    key_mean, key_var = single(blocks, dim), native(blocks, dim)
    low_key, low_value = native(blocks, dim), native(blocks, dim)
    spread = single(blocks)
    size: dict[str, Any] = {"D": dim, "DP": padded_dim(dim)}
    if hopper.prepares(key, value):
        copies = (key_out, value_out) if ordered else None
        sums, first_order = hopper.prepare(
            key, value, order, copies, key_mean, low_value, key_var, spread, sequence
        )
    else:
        sums = single(triton.cdiv(blocks, GROUP), 3, dim)
        summarise_kernel[(batch * heads, sums.shape[2])](
            key, value, order, key_out, value_out, key_mean, low_value, key_var, spread, sums,
            *key.stride()[:3], *value.stride()[:3],
            heads, tokens, blocks, sequence.text_before,
            **size, GROUP=GROUP, COPY=ordered, num_warps=SUMMARY_WARPS, num_stages=1,
        )  # fmt: skip
        first_order = single(triton.cdiv(blocks, ORDER_GROUP), dim, dim)
        first_order_kernel[(first_order.shape[2], batch * heads)](
            key_out, value_out, key_mean, first_order, tokens, blocks,
            **size, GROUP=ORDER_GROUP, **in_place,
            num_warps=launch.order_warps, num_stages=launch.order_stages,
        )  # fmt: skip
    cols = min(TOTAL_COLS, padded_dim(dim))
    parts = padded_dim(dim) // cols
    key_shift, head_spread = single(dim), single(parts)
    total_kernel[(parts, batch * heads)](
        sums, key_shift, head_spread, tokens, sums.shape[2],
        **size, COLS=cols, ROWS=TOTAL_ROWS, num_warps=4,
    )  # fmt: skip
    centre_kernel[(triton.cdiv(blocks, CENTRE_BLOCKS), batch * heads)](
        key_mean, spread, key_shift, head_spread, low_key, blocks,
        **size, COLS=cols, BJ=CENTRE_BLOCKS, num_warps=4,
    )  # fmt: skip
    low_order = native(dim, dim)
    order_kernel[(triton.cdiv(dim * dim, ORDER_CELLS), batch * heads)](
        first_order, low_order, first_order.shape[2], tokens, dim * dim, CELLS=ORDER_CELLS
    )
    return Summaries(
        in_place=not ordered, key=key_out, value=value_out,
        key_shift=key_shift, key_var=key_var, spread=spread,
        low_key=low_key, low_value=low_value, low_order=low_order,
    )  # fmt: skip


class Route(NamedTuple):
    """Scores' outcome: band of each pair, ascending block lists, lengths, marked mass terms."""

    route: Tensor
    exact_list: Tensor
    counts: Tensor
    mass_term: Tensor


def score_tiles(
    query: Tensor, summaries: Summaries, score: Tensor, mass_term: Tensor, sequence: Sequence,
    *, scale: float, launch: Launch, tile_list: Tensor | None = None,
) -> None:  # fmt: skip
    """Write scores (float32) and mass terms (float16) of tiles, both (B, H, tiles, blocks).

    tile_list: (tiles,) int32, which ones; all of them without it.
    """
    batch, heads, tiles, blocks = score.shape
    pairs, dim, tokens = batch * heads, query.shape[-1], sequence.tokens
    group_size = heads // summaries.low_key.shape[1]
    rows = triton.cdiv(tiles, POOLED_TILES) * POOLED_TILES * (QUERY_TILE // SUB_TILE)
    sub_mean, tile_square = (
        torch.empty(pairs, n, dim, device=query.device, dtype=query.dtype) for n in (rows, tiles)
    )
    size: dict[str, Any] = {"D": dim, "DP": padded_dim(dim)}
    listed = {} if tile_list is None else {"tile_list": tile_list}
    pool_tiles_kernel[(pairs, tiles)](
        query, token_order(sequence.grid, query.device), sub_mean, tile_square,
        *query.stride()[:3], heads, tokens, tiles, sequence.text_before, scale,
        **size, **listed, num_warps=4, num_stages=1,
    )  # fmt: skip
    side = launch.disperse_side
    disperse_kernel[(pairs, triton.cdiv(tiles, side), triton.cdiv(blocks, side))](
        tile_square, summaries.key_var, score, mass_term,
        heads, group_size, tokens, tiles, blocks, scale,
        **size, BI=side, BJ=side, PRECISION=launch.precision, num_warps=4, num_stages=1,
    )  # fmt: skip
    if hopper.applies(query):
        hopper.score(
            sub_mean, summaries.low_key, summaries.spread, score, sequence, scale, tile_list
        )
        return
    score_kernel[(pairs, triton.cdiv(tiles, launch.score_tiles))](
        sub_mean, summaries.low_key, summaries.spread, score,
        heads, group_size, tokens, tiles, blocks, scale,
        **size, TILES=launch.score_tiles, BJ=launch.score_blocks, WIDE=launch.score_wide,
        PRECISION=launch.precision, **listed,
        num_warps=launch.score_warps, num_stages=launch.score_stages,
    )  # fmt: skip


def given_limits(budget: Tensor, batch: int, mid_band: bool) -> Tensor:
    """Thresholds (B, H) from a budget (2, H): with a mid band, where it begins."""
    heads = budget.shape[1]
    limits = torch.empty(batch, heads, device=budget.device, dtype=torch.float32)
    limits_kernel[(batch * heads,)](budget[int(mid_band)].float().contiguous(), limits, heads)
    return limits


def make_route(
    query: Tensor,
    summaries: Summaries,
    budget: Tensor,
    sequence: Sequence,
    *,
    scale: float,
    launch: Launch,
    density: float = 0.0,
    mid_band: bool = False,
    limits: Tensor | None = None,
) -> Route:
    """Score every (query tile, key block) pair and choose its band.

    mid_band: pairs of the definition's mid band are attended exactly, so that its threshold counts.
    limits: the thresholds (B, H), where they are in hand already.
    """
    batch, heads = query.shape[:2]
    blocks = summaries.low_key.shape[2]
    tiles = triton.cdiv(sequence.tokens, QUERY_TILE)
    shape = (batch, heads, tiles, blocks)
    score = torch.empty(shape, device=query.device, dtype=torch.float32)
    mass_term = torch.empty(shape, device=query.device, dtype=torch.float16)
    score_tiles(query, summaries, score, mass_term, sequence, scale=scale, launch=launch)
    if limits is None and density > 0.0:
        limits = ref.resolve_thresholds(score, budget, density, mid_band)[1]
    elif limits is None:
        limits = given_limits(budget, batch, mid_band)
    route = torch.empty(shape, device=query.device, dtype=torch.int8)
    exact_list = torch.empty(shape, device=query.device, dtype=torch.int32)
    counts = torch.empty(batch, heads, tiles, device=query.device, dtype=torch.int32)
    route_kernel[(tiles, batch * heads)](
        score, limits, mass_term, route, exact_list, counts, tiles, blocks,
        BJ=route_step(blocks), num_warps=ROUTE_WARPS,
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


def probe_rows(query: Tensor, blocks: int, probes: int) -> ProbeRows:
    """Memory for `route_probes`."""
    shape = (*query.shape[:2], probes, blocks)
    return ProbeRows(
        torch.empty(probes, device=query.device, dtype=torch.int32),
        torch.empty(shape, device=query.device, dtype=torch.float32),
        torch.empty(shape, device=query.device, dtype=torch.int8),
        torch.empty(shape, device=query.device, dtype=torch.float16),
    )


def route_probes(
    query: Tensor, summaries: Summaries, limits: Tensor, sequence: Sequence, rows: ProbeRows,
    *, scale: float, launch: Launch,
) -> Route:  # fmt: skip
    """Bands of the probes' tiles, without lists: those that `make_route` finds.

    limits: thresholds (B, H). Results are in `rows`; what `score_tiles` allocates on the way
    stays on the stream that this is called on.
    """
    batch, heads, probes, blocks = rows.score.shape
    tiles = rows.tile_list
    probe_tiles_kernel[(1,)](tiles, sequence.tokens, probes, ROWS=PROBE_TILES, num_warps=1)
    score_tiles(
        query, summaries, rows.score, rows.mass_term, sequence,
        scale=scale, launch=launch, tile_list=tiles,
    )  # fmt: skip
    route_kernel[(probes, batch * heads)](
        rows.score, limits, rows.mass_term, rows.route, tiles, tiles, probes, blocks,
        BJ=route_step(blocks), LISTS=False, tile_list=tiles, num_warps=ROUTE_WARPS,
    )  # fmt: skip
    return Route(rows.route, tiles, tiles, rows.mass_term)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    summaries: Summaries,
    route: Route,
    coefficients: Tensor,
    out: Tensor,
    sequence: Sequence,
    *,
    scale: float,
    launch: Launch,
    tile_list: Tensor | None = None,
) -> None:
    """The fused attention of the video queries, written into `out` (B, H, N, D).

    tile_list: (tiles,) int32, which tiles the rows of the route are; all of them without it.
    """
    batch, heads, _, dim = query.shape
    tiles, blocks = route.mass_term.shape[2:]
    tokens = sequence.tokens
    parts = triton.cdiv(tokens, launch.rows)
    listed = {}
    if tile_list is not None:
        parts = tiles * (QUERY_TILE // launch.rows)
        listed = {"tile_list": tile_list}
    if hopper.applies(query):
        hopper.attend(
            query, token_order(sequence.grid, query.device), summaries.key, summaries.value,
            key, value, key_mask, summaries.low_key, summaries.low_value, summaries.low_order,
            summaries.key_shift, route.mass_term, coefficients, route.exact_list, route.counts,
            out, sequence, scale, tile_list,
        )  # fmt: skip
        return
    attend_kernel[(parts, batch * heads)](
        query, token_order(sequence.grid, query.device), summaries.key, summaries.value,
        key, value, key_mask if key_mask is not None else route.counts, summaries.key_shift,
        summaries.low_key, summaries.low_value, summaries.low_order,
        route.mass_term, coefficients, route.exact_list, route.counts, out,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        key_mask.stride(0) if key_mask is not None else 0, *out.stride()[:3],
        heads, heads // key.shape[1], tokens, tiles, blocks, sequence.text, sequence.text_before,
        scale,
        D=dim, DP=padded_dim(dim), BM=launch.rows, TEXT=sequence.text > 0,
        HAS_MASK=key_mask is not None, RAGGED=tokens % KEY_BLOCK != 0,
        WIDE=launch.wide, PRECISION=launch.precision, IN_PLACE=summaries.in_place, **listed,
        num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip


def attend_text(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, sequence: Sequence,
    scale: float,
) -> Tensor:  # fmt: skip
    """Dense attention of the text queries (B, H, X, D) over the whole sequence."""
    mask = sequence.sequence_mask(key_mask)
    return F.scaled_dot_product_attention(
        sequence.text_of(query), key, value,
        attn_mask=None if mask is None else mask[:, None, None, :],
        scale=scale, enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip


def store_text(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, out: Tensor,
    sequence: Sequence, scale: float,
) -> None:  # fmt: skip
    """Write the text queries' attention into `out` (B, H, N, D)."""
    if sequence.text:
        text = attend_text(query, key, value, key_mask, sequence, scale)
        out[:, :, : sequence.text_before] = text[:, :, : sequence.text_before]
        out[:, :, sequence.text_before + sequence.tokens :] = text[:, :, sequence.text_before :]


def reached_density(counts: Tensor, blocks: int) -> Tensor:
    """Share (B, H) of pairs served exactly, of list lengths (B, H, tiles)."""
    return counts.float().mean(2) / blocks


def with_unit_last_stride(x: Tensor) -> Tensor:
    """`x` itself unless its last dim is strided, which no kernel reads well."""
    return x if x.stride(-1) == 1 else x.contiguous()


class Findings(NamedTuple):
    """What the op returns beside its output; shapes as in `split_attention_op`."""

    density: Tensor
    probe_error: Tensor
    route: Tensor
    coefficients: Tensor


def split_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    budget: Tensor,
    key_mask: Tensor | None,
    sequence: Sequence,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Forward pass; results as those of `freqopt.kernels.op.split_attention_op`."""
    query, key, value = (with_unit_last_stride(x) for x in (query, key, value))
    if key_mask is not None:
        key_mask = with_unit_last_stride(key_mask)
    batch, heads, length, dim = query.shape
    kv_heads = key.shape[1]
    shared = heads // kv_heads
    per_head = bytes_per_key_head(sequence.tokens, dim, query.element_size(), shared)
    serve = split_heads
    if is_long(sequence.tokens):
        from freqopt.kernels.forward import long as long_split  # which is built on this module

        serve = long_split.split_heads
    out = torch.empty(batch, length, heads, dim, device=query.device, dtype=query.dtype)
    out = out.transpose(1, 2)
    found = []
    with _on_device(query):
        for row in turns(batch, kv_heads, per_head):
            parts = []
            for items, kv in row:
                own = slice(kv.start * shared, kv.stop * shared)
                parts.append(
                    serve(
                        query[items, own], key[items, kv], value[items, kv], budget[:, own],
                        None if key_mask is None else key_mask[items], sequence, settings,
                        out[items, own],
                    )
                )  # fmt: skip
            found.append(_joined(parts, 1))
    return out, *_joined(found, 0)


def _joined(parts: list[Findings], dim: int) -> Findings:
    """Findings of heads (dim 1) or batch items (dim 0) that went in turns."""
    if len(parts) == 1:
        return parts[0]
    return Findings(*(torch.cat(found, dim) for found in zip(*parts, strict=True)))


def split_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    budget: Tensor,
    key_mask: Tensor | None,
    sequence: Sequence,
    settings: Settings,
    out: Tensor,
) -> Findings:
    """The forward pass of heads that go together, into `out` (B, H, N, D)."""
    scale, density, mid_band, probes = settings
    batch, heads, _, dim = query.shape
    launch = launch_on(query.device, query.dtype, dim, sequence.tokens)
    options: dict[str, Any] = {"scale": scale, "launch": launch}
    routing = {"density": density, "mid_band": mid_band, **options}
    summaries = summarise(key, value, sequence, launch)
    blocks, probes = summaries.low_key.shape[2], min(probes, sequence.tokens)
    inputs = (query, key, value, key_mask, summaries)
    if not probes:
        route = make_route(query, summaries, budget, sequence, **routing)
        coefficients = torch.ones(batch, heads, 2, device=query.device)
        error = torch.full((batch, heads), torch.nan, device=query.device)
    else:
        space = probe_space(query, blocks, probes)
        coefficients, error = space.coefficients, space.error
        # A density's threshold is known when everything is scored: nothing is left to overlap.
        if density == 0.0 and pays(batch * heads, sequence.tokens):
            limits = given_limits(budget, batch, mid_band)
            rows = probe_rows(query, blocks, probes)
            with forked(query.device) as beside:
                with beside:
                    own = route_probes(query, summaries, limits, sequence, rows, **options)
                    fit_probes(*inputs, own, sequence, space, by_probe=True, **options)
                route = make_route(query, summaries, budget, sequence, limits=limits, **routing)
        else:
            route = make_route(query, summaries, budget, sequence, **routing)
            fit_probes(*inputs, route, sequence, space, **options)
    attend(*inputs, route, coefficients, out, sequence, **options)
    store_text(query, key, value, key_mask, out, sequence, scale)
    reached = reached_density(route.counts, blocks)
    return Findings(reached, error, route.route, coefficients)


def _on_device(x: Tensor) -> Any:
    """Make x's GPU current, as Triton launches there; nothing to do in the interpreter."""
    return torch.cuda.device(x.device) if x.is_cuda else torch.no_grad()
