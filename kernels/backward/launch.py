"""The backward pass on the GPU: the launches of `portable.backward` and `portable.backward_bands`.

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
    Lists,
    Rows,
    Sums,
    Turn,
    by_key_head,
    copy_rows,
    make_band,
    make_lists,
    shapes_for,
    softmax_sums,
    with_text,
)
from freqopt.kernels.forward.attention import attend_text, text_log_sums
from freqopt.kernels.forward.split import call_of, with_unit_last_stride
from freqopt.kernels.forward.summaries import summarise
from freqopt.kernels.layout import Inputs, Settings
from freqopt.kernels.portable.backward import key_gradient_kernel, query_gradient_kernel
from freqopt.kernels.portable.backward_bands import (
    band_gradient_kernel,
    finish_kernel,
    h_bar_gradient_kernel,
    mean_gradient_kernel,
)
from freqopt.kernels.tiles import padded_dim
from freqopt.kernels.workspace import turns

WORKSPACE = 4 << 30
"""Bytes of copies and partial sums that one turn of heads may hold."""

PAIR_BYTES = 40
"""Of one (query tile, key block) pair: lists, bias and its gradient, and PyTorch's temporaries."""

MEAN_PROGRAMS = 1024
"""Programs that the means are spread over, by cutting the tiles into ranges."""

H_BAR_TILES = 16
"""Query tiles per program of the first-order matrix's gradient: amortises its (D, D) sum."""

H_BAR_COLUMNS = 64
"""Value channels per program of the same."""


class BandGradients(NamedTuple):
    """Gradients of the low band's means, variances (B, Hkv, J, D) and H-bar (B, Hkv, D, D).

    float32 but for that of H-bar, which is in the keys' type and scaled to at most 1: to be
    multiplied by h_bar_factor (B, Hkv). pooled (B, H, I, D): of the mean squared queries.
    """

    key: Tensor
    value: Tensor
    var: Tensor
    h_bar: Tensor
    h_bar_factor: Tensor
    pooled: Tensor


def h_bar_gradient(
    turn: Turn, rows: Rows, share: Tensor, coefficients: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of H-bar over the number of tokens: scaled to at most 1, and by what."""
    columns, spans = (
        min(padded_dim(turn.call.dim), H_BAR_COLUMNS),
        triton.cdiv(turn.tiles, H_BAR_TILES),
    )
    parts = turn.single(turn.call.batch, turn.call.heads, spans, turn.call.dim, turn.call.dim)
    h_bar_gradient_kernel[(spans, turn.call.pairs, triton.cdiv(turn.call.dim, columns))](
        rows.query, rows.grad, share, parts, turn.tiles,
        **turn.call.size, BV=columns, GROUP=H_BAR_TILES,
        PRECISION=turn.shapes.precision, num_warps=8, num_stages=1,
    )  # fmt: skip
    factor = coefficients[..., 1] * (turn.call.scale / turn.call.tokens)
    h_bar = (parts.sum(2) * factor[..., None, None]).unflatten(1, (turn.call.kv_heads, -1)).sum(2)
    largest = h_bar.abs().amax((2, 3)).clamp(min=torch.finfo(torch.float32).tiny)
    return (h_bar / largest[..., None, None]).to(rows.query.dtype), largest


def mean_gradients(turn: Turn, rows: Rows, band: Band, sums: Sums) -> tuple[Tensor, Tensor]:
    """Gradients of the low band's mean keys and values."""
    shape = turn.shapes.means
    groups = triton.cdiv(turn.blocks, turn.shapes.keys)
    ranges = max(min(MEAN_PROGRAMS // (groups * turn.key_pairs), turn.tiles), 1)
    span = triton.cdiv(turn.tiles, ranges)
    ranges = triton.cdiv(turn.tiles, span)
    grads = [turn.single(ranges, *band.key.shape) for _ in range(2)]
    mean_gradient_kernel[(groups, turn.key_pairs, ranges)](
        rows.query, rows.grad, sums.centred, rows.low_delta, band.key, band.value, band.bias,
        *grads, turn.call.heads, turn.call.group_size, turn.tiles, turn.blocks, span,
        turn.call.scale, BN=turn.shapes.keys, **turn.options(shape),
    )  # fmt: skip
    return grads[0].sum(0), grads[1].sum(0)


def band_gradients(
    turn: Turn,
    rows: Rows,
    band: Band,
    sums: Sums,
    key_shift: Tensor,
    forward: Forward,
    banded: Tensor,
) -> BandGradients:
    """Gradients through the low band; that of the queries is written to banded.

    banded: (B, H, R, D) float32.
    """
    shape = turn.shapes.bands
    parts = turn.rows // shape.rows
    bias_grad = turn.single(turn.call.batch, turn.call.heads, parts, turn.blocks)
    share = turn.single(turn.call.batch, turn.call.heads, turn.rows)
    band_gradient_kernel[(parts, turn.call.pairs)](
        rows.query, rows.grad, sums.centred, rows.low_delta, band.key, band.value, band.bias,
        key_shift, forward.matrix, banded, bias_grad, share,
        turn.call.heads, turn.call.group_size, turn.tiles, turn.blocks, turn.call.scale,
        **turn.options(shape),
    )  # fmt: skip
    bias_grad = bias_grad.unflatten(2, (turn.tiles, -1)).sum(3)
    spread_grad = bias_grad * band.slope * (0.5 * turn.call.scale**2)
    spread_grad = by_key_head(spread_grad, turn.call.kv_heads)
    return BandGradients(
        *mean_gradients(turn, rows, band, sums),
        spread_grad.mT @ by_key_head(rows.pooled, turn.call.kv_heads),
        *h_bar_gradient(turn, rows, share, forward.coefficients),
        (spread_grad @ band.var).view_as(rows.pooled),
    )


class Results(NamedTuple):
    """Gradients of queries, keys and values in the model's order, any strides: written into."""

    query: Tensor
    key: Tensor
    value: Tensor


class Forward(NamedTuple):
    """What the forward pass found.

    out (B, H, Nq, D), route (B, H, I, J) int8, coefficients (B, H, 2): the probe's c and g; matrix
    (B, H, D, D): the first-order matrix.
    """

    out: Tensor
    route: Tensor
    coefficients: Tensor
    matrix: Tensor


def exact_gradients(
    turn: Turn, rows: Rows, blocks: Blocks, lists: Lists, sums: Sums, banded: Tensor,
    through: BandGradients, results: Results,
) -> None:  # fmt: skip
    """Gradients through the exact pairs, with those through the band added, into `results`."""
    call, layout, order = turn.call, turn.call.layout, turn.call.query_order
    sizes = (call.heads, call.group_size)
    query_gradient_kernel[(turn.rows // turn.shapes.query.rows, call.pairs)](
        rows.query, rows.grad, *blocks, sums.plain, rows.delta, lists.blocks, lists.block_counts,
        banded, through.pooled, order.index, results.query, *results.query.stride()[:3],
        *sizes, call.tokens, call.queries, turn.tiles, turn.blocks, turn.all_blocks,
        call.query_layout.text_before, call.scale, order.row, order.share,
        **turn.options(turn.shapes.query),
    )  # fmt: skip
    key_grad, value_grad = (turn.single(*blocks.key.shape) for _ in range(2))
    key_gradient_kernel[(turn.all_blocks * KEY_BLOCK // turn.shapes.keys, turn.key_pairs)](
        rows.query, rows.grad, blocks.key, blocks.value, sums.plain, rows.delta, lists.tiles,
        lists.tile_counts, key_grad, value_grad, *sizes, turn.tiles, turn.all_blocks, call.scale,
        BN=turn.shapes.keys, **turn.options(turn.shapes.key),
    )  # fmt: skip
    for keys in (True, False):
        own, other, exact, result = (
            (blocks.key, blocks.value, key_grad, results.key)
            if keys
            else (blocks.value, blocks.key, value_grad, results.value)
        )
        finish_kernel[(turn.all_blocks, turn.key_pairs)](
            own, other, blocks.valid, exact, call.order.index, result,
            through.key if keys else through.value, through.var, through.h_bar,
            through.h_bar_factor, *result.stride()[:3],
            call.kv_heads, call.tokens, turn.blocks, turn.all_blocks, layout.text,
            layout.text_before, call.order.row,
            **call.size, SLICE=turn.shapes.slice, KEYS=keys, PRECISION=turn.shapes.precision,
            num_warps=8, num_stages=1,
        )  # fmt: skip


def heads_backward(
    turn: Turn, grad: Tensor, log_sum_grad: Tensor | None, found: Forward, results: Results
) -> None:
    """The backward pass of heads that go together, into `results`; text queries apart."""
    call, c = turn.call, found.coefficients[..., 0, None, None]
    summaries = summarise(call)
    blocks = with_text(call, summaries)
    lists = make_lists(found.route, turn.all_blocks)
    rows = copy_rows(turn, grad, log_sum_grad, found.out, summaries, found.matrix)
    band = make_band(turn, summaries, found.route, rows.pooled, c)
    sums = softmax_sums(turn, rows, blocks, band, lists)
    banded = turn.single(*call.per_head, turn.rows, call.dim)
    through = band_gradients(turn, rows, band, sums, summaries.key_shift, found, banded)
    exact_gradients(turn, rows, blocks, lists, sums, banded, through, results)


def split_backward(
    grad: Tensor, log_sum_grad: Tensor | None, inputs: Inputs, forward: Forward, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value (B, H or Hkv, N, D), as chunked_backward.split_backward.

    grad, log_sum_grad: of the forward's output and log sums. inputs: with the forward's orders.
    """
    grad, out = with_unit_last_stride(grad), with_unit_last_stride(forward.out)
    inputs = inputs._replace(
        query=with_unit_last_stride(inputs.query),
        key=with_unit_last_stride(inputs.key),
        value=with_unit_last_stride(inputs.value),
    )
    if log_sum_grad is not None:
        log_sum_grad = log_sum_grad.contiguous()
    query, key, value = inputs.query, inputs.key, inputs.value
    batch, heads, _, dim = query.shape
    kv_heads, shared = key.shape[1], heads // key.shape[1]
    tiles, blocks = forward.route.shape[2:]
    query_grad, key_grad, value_grad = (
        torch.empty(batch, x.shape[2], x.shape[1], dim, device=x.device, dtype=x.dtype)
        for x in (query, key, value)
    )
    results = Results(*(x.transpose(1, 2) for x in (query_grad, key_grad, value_grad)))
    copies = 2 * (query.element_size() + 4) * dim
    per_head = copies * (blocks * KEY_BLOCK + shared * tiles * QUERY_TILE)
    per_head += shared * tiles * blocks * PAIR_BYTES
    settings = Settings(scale, 0.0, 0)
    with torch.cuda.device_of(query):
        for row in turns(batch, kv_heads, per_head, WORKSPACE):
            for items, kv in row:
                own = slice(kv.start * shared, kv.stop * shared)
                call = call_of(inputs.heads(items, kv), settings, None, None)
                turn = Turn(call, tiles, blocks, shapes_for(query.dtype, dim))
                sums = None if log_sum_grad is None else log_sum_grad[items, own].contiguous()
                found = Forward(
                    out[items, own],
                    forward.route[items, own],
                    forward.coefficients[items, own],
                    forward.matrix[items, own].contiguous(),
                )
                heads_backward(
                    turn,
                    grad[items, own],
                    sums,
                    found,
                    Results(
                        results.query[items, own], results.key[items, kv], results.value[items, kv]
                    ),
                )
        if (inputs.query_layout or inputs.layout).text:
            _add_text(grad, log_sum_grad, inputs, scale, results)
    return results


def _add_text(
    grad: Tensor, log_sum_grad: Tensor | None, inputs: Inputs, scale: float, results: Results
) -> None:
    """Gradients of the dense text queries, by PyTorch's own attention."""
    layout = inputs.query_layout or inputs.layout
    mask = inputs.layout.sequence_mask(inputs.key_mask)
    wanted = log_sum_grad is not None

    def dense(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        text = layout.text_of(query)
        out = attend_text(text, key, value, mask, scale)
        return (out, text_log_sums(text, key, mask, scale)) if wanted else (out,)

    # torch.func, not torch.autograd: inside an op's kernel the autograd keys are switched off.
    _, text_vjp, *_ = torch.func.vjp(dense, inputs.query, inputs.key, inputs.value)
    given = [layout.text_of(grad)]
    if log_sum_grad is not None:
        given.append(layout.text_of(log_sum_grad[..., None])[..., 0])
    grads = text_vjp(tuple(given))
    before, after = layout.text_before, layout.text_before + layout.tokens
    for part in (slice(0, before), slice(after, None)):
        results.query[:, :, part] = grads[0][:, :, part]
    results.key.add_(grads[1])
    results.value.add_(grads[2])
