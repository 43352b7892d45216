"""Split attention on a CPU: PyTorch's fused attention over the blocks that a route made exact.

Tiles with as many exact blocks go together, each with its own keys gathered; their softmax sums
join them with the low band. Summaries, scores and probe are those of `chunked_summaries`, the route
that of `freqopt.kernels.reference`, orders those of `chunked_order`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.profiler import record_function

from freqopt.config import KEY_BLOCK, QUERY_TILE
from freqopt.kernels import chunked_summaries as summaries
from freqopt.kernels import reference as ref
from freqopt.kernels.chunked_order import order_by_content
from freqopt.kernels.layout import Inputs, Settings, TokenLayout, repeat_heads, text_bias

CHUNK_BYTES = 4 * 2**20
"""Target size of the keys and values that a thread gathers at a time: a core's cache."""

MOST_FILL = 8
"""A list is filled up by one block in so many at most, to be as long as its group's longest."""

ATTENDING = "freqopt::attending"
"""What profilers call the part of a call that attends; the rest finds out what, and stores."""


class Tokens(NamedTuple):
    """One call's tensors in float32, heads repeated, all but text in their orders."""

    query: Tensor
    key: Tensor
    value: Tensor
    text_query: Tensor
    text_key: Tensor
    text_value: Tensor
    text_bias: Tensor


class Orders(NamedTuple):
    """Orders (B, Hkv, T) of the keys and (B, H, Tq) of the queries; None for the base order."""

    key: Tensor | None
    query: Tensor | None


def orders_of(inputs: Inputs, settings: Settings) -> Orders:
    """The orders of a call: given ones, or made by content where chunks ask for it."""
    share = inputs.query.shape[1] // inputs.key.shape[1]
    of_keys = _order(inputs.key, inputs.layout, inputs.key_order, inputs.chunks, settings)
    if inputs.query_layout is None:
        return Orders(of_keys, None if of_keys is None else of_keys.repeat_interleave(share, 1))
    chunks = None if inputs.chunks is None else inputs.chunks.repeat_interleave(share)
    layout = inputs.query_layout
    return Orders(of_keys, _order(inputs.query, layout, inputs.query_order, chunks, settings))


def _order(
    x: Tensor, layout: TokenLayout, given: Tensor | None, chunks: Tensor | None, settings: Settings
) -> Tensor | None:
    if given is not None or chunks is None or not settings.largest_chunk:
        return given
    tokens = x[:, :, layout.text_before : layout.text_before + layout.tokens]
    return order_by_content(tokens, layout.base_order(x.device), chunks)


def take_apart(inputs: Inputs, orders: Orders) -> Tokens:
    """Split the (B, H, N, D) tensors, of any floating dtype, into the parts of `Tokens`."""
    heads = inputs.query.shape[1]
    query = inputs.query.float()
    key, value = (repeat_heads(x, heads).float() for x in (inputs.key, inputs.value))
    layout, of_keys = inputs.layout, orders.key
    if of_keys is not None:
        of_keys = of_keys.repeat_interleave(heads // of_keys.shape[1], 1)
    queries = inputs.query_layout or layout
    text_key = layout.text_of(key)
    return Tokens(
        query=queries.video_of(query, orders.query),
        key=layout.video_of(key, of_keys),
        value=layout.video_of(value, of_keys),
        text_query=queries.text_of(query),
        text_key=text_key,
        text_value=layout.text_of(value),
        text_bias=text_bias(layout.text_mask(inputs.key_mask), text_key),
    )


class Placed(NamedTuple):
    """A call's tokens cut up: tiles of queries (B, H, I, 128, D), blocks of keys (B, H, J, 64, D).

    Behind the last token there are zeros. tokens: the same as views, with the text.
    """

    tiles: Tensor
    key_blocks: Tensor
    value_blocks: Tensor
    tokens: Tokens


def place(inputs: Inputs, orders: Orders) -> Placed:
    """The tensors of a call as `take_apart` makes them, each copied once."""
    layout, heads = inputs.layout, inputs.query.shape[1]
    queries = inputs.query_layout or layout
    tiles = cut(inputs.query, queries, orders.query, heads, QUERY_TILE)
    both = inputs.key, inputs.value
    keys, values = (cut(x, layout, orders.key, heads, KEY_BLOCK) for x in both)
    text_key, text_value = (repeat_heads(layout.text_of(x), heads).float() for x in both)
    tokens = Tokens(
        query=tiles.flatten(2, 3)[:, :, : queries.tokens],
        key=keys.flatten(2, 3)[:, :, : layout.tokens],
        value=values.flatten(2, 3)[:, :, : layout.tokens],
        text_query=queries.text_of(inputs.query).float(),
        text_key=text_key,
        text_value=text_value,
        text_bias=text_bias(layout.text_mask(inputs.key_mask), text_key),
    )
    return Placed(tiles, keys, values, tokens)


def cut(x: Tensor, layout: TokenLayout, order: Tensor | None, heads: int, size: int) -> Tensor:
    """Tokens of (B, Hx, N, D), without text and in an order (B, Ho, T), as (B, H, blocks, size, D).

    H is a multiple of Hx and of Ho. Float32, zeros behind the last token.
    """
    batch, own, _, dim = x.shape
    base = layout.base_order(x.device)
    cut_up = x.new_empty(batch, heads, -(-layout.tokens // size), size, dim, dtype=torch.float32)
    rows = cut_up.flatten(2, 3)
    rows[:, :, layout.tokens :] = 0.0
    video = x[:, :, layout.text_before : layout.text_before + layout.tokens]
    for item, head in itertools.product(range(batch), range(heads)):
        where = base if order is None else order[item, head * order.shape[1] // heads]
        to, source = rows[item, head, : layout.tokens], video[item, head * own // heads]
        if x.dtype == torch.float32:
            torch.index_select(source, 0, where, out=to)
        else:
            to.copy_(source.index_select(0, where))
    return cut_up


class Part(NamedTuple):
    """Attention of queries over some of the keys, to be joined with the rest.

    out (.., Q, D): normalised over these keys alone; log_sum (.., Q): of their softmax sum.
    """

    out: Tensor
    log_sum: Tensor


def fused(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Part:
    """Attention of (A, C, Q, D) queries over (A, C, K, D) keys with a bias (A, C, 1, K) or wider.

    A row whose keys are all hidden has weight zero: log_sum -inf.
    """
    if not key.shape[2]:
        return Part(torch.zeros_like(query), query.new_full(query.shape[:3], -torch.inf))
    wide = None if bias is None else bias.expand(*query.shape[:3], key.shape[2])
    out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, False, attn_mask=wide, scale=scale
    )
    if bias is None:
        return Part(out, log_sum)
    hidden = (bias.amax(-1) == -torch.inf).expand(query.shape[:3])
    return Part(out.masked_fill(hidden[..., None], 0.0), log_sum.masked_fill(hidden, -torch.inf))


class Low(NamedTuple):
    """How queries see the blocks that are not exact for them.

    key_mean, value_mean (B, H, J, D); bias (B, H, I, J): what logits have beside the products, -inf
    for blocks that are exact; matrix (B, H, D, D): the first-order matrix, turned and scaled.
    """

    key_mean: Tensor
    value_mean: Tensor
    bias: Tensor
    matrix: Tensor

    @classmethod
    def of(
        cls, low: ref.Summary, mass_term: Tensor, route: Tensor, probe: ref.Probe, scale: float
    ) -> Low:
        """From summaries, the second-order mass term and the route (B, H, I, J), and the probe."""
        bias = low.counts.log() + probe.c[..., None, None] * mass_term
        # Of a block with what is no number all pairs are exact; its mean must not reach the others.
        key_mean = low.key_mean.nan_to_num(0.0, 0.0, 0.0)
        bias = bias.masked_fill_(route != ref.LOW, -torch.inf)
        return cls(key_mean, low.value_mean, bias, scale * probe.matrix(low.h_bar).mT)


class Group(NamedTuple):
    """Tiles of a head with nearly as many exact blocks.

    tiles (n,); blocks (n, L): the exact ones of each, and any others behind; keys: how many keys
    of these blocks, by tile, count.
    """

    tiles: Tensor
    blocks: Tensor
    keys: list[int]


def groups(route: Tensor, most: int, missing: int) -> Iterator[Group]:
    """The tiles of a head's route (I, J), in groups of about `most` blocks, or of one tile.

    missing: keys that the last block lacks.
    """
    exact = route == ref.EXACT
    counts, columns = exact.sum(1), exact.shape[1]
    target = (exact.cumsum(1) - 1).masked_fill_(~exact, columns)
    lists = torch.zeros(len(exact), columns + 1, device=route.device, dtype=torch.int64)
    lists.scatter_(1, target, torch.arange(columns, device=route.device).expand_as(target))
    keys = counts * KEY_BLOCK - missing * exact[:, -1]
    order = counts.argsort(descending=True, stable=True)
    lists, lengths, ends = lists[order], counts[order].tolist(), keys[order].tolist()
    start = 0
    while start < len(lengths):
        length = max(lengths[start], 1)
        stop = start + 1
        while (
            stop < min(len(lengths), start + most // length)
            and lengths[stop] >= length - length // MOST_FILL
        ):
            stop += 1
        yield Group(order[start:stop], lists[start:stop, :length], ends[start:stop])
        start = stop


def attend_video(placed: Placed, low: Low, route: Tensor, scale: float) -> Part:
    """All query tiles over the blocks that the route (B, H, I, J) made exact, and others' means.

    All in one softmax, as products of matrices: fused attention takes so few queries in small
    steps. Returns out (B, H, I, 128, D), which takes the place of the queries, and log_sum
    (B, H, I, 128).
    """
    rows, dim = placed.tiles.shape[3:]
    blocks, missing = route.shape[-1], -placed.tokens.key.shape[2] % KEY_BLOCK
    most = CHUNK_BYTES * torch.get_num_threads() // (8 * KEY_BLOCK * dim)
    log_sums = placed.tiles.new_empty(placed.tiles.shape[:-1])
    # Memory that is given back and taken again after every product would be cleared each time.
    held = placed.tiles.new_empty(2, max(most, blocks), KEY_BLOCK * dim)
    logits = placed.tiles.new_empty(max(most, blocks) * KEY_BLOCK * rows)
    for at in itertools.product(*map(range, placed.tiles.shape[:2])):
        sources = [x[at].flatten(1) for x in (placed.key_blocks, placed.value_blocks)]
        tiles, log_sum = placed.tiles[at], log_sums[at]
        bias, matrix = low.bias[at][:, None], low.matrix[at]
        means = [x[at] for x in (low.key_mean, low.value_mean)]
        for chosen, listed, ends in groups(route[at], most, missing):
            count, length = listed.shape
            where = listed.flatten()
            for source, to in zip(sources, held, strict=True):
                torch.index_select(source, 0, where, out=to[: len(where)])
            key, value = (x[: len(where)].view(count, -1, dim) for x in held)
            query = tiles.index_select(0, chosen)
            turned = query @ matrix
            query *= scale
            near = logits[: len(where) * KEY_BLOCK * rows].view(count, rows, -1)
            torch.bmm(query, key.mT, out=near)
            for i, end in enumerate(ends):
                if end < length * KEY_BLOCK:
                    near[i, :, end:] = -torch.inf
            far = (query @ means[0].T).add_(bias.index_select(0, chosen))
            largest = torch.maximum(near.amax(-1, keepdim=True), far.amax(-1, keepdim=True))
            near.sub_(largest).exp_()
            far.sub_(largest).exp_()
            averaged = far.sum(-1, keepdim=True)
            total = near.sum(-1, keepdim=True).add_(averaged)
            turned.mul_(averaged).masked_fill_(averaged == 0, 0.0)  # not 0 times infinity
            found = turned.baddbmm_(near, value).add_(far @ means[1]).div_(total)
            tiles.index_copy_(0, chosen, found)
            log_sum.index_copy_(0, chosen, total.log_().add_(largest).squeeze(-1))
    return Part(placed.tiles, log_sums)


def attend_tiles(placed: Placed, low: Low, route: Tensor, scale: float) -> Part:
    """Split attention of all queries (B, H, Tq, D), in their order, in one softmax with the text.

    The output takes the place of the queries.
    """
    tokens, text = placed.tokens, None
    if tokens.text_key.shape[2]:
        text = fused(tokens.query, tokens.text_key, tokens.text_value, tokens.text_bias, scale)
    tiles, queries = attend_video(placed, low, route, scale), tokens.query.shape[2]
    part = Part(tiles.out.flatten(2, 3)[:, :, :queries], tiles.log_sum.flatten(2)[..., :queries])
    if text is None:
        return part
    log_sum = torch.logaddexp(part.log_sum, text.log_sum)
    out = part.out.mul_((part.log_sum - log_sum).exp_()[..., None])
    return Part(out.addcmul_(text.out, (text.log_sum - log_sum).exp_()[..., None]), log_sum)


def attend_text(tokens: Tokens, keys: Tensor, values: Tensor, scale: float) -> Part:
    """Dense attention of the text queries (B, H, X, D) over every key, the text's behind."""
    bias = F.pad(tokens.text_bias, (tokens.key.shape[2], 0))
    return fused(tokens.text_query, keys, values, bias, scale)


class Forward(NamedTuple):
    """What a forward pass returns.

    out (B, H, Nq, D) and log_sum (B, H, Nq) float32 as the model numbers its queries; split: the
    findings, in the queries' order; matrix (B, H, D, D): the first-order matrix in the queries'
    type; orders: those used.
    """

    out: Tensor
    log_sum: Tensor
    split: ref.Split
    matrix: Tensor
    orders: Orders


def split_forward(inputs: Inputs, settings: Settings) -> Forward:
    """Forward pass of a call on a CPU."""
    query, scale = inputs.query, settings.scale
    orders = orders_of(inputs, settings)
    placed = place(inputs, orders)
    tokens, own = placed.tokens, inputs.query_layout is None
    low = summaries.summarise(placed.key_blocks, placed.value_blocks, tokens.key.shape[2])
    scores = summaries.score_pairs(placed.tiles, tokens.query.shape[2], low, scale, query.dtype)
    thresholds = ref.resolve_thresholds(scores.score, inputs.threshold, settings.density, own=own)
    route = ref.route_pairs(scores.score, *thresholds, own=own)
    keys, values = tokens.key, tokens.value
    if tokens.text_key.shape[2]:
        keys = torch.cat([keys, tokens.text_key], 2)
        values = torch.cat([values, tokens.text_value], 2)
    probe = summaries.fit_probe(
        tokens.query, keys, values, tokens.text_bias, route, low, scores, settings.probes, scale
    )
    means = Low.of(low, scores.mass_term, route, probe, scale)
    with record_function(ATTENDING):
        video = attend_tiles(placed, means, route, scale)

    batch, heads, length, dim = query.shape
    out = query.new_empty(batch, length, heads, dim).transpose(1, 2)
    log_sum = query.new_empty(batch, heads, length, 1, dtype=torch.float32)
    layout = inputs.query_layout or inputs.layout
    text = attend_text(tokens, keys, values, scale) if layout.text else None
    layout.store(out, video.out, None if text is None else text.out, orders.query)
    layout.store(
        log_sum,
        video.log_sum[..., None],
        None if text is None else text.log_sum[..., None],
        orders.query,
    )
    split = ref.Split(video.out, route, ref.route_density(route), probe, video.log_sum)
    matrix = ref.rounded(probe.matrix(low.h_bar), query.dtype).to(query.dtype)
    return Forward(out, log_sum[..., 0], split, matrix, orders)
