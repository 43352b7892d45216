"""What the registered op asks of its tensors, whoever calls it: shape, dtype and device of each.

A graph holds the op and its budgets come from elsewhere, so a caller's checks are not the op's. The
kernels index a head's budget, mask and order by the queries' own heads: what does not fit is read
past its end. Only Python's numbers are compared, nothing waits for a device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from freqopt.errors import InputError
from freqopt.kernels.layout import Inputs, Settings, TokenLayout

MOST_PROBES = 1024
MOST_SCALE = 3e38


def check_call(inputs: Inputs, settings: Settings) -> None:
    """Refuse a call whose tensors do not belong together.

    Raises:
        InputError: which of them, what it is, and what it would have to be.
    """
    if not _fits(inputs, settings):
        _explain(inputs, settings)


def _fits(inputs: Inputs, settings: Settings) -> bool:
    """Whether there is nothing to explain: the same questions, without words, in a few µs."""
    query, key, value, limits, mask, layout, other, chunks, key_order, query_order = inputs
    shape, of_keys, dtype, device = query.shape, key.shape, query.dtype, query.device
    if len(shape) != 4 or len(of_keys) != 4 or value.shape != of_keys:
        return False
    (batch, heads, queries, dim), (kv_batch, kv_heads, tokens, kv_dim) = shape, of_keys
    (t, h, w), before, after = layout
    video = t * h * w
    scale, density, probes, largest, _ = settings
    return (
        (batch, dim) == (kv_batch, kv_dim)
        and dim > 0
        and kv_heads > 0
        and not heads % kv_heads
        and key.dtype == dtype == value.dtype
        and key.device == device == value.device == limits.device
        and limits.shape == (heads,)
        and limits.dtype == torch.float32
        and min(t, h, w) > 0
        and min(before, after) >= 0
        and video + before + after == tokens
        and (mask is None or _is_a(mask, (batch, tokens), torch.bool, device))
        and (chunks is None or _is_a(chunks, (kv_heads,), torch.int32, device))
        and (key_order is None or _is_a(key_order, (batch, kv_heads, video), torch.int32, device))
        and other is None
        and query_order is None
        and queries == tokens
        and -MOST_SCALE < scale < MOST_SCALE
        and 0.0 <= density <= 1.0
        and 0 <= probes <= MOST_PROBES
        and largest >= 0
        and not largest & (largest - 1)
    )


def _is_a(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> bool:
    return x.shape == shape and x.dtype == dtype and x.device == device


def _explain(inputs: Inputs, settings: Settings) -> None:
    """Raise InputError for the first thing that does not fit, if there is one."""
    query, key, value = inputs.query, inputs.key, inputs.value
    if not query.ndim == key.ndim == value.ndim == 4:
        raise InputError(
            f"split_attention got {_what(query)}, {_what(key)}, {_what(value)} as query, key and "
            "value; (batch, heads, tokens, head_dim) each is supported"
        )
    batch, heads, queries, dim = query.shape
    kv_heads, tokens = key.shape[1:3]
    _is("key", key, (batch, kv_heads, tokens, dim), query.dtype, query)
    _is("value", value, (batch, kv_heads, tokens, dim), query.dtype, query)
    if heads % kv_heads if kv_heads else heads:
        raise InputError(f"{heads} query heads are not a multiple of {kv_heads} key heads")
    if not dim:
        raise InputError("head_dim is 0; 1 and more are supported on a CPU")
    _is("threshold", inputs.threshold, (heads,), torch.float32, query)
    if inputs.key_mask is not None:
        _is("key_mask", inputs.key_mask, (batch, tokens), torch.bool, query)
    if inputs.chunks is not None:
        _is("chunks", inputs.chunks, (kv_heads,), torch.int32, query)
    _check_layout("the keys'", inputs.layout, tokens)
    video = inputs.layout.tokens
    if inputs.key_order is not None:
        _is("key_order", inputs.key_order, (batch, kv_heads, video), torch.int32, query)
    if inputs.query_layout is None:
        if queries != tokens or inputs.query_order is not None:
            raise InputError(
                f"{queries} queries of {tokens} keys (query_order "
                f"{'given' if inputs.query_order is not None else 'not given'}): queries that are "
                "other tokens than the keys need a query_layout"
            )
    else:
        _check_layout("the queries'", inputs.query_layout, queries)
        if inputs.query_order is not None:
            shape = (batch, heads, inputs.query_layout.tokens)
            _is("query_order", inputs.query_order, shape, torch.int32, query)
    _check_settings(settings)


def _check_settings(settings: Settings) -> None:
    scale, density, probes, largest, _ = settings
    if not -MOST_SCALE < scale < MOST_SCALE:
        raise InputError(f"scale {scale} is no number of float32; head_dim**-0.5 is usual")
    if not 0.0 <= density <= 1.0:
        raise InputError(f"density {density} is outside [0, 1]; 0 leaves it to the thresholds")
    if not 0 <= probes <= MOST_PROBES:
        raise InputError(f"probes {probes} is outside 0..{MOST_PROBES}")
    if largest < 0 or largest & (largest - 1):
        raise InputError(f"largest_chunk {largest} is neither 0 nor a power of two")


def _check_layout(whose: str, layout: TokenLayout, length: int) -> None:
    grid, before, after = layout
    t, h, w = grid
    fits = t > 0 and h > 0 and w > 0 and before >= 0 and after >= 0
    if not fits or t * h * w + before + after != length:
        raise InputError(
            f"{whose} grid {tuple(grid)} with {before} tokens of text before and {after} after it "
            f"is not a sequence of {length} tokens; positive extents that add up are supported"
        )


def _is(
    name: str, given: Tensor, shape: tuple[int, ...], dtype: torch.dtype, query: Tensor
) -> None:
    if given.shape != shape or given.dtype != dtype or given.device != query.device:
        raise InputError(
            f"{name} is {_what(given)}; {dtype} of shape {shape} on {query.device} is needed, as "
            f"query is {_what(query)}. A budget of another model's plan, or one that was left "
            "behind when the model moved, looks like this"
        )


def _what(x: Tensor) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)} on {x.device}"


def check_devices(query: Tensor, *others: Tensor | None) -> None:
    """What of `check_call` a graph that is traced, or a call on meta tensors, can be asked.

    The dispatcher takes the implementation that only allocates if any tensor is on meta: with a
    real query that would return memory that nobody wrote.

    Raises:
        InputError: a tensor that is elsewhere than the query.
    """
    device = query.device
    for each in others:
        if each is not None and each.device != device:
            raise InputError(
                f"split_attention got a tensor {_what(each)} beside query {_what(query)}: all have "
                "to be on one device. A budget that was made or moved on meta looks like this; "
                "attach the plan again"
            )


def check_backward(
    inputs: Inputs,
    grad: Tensor,
    log_sum_grad: Tensor | None,
    coefficients: Tensor,
    matrix: Tensor,
) -> None:
    """Refuse gradients that are not those of the call.

    Raises:
        InputError: as in `check_call`.
    """
    query = inputs.query
    rows = query.shape[:3]
    _is("grad", grad, tuple(query.shape), query.dtype, query)
    if log_sum_grad is not None:
        _is("log_sum_grad", log_sum_grad, tuple(rows), torch.float32, query)
    _is("coefficients", coefficients, (*rows[:2], 2), torch.float32, query)
    _is("matrix", matrix, (*rows[:2], query.shape[3], query.shape[3]), query.dtype, query)
    key: Any = inputs.key
    _is("key", key, (rows[0], key.shape[1], key.shape[2], query.shape[3]), query.dtype, query)
    _is("value", inputs.value, tuple(key.shape), query.dtype, query)
    _check_layout("the keys'", inputs.layout, key.shape[2])


def check_chunks(chunks: Tensor) -> None:
    """Refuse sizes of chunks that are none; for tensors on a CPU, which are read.

    Raises:
        InputError: one is neither 0 nor a power of two.
    """
    sizes = chunks.long()
    wrong = (sizes < 0) | (sizes & (sizes - 1) != 0)
    if bool(wrong.any()):
        raise InputError(
            f"chunks holds {sizes[wrong][0].item()}; 0 for the base order and powers of two are "
            "supported"
        )


def check_order(name: str, order: Tensor) -> None:
    """Refuse an order (.., T) that is no permutation; on a CPU only, where looking costs no wait.

    Raises:
        InputError: it has a number twice, or one outside of its tokens.
    """
    numbers = torch.arange(order.shape[-1], device=order.device, dtype=order.dtype)
    if not torch.equal(order.sort(-1).values, numbers.expand_as(order)):
        raise InputError(
            f"{name} is no permutation of 0..{order.shape[-1] - 1} in each head; every token has "
            "to stand at one place"
        )
