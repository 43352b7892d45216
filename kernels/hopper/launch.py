"""Launches the Gluon kernels where they apply: NVIDIA GPUs of compute capability 9.0."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from freqopt.config import QUERY_TILE
from freqopt.kernels.device import processors
from freqopt.kernels.forward.call import Call, Fitted, Route, Summaries, Target
from freqopt.kernels.layout import TokenLayout
from freqopt.kernels.tape import queued

STAGES = {64: 6, 128: 3}
"""Buffers of 128 keys and of 128 values in shared memory, by head dim: as many as fill it."""

PREPARE_STAGES = {64: 10, 128: 5}
"""Buffers of a block's keys and values in shared memory of the preparation, by head dim."""

RANGE_START = 4
"""What a program of the preparation costs beside its blocks, in blocks: filling the ring, and the
(D, D) sum at its end."""


@functools.lru_cache(maxsize=16)
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def applies(query: Tensor) -> bool:
    """Whether `score` and `attend` serve this call."""
    half = query.dtype in (torch.bfloat16, torch.float16)
    return half and query.shape[-1] in STAGES and _is_hopper(query.device)


def _descriptor(x: Tensor) -> Any:
    """Rows of D channels, loaded in boxes of 64 by 64."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from freqopt.kernels.hopper.attend import OPERAND

    return TensorDescriptor.from_tensor(x.view(-1, x.shape[-1]), [64, 64], OPERAND.value)


def _text_rows(x: Tensor, sequence: TokenLayout) -> Tensor:
    """Text tokens of (B, Hkv, N, D) with zeros up to whole tiles, (B, Hkv, X rounded up, D)."""
    before, after = sequence.text_before, sequence.text_before + sequence.tokens
    missing = -sequence.text % QUERY_TILE
    zeros = x.new_zeros(1, 1, 1, 1).expand(*x.shape[:2], missing, x.shape[-1])
    return torch.cat([x[:, :, :before], x[:, :, after:], zeros], 2)


def _query_side(call: Call) -> dict[str, Any]:
    """Optional arguments of a kernel that reads queries."""
    return {**call.both_sides, "OWN": call.own}


def score(
    call: Call, sub_mean: Tensor, low_key: Tensor, spread: Tensor, score: Tensor,
    tile_list: Tensor | None = None,
) -> None:  # fmt: skip
    """What `portable.score.score_kernel` does, on the same tensors."""
    from freqopt.kernels.hopper.score import TILES, score_hopper_kernel

    tiles, blocks = score.shape[2:]
    queued(score_hopper_kernel, (call.pairs, -(-tiles // TILES.value)))(
        sub_mean, _descriptor(low_key), spread, score, score if tile_list is None else tile_list,
        call.heads, call.group_size, call.tokens, tiles, blocks, call.scale,
        D=call.dim, LISTED=tile_list is not None, OWN=call.own, queries=call.queries, num_warps=4,
    )  # fmt: skip


def attend(
    call: Call, summaries: Summaries, route: Route, fitted: Fitted, target: Target,
    tile_list: Tensor | None = None,
) -> None:  # fmt: skip
    """The fused low-band, text and exact attention of all queries but text, into `target`.

    tile_list: (tiles,) int32, which tiles the rows of the route are; with it keys and values are
    read as the model gave them.
    """
    query, mask, out, log_sum = call.query, call.key_mask, target.out, target.log_sum
    tiles, blocks = route.mass_term.shape[2:]
    texts = [summaries.low_key, summaries.low_value]  # not read
    if call.layout.text:
        texts = [_text_rows(x, call.layout) for x in (call.key, call.value)]
    means = (summaries.low_key, summaries.low_value, fitted.matrix)
    # What both kernels take, in front of the keys' own strides and behind.
    common = (
        route.counts if mask is None else mask, *map(_descriptor, means), summaries.key_shift,
        route.mass_term, fitted.coefficients, route.exact_list, route.counts, out,
        *query.stride()[:3], 0 if mask is None else mask.stride(0), *out.stride()[:3],
        call.heads, call.group_size, call.tokens, tiles, blocks, call.layout.text,
        call.layout.text_before, call.scale,
    )  # fmt: skip
    options = {
        "D": call.dim, "HAS_MASK": mask is not None, "STAGES": STAGES[call.dim], "num_warps": 4,
        **_query_side(call),
    }  # fmt: skip
    if log_sum is not None:
        options |= {"log_sum": log_sum, "log_sum_row": log_sum.shape[-1], "LOG_SUM": True}
    order = call.query_order.index
    if tile_list is None:
        from freqopt.kernels.hopper.attend import attend_hopper_kernel

        queued(attend_hopper_kernel, (tiles, call.pairs))(
            query, order, *map(_descriptor, (summaries.key, summaries.value, *texts)), *common,
            **options,
        )  # fmt: skip
    else:
        from freqopt.kernels.hopper.gather import gather_hopper_kernel

        # Longest lists first: a chunk has few rounds of programs, and the last then is short.
        turn = route.counts.argsort(dim=-1, descending=True, stable=True)
        queued(gather_hopper_kernel, (tiles, call.pairs))(
            query, order, call.key, call.value, *map(_descriptor, texts), *common,
            *call.key.stride()[:3], *call.value.stride()[:3], tile_list, turn,
            **options, **call.keys_in_place,
        )  # fmt: skip


def _wide(x: Tensor) -> bool:
    """Whether rows of (B, Hkv, N, D) can be copied 16 bytes a thread.

    Triton takes only strides that are multiples of 16 for aligned.
    """
    return x.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in x.stride()[:3])


def gatherable(x: Tensor) -> Tensor:
    """Keys or values (B, Hkv, N, D) as `attend` reads them in place: themselves, or a copy."""
    return x if _wide(x) else x.contiguous()


def prepares(key: Tensor, value: Tensor) -> bool:
    """Whether `prepare` serves these (B, Hkv, N, D) keys and values, whose rows it gathers."""
    return _wide(key) and _wide(value) and applies(key)


@functools.lru_cache(maxsize=256)
def range_length(pairs: int, blocks: int, processors: int) -> int:
    """Key blocks per program of the preparation, so that the last round of programs is full, too.

    pairs: key heads over the batch; a processor has room for one program.
    """

    def rounds(length: int) -> int:
        return -(-pairs * -(-blocks // length) // processors)

    lengths = {-(-blocks // ranges) for ranges in range(1, min(blocks, processors) + 1)}
    return min(lengths, key=lambda length: (rounds(length) * (length + RANGE_START), length))


def prepare(
    call: Call, copies: tuple[Tensor, Tensor] | None, key_mean: Tensor, low_value: Tensor,
    key_var: Tensor, spread: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Summaries of every key block and, where there are tensors for them, copies in order.

    Returns float32 sums (B, Hkv, ranges, 3, D) of k, v and v * v and (B, Hkv, ranges, D, D) of
    v (k - mean)^T over ranges of blocks.
    """
    from freqopt.kernels.hopper.prepare import prepare_hopper_kernel

    key, value = call.key, call.value
    batch, heads, _, dim = key.shape
    blocks = key_mean.shape[2]
    length = range_length(batch * heads, blocks, processors(key.device))
    ranges = -(-blocks // length)
    per_range = (batch, heads, ranges)
    sums = torch.empty(*per_range, 3, dim, device=key.device, dtype=torch.float32)
    first_order = torch.empty(*per_range, dim, dim, device=key.device, dtype=torch.float32)
    # Without copies these descriptors are not read.
    targets = map(_descriptor, copies or (low_value, low_value))
    queued(prepare_hopper_kernel, (batch * heads, ranges))(
        key, value, call.order.index, *targets, key_mean, low_value, key_var, spread, sums,
        first_order, *key.stride()[:3], *value.stride()[:3],
        heads, call.tokens, blocks, length, call.layout.text_before,
        D=dim, COPY=copies is not None, STAGES=PREPARE_STAGES[dim], **call.key_side, num_warps=4,
    )  # fmt: skip
    return sums, first_order
