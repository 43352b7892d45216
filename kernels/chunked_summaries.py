"""Summaries, scores and probe of a call on a CPU: what `freqopt.kernels.reference` defines.

There each step makes tensors as large as the keys, which on a CPU is memory written and read again.
Here the tokens are looked at in pieces that stay in a core's cache, and each only as often as the
figures need.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from freqopt.config import KEY_BLOCK, QUERY_TILE, SUB_TILE
from freqopt.kernels import reference as ref

PIECE_BYTES = 2**19
"""Of the tokens that a thread looks at together; there are a few such tensors at a time."""


def pieces(length: int, row_bytes: int, *, most: int = PIECE_BYTES) -> Iterator[slice]:
    """Ranges of rows of so many bytes that all threads together have in their caches."""
    step = max(most * torch.get_num_threads() // max(row_bytes, 1), 1)
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def summarise(key: Tensor, value: Tensor, tokens: int) -> ref.Summary:
    """Of keys and values (B, H, J, 64, D), zeros behind the last token; see reference.summarise."""
    batch, heads, blocks, size, dim = key.shape
    count = ref.block_counts(tokens, size, key.device)
    key_mean, value_mean, key_var = key.new_empty(3, batch, heads, blocks, dim)
    within = key.new_empty(batch, heads, blocks)
    h_bar = key.new_zeros(batch, heads, dim, dim)
    for at in itertools.product(range(batch), range(heads)):
        for part in pieces(blocks, 4 * size * dim):
            keys, values, n = key[at][part], value[at][part], count[part, None]
            torch.div(keys.sum(1), n, out=key_mean[at][part])
            torch.div(values.sum(1), n, out=value_mean[at][part])
            off = keys - key_mean[at][part, None]
            around = values - value_mean[at][part, None]
            if part.stop == blocks:
                behind = slice(tokens - (blocks - 1) * size, size)
                off[-1, behind] = around[-1, behind] = 0.0
            h_bar[at].addmm_(values.flatten(0, 1).T, off.flatten(0, 1))
            torch.div(off.square_().sum(1), n, out=key_var[at][part])
            within[at][part] = torch.linalg.vector_norm(around.flatten(1), dim=1).square_()
    # What is spread over the head is so within its blocks, and among their means.
    among = value_mean - (value_mean * count[:, None]).sum(2, keepdim=True) / tokens
    spread = (within.sum(2) + (among.square().sum(3) * count).sum(2)) / tokens
    return ref.Summary(
        counts=count,
        key_mean=key_mean,
        value_mean=value_mean,
        key_var=key_var,
        value_spread=(within / count / spread.clamp(min=1e-30)[..., None]).sqrt(),
        h_bar=h_bar / tokens,
    )


def score_pairs(
    tiles: Tensor, queries: int, summary: ref.Summary, scale: float, dtype: torch.dtype
) -> ref.Scores:
    """Of query tiles (B, H, I, 128, D), zeros behind the last query; see reference.score_pairs."""
    batch, heads, count, rows, dim = tiles.shape
    flat = tiles.flatten(0, 2)
    pooled = flat.new_empty(len(flat), rows // SUB_TILE, dim)
    square = flat.new_empty(len(flat), dim)
    for part in pieces(len(flat), 4 * rows * dim):
        torch.sum(flat[part].unflatten(1, (-1, SUB_TILE)), 2, out=pooled[part])
        torch.sum(flat[part].square(), 1, out=square[part])
    starts = torch.arange(0, count * rows, SUB_TILE, device=tiles.device)
    of_sub_tiles = (queries - starts).clamp(0, SUB_TILE).float()
    of_tiles = ref.block_counts(queries, QUERY_TILE, tiles.device)
    mean = pooled.view(batch, heads, -1, dim) / of_sub_tiles.clamp(min=1)[:, None]
    mean_square = square.view(batch, heads, count, dim) / of_tiles[:, None]
    return ref.score_means(mean, of_sub_tiles, mean_square, summary, scale, dtype)


def fit_probe(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text_bias: Tensor,
    route: Tensor,
    low: ref.Summary,
    scores: ref.Scores,
    probes: int,
    scale: float,
) -> ref.Probe:
    """Fit on some queries (see reference.fit_probe); nothing is fitted without probes.

    query (B, H, Tq, D), key and value (B, H, T + X, D), the text's X behind; text_bias (B, 1, 1,
    X). Each product with all keys is made once.
    """
    if not probes:
        return ref.Probe.unfitted(scores.score[..., 0, 0], query.shape[-1])
    positions = ref.probe_positions(query.shape[2], probes, query.device)
    chosen, tile = query[:, :, positions] * scale, positions // QUERY_TILE
    tokens, text = key.shape[2] - text_bias.shape[-1], text_bias.shape[-1]
    pair = route[:, :, tile]
    full = chosen @ key.mT
    if text:
        full[..., tokens:] += text_bias
    largest = full.amax(-1, keepdim=True)
    share = full.sub_(largest).exp_()
    total = share.sum(-1, keepdim=True)
    share /= total
    looked = (pair == ref.EXACT).float().repeat_interleave(KEY_BLOCK, -1)[..., :tokens]
    exact = share.clone()
    exact[..., :tokens] *= looked
    missing = share.sub_(exact)  # what is looked at leaves 0
    exact_mass, missing_mass = (x.sum(-1, keepdim=True) for x in (exact, missing))
    exact_out, missing_out = exact @ value, missing @ value
    observed = ref.Observed(largest + total.log(), exact_mass, exact_out, missing_mass, missing_out)
    logit = (chosen @ low.key_mean.mT + low.counts.log()).masked_fill(pair != ref.LOW, -torch.inf)
    term = scores.mass_term[:, :, tile]
    columns = low.counts.numel()
    estimate = ref.Estimate(logit, term, low.value_mean, chosen, low.h_bar, 0.0, columns)
    return ref.fit_probe(observed, estimate)
