"""`freqopt::split_attention`: the one functional op that graphs, exporters and users call.

Registers the schema with its CPU, CUDA, fake and autograd implementations, and validates the public
call. Importing this module does not import triton; the first CUDA tensor does.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence as Extents
from typing import Any, NamedTuple

import torch
from torch import Tensor

from freqopt.config import DEFAULT_DENSITY, DEFAULT_PROBES, KEY_BLOCK, MID_RATIO, QUERY_TILE
from freqopt.errors import InputError
from freqopt.grid import check_grid
from freqopt.kernels import chunked
from freqopt.kernels.device import shared_memory
from freqopt.kernels.layout import PER_BYTE, Sequence, Settings, pack_route, unpack_route
from freqopt.kernels.workspace import is_long

logger = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256

WIDE_SHARED = {2: 86_016, 4: 172_032}
"""Bytes of shared memory that head dims above 128 need, by bytes per element."""


class SplitStats(NamedTuple):
    """What one call of split attention did, per batch item and head.

    density: (B, H) float32, share of (query tile, key block) pairs attended exactly.
    probe_error: (B, H) float32, relative L2 error of this call measured on the probes; NaN without.
    """

    density: Tensor
    probe_error: Tensor


@torch.library.custom_op("freqopt::split_attention", mutates_args=(), device_types="cpu")
def split_attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    budget: Tensor,
    key_mask: Tensor | None,
    grid: Extents[int],
    text_before: int,
    text_after: int,
    scale: float,
    density: float,
    mid_band: bool,
    probes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op itself; arguments as in `split_attention`, already validated.

    budget: (2, H) float32, thresholds of the exact and of the mid band, used if `density` is 0.

    Returns:
        out (B, H, N, D); density (B, H); probe_error (B, H); route (B, H, tiles, blocks) int8
        (0 low, 1 mid, on the CPU only, 2 exact), of long sequences (`workspace.is_long`) as
        layout.pack_route packs it; coefficients (B, H, 2) float32, the probe's c and g.
    """
    sequence = _sequence(grid, text_before, text_after)
    out, split = chunked.split_forward(
        query, key, value, budget, key_mask, sequence, Settings(scale, density, mid_band, probes)
    )
    coefficients = torch.stack([split.probe.c, split.probe.g], -1)
    route = pack_route(split.route) if is_long(sequence.tokens) else split.route
    return out, split.density, split.probe.error, route, coefficients


@split_attention_op.register_kernel("cuda")
def _split_attention_cuda(
    query: Tensor, key: Tensor, value: Tensor, budget: Tensor, key_mask: Tensor | None,
    *constants: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """constants: the schema's, from grid on."""
    from freqopt.kernels.forward.split import split_forward

    sequence, settings = _sequence(*constants[:3]), Settings(*constants[3:])
    if settings.mid_band:
        _note_exact_mid_band()
    return split_forward(query, key, value, budget, key_mask, sequence, settings)


@functools.cache
def _note_exact_mid_band() -> None:
    """Tell once what becomes of a mid band on CUDA."""
    logger.info(
        "mid_band: on CUDA its pairs are attended exactly, at their full cost; without mid_band "
        "they stay low"
    )


@split_attention_op.register_fake
def _split_attention_fake(
    query: Tensor, key: Tensor, value: Tensor, budget: Tensor, key_mask: Tensor | None,
    grid: Extents[int], *constants: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, heads, length, dim = query.shape
    tokens = grid[0] * grid[1] * grid[2]
    tiles = (tokens + QUERY_TILE - 1) // QUERY_TILE
    blocks = (tokens + KEY_BLOCK - 1) // KEY_BLOCK
    per_head = query.new_empty((batch, heads), dtype=torch.float32)
    route = query.new_empty((batch, heads, tiles, blocks), dtype=torch.int8)
    if is_long(tokens):
        packed = (batch, heads, tiles, (blocks + PER_BYTE - 1) // PER_BYTE)
        route = query.new_empty(packed, dtype=torch.uint8)
    return (
        query.new_empty((batch, length, heads, dim)).transpose(1, 2),
        per_head,
        torch.empty_like(per_head),
        route,
        query.new_empty((batch, heads, 2), dtype=torch.float32),
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, _, key_mask, grid, before, after, scale, _, mid_band, _ = inputs
    ctx.save_for_backward(query, key, value, key_mask, output[0], output[3], output[4])
    ctx.extents, ctx.constants = (grid, before, after), (scale, mid_band)
    ctx.mark_non_differentiable(*output[1:])


@torch.library.custom_op("freqopt::split_attention_backward", mutates_args=(), device_types="cpu")
def split_attention_backward_op(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    out: Tensor,
    route: Tensor,
    coefficients: Tensor,
    grid: Extents[int],
    text_before: int,
    text_after: int,
    scale: float,
    mid_band: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; out, route and coefficients are the forward's own."""
    sequence = _sequence(grid, text_before, text_after)
    grads = chunked.split_backward(
        grad, query, key, value, key_mask, unpack_route(route, sequence.tokens), coefficients,
        sequence, scale=scale, mid_band=mid_band,
    )  # fmt: skip
    return _by_tokens(grads[0]), _by_tokens(grads[1]), _by_tokens(grads[2])


def _by_tokens(x: Tensor) -> Tensor:
    """(B, H, N, D) laid out as (B, N, H, D), the gradients' layout on every device."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@split_attention_backward_op.register_kernel("cuda")
def _split_attention_backward_cuda(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, out: Tensor,
    route: Tensor, coefficients: Tensor, grid: Extents[int], text_before: int, text_after: int,
    scale: float, mid_band: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from freqopt.kernels.backward.launch import split_backward

    del mid_band  # the forward attended its pairs exactly
    sequence = _sequence(grid, text_before, text_after)
    return split_backward(
        grad, query, key, value, key_mask, out, unpack_route(route, sequence.tokens),
        coefficients, sequence, scale=scale,
    )  # fmt: skip


@split_attention_backward_op.register_fake
def _split_attention_backward_fake(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, length, dim = query.shape
    query_grad, key_grad, value_grad = (
        x.new_empty((batch, length, x.shape[1], dim)).transpose(1, 2) for x in (query, key, value)
    )
    return query_grad, key_grad, value_grad


def _backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    grads = split_attention_backward_op(grad, *ctx.saved_tensors, *ctx.extents, *ctx.constants)
    return (*grads, *[None] * 9)


split_attention_op.register_autograd(_backward, setup_context=_save_for_backward)


def _sequence(grid: Extents[int], text_before: int, text_after: int) -> Sequence:
    t, h, w = grid
    return Sequence((t, h, w), text_before, text_after)


def check_site(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device | str
) -> str | None:
    """Why the op cannot serve such an attention, or None if it can."""
    if dtype not in DTYPES:
        return f"dtype {dtype} has no kernel (supported: float32, float16, bfloat16)"
    if heads % kv_heads:
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


def split_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grid: Extents[int],
    threshold: float | Tensor | None = None,
    density: float | None = None,
    mid_band: bool | Tensor = False,
    text_before: int = 0,
    text_after: int = 0,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    probes: int = DEFAULT_PROBES,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, SplitStats]:
    """Frequency-split attention: exact where it matters, summarised content elsewhere, one softmax.

    Args:
        query: (B, H, N, D) float32, float16 or bfloat16, any strides with unit last stride.
        key, value: (B, Hkv, N, D) of the same dtype and device; H a multiple of Hkv.
        grid: extents (t, h, w) of the video tokens, in raster order within the sequence;
            t*h*w + text_before + text_after = N.
        threshold: the budget, a float or an (H,) tensor, in units of the routing score (no unit:
            around 1 keeps some 5-20 % exact); 0 is dense attention, inf only the local blocks.
        density: instead of a threshold, the share of (query tile, key block) pairs to attend
            exactly, in (0, 1]; resolved to a threshold per batch item and head on the device.
            Without either, 0.25.
        mid_band: serve pairs that score between a quarter of the threshold and the threshold from
            means of 8 tokens; a bool or (H,) bool. On CUDA, and in exported models, these pairs are
            attended exactly instead, so that the error is never larger than asked for: the quarter
            is then the threshold.
        text_before, text_after: text tokens at either end; always exact as keys, dense as queries.
        key_mask: (B, N) bool, True = attend. Only text entries are read: video keys always count.
        scale: factor of the logits; D**-0.5 if None.
        probes: queries per head attended exactly to unbias the split and to measure its error
            (0: none).
        return_stats: also return `SplitStats`.

    Returns:
        (B, H, N, D) in the inputs' dtype, laid out as (B, N, H, D) in memory; with `return_stats`
        a pair (out, SplitStats).

    Raises:
        InputError: shapes, dtypes, devices, grid or budgets that do not fit, with what would.
    """
    sequence = _check_call(query, key, value, grid, text_before, text_after, key_mask)
    heads = query.shape[1]
    if threshold is not None and density is not None:
        raise InputError("threshold and density were both given; pass one of them")
    if density is not None and not 0.0 < density <= 1.0:
        raise InputError(f"density {density} is outside (0, 1]; 1.0 is dense attention")
    if not 0 <= probes <= 1024:
        raise InputError(f"probes {probes} is outside 0..1024; the default is {DEFAULT_PROBES}")
    if threshold is None and density is None:
        density = DEFAULT_DENSITY
    budget = _budget(0.0 if threshold is None else threshold, mid_band, heads, query.device)
    uses_mid = bool(mid_band) if isinstance(mid_band, bool) else True
    out, reached, error, _, _ = split_attention_op(
        query, key, value, budget, key_mask, list(sequence.grid), text_before, text_after,
        query.shape[-1] ** -0.5 if scale is None else float(scale), density or 0.0, uses_mid,
        probes,
    )  # fmt: skip
    return (out, SplitStats(reached, error)) if return_stats else out


def _budget(
    threshold: float | Tensor, mid_band: bool | Tensor, heads: int, device: torch.device
) -> Tensor:
    """(2, H) float32 thresholds of the exact and the mid band."""
    if isinstance(threshold, Tensor):
        if threshold.shape != (heads,):
            raise InputError(
                f"threshold has shape {tuple(threshold.shape)}; a float or one value for each of "
                f"the {heads} heads is supported"
            )
        exact = threshold.to(device=device, dtype=torch.float32)
    else:
        if math.isnan(threshold) or threshold < 0:
            raise InputError(f"threshold {threshold} must be 0 (dense) or larger")
        exact = torch.full((heads,), float(threshold), device=device)
    if isinstance(mid_band, Tensor):
        if mid_band.shape != (heads,) or mid_band.dtype != torch.bool:
            raise InputError(
                f"mid_band is {mid_band.dtype} of shape {tuple(mid_band.shape)}; a bool or an "
                f"({heads},) bool tensor is supported"
            )
        middle = torch.where(mid_band.to(device), exact * MID_RATIO, exact)
    else:
        middle = exact * MID_RATIO if mid_band else exact
    return torch.stack([exact, middle])


def _check_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: Extents[int],
    text_before: int,
    text_after: int,
    key_mask: Tensor | None,
) -> Sequence:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if not query.dim() == key.dim() == value.dim() == 4:
        raise InputError(f"{shapes}: expected (batch, heads, tokens, head_dim) tensors")
    if (
        key.shape != value.shape
        or query.shape[0] != key.shape[0]
        or query.shape[2:] != key.shape[2:]
    ):
        raise InputError(
            f"{shapes}: self-attention over one sequence is supported, so batch, tokens and "
            "head_dim must agree and key and value must have one shape"
        )
    if not query.dtype == key.dtype == value.dtype:
        raise InputError(
            f"dtypes differ: {query.dtype}, {key.dtype}, {value.dtype}; cast them to one"
        )
    if not query.device == key.device == value.device:
        raise InputError(f"devices differ: {query.device}, {key.device}, {value.device}")
    reason = check_site(query.shape[1], key.shape[1], query.shape[3], query.dtype, query.device)
    if reason:
        raise InputError(f"{shapes}: {reason}")
    if text_before < 0 or text_after < 0:
        raise InputError(f"text_before {text_before} and text_after {text_after} must be 0 or more")
    extents = check_grid(grid, query.shape[2], text=text_before + text_after)
    if key_mask is not None and (
        key_mask.dtype != torch.bool or key_mask.shape != (query.shape[0], query.shape[2])
    ):
        raise InputError(
            f"key_mask is {key_mask.dtype} of shape {tuple(key_mask.shape)}; bool of shape "
            f"{(query.shape[0], query.shape[2])} (batch, tokens), True = attend, is supported"
        )
    return Sequence(extents, text_before, text_after)
