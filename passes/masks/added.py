"""Masks that are added to the scores, or filled into them, as the bool masks that they stand for.

`scores.masked_fill(hidden, -inf)`, `where(shown, scores, -inf)`, and the same of zeros that are
then added: what a very low number is put in the place of has no weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from freqopt.passes.axes.dimensions import same
from freqopt.passes.masks.masks import adds_dimensions
from freqopt.passes.masks.memory import is_written
from freqopt.passes.nodes import argument, constant, operation, shape, tensor
from freqopt.passes.rewrite.adding import add_function, add_method

LOW = -1e4
"""Scores that low have no weight beside any other: models write -10,000 where they have float16."""

ADDED = "freqopt_shown"
"""Marks nodes that stand beside others for a mask as bools."""

CASTS = frozenset(["to", "type_as", "float", "half", "bfloat16", "contiguous", "clone"])
FORMS = frozenset(["unsqueeze", "expand", "view", "reshape"])
"""Operations between a mask that was filled and what adds it: they do not change the last axis."""


def shown_by(mask: fx.Node) -> fx.Node | None:
    """The bool mask, True = attend, that scores or a mask of numbers stand for; None if for none.

    It has four dimensions, and is computed beside the other, which nothing else changes.
    """
    found = tensor(mask)
    if found is None or found.dtype == torch.bool:
        return None
    node, forms = mask, list[fx.Node]()
    while not is_written(node) and (operation(node) in CASTS or _is_form(node)):
        if _is_form(node):
            forms.insert(0, node)
        node = node.args[0]  # type: ignore[assignment]
    if is_written(node) or (node is not mask and operation(node) not in ("masked_fill", "where")):
        return None
    shown = _of_fill(node) if operation(node) == "masked_fill" else _of_choice(node)
    if shown is None or len(shape(mask)) != 4 or len(shape(shown)) > len(shape(node)):
        return None
    with mask.graph.inserting_before(mask):
        if forms:
            shown = _as_wide(shown, len(shape(node)), mask.meta)
        for form in forms:
            add = add_method if form.op == "call_method" else add_function
            shown = add(mask.meta, form.target, shown, *form.args[1:])  # type: ignore[arg-type]
        return _as_wide(shown, len(shape(mask)), mask.meta)


def _is_form(node: fx.Node) -> bool:
    """Whether a node gives a mask other dimensions, its last axis being the same."""
    if not node.args or not isinstance(node.args[0], fx.Node) or node.kwargs:
        return False
    kept = operation(node) in FORMS or adds_dimensions(node)
    before, after = shape(node.args[0]), shape(node)
    return kept and bool(before) and bool(after) and same(before[-1], after[-1])


def _as_wide(mask: fx.Node, dims: int, meta: Mapping[str, Any]) -> fx.Node:
    """A mask with as many dimensions, new ones in front."""
    while len(shape(mask)) < dims:
        mask = add_method(meta, "unsqueeze", mask, 0)
    return mask


def _of_fill(node: fx.Node) -> fx.Node | None:
    """What `masked_fill` leaves."""
    hidden = argument(node, 1, "mask")
    if not _is_low(argument(node, 2, "value")) or not _leaves(argument(node, 0, "input", "self")):
        return None
    return _complement(hidden, node) if isinstance(hidden, fx.Node) else None


def _of_choice(node: fx.Node) -> fx.Node | None:
    """What `where` leaves."""
    if operation(node) != "where" or len(node.args) != 3:
        return None
    chosen, yes, no = node.args
    if not isinstance(chosen, fx.Node):
        return None
    if _is_low(no) and _leaves(yes):
        return chosen
    return _complement(chosen, node) if _is_low(yes) and _leaves(no) else None


def _leaves(item: Any) -> bool:
    """Whether what is not filled are zeros, or scores: not another mask of numbers."""
    if isinstance(item, (int, float)):
        return item == 0
    zeros = ("zeros", "zeros_like", "new_zeros")
    return isinstance(item, fx.Node) and (operation(item) in zeros or _has_pairs(item))


def _has_pairs(node: fx.Node) -> bool:
    """Whether a tensor has an entry for each query, as scores do and a mask over keys does not."""
    sizes = shape(node)
    return len(sizes) > 2 and not (isinstance(sizes[-2], int) and sizes[-2] == 1)


def _is_low(item: Any) -> bool:
    number = constant(item)
    return isinstance(number, (int, float)) and number <= LOW


def _complement(hidden: fx.Node, before: fx.Node) -> fx.Node | None:
    """True where a bool mask is False: what it was made of, or a node before another."""
    found = tensor(hidden)
    if found is None or found.dtype != torch.bool:
        return None
    source = hidden.args[0] if hidden.args else None
    given = tensor(source)
    if given is not None and isinstance(source, fx.Node) and not is_written(hidden):
        if operation(hidden) in ("logical_not", "bitwise_not") and given.dtype == torch.bool:
            return source
        if operation(hidden) == "eq" and len(hidden.args) == 2 and constant(hidden.args[1]) == 0:
            return _before(before, source, "bool")
    return _before(before, hidden, "logical_not")


def _before(place: fx.Node, mask: fx.Node, method: str) -> fx.Node:
    """A method of a mask; the one that is there already, if the passes have looked before."""
    for user in mask.users:
        if user.op == "call_method" and user.target == method and ADDED in user.meta:
            return user
    with place.graph.inserting_before(place):
        made = add_method(place.meta, method, mask)
    made.meta[ADDED] = True
    return made
