"""Masks that are added to the scores, or filled into them, as the bool masks that they stand for.

`scores.masked_fill(hidden, -inf)`, `where(shown, scores, -inf)`, and the same of zeros that are
then added: what a very low number is put in the place of has no weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from freqopt.passes.axes.dimensions import same
from freqopt.passes.masks.masks import adds_dimensions
from freqopt.passes.masks.memory import is_written
from freqopt.passes.nodes import argument, constant, operation, shape, tensor
from freqopt.passes.rewrite.adding import add_function, add_method
from freqopt.passes.site import Attention

LOW = -1e4
"""Scores that low have no weight beside any other: models write -10,000 where they have float16."""

ADDED = "freqopt_shown"
"""Marks nodes that stand beside others for a mask as bools."""

CASTS = frozenset(["to", "type_as", "float", "half", "bfloat16", "contiguous", "clone"])
FORMS = frozenset(["unsqueeze", "expand", "view", "reshape"])
"""Operations between a mask that was filled and what adds it: they do not change the last axis."""


def shown_by(attention: Attention) -> fx.Node | None:
    """The bool mask, True = attend, that attention's mask of numbers stands for; None if for none.

    It has four dimensions, and is computed beside the other, which nothing else changes. Where
    the scores themselves were filled they stand for the mask, and are among the attention's nodes.
    A mask that is added has to be zeros where it is not filled: what else it has is a bias.
    """
    mask = attention.mask
    found = None if mask is None else tensor(mask)
    if mask is None or found is None or found.dtype == torch.bool:
        return None
    if mask in attention.nodes:
        return _in_form(_of_filled(mask, lambda item: True), mask, mask)
    node, forms = mask, list[fx.Node]()
    while not is_written(node) and (operation(node) in CASTS or _is_form(node)):
        if _is_form(node):
            forms.insert(0, node)
        node = node.args[0]  # type: ignore[assignment]
    if is_written(node):
        return None
    return _in_form(_of_filled(node, _is_zeros), node, mask, forms)


def _in_form(
    shown: fx.Node | None, filled: fx.Node, mask: fx.Node, forms: Sequence[fx.Node] = ()
) -> fx.Node | None:
    """A bool mask of what was filled, in the form that the mask has."""
    if shown is None or len(shape(mask)) != 4 or len(shape(shown)) > len(shape(filled)):
        return None
    with mask.graph.inserting_before(mask):
        if forms:
            shown = _as_wide(shown, len(shape(filled)), mask.meta)
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


def _of_filled(node: fx.Node, leaves: Callable[[Any], bool]) -> fx.Node | None:
    """What `masked_fill`, or `where`, leaves. leaves: whether that is what it has to be."""
    if operation(node) == "masked_fill":
        hidden = argument(node, 1, "mask")
        low = _is_low(argument(node, 2, "value")) and leaves(argument(node, 0, "input", "self"))
        return _complement(hidden, node) if low and isinstance(hidden, fx.Node) else None
    if operation(node) != "where" or len(node.args) != 3:
        return None
    chosen, yes, no = node.args
    if not isinstance(chosen, fx.Node):
        return None
    if _is_low(no) and leaves(yes):
        return chosen
    return _complement(chosen, node) if _is_low(yes) and leaves(no) else None


def _is_zeros(item: Any) -> bool:
    if isinstance(item, (int, float)):
        return item == 0
    zeros = ("zeros", "zeros_like", "new_zeros")
    return isinstance(item, fx.Node) and operation(item) in zeros and not is_written(item)


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
