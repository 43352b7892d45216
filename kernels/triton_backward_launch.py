"""The backward pass on the GPU: launches `triton_backward` inside the gradients of the summaries.

What grows with tokens x tokens is done by the kernels; means, variances, mass terms and H-bar are
differentiated by PyTorch, in float32. Nothing waits for the device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from freqopt.config import KEY_BLOCK, QUERY_TILE
from freqopt.kernels import reference as ref
from freqopt.kernels.launch import padded_dim
from freqopt.kernels.layout import Sequence, repeat_heads
from freqopt.kernels.triton_backward import key_gradient_kernel, query_gradient_kernel
from freqopt.kernels.triton_split import attend_text


class Blocks(NamedTuple):
    """Keys and values (B, Hkv, blocks * 64, D), video in token order, then text; both padded.

    valid: (B, blocks * 64) int8, 0 where there is no key or where it is masked.
    """

    key: Tensor
    value: Tensor
    valid: Tensor


class Rows(NamedTuple):
    """Queries and output gradients (B, H, T, D) in token order, and what a query's row adds.

    delta: (B, H, T) float32, output times its gradient; turned: first-order term times gradient.
    """

    query: Tensor
    grad: Tensor
    delta: Tensor
    turned: Tensor


class Low(NamedTuple):
    """Centred means and mean values (B, Hkv, J, D) in the keys' type; key_shift (B, Hkv, D).

    bias: (B, H, I, J) float32, what is added to the logits: -inf where a pair is not low.
    """

    key: Tensor
    value: Tensor
    key_shift: Tensor
    bias: Tensor


class Found(NamedTuple):
    """Gradients of the kernels' inputs, float32; low_share (B, H, T): mass of the low band."""

    query: Tensor
    bias: Tensor
    low_share: Tensor
    key: Tensor
    value: Tensor
    low_key: Tensor
    low_value: Tensor


def make_blocks(key: Tensor, value: Tensor, key_mask: Tensor | None, sequence: Sequence) -> Blocks:
    """Put text behind the video's last block."""
    text = sequence.text

    def padded(x: Tensor) -> Tensor:
        video = F.pad(sequence.video_of(x), (0, 0, 0, -sequence.tokens % KEY_BLOCK))
        return torch.cat([video, F.pad(sequence.text_of(x), (0, 0, 0, -text % KEY_BLOCK))], 2)

    batch = key.shape[0]
    video = torch.ones(batch, sequence.tokens, device=key.device, dtype=torch.int8)
    mask = sequence.text_mask(key_mask)
    seen = video.new_ones(batch, text) if mask is None else mask.to(torch.int8)
    valid = [F.pad(x, (0, -x.shape[1] % KEY_BLOCK)) for x in (video, seen)]
    return Blocks(padded(key), padded(value), torch.cat(valid, 1))


def listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending indices of the true entries of each row, int32, and their number."""
    # A sort keeps the strides it finds, and the kernels read rows.
    chosen = chosen.contiguous()
    order = torch.argsort(chosen.to(torch.int8), dim=-1, descending=True, stable=True)
    return order.to(torch.int32), chosen.sum(-1, dtype=torch.int32)


def query_rows(dtype: torch.dtype, padded: int) -> int:
    """Queries, and columns, per program that fit registers and shared memory."""
    return 64 if padded * dtype.itemsize <= 256 else 32 if padded * dtype.itemsize <= 512 else 16


def attend_gradients(rows: Rows, blocks: Blocks, low: Low, route: Tensor, *, scale: float) -> Found:
    """Launch the kernels over the exact lists and the low band."""
    batch, heads, tokens, dim = rows.query.shape
    kv_heads, n_low = low.key.shape[1:3]
    n_all = blocks.key.shape[2] // KEY_BLOCK
    tiles = route.shape[2]
    exact = F.pad(route == ref.EXACT, (0, n_all - n_low), value=True)
    exact_list, block_counts = listed(exact)
    tile_list, tile_counts = listed(exact.mT)
    padded = padded_dim(dim)
    step = query_rows(rows.query.dtype, padded)
    parts = tiles * (QUERY_TILE // step)
    device = rows.query.device
    options: dict[str, Any] = {
        "D": dim, "DP": padded, "BM": step, "num_stages": 1, "num_warps": 8,
        "PRECISION": "tf32x3" if rows.query.dtype == torch.float32 else "tf32",
    }  # fmt: skip

    def single(*shape: int) -> Tensor:
        return torch.empty(*shape, device=device, dtype=torch.float32)

    def per_row() -> Tensor:
        return single(batch, heads, tokens)

    log_sum, offset, low_share = per_row(), per_row(), per_row()
    query_grad, bias_grad = single(*rows.query.shape), single(batch, heads, parts, n_low)
    query_gradient_kernel[(parts, batch * heads)](
        rows.query, rows.grad, blocks.key, blocks.value, blocks.valid, low.key, low.value,
        low.bias, low.key_shift, rows.delta, rows.turned, exact_list, block_counts, log_sum,
        offset, low_share, query_grad, bias_grad,
        heads, heads // kv_heads, tokens, tiles, n_low, n_all, scale, **options,
    )  # fmt: skip
    grads = []
    for key, value, is_low in ((blocks.key, blocks.value, False), (low.key, low.value, True)):
        grads += [single(*key.shape), single(*key.shape)]
        columns = key.shape[2]
        key_gradient_kernel[(-(-columns // step), batch * kv_heads)](
            rows.query, rows.grad, key, value, blocks.valid, low.bias, log_sum, offset,
            rows.delta, rows.turned, tile_list, tile_counts, *grads[-2:],
            heads, heads // kv_heads, tokens, tiles, columns, scale, BN=step, LOW=is_low, **options,
        )  # fmt: skip
    bias_grad = bias_grad.unflatten(2, (tiles, -1)).sum(3)
    return Found(query_grad, bias_grad, low_share, *grads)


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

    out: what the forward returned. For calls without a mid band.
    """
    heads, kv_heads = query.shape[1], key.shape[1]
    c, g = coefficients[..., None, None].unbind(2)
    queries, grads, outs = (sequence.video_of(x).contiguous() for x in (query, grad, out))
    q32, grad32 = queries.float(), grads.float()
    k32, v32 = sequence.video_of(key).float(), sequence.video_of(value).float()

    def summarised(keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        found = ref.summarise(keys, values, KEY_BLOCK)
        return found.key_mean, found.value_mean, found.key_var, found.first_order

    def biased(tokens: Tensor, key_var: Tensor) -> Tensor:
        capacity = ref.block_counts(sequence.tokens, KEY_BLOCK, tokens.device).log()
        spread = ref.tile_mean_square(tokens) @ repeat_heads(key_var, heads).mT
        term = torch.minimum(0.5 * scale**2 * spread, capacity)
        return torch.where(route == ref.LOW, capacity + c * term, -torch.inf)

    # torch.func, not torch.autograd: inside an op's kernel the autograd keys are switched off.
    summaries, summary_vjp, *_ = torch.func.vjp(summarised, k32, v32)
    key_mean, value_mean, key_var, first_order = summaries
    bias, bias_vjp, *_ = torch.func.vjp(biased, q32, key_var)
    shift = k32.mean(2, keepdim=True)
    order = repeat_heads(first_order, heads)
    turned = g[..., 0] * scale * ((q32 @ order.mT) * grad32).sum(-1)
    rows = Rows(queries, grads, (grad32 * outs.float()).sum(-1), turned.contiguous())
    low = Low(
        (key_mean - shift).to(key.dtype), value_mean.to(key.dtype), shift.contiguous(),
        bias.contiguous(),
    )  # fmt: skip
    blocks = make_blocks(key, value, key_mask, sequence)
    with torch.cuda.device_of(query):
        found = attend_gradients(rows, blocks, low, route, scale=scale)

    weighted = g * scale * found.low_share[..., None] * grad32
    order_grad = (weighted.mT @ q32).unflatten(1, (kv_heads, -1)).sum(2)
    term_grad, var_grad = bias_vjp(found.bias)
    query_grad = found.query + weighted @ order + term_grad
    key_grad, value_grad = summary_vjp((found.low_key, found.low_value, var_grad, order_grad))
    tokens, behind = sequence.tokens, low.key.shape[2] * KEY_BLOCK
    text = slice(behind, behind + sequence.text)
    results = [torch.zeros_like(x, dtype=torch.float32) for x in (query, key, value)]
    sequence.store(results[0], query_grad, None)
    for result, summary, exact in zip(
        results[1:], (key_grad, value_grad), (found.key, found.value), strict=True
    ):
        sequence.store(result, summary + exact[:, :, :tokens], exact[:, :, text])
    if sequence.text:

        def dense(*tensors: Tensor) -> Tensor:
            return attend_text(tensors[0], tensors[1], tensors[2], key_mask, sequence, scale)

        _, text_vjp, *_ = torch.func.vjp(dense, query, key, value)
        results = [x + y for x, y in zip(results, text_vjp(sequence.text_of(grad)), strict=True)]
    return results[0].to(query.dtype), results[1].to(key.dtype), results[2].to(value.dtype)
