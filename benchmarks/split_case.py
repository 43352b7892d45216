"""One attention, routed, with everything known: what experiments on the definition start from.

Float32 on the reference's own functions, all queries at once, so it is for small sizes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.tensors import Attention
from freqopt.config import KEY_BLOCK
from freqopt.grid import token_order
from freqopt.kernels import reference as ref


class Case(NamedTuple):
    """An attention in token order at some density: (1, H, N, D) query and exact output `truth`,
    logits (1, H, N, N) of all pairs, and the bands that its queries attend to."""

    query: Tensor
    truth: Tensor
    logits: Tensor
    bands: ref.Bands
    scale: float

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.query.shape[2]

    def probe(self, positions: Tensor) -> ref.Probe:
        """What the op's probe fits and measures on the queries at `positions` (P,)."""
        bands, estimate = self.bands, self.bands.estimate
        part = estimate._replace(
            logit=estimate.logit[:, :, positions],
            term=estimate.term[:, :, positions],
            order=estimate.order[:, :, :, positions],
        )
        chosen = ref.Bands(bands.exact[:, :, positions], bands.value, part)
        return ref.fit_probe(ref.observe(chosen, self.logits[:, :, positions]), part)

    def attend(self, probe: ref.Probe) -> Tensor:
        """The split's output (1, H, N, D) with a probe's coefficients."""
        return ref.attend_bands(self.bands, probe.c, probe.g)

    def low_queries(self, probe: ref.Probe) -> Tensor:
        """(1, H, N, D): low-band mass times scaled query, which H-bar is multiplied with."""
        estimate = self.bands.estimate
        approximate = estimate.logit + probe.c[..., None, None] * estimate.term
        weights = torch.cat([approximate, self.bands.exact], -1).softmax(-1)
        low = weights[..., : approximate.shape[-1]].sum(-1, keepdim=True)
        return low * self.query * self.scale


def make_case(attention: Attention, density: float) -> Case:
    """Route an attention at a density per head, without mid band or text."""
    order = token_order(attention.grid, attention.query.device)
    query, key, value = (x[:, :, order].float() for x in attention[:3])
    scale = query.shape[-1] ** -0.5
    low = ref.summarise(key, value, KEY_BLOCK)
    scores = ref.score_pairs(query, low, scale)
    threshold = ref.threshold_for_density(scores.score, density)
    route = ref.route_pairs(scores.score, threshold, threshold)
    everything = torch.arange(query.shape[2])
    no_text, no_bias = query[:, :, :0], query.new_zeros(1, 1, 1, 0)
    bands = ref.make_bands(
        query, everything // ref.QUERY_TILE, key, value, no_text, no_text, no_bias,
        route, low, None, scores, ref.tile_mean_square(query), scale,
    )  # fmt: skip
    logits = query @ key.mT * scale
    return Case(query, logits.softmax(-1) @ value, logits, bands, scale)


def squared_errors(out: Tensor, truth: Tensor) -> Tensor:
    """Squared relative L2 error of each head of (1, H, N, D): (H,)."""
    return (out - truth).square().sum((0, 2, 3)) / truth.square().sum((0, 2, 3))
