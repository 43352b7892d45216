"""Launches the probes' chain: their exact attention, what the bands make of them, and the fit.

Everything it writes is allocated beforehand (`ProbeSpace`), so that it can be launched on a stream
beside the caller's (`freqopt.kernels.overlap`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
from torch import Tensor

from freqopt.grid import token_order
from freqopt.kernels.layout import Sequence
from freqopt.kernels.portable.attend import probe_kernel
from freqopt.kernels.portable.glue import (
    MOMENTS,
    UNIT,
    estimate_kernel,
    fit_kernel,
    merge_kernel,
)
from freqopt.kernels.tiles import Launch, padded_dim

if TYPE_CHECKING:  # which launches this chain
    from freqopt.kernels.forward.split import Route, Summaries

FIT_ROWS = 128
"""Units of cells whose moments the fit reads at a time."""

PROBE_PROGRAMS = 264
"""Programs that the probe's exact pass is spread over, by cutting the keys into ranges: twice the
processors of an H200, where 132, 396, 512 and 1,056 were slower."""

PROBE_WARPS = 4

FIT_WARPS = 8
FIT_STAGES = 1

MERGE_ROWS = 4

MAX_PARTS = 64
"""Most key ranges of one head: their partial sums have to be merged."""


class ProbeSpace(NamedTuple):
    """What the chain writes. pairs: batch items times heads; parts: key ranges of the exact pass.

    peak (pairs, parts, probes), mass (.., 2), exact and missing (.., D): the exact pass's sums;
    logit float32 and term float16 (pairs, probes, blocks): the low band; moments (pairs, units,
    MOMENTS): what c is fitted on. coefficients (B, H, 2) and error (B, H): the relative L2 error
    left, as reference.fit_probe. All but term float32.
    """

    peak: Tensor
    mass: Tensor
    exact: Tensor
    missing: Tensor
    logit: Tensor
    term: Tensor
    moments: Tensor
    coefficients: Tensor
    error: Tensor


def probe_space(query: Tensor, blocks: int, probes: int) -> ProbeSpace:
    """Memory for the chain of a call on queries (B, H, N, D)."""
    batch, heads, _, dim = query.shape
    pairs = batch * heads
    parts = max(min(PROBE_PROGRAMS // pairs, MAX_PARTS, blocks), 1)

    def single(*shape: int) -> Tensor:
        return torch.empty(*shape, device=query.device, dtype=torch.float32)

    found = (pairs, parts, probes)
    return ProbeSpace(
        single(*found), single(*found, 2), single(*found, dim), single(*found, dim),
        single(pairs, probes, blocks),
        torch.empty(pairs, probes, blocks, device=query.device, dtype=torch.float16),
        single(pairs, moment_units(probes, blocks), MOMENTS.value),
        single(batch, heads, 2), single(batch, heads),
    )  # fmt: skip


def moment_units(probes: int, blocks: int) -> int:
    """Units of cells that a head has moments of; see triton_glue._store_moments."""
    unit = int(UNIT.value)
    return -(-probes // unit) * -(-blocks // unit)


def fit_probes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    summaries: Summaries,
    route: Route,
    sequence: Sequence,
    space: ProbeSpace,
    *,
    scale: float,
    launch: Launch,
    by_probe: bool = False,
) -> None:
    """Attend a few queries exactly, and fit c and g on what the bands would have made of them.

    by_probe: the route has a row for each probe, not for each tile. Allocates nothing.
    """
    heads, dim = query.shape[1], query.shape[3]
    group_size = heads // key.shape[1]
    tokens, text_before = sequence.tokens, sequence.text_before
    tiles, blocks = route.route.shape[2:]
    pairs, parts, probes = space.peak.shape
    order = token_order(sequence.grid, query.device)
    size: dict[str, Any] = {"D": dim, "DP": padded_dim(dim)}
    probe_kernel[(parts, pairs, triton.cdiv(probes, launch.probe_rows))](
        query, order, summaries.key, summaries.value,
        key, value, key_mask if key_mask is not None else route.route, route.route,
        summaries.key_shift, space.peak, space.mass, space.exact, space.missing,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        key_mask.stride(0) if key_mask is not None else 0,
        heads, group_size, tokens, tiles, blocks, probes, sequence.text, text_before, scale,
        **size, BP=launch.probe_rows, HAS_MASK=key_mask is not None,
        PRECISION=launch.precision, IN_PLACE=summaries.in_place, BY_PROBE=by_probe,
        num_warps=PROBE_WARPS, num_stages=launch.probe_stages,
    )  # fmt: skip
    merge_kernel[(triton.cdiv(probes, MERGE_ROWS), pairs)](
        space.peak, space.mass, space.exact, space.missing, probes, parts,
        **size, BP=MERGE_ROWS, num_warps=4,
    )  # fmt: skip
    rows, step = launch.fit_rows, launch.fit_columns
    estimate_kernel[(triton.cdiv(blocks, step), pairs, triton.cdiv(probes, rows))](
        query, order, summaries.low_key, route.mass_term, space.peak,
        space.logit, space.term, space.moments,
        *query.stride()[:3],
        heads, group_size, tokens, tiles, blocks, probes, parts, text_before, scale,
        **size, BP=rows, BJ=step, PRECISION=launch.precision,
        BY_PROBE=by_probe, num_warps=4, num_stages=1,
    )  # fmt: skip
    fit_kernel[(pairs,)](
        query, order, summaries.low_value, summaries.low_order, space.logit, space.term,
        space.moments, space.mass, space.exact, space.missing, space.coefficients, space.error,
        *query.stride()[:3],
        heads, group_size, tokens, blocks, probes, parts, text_before, scale,
        **size, BP=rows, BJ=step, ROWS=FIT_ROWS, PRECISION=launch.precision,
        num_warps=FIT_WARPS, num_stages=FIT_STAGES,
    )  # fmt: skip
