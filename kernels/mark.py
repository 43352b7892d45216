"""`freqopt::mark`: an identity that carries an attention module's own budget into the graph.

Where one compiled graph serves many layers, budgets cannot be constants of the graph. The mark
brings them in as an operand; the passes hand it to the op and take the mark out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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


Given = tuple[tuple[Any, ...], dict[str, Any]]
"""What a module is called with: args and kwargs."""


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str | None:
    """Place or name of the tensor that a module's mark is put on; None where it is given none."""
    for index, item in enumerate(args):
        if isinstance(item, Tensor):
            return index
    for name, item in kwargs.items():
        if isinstance(item, Tensor):
            return name
    return None


def with_item(args: tuple[Any, ...], kwargs: dict[str, Any], at: int | str, item: Tensor) -> Given:
    """The same with another tensor at a place or name."""
    if isinstance(at, int):
        return (*args[:at], item, *args[at + 1 :]), kwargs
    return args, {**kwargs, at: item}
