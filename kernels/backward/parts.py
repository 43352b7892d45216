"""What the backward kernels read: tile shapes, lists of pairs, copies of rows, biases of means.

Shapes: I query tiles, J key blocks, R = I * 128 rows. Nothing here waits for the device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from freqopt.config import KEY_BLOCK, QUERY_TILE
from freqopt.kernels import reference as ref
from freqopt.kernels.forward.call import Call, Summaries
from freqopt.kernels.portable.backward import sum_kernel
from freqopt.kernels.portable.backward_bands import list_kernel, rows_kernel
from freqopt.kernels.tiles import padded_dim

LOG2E = 1.4426950408889634


class Shape(NamedTuple):
    """Queries per program (or per step, where keys own the program), warps and stages."""

    rows: int
    warps: int
    stages: int


class Shapes(NamedTuple):
    """Tile choices of the backward kernels for one type and head dim.

    sum_columns: exact keys per step of the sums; keys: keys, or means, per program of their
    gradients; bands: of the queries' gradients through the low band, and of the copies in token
    order; means: of the gradients of its means; slice: channels per step of the products with
    H-bar's gradient.
    """

    sums: Shape
    sum_columns: int
    query: Shape
    key: Shape
    keys: int
    bands: Shape
    means: Shape
    slice: int
    precision: str


def shapes_for(dtype: torch.dtype, head_dim: int) -> Shapes:
    """Shapes that fit registers and the shared memory of sm_80 and later.

    Four warps with 64 queries or keys leave room for a second program on each multiprocessor, whose
    products run beside this one's exponentials (docs/design/kernels.md).
    """
    padded = padded_dim(head_dim)
    row_bytes = padded * dtype.itemsize
    if dtype != torch.float32 and row_bytes <= 256:
        two = Shape(64, 4, 2)
        return Shapes(
            sums=Shape(128, 8, 3), sum_columns=128, query=two, key=two, keys=64, bands=two,
            means=Shape(32, 4, 3), slice=padded, precision="tf32",
        )  # fmt: skip
    rows = 64 if row_bytes <= 256 else 32 if row_bytes <= 512 else 16
    one = Shape(rows, 8, 1)
    return Shapes(
        sums=one, sum_columns=64, query=one, key=one, keys=rows, bands=one, means=one,
        slice=min(padded, 128 // dtype.itemsize),
        precision="tf32x3" if dtype == torch.float32 else "tf32",
    )  # fmt: skip


class Blocks(NamedTuple):
    """Keys and values (B, Hkv, all blocks * 64, D): video in token order, then text; padded.

    valid: (B, all blocks * 64) int8, 0 where there is no key or where it is masked.
    """

    key: Tensor
    value: Tensor
    valid: Tensor


class Rows(NamedTuple):
    """Copies of queries and output gradients in token order (B, H, R, D), and what a row adds.

    R = tiles * 128, zeros past the last token. offset: the mean key's logit, base 2; delta: output
    times its gradient; low_delta: less the first-order term (B, H, R); pooled: mean squared query
    of each tile (B, H, I, D). float32 but for the copies.
    """

    query: Tensor
    grad: Tensor
    offset: Tensor
    delta: Tensor
    low_delta: Tensor
    pooled: Tensor


class Lists(NamedTuple):
    """Exact blocks of every tile (B, H, I, J), tiles of every block, text's too, and how many."""

    blocks: Tensor
    block_counts: Tensor
    tiles: Tensor
    tile_counts: Tensor


class Band(NamedTuple):
    """The low band's means (B, Hkv, J, D), and what is added to their logits.

    var: variance of the keys behind each mean, float32; bias (B, H, I, J) float32, base 2: -inf
    where a pair is exact; slope: of the bias in the second-order mass, in nats.
    """

    key: Tensor
    value: Tensor
    var: Tensor
    bias: Tensor
    slope: Tensor


class Sums(NamedTuple):
    """Logarithm of each query's softmax sum (B, H, R), base 2, inf past the last token.

    In the frame of centred keys, and in that of the keys themselves.
    """

    centred: Tensor
    plain: Tensor


class Turn(NamedTuple):
    """What every step of one turn needs: the call of its heads, sizes, and launch options."""

    call: Call
    tiles: int
    blocks: int
    shapes: Shapes

    @property
    def all_blocks(self) -> int:
        """Blocks of the keys and of their text."""
        return self.blocks + -(-self.call.layout.text // KEY_BLOCK)

    @property
    def rows(self) -> int:
        """Queries per head, whole tiles."""
        return self.tiles * QUERY_TILE

    @property
    def key_pairs(self) -> int:
        """(batch item, key head) pairs."""
        return self.call.batch * self.call.kv_heads

    @property
    def device(self) -> torch.device:
        """Where everything is."""
        return self.call.query.device

    def single(self, *shape: int) -> Tensor:
        """Fresh float32 memory."""
        return torch.empty(*shape, device=self.device, dtype=torch.float32)

    def options(self, shape: Shape) -> dict[str, Any]:
        """Constants and launch options of a kernel of BM rows."""
        return {
            **self.call.size,
            "BM": shape.rows,
            "PRECISION": self.shapes.precision,
            "num_warps": shape.warps,
            "num_stages": shape.stages,
        }


def make_lists(route: Tensor, all_blocks: int) -> Lists:
    """Lists of exact pairs by tile and by block, in ascending order."""
    batch, heads, tiles, blocks = route.shape
    route = route.contiguous()

    def whole(*shape: int) -> Tensor:
        return torch.empty(batch, heads, *shape, device=route.device, dtype=torch.int32)

    found = Lists(whole(tiles, blocks), whole(tiles), whole(all_blocks, tiles), whole(all_blocks))
    for listed, counts, rows, all_rows, columns, strides in (
        (found.blocks, found.block_counts, tiles, tiles, blocks, (blocks, 1)),
        (found.tiles, found.tile_counts, blocks, all_blocks, tiles, (1, blocks)),
    ):
        list_kernel[(triton.cdiv(all_rows, 32), batch * heads)](
            route, listed, counts, rows, all_rows, columns, *strides, BR=32, BC=64, num_warps=4
        )
    return found


def with_text(call: Call, summaries: Summaries) -> Blocks:
    """Put text behind the last block of the other keys."""
    layout = call.layout
    video = torch.ones(call.batch, layout.tokens, device=call.key.device, dtype=torch.int8)
    mask = layout.text_mask(call.key_mask)
    seen = video.new_ones(call.batch, layout.text) if mask is None else mask.to(torch.int8)
    valid = torch.cat([F.pad(x, (0, -x.shape[1] % KEY_BLOCK)) for x in (video, seen)], 1)
    blocks = [summaries.key, summaries.value]
    if layout.text:
        for i, x in enumerate((call.key, call.value)):
            behind = F.pad(layout.text_of(x), (0, 0, 0, -layout.text % KEY_BLOCK))
            blocks[i] = torch.cat([blocks[i], behind], 2)
    return Blocks(blocks[0], blocks[1], valid)


def copy_rows(
    turn: Turn,
    grad: Tensor,
    log_sum_grad: Tensor | None,
    out: Tensor,
    summaries: Summaries,
    matrix: Tensor,
) -> Rows:
    """Queries and output gradients in the queries' order, with their row sums."""
    shape, call = turn.shapes.bands, turn.call
    parts = turn.rows // shape.rows
    per_row = (*call.per_head, turn.rows)
    copies = [
        torch.empty(*per_row, call.dim, device=x.device, dtype=x.dtype) for x in (call.query, grad)
    ]
    offset, delta, low_delta = (turn.single(*per_row) for _ in range(3))
    squares = turn.single(*call.per_head, parts, call.dim)
    sums = {}
    if log_sum_grad is not None:
        sums = {"log_sum_grad": log_sum_grad, "log_sum_row": log_sum_grad.shape[-1]}
    order = call.query_order
    rows_kernel[(parts, call.pairs)](
        call.query, grad, out, order.index, summaries.key_shift, matrix, *copies, offset, delta,
        low_delta, squares,
        *call.query.stride()[:3], *grad.stride()[:3], *out.stride()[:3],
        call.heads, call.group_size, call.queries, turn.tiles, call.query_layout.text_before,
        call.scale, order.row, order.share, **turn.options(shape), **sums,
    )  # fmt: skip
    count = ref.block_counts(call.queries, QUERY_TILE, turn.device)
    pooled = squares.unflatten(2, (turn.tiles, -1)).sum(3) / count[:, None]
    return Rows(copies[0], copies[1], offset, delta, low_delta, pooled)


def by_key_head(x: Tensor, kv_heads: int) -> Tensor:
    """(B, H, I, C) -> (B, Hkv, H / Hkv * I, C), without a copy."""
    return torch.unflatten(x, 1, (kv_heads, -1)).flatten(2, 3)


def make_band(turn: Turn, summaries: Summaries, route: Tensor, pooled: Tensor, c: Tensor) -> Band:
    """The low band with its biases; c: (B, H, 1, 1)."""
    call = turn.call
    capacity = ref.block_counts(call.tokens, KEY_BLOCK, turn.device).log()
    var = summaries.key_var.float()
    spread = by_key_head(pooled, call.kv_heads) @ var.mT * (0.5 * call.scale**2)
    spread = spread.view(*call.per_head, turn.tiles, -1)
    logit = (capacity + c * torch.minimum(spread, capacity)) * LOG2E
    bias = torch.where(route == ref.LOW, logit, -torch.inf)
    return Band(
        summaries.low_key,
        summaries.low_value,
        var,
        bias,
        torch.where(spread < capacity, c, 0.0),
    )


def softmax_sums(turn: Turn, rows: Rows, blocks: Blocks, band: Band, lists: Lists) -> Sums:
    """Walk everything the queries attend to, for their weights' normaliser."""
    shape, call = turn.shapes.sums, turn.call
    sums = Sums(*(turn.single(*call.per_head, turn.rows) for _ in range(2)))
    sum_kernel[(turn.rows // shape.rows, call.pairs)](
        rows.query, rows.offset, blocks.key, blocks.valid, band.key, band.bias,
        lists.blocks, lists.block_counts, *sums,
        call.heads, call.group_size, call.tokens, call.queries, turn.tiles, turn.blocks,
        turn.all_blocks, call.scale, BN=turn.shapes.sum_columns, **turn.options(shape),
    )  # fmt: skip
    return sums
