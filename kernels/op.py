"""`freqopt::split_attention`: the one functional op that graphs, exporters and users call.

Registers the schema with its CPU, CUDA, fake and autograd implementations, all of which check their
tensors (`freqopt.kernels.checks`): graphs hold this op, and budgets come to it from elsewhere.
Importing this module does not import triton; the first CUDA tensor does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from freqopt.config import KEY_BLOCK, QUERY_TILE
from freqopt.kernels.checks import (
    check_backward,
    check_call,
    check_chunks,
    check_devices,
    check_order,
)
from freqopt.kernels.device import shared_memory, uncast
from freqopt.kernels.layout import (
    PER_BYTE,
    Inputs,
    Settings,
    TokenLayout,
    pack_route,
    unpack_route,
)
from freqopt.kernels.workspace import is_long

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256

WIDE_SHARED = {2: 86_016, 4: 172_032}
"""Bytes of shared memory that head dims above 128 need, by bytes per element."""


@torch.library.custom_op("freqopt::split_attention", mutates_args=(), device_types="cpu")
def split_attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    threshold: Tensor,
    key_mask: Tensor | None,
    grid: Sequence[int],
    text_before: int,
    text_after: int,
    scale: float,
    density: float,
    probes: int,
    chunks: Tensor | None = None,
    largest_chunk: int = 0,
    key_order: Tensor | None = None,
    query_order: Tensor | None = None,
    query_layout: Sequence[int] | None = None,
    log_sum: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op itself; arguments as in `attention.split_attention`, already validated.

    Args:
        query: (B, H, Nq, D); key, value: (B, Hkv, Nk, D).
        threshold: (H,) float32, used where `density` is 0; what is no number, or negative, attends
            every pair exactly.
        key_mask: (B, Nk) bool.
        grid, text_before, text_after: of the keys' sequence; (1, 1, T) for tokens without a grid.
        chunks: (Hkv,) int32: tokens of a key head's chunks, 0 for the base order of the grid.
        largest_chunk: at least the largest of them; 0 where no order is made.
        key_order: (B, Hkv, T) int32, used instead of making one; query_order: (B, H, Tq), of
            queries that are other tokens. On a CPU what is no permutation is refused; on a GPU,
            which would have to be waited for, numbers are kept among the tokens, and queries that
            have no place are NaN.
        query_layout: (t, h, w, text_before, text_after) of queries that are other tokens than the
            keys; they are the same without it.
        log_sum: whether the logarithms of the softmax sums are wanted.

    Returns:
        out (B, H, Nq, D); density (B, H); probe_error (B, H); route (B, H, tiles, blocks) int8
        (0 low, 2 exact), of long sequences (`workspace.is_long`) as layout.pack_route packs it;
        coefficients (B, H, 2) float32, the probe's c and g; log_sum (B, H, Nq) float32; the orders
        of keys (B, Hkv, T) and of queries (B, H, Tq) that were made, int32, of which, as of the log
        sums, those that were not asked for are empty; the first-order matrix (B, H, D, D), g H-bar
        and the update, in the queries' dtype.

    Raises:
        InputError: tensors whose shapes, dtypes or devices do not belong together.
    """
    from freqopt.kernels.chunked import split_forward

    inputs, settings = _arguments(
        query, key, value, threshold, key_mask, grid, text_before, text_after, scale, density,
        probes, chunks, largest_chunk, key_order, query_order, query_layout, log_sum,
    )  # fmt: skip
    check_call(inputs, settings)
    if not query.shape[0] * query.shape[1]:
        return _unwritten(inputs, settings)
    if chunks is not None:
        check_chunks(chunks)
    if key_order is not None:
        check_order("key_order", key_order)
    if query_order is not None:
        check_order("query_order", query_order)
    with uncast(query.device):
        found = split_forward(inputs, settings)
    split = found.split
    coefficients = torch.stack([split.probe.c, split.probe.g], -1)
    route = pack_route(split.route) if is_long(inputs.layout.tokens) else split.route
    nothing = query.new_empty(0, dtype=torch.int32)
    made = bool(largest_chunk) and chunks is not None
    of_keys, of_queries = found.orders
    return (
        found.out,
        split.density,
        split.probe.error,
        route,
        coefficients,
        found.log_sum if log_sum else query.new_empty(0, dtype=torch.float32),
        of_keys if made and key_order is None and of_keys is not None else nothing,
        of_queries
        if made and query_layout is not None and query_order is None and of_queries is not None
        else torch.empty_like(nothing),
        found.matrix,
    )


@split_attention_op.register_kernel("cuda")
def _split_attention_cuda(*arguments: Any) -> tuple[Tensor, ...]:
    from freqopt.kernels.forward.split import split_forward

    inputs, settings = _arguments(*arguments)
    check_call(inputs, settings)
    if not inputs.query.shape[0] * inputs.query.shape[1]:
        return _unwritten(inputs, settings)
    with uncast(inputs.query.device):
        return split_forward(inputs, settings)


def _arguments(
    query: Tensor, key: Tensor, value: Tensor, threshold: Tensor, key_mask: Tensor | None,
    grid: Sequence[int], text_before: int, text_after: int, scale: float, density: float,
    probes: int, chunks: Tensor | None = None, largest_chunk: int = 0,
    key_order: Tensor | None = None, query_order: Tensor | None = None,
    query_layout: Sequence[int] | None = None, log_sum: bool = False,
) -> tuple[Inputs, Settings]:  # fmt: skip
    """The op's arguments, of which a dispatcher leaves out the last that are as by default."""
    inputs = _inputs(
        query, key, value, threshold, key_mask, (*grid, text_before, text_after), query_layout,
        chunks, key_order, query_order,
    )  # fmt: skip
    return inputs, Settings(scale, density, probes, largest_chunk, log_sum)


def _inputs(
    query: Tensor, key: Tensor, value: Tensor, threshold: Tensor, key_mask: Tensor | None,
    layout: Sequence[int], query_layout: Sequence[int] | None, chunks: Tensor | None,
    key_order: Tensor | None, query_order: Tensor | None,
) -> Inputs:  # fmt: skip
    return Inputs(
        query, key, value, threshold, key_mask, TokenLayout.of(layout),
        None if query_layout is None else TokenLayout.of(query_layout),
        chunks, key_order, query_order,
    )  # fmt: skip


@split_attention_op.register_fake
def _split_attention_fake(*arguments: Any) -> tuple[Tensor, ...]:
    check_devices(*(each for each in arguments if isinstance(each, Tensor)))
    return _unwritten(*_arguments(*arguments))


def _unwritten(inputs: Inputs, settings: Settings) -> tuple[Any, ...]:
    """Tensors as the op returns them, whose values nobody has written."""
    query, key = inputs.query, inputs.key
    batch, heads, length, dim = query.shape
    tokens = inputs.layout.tokens
    queries = tokens if inputs.query_layout is None else inputs.query_layout.tokens
    tiles = (queries + QUERY_TILE - 1) // QUERY_TILE
    blocks = (tokens + KEY_BLOCK - 1) // KEY_BLOCK
    per_head = query.new_empty((batch, heads), dtype=torch.float32)
    route = query.new_empty((batch, heads, tiles, blocks), dtype=torch.int8)
    if is_long(tokens):
        packed = (batch, heads, tiles, (blocks + PER_BYTE - 1) // PER_BYTE)
        route = query.new_empty(packed, dtype=torch.uint8)
    made = inputs.chunks is not None and settings.largest_chunk > 0
    of_keys: tuple[Any, ...] = (0,)
    of_queries: tuple[Any, ...] = (0,)
    if made and inputs.key_order is None:
        of_keys = (batch, key.shape[1], tokens)
    if made and inputs.query_layout is not None and inputs.query_order is None:
        of_queries = (batch, heads, queries)
    return (
        query.new_empty((batch, length, heads, dim)).transpose(1, 2),
        per_head,
        torch.empty_like(per_head),
        route,
        query.new_empty((batch, heads, 2), dtype=torch.float32),
        query.new_empty((batch, heads, length) if settings.log_sum else (0,), dtype=torch.float32),
        query.new_empty(of_keys, dtype=torch.int32),
        query.new_empty(of_queries, dtype=torch.int32),
        query.new_empty((batch, heads, dim, dim)),
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, _, key_mask, grid, before, after, scale, _, _, *optional = inputs
    chunks, largest_chunk, key_order, query_order, query_layout, ctx.log_sum = optional
    if chunks is not None and largest_chunk > 0:
        key_order = output[6] if key_order is None else key_order
        if query_layout is not None and query_order is None:
            query_order = output[7]
    out, _, _, route, coefficients, *_, matrix = output
    ctx.save_for_backward(
        query, key, value, key_mask, out, route, coefficients, matrix, key_order, query_order
    )
    ctx.layouts = (*grid, before, after), query_layout
    ctx.scale = scale
    ctx.mark_non_differentiable(*output[1:5], *output[6:])


@torch.library.custom_op("freqopt::split_attention_backward", mutates_args=(), device_types="cpu")
def split_attention_backward_op(
    grad: Tensor,
    log_sum_grad: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    out: Tensor,
    route: Tensor,
    coefficients: Tensor,
    matrix: Tensor,
    key_order: Tensor | None,
    query_order: Tensor | None,
    layout: Sequence[int],
    query_layout: Sequence[int] | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value.

    grad, log_sum_grad: of the forward's out and log_sum; out, route, coefficients, matrix and
    orders are the forward's own. layout: (t, h, w, text_before, text_after) of the keys.
    """
    from freqopt.kernels.chunked import Orders
    from freqopt.kernels.chunked_backward import Gradients, split_backward

    inputs = _inputs(
        query, key, value, coefficients, key_mask, layout, query_layout, None, key_order,
        query_order,
    )  # fmt: skip
    check_backward(inputs, grad, log_sum_grad, coefficients, matrix)
    if not query.shape[0] * query.shape[1]:
        return _no_gradients(query, key, value)
    of_queries = query_order
    if query_layout is None and key_order is not None:
        of_queries = key_order.repeat_interleave(query.shape[1] // key.shape[1], 1)
    with uncast(query.device):
        grads = split_backward(
            Gradients(grad, log_sum_grad),
            inputs,
            Orders(key_order, of_queries),
            unpack_route(route, inputs.layout.tokens),
            coefficients,
            matrix,
            scale,
        )
    return by_tokens(grads[0]), by_tokens(grads[1]), by_tokens(grads[2])


def by_tokens(x: Tensor) -> Tensor:
    """(B, H, N, D) laid out as (B, N, H, D), the gradients' layout on every device."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _no_gradients(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Those of a call without items or heads."""
    query_grad, key_grad, value_grad = empty_gradients(query, key, value)
    return query_grad.zero_(), key_grad.zero_(), value_grad.zero_()


@split_attention_backward_op.register_kernel("cuda")
def _split_attention_backward_cuda(
    grad: Tensor, log_sum_grad: Tensor | None, query: Tensor, key: Tensor, value: Tensor,
    key_mask: Tensor | None, out: Tensor, route: Tensor, coefficients: Tensor, matrix: Tensor,
    key_order: Tensor | None, query_order: Tensor | None, layout: Sequence[int],
    query_layout: Sequence[int] | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from freqopt.kernels.backward.launch import Forward, split_backward

    inputs = _inputs(
        query, key, value, coefficients, key_mask, layout, query_layout, None, key_order,
        query_order,
    )  # fmt: skip
    check_backward(inputs, grad, log_sum_grad, coefficients, matrix)
    if not query.shape[0] * query.shape[1]:
        return _no_gradients(query, key, value)
    route = unpack_route(route, inputs.layout.tokens)
    forward = Forward(out, route, coefficients, matrix)
    with uncast(query.device):
        return split_backward(grad, log_sum_grad, inputs, forward, scale)


@split_attention_backward_op.register_fake
def _split_attention_backward_fake(
    grad: Tensor, log_sum_grad: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(query, key, value)


def empty_gradients(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Memory as the gradients of query, key and value have it."""
    batch = query.shape[0]
    query_grad, key_grad, value_grad = (
        x.new_empty((batch, x.shape[2], x.shape[1], x.shape[3])).transpose(1, 2)
        for x in (query, key, value)
    )
    return query_grad, key_grad, value_grad


def _backward(
    ctx: Any, grad: Tensor, _1: Any, _2: Any, _3: Any, _4: Any, log_sum_grad: Tensor, *_5: Any
) -> tuple[Tensor | None, ...]:
    sums = log_sum_grad if ctx.log_sum else None
    grads = split_attention_backward_op(grad, sums, *ctx.saved_tensors, *ctx.layouts, ctx.scale)
    return (*grads, *[None] * 14)


split_attention_op.register_autograd(_backward, setup_context=_save_for_backward)


def check_site(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device | str
) -> str | None:
    """Why the op cannot serve such an attention, or None if it can."""
    if dtype not in DTYPES:
        return f"dtype {dtype} has no kernel (supported: float32, float16, bfloat16)"
    if heads % kv_heads if kv_heads else heads:
        return f"{heads} query heads are not a multiple of {kv_heads} key heads"
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        return f"device {kind} has no kernel (supported: cpu, cuda)"
    if kind == "cuda" and (head_dim % 8 or not 8 <= head_dim <= MAX_HEAD_DIM):
        return f"head_dim {head_dim} has no kernel (supported: multiples of 8 up to {MAX_HEAD_DIM})"
    if kind == "cuda" and head_dim > 128:
        needed = WIDE_SHARED[dtype.itemsize]
        here = shared_memory(device)
        if here < needed:
            return (
                f"head_dim {head_dim} in {dtype} needs {needed} bytes of shared memory and this "
                f"GPU has {here} (head dims up to 128 are supported here)"
            )
    return None
