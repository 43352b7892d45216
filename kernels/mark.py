"""`freqopt::mark`: an identity that carries an attention module's own budget into the graph.

Where one compiled graph serves many layers, budgets cannot be constants of the graph. The mark
brings them in as an operand; the passes hand it to the op and take the mark out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_library = torch.library.Library("freqopt", "FRAGMENT")
_library.define(
    "mark(Tensor(a) x, Tensor budget, int[] layouts, int nth, int largest_chunk) -> Tensor(a)"
)


def _identity(
    x: Tensor, budget: Tensor, layouts: Sequence[int], nth: int, largest_chunk: int
) -> Tensor:
    return x.view_as(x)


_library.impl("mark", _identity, "CompositeImplicitAutograd")


def mark(x: Tensor, budget: Tensor, layouts: Sequence[int], nth: int, largest_chunk: int) -> Tensor:
    """`x` itself; in a graph also the budget (2, H) of the nth attention of its module.

    layouts: how its tokens lie, as `freqopt.passes.marks.numbers_of` writes it.
    """
    marked: Tensor = torch.ops.freqopt.mark.default(x, budget, layouts, nth, largest_chunk)
    return marked
