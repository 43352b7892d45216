"""The backward pass on the GPU: launches `triton_backward` and `triton_backward_bands`.

Kernels do whatever touches tokens; the gradients of mass terms, one number for a pair of tile and
mean, are matrix products by PyTorch in float32. Nothing waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from freqopt.config import KEY_BLOCK, QUERY_TILE
from freqopt.kernels.backward.parts import (
    Band,
    Blocks,
    Call,
    Lists,
    Rows,
    Sums,
    by_key_head,
    copy_rows,
    make_band,
    make_lists,
    shapes_for,
    softmax_sums,
    with_text,
)
from freqopt.kernels.forward.split import attend_text, summarise, with_unit_last_stride
from freqopt.kernels.layout import Sequence
from freqopt.kernels.portable.backward import key_gradient_kernel, query_gradient_kernel
from freqopt.kernels.portable.backward_bands import (
    band_gradient_kernel,
    finish_kernel,
    mean_gradient_kernel,
    order_gradient_kernel,
)
from freqopt.kernels.tiles import padded_dim
from freqopt.kernels.tuned import launch_on
from freqopt.kernels.workspace import turns

WORKSPACE = 4 << 30
"""Bytes of copies and partial sums that one turn of heads may hold."""

PAIR_BYTES = 40
"""Of one (query tile, key block) pair: lists, bias and its gradient, and PyTorch's temporaries."""

MEAN_PROGRAMS = 1024
"""Programs that the means are spread over, by cutting the tiles into ranges."""

ORDER_TILES = 16
"""Query tiles per program of the first-order matrix's gradient: amortises its (D, D) sum."""

ORDER_COLUMNS = 64
"""Value channels per program of the same."""


class BandGradients(NamedTuple):
    """Gradients of the low band's means, variances (B, Hkv, J, D) and H-bar (B, Hkv, D, D).

    float32 but for that of H-bar, which is in the keys' type and scaled to at most 1: to be
    multiplied by order_factor (B, Hkv). pooled (B, H, I, D): of the mean squared queries.
    """

    key: Tensor
    value: Tensor
    var: Tensor
    order: Tensor
    order_factor: Tensor
    pooled: Tensor


def order_gradient(
    call: Call, rows: Rows, share: Tensor, coefficients: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of H-bar over the number of tokens: scaled to at most 1, and by what."""
    columns, spans = min(padded_dim(call.dim), ORDER_COLUMNS), triton.cdiv(call.tiles, ORDER_TILES)
    parts = call.single(call.batch, call.heads, spans, call.dim, call.dim)
    order_gradient_kernel[(spans, call.pairs, triton.cdiv(call.dim, columns))](
        rows.query, rows.grad, share, parts, call.tiles,
        D=call.dim, DP=padded_dim(call.dim), BV=columns, GROUP=ORDER_TILES,
        PRECISION=call.shapes.precision, num_warps=8, num_stages=1,
    )  # fmt: skip
    factor = coefficients[..., 1] * (call.scale / call.sequence.tokens)
    order = (parts.sum(2) * factor[..., None, None]).unflatten(1, (call.kv_heads, -1)).sum(2)
    largest = order.abs().amax((2, 3)).clamp(min=torch.finfo(torch.float32).tiny)
    return (order / largest[..., None, None]).to(rows.query.dtype), largest


def mean_gradients(call: Call, rows: Rows, band: Band, sums: Sums) -> tuple[Tensor, Tensor]:
    """Gradients of the low band's mean keys and values."""
    shape = call.shapes.means
    groups = triton.cdiv(call.blocks, call.shapes.keys)
    ranges = max(min(MEAN_PROGRAMS // (groups * call.key_pairs), call.tiles), 1)
    span = triton.cdiv(call.tiles, ranges)
    ranges = triton.cdiv(call.tiles, span)
    grads = [call.single(ranges, *band.key.shape) for _ in range(2)]
    mean_gradient_kernel[(groups, call.key_pairs, ranges)](
        rows.query, rows.grad, sums.centred, rows.low_delta, band.key, band.value, band.bias,
        *grads, call.heads, call.group_size, call.tiles, call.blocks, span, call.scale,
        BN=call.shapes.keys, **call.options(shape),
    )  # fmt: skip
    return grads[0].sum(0), grads[1].sum(0)


def band_gradients(
    call: Call, rows: Rows, band: Band, sums: Sums, key_shift: Tensor, coefficients: Tensor,
    banded: Tensor,
) -> BandGradients:  # fmt: skip
    """Gradients through the low band; that of the queries is written to banded.

    banded: (B, H, R, D) float32.
    """
    shape = call.shapes.bands
    parts = call.rows // shape.rows
    bias_grad = call.single(call.batch, call.heads, parts, call.blocks)
    share = call.single(call.batch, call.heads, call.rows)
    band_gradient_kernel[(parts, call.pairs)](
        rows.query, rows.grad, sums.centred, rows.low_delta, band.key, band.value, band.bias,
        key_shift, coefficients, band.order, banded, bias_grad, share,
        call.heads, call.group_size, call.tiles, call.blocks, call.scale, **call.options(shape),
    )  # fmt: skip
    bias_grad = bias_grad.unflatten(2, (call.tiles, -1)).sum(3)
    spread_grad = bias_grad * band.slope * (0.5 * call.scale**2)
    spread_grad = by_key_head(spread_grad, call.kv_heads)
    return BandGradients(
        *mean_gradients(call, rows, band, sums),
        spread_grad.mT @ by_key_head(rows.pooled, call.kv_heads),
        *order_gradient(call, rows, share, coefficients),
        (spread_grad @ band.var).view_as(rows.pooled),
    )


class Results(NamedTuple):
    """Gradients of queries, keys and values in the model's order, any strides: written into."""

    query: Tensor
    key: Tensor
    value: Tensor


def exact_gradients(
    call: Call, rows: Rows, blocks: Blocks, lists: Lists, sums: Sums, banded: Tensor,
    through: BandGradients, results: Results,
) -> None:  # fmt: skip
    """Gradients through the exact pairs, with those through the band added, into `results`."""
    tokens, text, before = call.sequence.tokens, call.sequence.text, call.sequence.text_before
    sizes = (call.heads, call.group_size)
    query_gradient_kernel[(call.rows // call.shapes.query.rows, call.pairs)](
        rows.query, rows.grad, *blocks, sums.plain, rows.delta, lists.blocks, lists.block_counts,
        banded, through.pooled, call.order, results.query, *results.query.stride()[:3],
        *sizes, tokens, call.tiles, call.blocks, call.all_blocks, before, call.scale,
        **call.options(call.shapes.query),
    )  # fmt: skip
    key_grad, value_grad = (call.single(*blocks.key.shape) for _ in range(2))
    key_gradient_kernel[(call.all_blocks * KEY_BLOCK // call.shapes.keys, call.key_pairs)](
        rows.query, rows.grad, blocks.key, blocks.value, sums.plain, rows.delta, lists.tiles,
        lists.tile_counts, key_grad, value_grad, *sizes, call.tiles, call.all_blocks, call.scale,
        BN=call.shapes.keys, **call.options(call.shapes.key),
    )  # fmt: skip
    for keys in (True, False):
        own, other, exact, result = (
            (blocks.key, blocks.value, key_grad, results.key) if keys
            else (blocks.value, blocks.key, value_grad, results.value)
        )  # fmt: skip
        finish_kernel[(call.all_blocks, call.key_pairs)](
            own, other, blocks.valid, exact, call.order, result,
            through.key if keys else through.value, through.var, through.order,
            through.order_factor, *result.stride()[:3],
            call.kv_heads, tokens, call.blocks, call.all_blocks, text, before,
            D=call.dim, DP=padded_dim(call.dim), SLICE=call.shapes.slice, KEYS=keys,
            PRECISION=call.shapes.precision, num_warps=8, num_stages=1,
        )  # fmt: skip


def heads_backward(
    call: Call, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None,
    out: Tensor, route: Tensor, coefficients: Tensor, results: Results,
) -> None:  # fmt: skip
    """The backward pass of heads that go together, into `results`; text queries apart."""
    launch = launch_on(query.device, query.dtype, call.dim, call.sequence.tokens)
    summaries = summarise(key, value, call.sequence, launch)
    blocks = with_text(summaries, key, value, key_mask, call.sequence)
    lists = make_lists(route, call.all_blocks)
    rows = copy_rows(call, query, grad, out, summaries, coefficients)
    band = make_band(call, summaries, route, rows.pooled, coefficients[..., 0, None, None])
    sums = softmax_sums(call, rows, blocks, band, lists)
    banded = call.single(call.batch, call.heads, call.rows, call.dim)
    through = band_gradients(call, rows, band, sums, summaries.key_shift, coefficients, banded)
    exact_gradients(call, rows, blocks, lists, sums, banded, through, results)


def split_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    out: Tensor,
    route: Tensor,
    coefficients: Tensor,
    sequence: Sequence,
    *,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value (B, H or Hkv, N, D), as chunked.split_backward.

    out: what the forward returned.
    """
    grad, query, key, value, out = (
        with_unit_last_stride(x) for x in (grad, query, key, value, out)
    )
    batch, heads, length, dim = query.shape
    kv_heads, shared = key.shape[1], heads // key.shape[1]
    tiles, blocks = route.shape[2:]
    query_grad, key_grad, value_grad = (
        torch.empty(batch, length, x.shape[1], dim, device=x.device, dtype=x.dtype).transpose(1, 2)
        for x in (query, key, value)
    )
    copies = 2 * (query.element_size() + 4) * tiles * QUERY_TILE * dim
    per_head = (1 + shared) * copies + shared * tiles * blocks * PAIR_BYTES
    with torch.cuda.device_of(query):
        for row in turns(batch, kv_heads, per_head, WORKSPACE):
            for items, kv in row:
                own = slice(kv.start * shared, kv.stop * shared)
                call = Call(
                    items.stop - items.start, own.stop - own.start, kv.stop - kv.start, dim, tiles,
                    blocks, sequence, scale, shapes_for(query.dtype, dim), query.device,
                )  # fmt: skip
                heads_backward(
                    call, grad[items, own], query[items, own], key[items, kv], value[items, kv],
                    None if key_mask is None else key_mask[items], out[items, own],
                    route[items, own], coefficients[items, own],
                    Results(query_grad[items, own], key_grad[items, kv], value_grad[items, kv]),
                )  # fmt: skip
        results = Results(query_grad, key_grad, value_grad)
        if sequence.text:
            _add_text(grad, query, key, value, key_mask, sequence, scale, results)
    return results


def _add_text(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None,
    sequence: Sequence, scale: float, results: Results,
) -> None:  # fmt: skip
    """Gradients of the dense text queries, by PyTorch's own attention."""

    def dense(*tensors: Tensor) -> Tensor:
        return attend_text(tensors[0], tensors[1], tensors[2], key_mask, sequence, scale)

    # torch.func, not torch.autograd: inside an op's kernel the autograd keys are switched off.
    _, text_vjp, *_ = torch.func.vjp(dense, query, key, value)
    grads = text_vjp(sequence.text_of(grad))
    before, after = sequence.text_before, sequence.text_before + sequence.tokens
    for part in (slice(0, before), slice(after, None)):
        results.query[:, :, part] = grads[0][:, :, part]
    results.key.add_(grads[1])
    results.value.add_(grads[2])
