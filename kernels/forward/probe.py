"""Launches the probes' chain: their exact attention, what the bands make of them, and the fits.

Everything it writes is allocated beforehand (`ProbeSpace`), so that it can be launched on a stream
beside the caller's (`freqopt.kernels.overlap`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from freqopt.kernels.forward.call import Call, Fitted, Route, Summaries
from freqopt.kernels.portable.attend import probe_kernel
from freqopt.kernels.portable.glue import (
    MOMENTS,
    UNIT,
    estimate_kernel,
    fit_kernel,
    merge_kernel,
)
from freqopt.kernels.portable.ridge import ridge_kernel
from freqopt.kernels.split_launches import key_ranges
from freqopt.kernels.tape import queued


class ProbeSpace(NamedTuple):
    """What the chain writes. pairs: batch items times heads; parts: key ranges of the exact pass.

    peak (pairs, parts, probes), mass (.., 2), exact and missing (.., D): the exact pass's sums;
    logit float32 and term float16 (pairs, probes, blocks): the low band; moments (pairs, units,
    MOMENTS): what c is fitted on; energy (pairs,) of the probes' exact attention. fitted, and error
    (B, H): the relative L2 error left, as reference.fit_probe. All but term and matrix float32.
    """

    peak: Tensor
    mass: Tensor
    exact: Tensor
    missing: Tensor
    logit: Tensor
    term: Tensor
    moments: Tensor
    energy: Tensor
    fitted: Fitted
    error: Tensor


def probe_space(call: Call, blocks: int, probes: int) -> ProbeSpace:
    """Memory for the chain of a call."""
    pairs, dim, device = call.pairs, call.dim, call.query.device
    parts = key_ranges(pairs, blocks)

    def single(*shape: int) -> Tensor:
        return torch.empty(*shape, device=device, dtype=torch.float32)

    rows = (pairs, parts, probes)
    return ProbeSpace(
        single(*rows),
        single(*rows, 2),
        single(*rows, dim),
        single(*rows, dim),
        single(pairs, probes, blocks),
        torch.empty(pairs, probes, blocks, device=device, dtype=torch.float16),
        single(pairs, moment_units(probes, blocks), MOMENTS.value),
        single(pairs),
        Fitted(
            single(*call.per_head, 2),
            torch.empty(*call.per_head, dim, dim, device=device, dtype=call.query.dtype),
        ),
        single(*call.per_head),
    )


def unfitted(call: Call, summaries: Summaries) -> Fitted:
    """What goes to the attention of a call without probes."""
    ones = torch.ones(*call.per_head, 2, device=call.query.device, dtype=torch.float32)
    matrix = summaries.h_bar
    if call.group_size > 1:
        matrix = matrix.repeat_interleave(call.group_size, 1)
    return Fitted(ones, matrix)


def moment_units(probes: int, blocks: int) -> int:
    """Units of cells that a head has moments of; see glue._store_moments."""
    unit = int(UNIT.value)
    return -(-probes // unit) * -(-blocks // unit)


def fit_probes(
    call: Call, summaries: Summaries, route: Route, space: ProbeSpace, *, by_probe: bool = False
) -> None:
    """Attend a few queries exactly, and fit on what the bands would have made of them.

    by_probe: the route has a row for each probe, not for each tile. Allocates nothing.
    """
    query, key, value, mask, launches = (
        call.query,
        call.key,
        call.value,
        call.key_mask,
        call.launches,
    )
    order, text_before = call.query_order.index, call.query_layout.text_before
    tiles, blocks = route.route.shape[2:]
    pairs, parts, probes = space.peak.shape
    probe, merge = launches["probe"], launches["merge"]
    queued(probe_kernel, probe.grid(parts=parts, pairs=pairs, probes=probes))(
        query, order, summaries.key, summaries.value,
        key, value, mask if mask is not None else route.route, route.route,
        summaries.key_shift, space.peak, space.mass, space.exact, space.missing,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        mask.stride(0) if mask is not None else 0,
        call.heads, call.group_size, call.tokens, tiles, blocks, probes, call.layout.text,
        call.layout.text_before, call.scale,
        **probe.fixed, **call.both_sides, **call.keys_in_place,
        HAS_MASK=mask is not None, IN_PLACE=summaries.in_place, BY_PROBE=by_probe,
    )  # fmt: skip
    queued(merge_kernel, merge.grid(probes=probes, pairs=pairs))(
        space.peak, space.mass, space.exact, space.missing, probes, parts, **merge.fixed
    )
    estimate, fit, ridge = launches["estimate"], launches["fit"], launches["ridge"]
    queued(estimate_kernel, estimate.grid(blocks=blocks, pairs=pairs, probes=probes))(
        query, order, summaries.low_key, route.mass_term, space.peak,
        space.logit, space.term, space.moments, *query.stride()[:3],
        call.heads, call.group_size, call.tokens, tiles, blocks, probes, parts, text_before,
        call.scale, **estimate.fixed, **call.query_side, BY_PROBE=by_probe,
        queries=None if call.own else call.queries,
    )  # fmt: skip
    queued(fit_kernel, fit.grid(pairs=pairs))(
        query, order, summaries.low_value, summaries.h_bar, space.logit, space.term,
        space.moments, space.mass, space.exact, space.missing, space.fitted.coefficients,
        space.energy,
        *query.stride()[:3],
        call.heads, call.group_size, call.queries, blocks, probes, parts, text_before, call.scale,
        **fit.fixed, **call.query_side,
    )  # fmt: skip
    queued(ridge_kernel, ridge.grid(pairs=pairs))(
        query, order, summaries.h_bar, space.mass, space.exact, space.missing,
        space.fitted.coefficients, space.energy, space.fitted.matrix, space.error,
        *query.stride()[:3],
        call.heads, call.group_size, call.queries, probes, parts, text_before, call.scale,
        **ridge.fixed, **call.query_side,
    )  # fmt: skip
