"""The public call: `freqopt.split_attention` checks its arguments and calls the op.

`freqopt.merge_attention` joins results over parts of the keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from freqopt.chunks import check_chunk
from freqopt.config import (
    DEFAULT_CHUNK,
    DEFAULT_DENSITY,
    DEFAULT_PROBES,
    MID_RATIO,
)
from freqopt.errors import InputError
from freqopt.grid import Grid, check_grid
from freqopt.kernels.checks import MOST_SCALE
from freqopt.kernels.content_order import enclosing
from freqopt.kernels.layout import TokenLayout
from freqopt.kernels.op import check_site, split_attention_op

NUMBERS = "a number is supported"
TRANSPOSED = "; if these are (batch, tokens, heads, head_dim), pass x.transpose(1, 2)"


class SplitStats(NamedTuple):
    """What one call of split attention did, per batch item and head.

    Attributes:
        density: (B, H) float32, share of (query tile, key block) pairs attended exactly.
        probe_error: (B, H) float32, relative L2 error of this call measured on the probes; NaN
            without.
        key_order: (B, Hkv, T) int32, the order that the keys without text were given by content,
            counted from the first of them; None for the base order, or where it was given.
        query_order: (B, H, Tq) int32, the same of queries that are other tokens than the keys.
        fitted: (B, H) bool, whether probes had anything to fit the approximation's two scalars on.
            Where not (no probes, nothing approximated, a term that is rounding, values that are no
            numbers) these are 1.
    """

    density: Tensor
    probe_error: Tensor
    key_order: Tensor | None
    query_order: Tensor | None
    fitted: Tensor


class _Orders(NamedTuple):
    """How a call orders its tokens, as the op takes it."""

    chunks: Tensor | None = None
    largest_chunk: int = 0
    key_order: Tensor | None = None
    query_order: Tensor | None = None


def split_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grid: Sequence[int] | None = None,
    order: str | Tensor | None = None,
    chunk: int | str = DEFAULT_CHUNK,
    threshold: float | Tensor | None = None,
    density: float | None = None,
    mid_band: bool | Tensor = False,
    text_before: int = 0,
    text_after: int = 0,
    query_grid: Sequence[int] | None = None,
    query_text_before: int = 0,
    query_text_after: int = 0,
    query_order: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    probes: int = DEFAULT_PROBES,
    return_stats: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Frequency-split attention: exact where it matters, summarised content elsewhere, one softmax.

    Queries are the keys' own tokens where there are as many (self-attention), or other tokens.

    Args:
        query: (B, H, Nq, D) float32, float16 or bfloat16, any strides with unit last stride.
        key, value: (B, Hkv, Nk, D) of the same dtype and device; H a multiple of Hkv.
        grid: extents (t, h, w) of the video's keys, in raster order within the sequence;
            t*h*w + text_before + text_after = Nk. Without it the tokens are taken as they are
            numbered, and ordered by content.
        order: what stands in a block together. "grid": what is near in the grid. "content": what
            is alike, within chunks of the base order (the grid's, or the tokens' own numbers). A
            tensor (Hkv,) of integers: each key head's chunk, 0 for the grid. A tensor (B, Hkv, T)
            of integers: the order itself, entry p the number of the key that stands at p, counted
            from the first that is no text. Default: "grid" with a grid, else "content". A tensor
            of chunks is read on the host, which waits for its device.
        chunk: tokens of the chunks of "content": a power of two from 256, or "all".
        threshold: a float or an (H,) tensor, in units of the routing score (no unit: around 1
            keeps some 5-20 % exact); 0 is dense attention, inf only the local blocks; entries of a
            tensor that are negative or no number are dense attention too.
        density: instead of a threshold, the share of (query tile, key block) pairs to attend
            exactly, in (0, 1]; resolved to a threshold per batch item and head on the device.
            Without either, 0.25.
        mid_band: attend pairs from a quarter of the threshold exactly; a bool or (H,) bool. The
            definition (`freqopt.kernels.reference`) serves them from means of 8 tokens.
        text_before, text_after: text tokens at either end; always exact as keys, dense as queries.
        query_grid, query_text_before, query_text_after: the same of queries that are other tokens
            than the keys.
        query_order: (B, H, Tq) integers, the order of queries that are other tokens.
        key_mask: (B, Nk) bool, True = attend. Only text may be left out: a mask that leaves out
            other keys is refused, which waits for the device; a call that is traced or captured
            must have passed it before.
        scale: factor of the logits; D**-0.5 if None.
        probes: queries per head attended exactly to unbias the split and to measure its error
            (0: none).
        return_stats: also return `SplitStats`.
        return_lse: also return the natural logarithms of the softmax sums, (B, H, Nq) float32.

    Returns:
        (B, H, Nq, D) in the inputs' dtype, laid out as (B, Nq, H, D) in memory; a tuple with the
        log sums and the stats behind it, where these are asked for, in this order.

    Raises:
        InputError: shapes, dtypes, devices, grid, order or thresholds that do not fit, with what
            would.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _check_tensor(name, tensor)
    for name, given in (("key_mask", key_mask), ("query_order", query_order)):
        if given is not None:
            _check_tensor(name, given)
    for name, number in (("density", density), ("scale", scale)):
        if number is not None:
            _check_number(name, number)
    _check_whole("probes", probes)
    _check_whole("text_before", text_before)
    _check_whole("text_after", text_after)
    _check_whole("query_text_before", query_text_before)
    _check_whole("query_text_after", query_text_after)
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    _check_tensors(shapes, query, key, value)
    hint = TRANSPOSED if query.shape[1] > query.shape[2] else ""
    layout = _layout(shapes, "", grid, key.shape[2], text_before, text_after, hint)
    other = None
    if query.shape[2] != key.shape[2] or query_grid is not None or query_order is not None:
        other = _layout(
            shapes, "query_", query_grid, query.shape[2], query_text_before, query_text_after, hint
        )
    if key_mask is not None:
        _check_mask(key_mask, key, layout)
    heads = query.shape[1]
    if threshold is not None and density is not None:
        raise InputError("threshold and density were both given; pass one of them")
    if density is not None and not 0.0 < density <= 1.0:
        raise InputError(f"density {density} is outside (0, 1]; 1.0 is dense attention")
    if not 0 <= probes <= 1024:
        raise InputError(f"probes {probes} is outside 0..1024; the default is {DEFAULT_PROBES}")
    if scale is not None and not -MOST_SCALE < scale < MOST_SCALE:
        raise InputError(f"scale {scale} is no number of float32; head_dim**-0.5 is usual")
    if threshold is None and density is None:
        density = DEFAULT_DENSITY
    limits = _thresholds(0.0 if threshold is None else threshold, mid_band, heads, query.device)
    if order is None:
        order = "content" if grid is None else "grid"
    orders = _orders(order, chunk, query_order, query, key, layout, other)
    out, reached, error, _, scalars, log_sum, key_order, made, _ = split_attention_op(
        query,
        key,
        value,
        limits,
        key_mask,
        list(layout.grid),
        text_before,
        text_after,
        query.shape[-1] ** -0.5 if scale is None else float(scale),
        density or 0.0,
        probes,
        *orders,
        None if other is None else [*other.grid, other.text_before, other.text_after],
        bool(return_lse),
    )
    results: list[Tensor | SplitStats] = [out]
    if return_lse:
        results.append(log_sum)
    if return_stats:
        of_keys, of_queries = (x if x.numel() else None for x in (key_order, made))
        fitted = (scalars != 1.0).all(-1)
        results.append(SplitStats(reached, error, of_keys, of_queries, fitted))
    return out if len(results) == 1 else tuple(results)  # type: ignore[arg-type]


def merge_attention(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention over all keys, from attentions of the same queries over parts of them.

    Args:
        parts: pairs of an output (B, H, N, D) and its log sums (B, H, N) float32, as
            `split_attention(..., return_lse=True)` returns them, or any other attention. A part
            whose log sum is -inf has no keys for a query.

    Returns:
        The same for the union of their keys; the output in the parts' dtype. Differentiable.

    Raises:
        InputError: no parts, or shapes that differ.
    """
    if not parts:
        raise InputError("merge_attention got no parts; pass at least one (out, lse) pair")
    shapes = [(tuple(out.shape), tuple(log_sum.shape)) for out, log_sum in parts]
    if any(s != shapes[0] or s[1] != s[0][:-1] for s in shapes):
        raise InputError(
            f"parts have shapes {shapes}; outputs of one shape (B, H, N, D) with log sums "
            "(B, H, N) are supported"
        )
    log_sums = torch.stack([log_sum.float() for _, log_sum in parts])
    total = log_sums.logsumexp(0)
    out = torch.zeros_like(parts[0][0], dtype=torch.float32)
    for (part, _), log_sum in zip(parts, log_sums, strict=True):
        share = (log_sum - total).exp()[..., None]
        out = out + torch.where(share > 0, share * part.float(), 0.0)
    return out.to(parts[0][0].dtype), total


def _layout(
    shapes: str,
    prefix: str,
    grid: Sequence[int] | None,
    length: int,
    before: int,
    after: int,
    hint: str,
) -> TokenLayout:
    if before < 0 or after < 0:
        raise InputError(
            f"{prefix}text_before {before} and {prefix}text_after {after} must be 0 or more"
        )
    if grid is not None:
        try:
            return TokenLayout(check_grid(grid, length, text=before + after), before, after)
        except InputError as error:
            raise InputError(f"{error}{hint}") from None
    if before + after >= length:
        raise InputError(
            f"{shapes}: {prefix}text_before {before} and {prefix}text_after {after} leave no "
            f"tokens of {length}; at least one that is no text is supported"
        )
    own: Grid = (1, 1, length - before - after)
    return TokenLayout(own, before, after)


def _check_tensor(name: str, x: object) -> None:
    """Refuse what is no plain tensor, before anything is asked of it."""
    if not isinstance(x, Tensor):
        raise InputError(f"{name} is a {type(x).__name__}; a torch.Tensor is supported")
    if x.is_nested or x.layout != torch.strided:
        kind = "nested" if x.is_nested else x.layout
        raise InputError(f"{name} is a {kind} tensor; a plain one (torch.strided) is supported")


def _check_number(name: str, x: object) -> None:
    if not isinstance(x, float) and not hasattr(x, "__float__"):
        raise InputError(f"{name} is {x!r}; {NUMBERS}")


def _check_whole(name: str, x: object) -> None:
    if isinstance(x, bool) or not (isinstance(x, int) or hasattr(x, "__index__")):
        raise InputError(f"{name} is {x!r}; a whole number is supported")


def _check_tensors(shapes: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    if not query.dim() == key.dim() == value.dim() == 4:
        raise InputError(f"{shapes}: expected (batch, heads, tokens, head_dim) tensors")
    if key.shape != value.shape or query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise InputError(
            f"{shapes}: batch and head_dim must agree and key and value must have one shape, "
            f"(batch, heads, tokens, head_dim){_swapped(query, key)}"
        )
    if not query.dtype == key.dtype == value.dtype:
        raise InputError(
            f"dtypes differ: {query.dtype}, {key.dtype}, {value.dtype}; cast them to one"
        )
    if not query.device == key.device == value.device:
        raise InputError(f"devices differ: {query.device}, {key.device}, {value.device}")
    if not query.shape[3]:
        raise InputError(f"{shapes}: head_dim is 0; 1 and more are supported")
    reason = check_site(query.shape[1], key.shape[1], query.shape[3], query.dtype, query.device)
    if reason:
        raise InputError(f"{shapes}: {reason}{_swapped(query, key)}")


def _swapped(query: Tensor, key: Tensor) -> str:
    """A hint for (batch, tokens, heads, head_dim) tensors: many heads of few tokens."""
    if query.dim() == 4 and query.shape[1] > 8 * query.shape[2] and key.shape[1] > key.shape[2]:
        return TRANSPOSED
    return ""


def _check_mask(mask: Tensor, key: Tensor, layout: TokenLayout) -> None:
    shape = (key.shape[0], key.shape[2])
    if mask.dtype != torch.bool or mask.shape != shape:
        raise InputError(
            f"key_mask is {mask.dtype} of shape {tuple(mask.shape)}; bool of shape "
            f"{shape} (batch, tokens), True = attend, is supported"
        )
    if _can_look(mask):
        before = layout.text_before
        out = ~mask[:, before : before + layout.tokens]
        if bool(out.any()):
            first = int(out.any(0).int().argmax()) + before
            raise InputError(
                f"key_mask leaves out {int(out.sum())} keys that are no text, the first at "
                f"{first}; only text keys can be left out (text_before, text_after): others take "
                "part in averages. Cut them off query, key and value, or declare them as text"
            )


def _can_look(x: Tensor) -> bool:
    """Whether what is in a tensor can be read now: the call is neither traced nor captured."""
    if torch.compiler.is_compiling() or x.is_meta or isinstance(x, FakeTensor):
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _thresholds(
    threshold: float | Tensor, mid_band: bool | Tensor, heads: int, device: torch.device
) -> Tensor:
    """(H,) float32: from where pairs are exact."""
    if isinstance(threshold, Tensor):
        if threshold.shape != (heads,):
            raise InputError(
                f"threshold has shape {tuple(threshold.shape)}; a float or one value for each of "
                f"the {heads} heads is supported"
            )
        if threshold.is_meta or threshold.is_complex() or threshold.dtype == torch.bool:
            raise InputError(f"threshold is {threshold.dtype} on {threshold.device}; {NUMBERS}")
        exact = threshold.to(device=device, dtype=torch.float32)
    else:
        _check_number("threshold", threshold)
        if threshold != threshold or threshold < 0:
            raise InputError(f"threshold {threshold} must be 0 (dense) or larger")
        limit = float(threshold) if threshold < MOST_SCALE else math.inf
        exact = torch.full((heads,), limit, device=device, dtype=torch.float32)
    if not isinstance(mid_band, (bool, Tensor)):
        raise InputError(f"mid_band is {mid_band!r}; a bool or an ({heads},) bool tensor")
    if isinstance(mid_band, Tensor):
        if mid_band.is_meta or mid_band.shape != (heads,) or mid_band.dtype != torch.bool:
            raise InputError(
                f"mid_band is {mid_band.dtype} of shape {tuple(mid_band.shape)} on "
                f"{mid_band.device}; a bool or an ({heads},) bool tensor is supported"
            )
        return torch.where(mid_band.to(device), exact * MID_RATIO, exact)
    return exact * MID_RATIO if mid_band else exact


def _orders(
    order: str | Tensor,
    chunk: int | str,
    query_order: Tensor | None,
    query: Tensor,
    key: Tensor,
    layout: TokenLayout,
    other: TokenLayout | None,
) -> _Orders:
    """The op's arguments for the orders that a call asks for."""
    batch, kv_heads = key.shape[:2]
    if query_order is not None:
        assert other is not None
        query_order = _permutation("query_order", query_order, (*query.shape[:2], other.tokens))
        query_order = query_order.to(query.device)
    if isinstance(order, Tensor) and order.dim() == 3:
        given = _permutation("order", order, (batch, kv_heads, layout.tokens)).to(key.device)
        return _Orders(key_order=given, query_order=query_order)
    longest = max(layout.tokens, 0 if other is None else other.tokens)
    if isinstance(order, Tensor):
        if order.shape != (kv_heads,) or not _has_integers(order):
            raise InputError(
                f"order is {order.dtype} of shape {tuple(order.shape)} on {order.device}; 'grid', "
                f"'content', integers ({kv_heads},), the chunk of each key head, or an order "
                f"{(batch, kv_heads, layout.tokens)} are supported"
            )
        largest = max((each and check_chunk(each) for each in order.tolist()), default=0)
        chunks = order.to(device=key.device, dtype=torch.int32)
        return _Orders(chunks, min(largest, enclosing(longest)), query_order=query_order)
    if order == "grid":
        return _Orders(query_order=query_order)
    if order != "content":
        raise InputError(
            f"order is {order!r}; 'grid', 'content', an integer for each key head or an order "
            "(B, Hkv, T) are supported"
        )
    size = check_chunk(chunk)
    chunks = torch.full((kv_heads,), size, device=key.device, dtype=torch.int32)
    return _Orders(chunks, min(size, enclosing(longest)), query_order=query_order)


def _has_integers(x: Tensor) -> bool:
    return not (x.dtype.is_floating_point or x.is_complex() or x.is_meta)


def _permutation(name: str, order: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An order as int32, checked.

    The check waits for the device, so a call that is traced or captured must have passed it before.
    """
    if order.shape != shape or not _has_integers(order):
        raise InputError(
            f"{name} is {order.dtype} of shape {tuple(order.shape)} on {order.device}; integers "
            f"of shape {shape} (batch, heads, tokens without text) are supported"
        )
    if _can_look(order):
        numbers = torch.arange(shape[-1], device=order.device)
        if not bool((order.sort(-1).values == numbers).all()):
            raise InputError(
                f"{name} is no permutation of 0..{shape[-1] - 1} in each head; every token has to "
                "stand at one place"
            )
    return order.to(torch.int32)
