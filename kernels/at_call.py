"""`freqopt::split_attention_at_call`: the op for grids that are read from a call's data.

Its graph serves every grid: the extents are operands and no shape of a result depends on them, so
nothing is compiled anew for another. A call whose data tell no grid has extents of 0, and is dense.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from freqopt.kernels import op
from freqopt.kernels.backward.dense import dense_gradients
from freqopt.kernels.checks import check_devices


@torch.library.custom_op("freqopt::split_attention_at_call", mutates_args=())
def split_attention_at_call(
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
    dense_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments as those of `freqopt::split_attention`; `text_after` is what is left, whatever.

    dense_mask: (B or 1, H or 1, N, N) bool, in the place of `key_mask` in a call that is dense.

    Returns:
        out (B, H, N, D); density (B, H), 1 where it is dense; probe_error (B, H), NaN there.
    """
    if _is_dense(query, grid, text_before):
        mask = _whole_mask(key_mask, dense_mask)
        grouped = key.shape[1] != query.shape[1]
        out = F.scaled_dot_product_attention(
            query, key, value, mask, scale=scale, enable_gqa=grouped
        )
        exact = torch.ones(query.shape[:2], device=query.device, dtype=torch.float32)
        return op.by_tokens(out), exact, exact * math.nan
    after = _after(query, grid, text_before)
    found = op.split_attention_op(
        query, key, value, threshold, key_mask, list(grid), text_before, after, scale, density,
        probes, chunks, largest_chunk,
    )  # fmt: skip
    return found[0], found[1], found[2]


def _is_dense(query: Tensor, grid: Sequence[int], before: int) -> bool:
    """Whether a call tells no grid, or none of its tokens."""
    return math.prod(grid) == 0 or before < 0 or _after(query, grid, before) < 0


def _whole_mask(key_mask: Tensor | None, dense_mask: Tensor | None) -> Tensor | None:
    """The mask of a call that is dense, (B or 1, H or 1, N or 1, N)."""
    if dense_mask is not None or key_mask is None:
        return dense_mask
    return key_mask[:, None, None]


def _after(query: Tensor, grid: Sequence[int], before: int) -> int:
    """Tokens after a grid; negative where it is not that of these tokens."""
    return query.shape[2] - math.prod(grid) - before


@split_attention_at_call.register_fake
def _fake(
    query: Tensor, key: Tensor, value: Tensor, threshold: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    check_devices(query, key, value, threshold, *(x for x in rest if isinstance(x, Tensor)))
    batch, heads, length, dim = query.shape
    per_head = query.new_empty((batch, heads), dtype=torch.float32)
    out = query.new_empty((batch, length, heads, dim)).transpose(1, 2)
    return out, per_head, torch.empty_like(per_head)


@torch.library.custom_op("freqopt::split_attention_at_call_backward", mutates_args=())
def split_attention_at_call_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, threshold: Tensor,
    key_mask: Tensor | None, chunks: Tensor | None, dense_mask: Tensor | None, grid: Sequence[int],
    text_before: int, scale: float, density: float, probes: int, largest_chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key and value: what the forward made is made once more."""
    mask = _whole_mask(key_mask, dense_mask)
    if _is_dense(query, grid, text_before):
        if mask is not None:
            made = op.empty_gradients(query, key, value)
            for to, of in zip(
                made, dense_gradients(grad, query, key, value, mask, scale), strict=True
            ):
                to.copy_(of)
            return made
        # At threshold 0 the op is dense attention, whatever the grid.
        grid, text_before, chunks = (1, 1, query.shape[2]), 0, None
        threshold, density, probes = torch.zeros_like(threshold), 0.0, 0
    after = _after(query, grid, text_before)
    found = op.split_attention_op(
        query, key, value, threshold, key_mask, list(grid), text_before, after, scale, density,
        probes, chunks, largest_chunk,
    )  # fmt: skip
    order = found[6] if chunks is not None and largest_chunk > 0 else None
    grads: tuple[Tensor, Tensor, Tensor] = op.split_attention_backward_op(
        grad, None, query, key, value, key_mask, found[0], *found[3:5], found[8], order, None,
        [*grid, text_before, after], None, scale,
    )  # fmt: skip
    return grads


@split_attention_at_call_backward.register_fake
def _fake_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return op.empty_gradients(query, key, value)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:5], inputs[11], inputs[13])
    grid, before, _, scale, density, probes = inputs[5:11]
    ctx.constants = grid, before, scale, density, probes, inputs[12]
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    grads = split_attention_at_call_backward(grad, *ctx.saved_tensors, *ctx.constants)
    return (*grads, *[None] * 11)


split_attention_at_call.register_autograd(_backward, setup_context=_save)
