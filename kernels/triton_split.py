"""Split attention on the GPU: launches the Triton kernels around a little PyTorch glue.

Nothing here waits for the device: routes, list lengths and the probe's scalars stay there, so a
call can be captured in a CUDA graph and replayed with other content.
"""

from __future__ import annotations

import functools
import os
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from freqopt.config import KEY_BLOCK, QUERY_TILE, SUB_BLOCK
from freqopt.grid import token_order
from freqopt.kernels import reference as ref
from freqopt.kernels.device import HOPPER_SHARED, shared_memory
from freqopt.kernels.layout import Sequence
from freqopt.kernels.triton_attend import attend_kernel, probe_kernel
from freqopt.kernels.triton_prepare import route_kernel, score_kernel, summarise_kernel

GROUP = 16
"""Key blocks per program of the summaries: amortises the (D, D) sum of first-order products."""

SCORE_BLOCKS = 32
"""Key blocks per step of the scores."""

PROBE_ROWS = 64
PROBE_PARTS = 16
"""Key ranges the probe's exact pass is spread over."""


class Launch(NamedTuple):
    """Tile choices for one (dtype, head dim, shared memory); see docs/kernels.md."""

    rows: int
    warps: int
    stages: int
    score_tiles: int
    score_stages: int
    probe_rows: int
    precision: str
    score_precision: str


@functools.lru_cache(maxsize=64)
def launch_for(dtype: torch.dtype, head_dim: int, shared: int = HOPPER_SHARED) -> Launch:
    """Tile shapes that fit registers and `shared` bytes of shared memory per program.

    Hopper has 227 KiB, sm_80 163 KiB, consumer cards 99 KiB.
    """
    padded = padded_dim(head_dim)
    wide, roomy = padded > 128, shared >= 220 * 1024
    single = dtype == torch.float32
    bytes_per_row = padded * dtype.itemsize
    rows = QUERY_TILE
    while rows > 16 and rows * bytes_per_row > 32 * 1024:
        rows //= 2
    if single and not roomy:
        rows = max(rows // 2, 16)
    key_tile = 2 * KEY_BLOCK * bytes_per_row
    stages = max(1, min(3, (shared - rows * bytes_per_row) // key_tile - 1))
    return Launch(
        rows=rows,
        warps=8 if rows >= 64 else 4,
        stages=1 if single else stages,
        score_tiles=1 if wide or not roomy else 4,
        score_stages=1 if wide or not roomy else 2,
        probe_rows=16 if single and padded >= 128 else (32 if wide else PROBE_ROWS),
        precision="tf32x3" if single else "tf32",
        score_precision=os.environ.get("FREQOPT_SCORE_PRECISION", "tf32x3"),
    )


class Summaries(NamedTuple):
    """Ordered keys and values (B, Hkv, J * 64, D) and their summaries, per key head."""

    key: Tensor
    value: Tensor
    key_shift: Tensor
    key_mean: Tensor
    key_var: Tensor
    spread: Tensor
    low_key: Tensor
    low_value: Tensor
    low_order: Tensor
    fine_key: Tensor
    fine_value: Tensor
    fine_var: Tensor
    fine_order: Tensor


def padded_dim(head_dim: int) -> int:
    """Head dim of the kernels' tiles: the next power of two, at least 16."""
    return max(int(triton.next_power_of_2(head_dim)), 16)


def summarise(key: Tensor, value: Tensor, sequence: Sequence, mid_band: bool) -> Summaries:
    """Reorder keys and values and summarise them, in one pass over memory."""
    batch, heads, _, dim = key.shape
    tokens = sequence.tokens
    blocks = triton.cdiv(tokens, KEY_BLOCK)
    groups = triton.cdiv(blocks, GROUP)
    ratio = KEY_BLOCK // SUB_BLOCK
    per_head = (batch, heads)

    def single(*shape: int) -> Tensor:
        return torch.empty(*per_head, *shape, device=key.device, dtype=torch.float32)

    def native(*shape: int) -> Tensor:
        return torch.empty(*per_head, *shape, device=key.device, dtype=key.dtype)

    key_out, value_out = native(blocks * KEY_BLOCK, dim), native(blocks * KEY_BLOCK, dim)
    key_mean, value_mean, key_var = (single(blocks, dim) for _ in range(3))
    block_spread, first_order = single(blocks), single(groups, dim, dim)
    fine_rows = blocks * ratio if mid_band else 0
    fine_key, fine_value = native(fine_rows, dim), native(fine_rows, dim)
    fine_var = single(fine_rows, dim)
    fine_first = single(groups, dim, dim) if mid_band else single(0, 0, 0)
    summarise_kernel[(groups, batch * heads)](
        key, value, token_order(sequence.grid, key.device),
        key_out, value_out, key_mean, value_mean, key_var, block_spread, first_order,
        fine_key, fine_value, fine_var, fine_first,
        *key.stride()[:3], *value.stride()[:3],
        heads, tokens, blocks, sequence.text_before,
        D=dim, DP=padded_dim(dim), GROUP=GROUP, MID=mid_band,
        num_warps=8, num_stages=1,
    )  # fmt: skip
    weight = ref.block_counts(tokens, KEY_BLOCK, key.device)[:, None] / tokens
    key_shift = (key_mean * weight).sum(2, keepdim=True)
    value_centre = (value_mean * weight).sum(2, keepdim=True)
    between = (value_mean - value_centre).square().sum(3)
    head_spread = ((block_spread + between) * weight[:, 0]).sum(2, keepdim=True)
    key_mean = key_mean - key_shift
    return Summaries(
        key=key_out,
        value=value_out,
        key_shift=key_shift,
        key_mean=key_mean,
        key_var=key_var,
        spread=(block_spread / head_spread.clamp(min=1e-30)).sqrt(),
        low_key=key_mean.to(key.dtype),
        low_value=value_mean.to(key.dtype),
        low_order=(first_order.sum(2) / tokens).to(key.dtype),
        fine_key=fine_key,
        fine_value=fine_value,
        fine_var=fine_var,
        fine_order=(fine_first.sum(2) / tokens).to(key.dtype),
    )


class Route(NamedTuple):
    """Scores' outcome: bands per pair, ascending block lists with lengths, marked mass terms."""

    route: Tensor
    exact_list: Tensor
    mid_list: Tensor
    counts: Tensor
    mass_term: Tensor


def make_route(
    query: Tensor,
    summaries: Summaries,
    budget: Tensor,
    sequence: Sequence,
    *,
    scale: float,
    density: float,
    mid_band: bool,
    launch: Launch,
) -> Route:
    """Score every (query tile, key block) pair and choose its band."""
    batch, heads, _, dim = query.shape
    kv_heads, blocks = summaries.key_mean.shape[1:3]
    tiles = triton.cdiv(sequence.tokens, QUERY_TILE)
    shape = (batch, heads, tiles, blocks)
    score = torch.empty(shape, device=query.device, dtype=torch.float32)
    mass_term = torch.empty(shape, device=query.device, dtype=torch.float16)
    score_kernel[(triton.cdiv(tiles, launch.score_tiles), batch * heads)](
        query, token_order(sequence.grid, query.device),
        summaries.key_mean, summaries.key_var, summaries.spread, score, mass_term,
        *query.stride()[:3],
        heads, heads // kv_heads, sequence.tokens, tiles, blocks, sequence.text_before, scale,
        D=dim, DP=padded_dim(dim), TILES=launch.score_tiles, BJ=SCORE_BLOCKS,
        PRECISION=launch.score_precision, num_warps=4, num_stages=launch.score_stages,
    )  # fmt: skip
    thresholds = ref.resolve_thresholds(score, budget, density, mid_band)
    limits = torch.stack([t.expand(batch, heads) for t in thresholds], -1).contiguous()
    route = torch.empty(shape, device=query.device, dtype=torch.int8)
    exact_list = torch.empty(shape, device=query.device, dtype=torch.int32)
    mid_list = torch.empty(shape if mid_band else (1,), device=query.device, dtype=torch.int32)
    counts = torch.empty(batch, heads, tiles, 2, device=query.device, dtype=torch.int32)
    route_kernel[(tiles, batch * heads)](
        score, limits, mass_term, route, exact_list, mid_list, counts, tiles, blocks,
        BJ=min(triton.next_power_of_2(blocks), 1024), MID=mid_band, num_warps=4,
    )  # fmt: skip
    return Route(route, exact_list, mid_list, counts, mass_term)


def observe_probes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    summaries: Summaries,
    route: Tensor,
    sequence: Sequence,
    *,
    scale: float,
    probes: int,
    launch: Launch,
) -> ref.Observed:
    """Exact attention of the probes, in float32, logits in the frame of centred keys."""
    batch, heads, _, dim = query.shape
    tiles, blocks = route.shape[2:]
    parts = min(PROBE_PARTS, blocks)

    def single(*shape: int) -> Tensor:
        return torch.empty(
            batch, heads, parts, probes, *shape, device=query.device, dtype=torch.float32
        )

    peak, mass, exact, missing = single(), single(2), single(dim), single(dim)
    probe_kernel[(parts, batch * heads, triton.cdiv(probes, launch.probe_rows))](
        query, token_order(sequence.grid, query.device), summaries.key, summaries.value,
        key, value, key_mask if key_mask is not None else route, route, summaries.key_shift,
        peak, mass, exact, missing,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        key_mask.stride(0) if key_mask is not None else 0,
        heads, heads // key.shape[1], sequence.tokens, tiles, blocks, probes, sequence.text,
        sequence.text_before, scale,
        D=dim, DP=padded_dim(dim), BP=launch.probe_rows, HAS_MASK=key_mask is not None,
        PRECISION=launch.precision, num_warps=4, num_stages=2,
    )  # fmt: skip
    top = peak.amax(2, keepdim=True)
    weight = (peak - top).exp2()[..., None]
    both = (mass * weight).sum(2)
    total = both.sum(-1, keepdim=True)
    share = both / total
    return ref.Observed(
        log_total=(top[:, :, 0, :, None] + total.log2()) * 0.6931471805599453,
        exact_mass=share[..., :1],
        exact_out=(exact * weight).sum(2) / total,
        missing_mass=share[..., 1:],
        missing_out=(missing * weight).sum(2) / total,
    )


def estimate_probes(
    query: Tensor,
    summaries: Summaries,
    route: Route,
    sequence: Sequence,
    *,
    scale: float,
    probes: int,
    mid_band: bool,
) -> ref.Estimate:
    """How the low and mid bands see the probes, from the summaries the kernels attend with."""
    heads = query.shape[1]
    group = heads // summaries.key.shape[1]
    positions = ref.probe_positions(sequence.tokens, probes, query.device)
    order = token_order(sequence.grid, query.device)
    chosen = query[:, :, order[positions].long() + sequence.text_before].float()
    tile = positions // QUERY_TILE

    def per_query_head(x: Tensor) -> Tensor:
        return (x if group == 1 else x.repeat_interleave(group, 1)).float()

    count = ref.block_counts(sequence.tokens, KEY_BLOCK, query.device)
    term = route.mass_term[:, :, tile].float()
    logit = chosen @ per_query_head(summaries.low_key).mT * scale + count.log()
    logit = logit.masked_fill(term < 0, -torch.inf)
    value = per_query_head(summaries.low_value)
    low_order = chosen @ per_query_head(summaries.low_order).mT * scale
    mid_order = torch.zeros_like(low_order)
    if mid_band:
        fine_count = ref.block_counts(sequence.tokens, SUB_BLOCK, query.device)
        columns = fine_count.numel()
        pair = route.route[:, :, tile].repeat_interleave(KEY_BLOCK // SUB_BLOCK, -1)[..., :columns]
        centred = per_query_head(summaries.fine_key[:, :, :columns].float() - summaries.key_shift)
        fine = chosen @ centred.mT * scale + fine_count.log()
        square = ref.tile_mean_square(sequence.video_of(query).float())[:, :, tile]
        spread = square @ per_query_head(summaries.fine_var[:, :, :columns]).mT * scale**2
        logit = torch.cat([logit, fine.masked_fill(pair != ref.MID, -torch.inf)], -1)
        term = torch.cat([term, torch.minimum(0.5 * spread, fine_count.log())], -1)
        value = torch.cat([value, per_query_head(summaries.fine_value[:, :, :columns])], 2)
        mid_order = chosen @ per_query_head(summaries.fine_order).mT * scale
    order_terms = torch.stack([low_order, mid_order])
    return ref.Estimate(logit, term.clamp(min=0), value, order_terms, count.numel())


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
    mid_band: bool,
    launch: Launch,
) -> None:
    """The fused three-band attention of the video queries, written into `out` (B, H, N, D)."""
    batch, heads, _, dim = query.shape
    tiles, blocks = route.route.shape[2:]
    tokens = sequence.tokens
    attend_kernel[(triton.cdiv(tokens, launch.rows), batch * heads)](
        query, token_order(sequence.grid, query.device), summaries.key, summaries.value,
        key, value, key_mask if key_mask is not None else route.route, summaries.key_shift,
        summaries.low_key, summaries.low_value, summaries.low_order,
        summaries.fine_key, summaries.fine_value, summaries.fine_var, summaries.fine_order,
        route.mass_term, coefficients, route.exact_list, route.mid_list, route.counts, out,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        key_mask.stride(0) if key_mask is not None else 0, *out.stride()[:3],
        heads, heads // key.shape[1], tokens, tiles, blocks, sequence.text, sequence.text_before,
        scale,
        D=dim, DP=padded_dim(dim), BM=launch.rows, MID=mid_band, TEXT=sequence.text > 0,
        HAS_MASK=key_mask is not None, RAGGED=tokens % KEY_BLOCK != 0,
        PRECISION=launch.precision, num_warps=launch.warps, num_stages=launch.stages,
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


def with_unit_last_stride(x: Tensor) -> Tensor:
    """`x` itself unless its last dim is strided, which no kernel reads well."""
    return x if x.stride(-1) == 1 else x.contiguous()


def split_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    budget: Tensor,
    key_mask: Tensor | None,
    sequence: Sequence,
    *,
    scale: float,
    density: float,
    mid_band: bool,
    probes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Forward pass; arguments and results as in `freqopt.kernels.op.split_attention_op`."""
    query, key, value = (with_unit_last_stride(x) for x in (query, key, value))
    if key_mask is not None:
        key_mask = with_unit_last_stride(key_mask)
    batch, heads, length, dim = query.shape
    options: dict[str, Any] = {"scale": scale, "mid_band": mid_band}
    with _on_device(query):
        launch = launch_for(query.dtype, dim, shared_memory(query.device))
        summaries = summarise(key, value, sequence, mid_band)
        route = make_route(
            query, summaries, budget, sequence, density=density, launch=launch, **options
        )
        probes = min(probes, sequence.tokens)
        coefficients = torch.ones(batch, heads, 2, device=query.device)
        error = torch.full((batch, heads), torch.nan, device=query.device)
        if probes:
            observed = observe_probes(
                query, key, value, key_mask, summaries, route.route, sequence,
                scale=scale, probes=probes, launch=launch,
            )  # fmt: skip
            estimate = estimate_probes(query, summaries, route, sequence, probes=probes, **options)
            probe = ref.fit_probe(observed, estimate)
            coefficients, error = torch.stack([probe.c, probe.g], -1), probe.error
        out = torch.empty(
            batch, length, heads, dim, device=query.device, dtype=query.dtype
        ).transpose(1, 2)
        attend(
            query, key, value, key_mask, summaries, route, coefficients, out, sequence,
            launch=launch, **options,
        )  # fmt: skip
        if sequence.text:
            text = attend_text(query, key, value, key_mask, sequence, scale)
            out[:, :, : sequence.text_before] = text[:, :, : sequence.text_before]
            out[:, :, sequence.text_before + sequence.tokens :] = text[:, :, sequence.text_before :]
        counts = route.counts.float().mean(2) / route.route.shape[-1]
        reached = counts[..., 0] + counts[..., 1] / SUB_BLOCK
    return out, reached, error, route.route, coefficients


def _on_device(x: Tensor) -> Any:
    """Make x's GPU current, as Triton launches there; nothing to do in the interpreter."""
    return torch.cuda.device(x.device) if x.is_cuda else torch.no_grad()
