"""The forward pass on the GPU: orders are made, and heads that fit the workspace go together.

Nothing here waits for the device: orders, routes, list lengths and the probe's scalars stay there,
so a call can be captured in a CUDA graph and replayed with other content.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from freqopt.kernels.forward import long, short
from freqopt.kernels.forward.call import Call, Findings, Order, Target
from freqopt.kernels.forward.order import order_by_content
from freqopt.kernels.layout import Inputs, Settings, TokenLayout
from freqopt.kernels.repeat import REPEATER
from freqopt.kernels.tuned import launch_on
from freqopt.kernels.workspace import bytes_per_key_head, is_long, turns


def with_unit_last_stride(x: Tensor) -> Tensor:
    """`x` itself unless its last dim is strided, which no kernel reads well."""
    return x if x.stride(-1) == 1 else x.contiguous()


def readable(inputs: Inputs) -> Inputs:
    """Tensors as the kernels read them."""
    return inputs._replace(
        query=with_unit_last_stride(inputs.query),
        key=with_unit_last_stride(inputs.key),
        value=with_unit_last_stride(inputs.value),
        key_mask=None if inputs.key_mask is None else with_unit_last_stride(inputs.key_mask),
    )


def split_forward(inputs: Inputs, settings: Settings) -> tuple[Tensor, ...]:
    """Forward pass; results as those of `freqopt.kernels.op.split_attention_op`."""
    inputs = readable(inputs)
    query = inputs.query
    tiles = launch_on(query.device, query.dtype, query.shape[-1], inputs.layout.tokens)
    with on_device(query):
        found: tuple[Tensor, ...] = REPEATER.serve(inputs, settings, tiles, launch_all)
    return found


def launch_all(inputs: Inputs, settings: Settings) -> tuple[Tensor, ...]:
    """The forward pass launched kernel by kernel, its GPU being the current one."""
    query, key = inputs.query, inputs.key
    batch, heads, length, dim = query.shape
    kv_heads, tokens = key.shape[1], inputs.layout.tokens
    out = torch.empty(batch, length, heads, dim, device=query.device, dtype=query.dtype)
    if inputs.key_order is not None or inputs.query_order is not None:
        out.fill_(torch.nan)  # what a given order leaves out is nobody's memory
    target = Target(out.transpose(1, 2), inputs.log_sum_memory(settings))
    orders = inputs.order_memory(settings)
    queries = tokens if inputs.query_layout is None else inputs.query_layout.tokens
    per_head = bytes_per_key_head(tokens, queries, dim, query.element_size(), heads // kv_heads)
    serve = long.split_heads if is_long(tokens) else short.split_heads
    rows = []
    for row in turns(batch, kv_heads, per_head):
        parts = []
        for items, kv in row:
            own = slice(kv.start * heads // kv_heads, kv.stop * heads // kv_heads)
            part = inputs.heads(items, kv)
            call = call_of(part, settings, *(
                x if x is None else x[items, h] for x, h in zip(orders, (kv, own), strict=True)
            ))  # fmt: skip
            log_sum = None if target.log_sum is None else target.log_sum[items, own]
            here = Target(target.out[items, own], log_sum)
            parts.append(serve(call, part.threshold, settings, here))
        rows.append(_joined(parts, 1))
    density, error, route, coefficients, matrix = _joined(rows, 0)
    types = (torch.float32, torch.int32, torch.int32)
    optional = (
        out.new_empty(0, dtype=dtype) if x is None else x
        for x, dtype in zip((target.log_sum, *orders), types, strict=True)
    )
    return target.out, density, error, route, coefficients, *optional, matrix


def call_of(
    inputs: Inputs, settings: Settings, key_order: Tensor | None, query_order: Tensor | None
) -> Call:
    """The call with its orders; key_order and query_order: memory for those that are made."""
    query, key = inputs.query, inputs.key
    order = _order(
        key, inputs.layout, inputs.key_order, inputs.chunks, settings.largest_chunk, key_order
    )
    share = query.shape[1] // key.shape[1]
    layout = inputs.query_layout
    if layout is None:
        of_queries = order._replace(share=share)
    else:
        chunks = None if inputs.chunks is None else inputs.chunks.repeat_interleave(share)
        of_queries = _order(
            query, layout, inputs.query_order, chunks, settings.largest_chunk, query_order
        )
    return Call(
        query, key, inputs.value, inputs.key_mask, inputs.layout, order,
        layout or inputs.layout, of_queries, layout is None, settings.scale,
        launch_on(query.device, query.dtype, query.shape[-1], inputs.layout.tokens),
    )  # fmt: skip


def _order(
    tokens_of: Tensor,
    layout: TokenLayout,
    given: Tensor | None,
    chunks: Tensor | None,
    largest_chunk: int,
    memory: Tensor | None,
) -> Order:
    """The order of (B, H, N, D) tokens: the one given, one by content, or the base order."""
    if given is not None:  # by whoever calls the op: no number of it may lead past the tokens
        return Order.per_head(given.clamp(0, layout.tokens - 1).contiguous())
    base = layout.base_order(tokens_of.device)
    if memory is None:
        return Order.shared(base)
    assert chunks is not None
    order_by_content(tokens_of, base, chunks, largest_chunk, layout.text_before, memory)
    return Order.per_head(memory)


def _joined(parts: list[Findings], dim: int) -> Findings:
    """Findings of heads (dim 1) or batch items (dim 0) that went in turns."""
    if len(parts) == 1:
        return parts[0]
    return Findings(*(torch.cat(found, dim) for found in zip(*parts, strict=True)))


def on_device(x: Tensor) -> Any:
    """Make x's GPU current, as Triton launches there; nothing to do in the interpreter."""
    return torch.cuda.device(x.device) if x.is_cuda else torch.no_grad()
