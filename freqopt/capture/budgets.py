"""Budgets on the modules of a model: where they are, and which one of a table a timestep selects.

A layer is known by the budget that it brings, as an object. Calls that gradients may be asked of
bring one of their own each, as the backward pass may read it when other calls have been made since;
it stands for the one that the layer is known by.
"""

from __future__ import annotations

import torch
from torch import Tensor

BUDGET = "freqopt_budget"
"""Attribute of a module for the budget of its first attention; of others with their number."""

STANDS_FOR = "freqopt_stands_for"
"""Attribute of a budget that is of one call alone: the one that its layer is known by."""


def attribute_of(nth: int) -> str:
    """The attribute of a module that holds the budget (2, H) of its nth attention."""
    return f"{BUDGET}_{nth}" if nth else BUDGET


def known_by(budget: Tensor) -> Tensor:
    """The budget that a layer is known by, of the one that it brings in a call."""
    found: Tensor = budget.__dict__.get(STANDS_FOR, budget)
    return found


def standing_for(known: Tensor, fresh: Tensor) -> Tensor:
    """`fresh`, which a layer brings in one call, marked as such."""
    fresh.__dict__[STANDS_FOR] = known
    return fresh


def budget_at(table: Tensor, edges: Tensor, timestep: Tensor) -> Tensor:
    """Row of a table (buckets, n) at a timestep; eager twin of `passes.timestep.select_budgets`.

    edges: (buckets - 1,) ascending. timestep: () or (B,) or (B, ...): the mean of each batch item
    decides its bucket, and the smallest entries over the items are taken.
    """
    return table.index_select(0, buckets_at(edges, timestep)).amin(0)


def buckets_at(edges: Tensor, timestep: Tensor) -> Tensor:
    """(B,) the bucket of each batch item; see `budget_at`."""
    times = timestep.to(torch.float32)
    if times.dim() > 1:
        times = times.flatten(1).mean(1)
    return (times.reshape(-1, 1) > edges).sum(-1)
