"""The definition of frequency-split attention, in plain PyTorch and float32.

Every other implementation is tested against this one. It favours reading over speed and builds
(tokens x keys) tensors, so it is for short sequences; `freqopt.kernels.chunked` reuses its
summaries, scores and probe and attends tile by tile. The mathematics: docs/design/mathematics.md.

Shapes: B batch, H query heads, T video tokens in token order, X text tokens, D head dim,
J = ceil(T / 64) key blocks, I = ceil(T / 128) query tiles, S = 16 * I sub-tiles of 8 queries.
Everything here is float32, keys and values already repeated to the H query heads.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from freqopt.config import KEY_BLOCK, MID_RATIO, QUERY_TILE, SUB_BLOCK, SUB_TILE

LOW, MID, EXACT = 0, 1, 2
"""Values of the route: which band serves a (query tile, key block) pair."""

C_MAX, G_MAX, UPDATE_MAX = 2.0, 1.5, 0.5
"""Bounds of the probe's two scalars, and of the update's terms by those of H-bar, both as root mean
squares over the probes; past them the fit would chase noise."""

LEAST_MASS, LEAST_CORRECTION = 1e-6, 1e-12
"""Share of a probe's softmax sum that is approximated, on average, and share of the output's energy
that the first-order term is, from which the probe's scalars are fitted: below is only rounding."""

NEWTON_STEPS = 4
"""Steps of the fit of c: the log-mass is convex in c and close to linear, so four converge."""

RIDGE = 3 / 128
"""Strength of the ridge that the update of the first-order matrix is fitted with. What it is added
to has a trace of 2 over the probes (docs/decisions/ridge.md)."""

UPDATE_SHARE = 0.5
"""Of the update that suits the probes best, how much is taken: what is wrong with it is the same
for all queries, so it adds up where the error that it removes does not. Half removes three quarters
of what the whole would, and adds a quarter of its own energy (docs/decisions/ridge.md)."""

LEAST_TERM, LEAST_TOLD = 1 / 16, 1e-6
"""Energy of the first-order terms, by that of what g leaves, from which the update is fitted: where
they are less, the error comes from elsewhere, and what is fitted to it fails other queries. And
that of predictions of what is left: less is rounding, as where there is one probe."""

INVERSE_STEPS = 9
"""Of Newton and Schulz, X <- X (2 - A X) from 1 / (1 + RIDGE), where there is no inverse.
Eigenvalues of A lie between the ridge and 2 more, so X is off by less than 0.977^(2^9), 7e-6."""

RIDGE_PROBES = 64
"""Most probes that the update is fitted to: their products are a matrix to be inverted."""


class Summary(NamedTuple):
    """What the low (or mid) band knows about the blocks of one head.

    counts (J,), key_mean / value_mean / key_var (B, H, J, D), value_spread (B, H, J): rms distance
    of a block's values from their mean, relative to the head's; h_bar (B, H, D, D): the
    token-mean of v (k - block mean)^T, the matrix H-bar of the first-order term before scaling.
    """

    counts: Tensor
    key_mean: Tensor
    value_mean: Tensor
    key_var: Tensor
    value_spread: Tensor
    h_bar: Tensor


class Scores(NamedTuple):
    """Routing scores (B, H, I, J) and the second-order mass term of the same pairs, in nats."""

    score: Tensor
    mass_term: Tensor


class Probe(NamedTuple):
    """What the probes tell of a call.

    c, g (B, H): 1 where none fits; error (B, H): the relative L2 error left after all three; update
    (B, H, D, D): what the first-order matrix has beside g H-bar, values by keys; 0 where none fits.
    """

    c: Tensor
    g: Tensor
    error: Tensor
    update: Tensor

    @classmethod
    def unfitted(cls, per_head: Tensor, dim: int) -> Probe:
        """That of a call without probes. per_head: any tensor (B, H); dim: of a head."""
        one = torch.ones_like(per_head)
        update = torch.zeros(*one.shape, dim, dim, device=one.device, dtype=one.dtype)
        return cls(one, one, one * torch.nan, update)

    def matrix(self, h_bar: Tensor) -> Tensor:
        """The first-order matrix M = g H-bar + update, of H-bar (B, H, D, D)."""
        return self.g[..., None, None] * h_bar + self.update


def split_blocks(x: Tensor, size: int) -> Tensor:
    """(B, H, T, D) -> (B, H, blocks, size, D), the last block padded with zeros."""
    blocks = -(-x.shape[2] // size)
    missing = blocks * size - x.shape[2]
    padded: Tensor = F.pad(x, (0, 0, 0, missing)) if missing else x
    return torch.unflatten(padded, 2, (blocks, size))


def block_counts(tokens: int, size: int, device: torch.device) -> Tensor:
    """True number of tokens of each block, (blocks,) float32: the last one may be ragged."""
    starts = torch.arange(0, tokens, size, device=device)
    return (tokens - starts).clamp(max=size).float()


def summarise(key: Tensor, value: Tensor, size: int) -> Summary:
    """Block means, second moments, value spread and the token-mean first-order matrix.

    key, value: (B, H, T, D) in token order. Source: docs/design/mathematics.md §2.
    """
    tokens = key.shape[2]
    count = block_counts(tokens, size, key.device)
    valid = torch.arange(size, device=key.device) < count[:, None]
    keys, values = split_blocks(key, size), split_blocks(value, size)
    key_mean = keys.sum(3) / count[:, None]
    value_mean = values.sum(3) / count[:, None]
    key_offset = (keys - key_mean.unsqueeze(3)) * valid[..., None]
    value_offset = (values - value_mean.unsqueeze(3)) * valid[..., None]
    block_spread = value_offset.square().sum((3, 4)) / count
    head_spread = (value - value.mean(2, keepdim=True)).square().sum((2, 3)) / tokens
    return Summary(
        counts=count,
        key_mean=key_mean,
        value_mean=value_mean,
        key_var=key_offset.square().sum(3) / count[:, None],
        value_spread=(block_spread / head_spread.clamp(min=1e-30)[..., None]).sqrt(),
        h_bar=torch.einsum("bhjnd,bhjne->bhde", values, key_offset) / tokens,
    )


def pool_queries(query: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of the queries of each sub-tile of 8.

    Returns the means (B, H, S, D) and the true number of queries (S,); sub-tiles past the end of
    the last tile have zero queries.
    """
    tokens = query.shape[2]
    sub_tiles = -(-tokens // QUERY_TILE) * (QUERY_TILE // SUB_TILE)
    starts = torch.arange(sub_tiles, device=query.device) * SUB_TILE
    count = (tokens - starts).clamp(0, SUB_TILE).float()
    queries = F.pad(query, (0, 0, 0, sub_tiles * SUB_TILE - tokens)).unflatten(2, (-1, SUB_TILE))
    return queries.sum(3) / count.clamp(min=1)[:, None], count


def tile_mean_square(query: Tensor) -> Tensor:
    """(B, H, I, D): mean of the squared queries of each tile."""
    count = block_counts(query.shape[2], QUERY_TILE, query.device)
    return split_blocks(query, QUERY_TILE).square().sum(3) / count[:, None]


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Float32 `x` as a tensor of `dtype` would hold it; float16 saturates."""
    largest = torch.finfo(dtype).max
    return x.clamp(-largest, largest).to(dtype).float()


def score_pairs(
    query: Tensor, summary: Summary, scale: float, dtype: torch.dtype = torch.float32
) -> Scores:
    """Routing score of every (query tile, key block) pair, and its second-order mass term.

    dtype: the type that pooled queries and block summaries are rounded to before their products,
    the attended tensors' own: tensor cores then score at their full rate, and a routing decision
    needs no more. Key means are rounded in the frame of centred keys.

    The score is J x rms over sub-tiles of the pooled softmax mass, times the tile's logit
    dispersion in the block and the block's value spread: an estimate of the error made by keeping
    the block low, free of the units of q, k and v and of the number of blocks. Source:
    docs/design/mathematics.md §4.
    """
    mean, count = pool_queries(query)
    return score_means(mean, count, tile_mean_square(query), summary, scale, dtype)


def score_means(
    mean: Tensor,
    count: Tensor,
    mean_square: Tensor,
    summary: Summary,
    scale: float,
    dtype: torch.dtype = torch.float32,
) -> Scores:
    """Score pairs, given what `pool_queries` and `tile_mean_square` tell of the queries."""
    capacity = summary.counts.log()
    weight = summary.counts[:, None] / summary.counts.sum()
    key_mean = summary.key_mean - (summary.key_mean * weight).sum(2, keepdim=True)
    key_var = rounded(summary.key_var, dtype)
    dispersion = rounded(mean_square, dtype) @ key_var.mT * scale**2
    mass_term = torch.minimum(0.5 * dispersion, capacity)
    logit = rounded(mean, dtype) @ rounded(key_mean, dtype).mT * scale + capacity
    per_tile = QUERY_TILE // SUB_TILE
    mass = (logit + mass_term.repeat_interleave(per_tile, 2)).softmax(-1)
    present = (count > 0).float().unflatten(0, (-1, per_tile))
    squares = mass.square().unflatten(2, (-1, per_tile)) * present[..., None]
    mean_mass_square = squares.sum(3) / present.sum(1)[:, None]
    score = (mean_mass_square * dispersion).sqrt() * summary.value_spread.unsqueeze(2)
    # What is no number is attended exactly, whatever the threshold.
    score = (score * summary.counts.numel()).nan_to_num(nan=torch.inf, posinf=torch.inf)
    return Scores(score, mass_term.nan_to_num(nan=0.0))


def own_blocks(tiles: int, blocks: int, device: torch.device) -> Tensor:
    """(I, J) bool: the blocks of a tile's own tokens, always exact (the local neighbourhood)."""
    block = torch.arange(blocks, device=device)
    tile = torch.arange(tiles, device=device)
    return block * KEY_BLOCK // QUERY_TILE == tile[:, None]


def route_pairs(
    score: Tensor, threshold: Tensor, mid_threshold: Tensor, *, own: bool = True
) -> Tensor:
    """Choose the band of every pair: EXACT from the threshold up, MID between the two, else LOW.

    score: (B, H, I, J); thresholds (B, H), of which one that is no number makes all pairs exact.
    own: the queries are the keys' tokens, and a tile's own blocks are exact whatever they score;
    else the block of its highest score is. Returns (B, H, I, J) int8.
    """
    if own:
        always = own_blocks(score.shape[2], score.shape[3], score.device)
    else:
        best = score.argmax(-1, keepdim=True)
        always = torch.arange(score.shape[3], device=score.device) == best
    exact = ~(score < threshold[..., None, None]) | always
    middle = ~(score < mid_threshold[..., None, None])
    return torch.where(exact, EXACT, torch.where(middle, MID, LOW)).to(torch.int8)


def threshold_for_density(score: Tensor, density: float, *, own: bool = True) -> Tensor:
    """Threshold (B, H) that makes the given share of pairs exact, own blocks counted in."""
    if own:
        local = own_blocks(score.shape[2], score.shape[3], score.device)
        score = torch.where(local, torch.inf, score)
    flat = score.flatten(2)
    kept = min(max(math.ceil(density * flat.shape[-1]), 1), flat.shape[-1])
    return flat.kthvalue(flat.shape[-1] - kept + 1, dim=-1).values


def route_density(route: Tensor) -> Tensor:
    """Share of pairs served exactly, a mid pair counted by its cost, 1 / SUB_BLOCK. (B, H)."""
    return (route == EXACT).float().mean((2, 3)) + (route == MID).float().mean((2, 3)) / SUB_BLOCK


def probe_positions(tokens: int, probes: int, device: torch.device) -> Tensor:
    """Token-order positions of the probes, evenly spaced; (min(probes, tokens),) int64."""
    probes = min(probes, tokens)
    return (2 * torch.arange(probes, device=device) + 1) * tokens // (2 * probes)


class Observed(NamedTuple):
    """Exact attention of the probes, divided by its softmax sum, and how the route splits it.

    log_total (B, H, P, 1): logarithm of the softmax sum; exact_mass (B, H, P, 1) and exact_out
    (B, H, P, D): share of the pairs served exactly; missing_mass, missing_out: the rest.
    """

    log_total: Tensor
    exact_mass: Tensor
    exact_out: Tensor
    missing_mass: Tensor
    missing_out: Tensor


class Estimate(NamedTuple):
    """How the approximate bands see the probes: what replaces the missing pairs.

    logit, term (B, H, P, columns): -inf where unused, and what c multiplies; value (B, H, columns,
    D); query (B, H, P, D), scaled; h_bar (B, H, D, D): H-bar of the low band; mid_turned
    (B, H, P, D): first-order term of the mid band, or 0; low_columns: low ones come first.
    """

    logit: Tensor
    term: Tensor
    value: Tensor
    query: Tensor
    h_bar: Tensor
    mid_turned: Tensor | float
    low_columns: int


class Bands(NamedTuple):
    """Everything that queries (B, H, Q, D) attend to.

    exact (B, H, Q, T + X): logits of tokens and text, -inf where a pair is not exact; value
    (B, H, T + X, D); estimate: the approximate bands.
    """

    exact: Tensor
    value: Tensor
    estimate: Estimate


def attend_bands(bands: Bands, probe: Probe) -> Tensor:
    """One softmax over all bands, and the first-order term. Returns (B, H, Q, D)."""
    estimate, c, g = bands.estimate, probe.c[..., None, None], probe.g[..., None, None]
    approximate = estimate.logit + c * estimate.term
    weights = torch.cat([approximate, bands.exact], -1).softmax(-1)
    columns, low_columns = approximate.shape[-1], estimate.low_columns
    low = weights[..., :low_columns].sum(-1, keepdim=True)
    mid = weights[..., low_columns:columns].sum(-1, keepdim=True)
    out = weights[..., columns:] @ bands.value
    out = out + weights[..., :columns] @ estimate.value
    out = out + low * (estimate.query @ probe.matrix(estimate.h_bar).mT)
    return out + g * (mid * estimate.mid_turned)


def log_sum_of(bands: Bands, c: Tensor) -> Tensor:
    """Logarithms (B, H, Q) of the softmax sums over all bands."""
    approximate = bands.estimate.logit + c[..., None, None] * bands.estimate.term
    return torch.cat([approximate, bands.exact], -1).logsumexp(-1)


def fit_probe(observed: Observed, estimate: Estimate) -> Probe:
    """Fit c, g and the update on queries whose exact attention is known; measure what is left.

    c makes the mean approximate mass unbiased (Newton on its logarithm), g is the least-squares
    factor of the first-order term, and the update is fitted to what g leaves (`fit_update`). Where
    the probes have nothing to fit them on (no mass that is approximated, a term that is rounding,
    values that are no numbers) c and g are 1, and the update is 0. The error is that of probes
    which the update has not seen. Source: docs/design/mathematics.md §5.
    """
    relative = estimate.logit - observed.log_total
    target = observed.missing_mass.sum((2, 3))
    fits = target > LEAST_MASS * observed.missing_mass.shape[2]
    c = torch.ones_like(target)
    for _ in range(NEWTON_STEPS):
        mass = (relative + c[..., None, None] * estimate.term).exp()
        total, slope = mass.sum((2, 3)), (mass * estimate.term).sum((2, 3))
        step = (total.clamp(min=1e-30) / target.clamp(min=1e-30)).log() * total
        usable = (slope > 1e-12) & fits
        c = torch.where(usable, c - step / slope.clamp(min=1e-12), c).clamp(0.0, C_MAX)
    mass = (relative + c[..., None, None] * estimate.term).exp()
    low = mass[..., : estimate.low_columns].sum(-1, keepdim=True)
    mid = mass[..., estimate.low_columns :].sum(-1, keepdim=True)
    # Of logits in the hundreds a probe may have next to nothing in any band, relative to its sum.
    total = (observed.exact_mass + low + mid).clamp(min=1e-30)
    plain = (observed.exact_out + mass @ estimate.value) / total
    turned = low / total * estimate.query
    terms = turned @ estimate.h_bar.mT
    correction = terms + mid / total * estimate.mid_turned
    truth = observed.exact_out + observed.missing_out
    energy = correction.square().sum((2, 3))
    aligned = ((truth - plain) * correction).sum((2, 3))
    whole = truth.square().sum((2, 3))
    fits = (energy > LEAST_CORRECTION * whole) & (energy > 1e-30) & aligned.isfinite()
    g = torch.where(fits, aligned / energy.clamp(min=1e-30), 1.0).clamp(0.0, G_MAX)
    left = truth - plain - g[..., None, None] * correction
    update, left = fit_update(turned, terms, estimate.h_bar, left, fits)
    error = (left.square().sum((2, 3)) / whole.clamp(min=1e-30)).sqrt()
    return Probe(c, g, error, update)


def fit_update(
    turned: Tensor, terms: Tensor, h_bar: Tensor, left: Tensor, fits: Tensor
) -> tuple[Tensor, Tensor]:
    """Ridge regression of what g leaves of the probes, in its dual form, drawn back.

    turned F (B, H, P, D): what the first-order matrix is multiplied with, low mass times scaled
    query; terms G = F H-bar^T; h_bar: H-bar (B, H, D, D); left R (B, H, P, D); fits
    (B, H): where g was fitted. With K = F F^T / tr + G G^T / tr and A = (K + ridge)^-1 R, the
    update is a A^T (F / tr + G H-bar / tr): a part of it is any matrix, a part H-bar times any.
    a is half of what suits predictions of each probe from all others best, between 0 and 1, and
    keeps the update within its bound.

    Returns the update (B, H, D, D) and what is left of each probe when it is predicted so. Source:
    docs/design/mathematics.md §5.
    """
    probes = left.shape[2]
    chosen = probe_positions(probes, RIDGE_PROBES, left.device)
    f, g, r = (x[:, :, chosen] for x in (turned, terms, left))
    of_f, of_g = (x.square().sum((2, 3), keepdim=True).clamp(min=1e-30) for x in (f, g))
    kernel = f @ f.mT / of_f + g @ g.mT / of_g
    # A whole inverse, as its diagonal predicts each probe from the others at once.
    ridge = RIDGE * torch.eye(len(chosen), device=kernel.device, dtype=kernel.dtype)
    inverse = torch.linalg.inv_ex(kernel + ridge).inverse
    weights = inverse @ r
    told = r - weights / inverse.diagonal(dim1=2, dim2=3)[..., None]
    aligned, energy = (r * told).sum((2, 3)), told.square().sum((2, 3))
    before = r.square().sum((2, 3))
    fits = fits & (g.square().sum((2, 3)) > LEAST_TERM * before) & (energy > LEAST_TOLD * before)
    factor = torch.where(fits & aligned.isfinite(), aligned / energy.clamp(min=1e-30), 0.0)
    own_terms = (kernel @ weights).square().sum((2, 3)).clamp(min=1e-30)
    most = UPDATE_MAX * (g.square().sum((2, 3)) / own_terms).sqrt()
    factor = UPDATE_SHARE * torch.minimum(factor.clamp(0.0, 1.0), most)[..., None, None]
    update = factor * (weights.mT @ (f / of_f + g @ h_bar / of_g))
    update = torch.where(factor > 0, update, 0.0)  # not 0 times what is no number
    after = left - turned @ update.mT
    after[:, :, chosen] = torch.where(factor > 0, r - factor * told, r)
    return update, after


def observe(bands: Bands, full_logits: Tensor) -> Observed:
    """Exact attention of queries (B, H, P, D) from their logits (B, H, P, T + X) to every key."""
    log_total = full_logits.logsumexp(-1, keepdim=True)
    exact = (bands.exact - log_total).exp()
    missing = torch.where(bands.exact.isinf(), (full_logits - log_total).exp(), 0.0)
    return Observed(
        log_total,
        exact.sum(-1, keepdim=True),
        exact @ bands.value,
        missing.sum(-1, keepdim=True),
        missing @ bands.value,
    )


def make_bands(
    query: Tensor,
    tile: Tensor,
    key: Tensor,
    value: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    text_bias: Tensor,
    route: Tensor,
    low: Summary,
    mid: Summary | None,
    scores: Scores,
    mean_square: Tensor,
    scale: float,
) -> Bands:
    """Lay out the three bands for queries (B, H, Q, D) whose tiles are `tile` (Q,).

    text_bias: (B, 1, 1, X), 0 or -inf. mean_square: (B, H, I, D), pooled over whole tiles.
    """
    pair = route[:, :, tile]
    token_pair = pair.repeat_interleave(KEY_BLOCK, -1)[..., : key.shape[2]]
    exact = (query @ key.mT * scale).masked_fill(token_pair != EXACT, -torch.inf)
    text = query @ text_key.mT * scale + text_bias
    approximate = query @ low.key_mean.mT * scale + low.counts.log()
    approximate = approximate.masked_fill(pair != LOW, -torch.inf)
    term, values = scores.mass_term[:, :, tile], low.value_mean
    mid_turned: Tensor | float = 0.0
    if mid is not None:
        fine_pair = pair.repeat_interleave(KEY_BLOCK // SUB_BLOCK, -1)[..., : mid.counts.numel()]
        fine = query @ mid.key_mean.mT * scale + mid.counts.log()
        fine = fine.masked_fill(fine_pair != MID, -torch.inf)
        spread = mean_square[:, :, tile] @ mid.key_var.mT * scale**2
        approximate = torch.cat([approximate, fine], -1)
        term = torch.cat([term, torch.minimum(0.5 * spread, mid.counts.log())], -1)
        values = torch.cat([values, mid.value_mean], 2)
        mid_turned = query @ mid.h_bar.mT * scale
    return Bands(
        exact=torch.cat([exact, text], -1),
        value=torch.cat([value, text_value], 2),
        estimate=Estimate(
            approximate, term, values, query * scale, low.h_bar, mid_turned, low.counts.numel()
        ),
    )


class Split(NamedTuple):
    """Result of the reference.

    out (B, H, Tq, D) in the queries' order, route (B, H, I, J), density (B, H), probe, and log_sum
    (B, H, Tq), the natural logarithms of the softmax sums over all bands.
    """

    out: Tensor
    route: Tensor
    density: Tensor
    probe: Probe
    log_sum: Tensor


def resolve_thresholds(
    score: Tensor, threshold: Tensor, density: float, mid_band: bool = False, *, own: bool = True
) -> tuple[Tensor, Tensor]:
    """Thresholds (B, H) of the exact and the mid band, from the heads' (H,) or from a density."""
    if density > 0.0:
        exact = threshold_for_density(score, density, own=own)
    else:
        exact = threshold.float().expand(score.shape[0], -1)
    return exact, exact * MID_RATIO if mid_band else exact


def split_tokens(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    text_bias: Tensor,
    threshold: Tensor,
    *,
    scale: float,
    density: float = 0.0,
    mid_band: bool = False,
    probes: int = 64,
    dtype: torch.dtype = torch.float32,
    own: bool = True,
) -> Split:
    """Frequency-split attention of queries (B, H, Tq, D), all in their orders, float32.

    threshold: (H,), used where density is 0. dtype: of the tensors that were attended, as in
    `score_pairs`. own: the queries are the keys' own tokens, in one order with them.
    """
    low = summarise(key, value, KEY_BLOCK)
    mid = summarise(key, value, SUB_BLOCK) if mid_band else None
    scores = score_pairs(query, low, scale, dtype)
    thresholds = resolve_thresholds(scores.score, threshold, density, mid_band, own=own)
    route = route_pairs(scores.score, *thresholds, own=own)
    mean_square = tile_mean_square(query)

    def bands_of(positions: Tensor) -> Bands:
        tile = positions // QUERY_TILE
        return make_bands(
            query[:, :, positions], tile, key, value, text_key, text_value, text_bias, route,
            low, mid, scores, mean_square, scale,
        )  # fmt: skip

    probe = Probe.unfitted(scores.score[..., 0, 0], query.shape[-1])
    if probes:
        chosen = probe_positions(query.shape[2], probes, query.device)
        with torch.no_grad():  # what is fitted is a constant to the gradient, like the route
            text = query[:, :, chosen] @ text_key.mT * scale + text_bias
            full = torch.cat([query[:, :, chosen] @ key.mT * scale, text], -1)
            bands = bands_of(chosen)
            probe = fit_probe(observe(bands, full), bands.estimate)
    everything = bands_of(torch.arange(query.shape[2], device=query.device))
    out = attend_bands(everything, probe)
    log_sum = log_sum_of(everything, probe.c)
    return Split(out, route, route_density(route), probe, log_sum)
