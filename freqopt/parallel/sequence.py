"""Attention of one rank's queries over the keys of all ranks: gathered at once, or part by part.

Every rank has an equal part of the sequence and all heads, so heads need not divide. Gathered keys
are split as on one GPU, each rank serving its own query tiles; parts that arrive one after the
other are split each by itself and merged by their log-sum-exp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import Tensor

from freqopt.config import DEFAULT_PROBES
from freqopt.errors import InputError
from freqopt.grid import Grid, token_order
from freqopt.kernels.attention import merge_attention, split_attention

Method = Literal["gather", "ring"]


@dataclass(frozen=True)
class Part:
    """How one of `ranks` equal parts of a sequence lies, which is that of rank `rank`.

    grid: of the tokens of all parts together that are no text, None where they have none. before,
    after: text tokens at either end of each part.
    """

    rank: int
    ranks: int
    tokens: int
    grid: Grid | None
    before: int = 0
    after: int = 0

    @property
    def video(self) -> int:
        """Tokens of a part that are no text."""
        return self.tokens - self.before - self.after

    def order(self, rank: int, device: torch.device) -> Tensor:
        """The order (video,) int32 of a rank's tokens, as the grid's curve meets them."""
        grid = self.grid or (1, 1, self.ranks * self.video)
        found: Tensor = _order_of_part(grid, rank, self.ranks, device)
        return found


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _order_of_part(grid: Grid, rank: int, ranks: int, device: torch.device) -> Tensor:
    """Numbers of a part's tokens, counted from its first, in the order of the grid's curve."""
    return _made_order(grid, rank, ranks, device)


@lru_cache(maxsize=64)
def _made_order(grid: Grid, rank: int, ranks: int, device: torch.device) -> Tensor:
    whole = token_order(grid, torch.device("cpu")).long()
    length = len(whole) // ranks
    mine = whole[(whole >= rank * length) & (whole < (rank + 1) * length)]
    return (mine - rank * length).to(device=device, dtype=torch.int32)


def attention_over_ranks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    method: Method = "gather",
    grid: Sequence[int] | None = None,
    text_before: int = 0,
    text_after: int = 0,
    threshold: float | Tensor | None = None,
    density: float | None = None,
    order: str | Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    probes: int = DEFAULT_PROBES,
    exact: bool = False,
) -> Tensor:
    """Attention of this rank's queries over the keys of all ranks of a group; without gradients.

    All ranks call it with tensors of the same shapes. The sequence is that of rank 0, then that of
    rank 1, and so on; attention does not depend on where in it text lies.

    Args:
        query: (B, H, n, D), of the n tokens of this rank; all heads.
        key, value: (B, Hkv, n, D), of the same tokens.
        group: the ranks; all of them where it is not given.
        method: "gather" brings all keys to every rank in one collective, of which torch.compile
            makes a part of the graph. "ring" passes parts on from rank to rank while the part
            before is attended to, and holds two parts at a time; it runs in eager mode.
        grid: extents (t, h, w) of the video tokens of all ranks together, in raster order over the
            ranks; not needed to order by content.
        text_before, text_after: text tokens at either end of every rank's part; always exact.
        threshold, density, order, scale, probes: as `freqopt.split_attention` has them. Thresholds
            of a plan are those of one GPU; with "ring" they serve each part by itself, which keeps
            somewhat more where a part has little of a query's weight.
        key_mask: (B, n) bool of this rank's keys, True = attend. Only text entries are read.
        exact: dense attention instead, over all keys too.

    Returns:
        (B, H, n, D) in the inputs' dtype.

    Raises:
        InputError: shapes, a grid or text that do not fit, a method that there is not, or tensors
            that gradients are wanted of.
    """
    if method not in ("gather", "ring"):
        raise InputError(f"method {method!r} is none; supported: 'gather' and 'ring'")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        raise InputError(
            "gradients through attention over ranks are not supported: call it under "
            "torch.no_grad(), or train with Ulysses, whose collectives have gradients"
        )
    ranks = dist.get_world_size(group)
    part = _part(query, key, dist.get_rank(group), ranks, grid, text_before, text_after)
    if exact or order is None:
        order = "grid" if exact or grid is not None else "content"

    def attend(k: Tensor, v: Tensor, mask: Tensor | None, layout: _Layout) -> tuple[Tensor, ...]:
        return split_attention(
            query,
            k,
            v,
            grid=layout.grid,
            order=_order(order, layout, key.shape[:2]),
            threshold=0.0 if exact else threshold,
            density=None if exact else density,
            text_before=layout.before,
            text_after=layout.after,
            query_grid=(1, 1, part.video),
            query_text_before=part.before,
            query_text_after=part.after,
            query_order=_query_order(order, part, query),
            key_mask=mask,
            scale=scale,
            probes=probes,
            return_lse=True,
        )  # type: ignore[return-value]

    if ranks == 1 or method == "gather":
        keys, mask = _gathered(torch.stack([key, value]), key_mask, part, group)
        if exact:
            return _dense(query, keys[0], keys[1], mask, scale)
        whole = part.grid or (1, 1, ranks * part.video)
        layout = _Layout(whole, ranks * part.before, ranks * part.after, None)
        return attend(keys[0], keys[1], mask, layout)[0]
    found = []
    for owner, (k, v, mask) in _passed_on(key, value, key_mask, part, group):
        layout = _Layout((1, 1, part.video), part.before, part.after, part.order(owner, key.device))
        found.append(attend(k, v, mask, layout))
    return merge_attention([(each[0], each[1]) for each in found])[0]


@dataclass(frozen=True)
class _Layout:
    """How keys lie. order: of those that are no text, where that is not their grid's own."""

    grid: Grid
    before: int
    after: int
    order: Tensor | None


def _part(
    query: Tensor,
    key: Tensor,
    rank: int,
    ranks: int,
    grid: Sequence[int] | None,
    before: int,
    after: int,
) -> Part:
    if query.dim() != 4 or key.dim() != 4 or query.shape[2] != key.shape[2]:
        raise InputError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)}: the tensors of one rank's tokens "
            "(batch, heads, tokens, head_dim) are supported, as many queries as keys"
        )
    tokens = query.shape[2]
    if before < 0 or after < 0 or before + after >= tokens:
        raise InputError(
            f"text_before {before} and text_after {after} leave no tokens of the {tokens} of a rank"
        )
    extents = None if grid is None else (int(grid[0]), int(grid[1]), int(grid[2]))
    video = tokens - before - after
    if extents is not None and math.prod(extents) != ranks * video:
        raise InputError(
            f"grid {extents} has {math.prod(extents)} tokens and the {ranks} ranks have {video} "
            "each that are no text; pass the grid of all ranks together"
        )
    return Part(rank, ranks, tokens, extents, before, after)


def _order(
    order: str | Tensor | None, layout: _Layout, heads: Sequence[int]
) -> str | Tensor | None:
    """The order of keys as `split_attention` takes it."""
    if layout.order is None or not _by_grid(order):
        return order
    return layout.order.expand(heads[0], heads[1], -1)


def _by_grid(order: str | Tensor | None) -> bool:
    return isinstance(order, str) and order == "grid"


def _query_order(order: str | Tensor | None, part: Part, query: Tensor) -> Tensor | None:
    """The grid's order of this rank's queries; None where they are ordered by content."""
    if not _by_grid(order):
        return None
    mine = part.order(part.rank, query.device)
    return mine.expand(query.shape[0], query.shape[1], -1)


def _dense(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    bias = None if mask is None else mask[:, None, None, :]
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=bias, scale=scale, enable_gqa=grouped
    )


def _gathered(
    pair: Tensor, mask: Tensor | None, part: Part, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor | None]:
    """Keys and values (2, B, Hkv, N, D) of all ranks, text to the ends, and their mask (B, N)."""
    if part.ranks == 1:
        return pair, mask
    own = group if group is not None else dist.group.WORLD
    by_token = pair.permute(3, 0, 1, 2, 4).contiguous()
    everything = _text_to_the_ends(_all(by_token, own), part)
    keys = everything.permute(1, 2, 3, 0, 4)
    if mask is None:
        return keys, None
    of_all = _all(mask.t().contiguous().to(torch.uint8), own)
    return keys, _text_to_the_ends(of_all, part).t().bool()


def _all(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """(P n, ...) of all ranks from (n, ...) of each."""
    gather: Any = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor
    found: Tensor = collectives.wait_tensor(gather(x, 0, group))
    return found


def _text_to_the_ends(x: Tensor, part: Part) -> Tensor:
    """Tokens (P n, ...) of all parts with the text of all at either end."""
    if not part.before and not part.after:
        return x
    parts = x.unflatten(0, (part.ranks, part.tokens))
    stop = part.tokens - part.after
    pieces = parts[:, : part.before], parts[:, part.before : stop], parts[:, stop:]
    return torch.cat([piece.flatten(0, 1) for piece in pieces])


Held = tuple[Tensor, Tensor, Tensor | None]


def _passed_on(
    key: Tensor, value: Tensor, mask: Tensor | None, part: Part, group: dist.ProcessGroup | None
) -> Iterator[tuple[int, Held]]:
    """Keys, values and mask of every rank, this one's first; the next are on their way."""
    to, come = (
        dist.get_global_rank(group, (part.rank + step) % part.ranks)
        if group is not None
        else (part.rank + step) % part.ranks
        for step in (1, -1)
    )
    held: list[Tensor] = [key.contiguous(), value.contiguous()]
    if mask is not None:
        held.append(mask.contiguous().to(torch.uint8))
    for step in range(part.ranks):
        last = step == part.ranks - 1
        arriving = [] if last else [torch.empty_like(x) for x in held]
        wait = _exchange(held, arriving, to, come, group)
        yield (
            (part.rank - step) % part.ranks,
            (held[0], held[1], held[2].bool() if mask is not None else None),
        )
        wait()
        held = arriving


def _exchange(
    leaving: Sequence[Tensor],
    arriving: Sequence[Tensor],
    to: int,
    come: int,
    group: dist.ProcessGroup | None,
) -> Callable[[], None]:
    """Start passing tensors on; returns what waits for them."""
    if not arriving:
        return lambda: None
    sends = [dist.P2POp(dist.isend, x, to, group) for x in leaving]
    receives = [dist.P2POp(dist.irecv, x, come, group) for x in arriving]
    requests = dist.batch_isend_irecv([*sends, *receives])

    def wait() -> None:
        for request in requests:
            request.wait()

    return wait
