"""Gradients of dense attention under a mask, for calls of the op that are dense.

dV = P^T dO, dS = P * (dP - rowsum(dP * P)) with dP = dO V^T, dQ = s dS K, dK = s dS^T Q, as in
FlashAttention (arXiv:2205.14135), appendix B.2, some queries at a time. Such calls are rare, and
nothing here is tuned.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 1024
"""Queries that are looked at together; all pairs of them may be gigabytes."""


def dense_gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query (B, H, N, D), key and value (B, G, M, D), in their dtypes.

    grad: of the output, (B, H, N, D). mask: (B or 1, H or 1, N or 1, M) bool, True where a pair is
    attended; a query that sees nothing has a gradient of 0. H is a multiple of G.
    """
    groups = query.shape[1] // key.shape[1]
    keys, values = (x.float().repeat_interleave(groups, 1) for x in (key, value))
    grad_query = torch.empty_like(query, dtype=torch.float32)
    grad_key, grad_value = torch.zeros_like(keys), torch.zeros_like(values)
    for start in range(0, query.shape[2], ROWS):
        rows = slice(start, start + ROWS)
        queries, above = query[:, :, rows].float(), grad[:, :, rows].float()
        weights = _weights(queries @ keys.mT * scale, mask, rows)
        grad_value += weights.mT @ above
        of_weights = above @ values.mT
        of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True))
        grad_query[:, :, rows] = of_scores @ keys * scale
        grad_key += of_scores.mT @ queries * scale
    grads = (x.unflatten(1, (-1, groups)).sum(2) for x in (grad_key, grad_value))
    of_key, of_value = (g.to(x.dtype) for g, x in zip(grads, (key, value), strict=True))
    return grad_query.to(query.dtype), of_key, of_value


def _weights(scores: Tensor, mask: Tensor, rows: slice) -> Tensor:
    """The softmax of some queries' scores; zeros for those that see nothing."""
    shown = mask if mask.shape[2] == 1 else mask[:, :, rows]
    return scores.masked_fill(~shown, -torch.inf).softmax(-1).nan_to_num(0.0)
