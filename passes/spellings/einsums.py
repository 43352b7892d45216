"""Brings the einsums of attention into one order, (.., tokens, head_dim), while sites are found.

Written with einsum, attention often keeps (B, N, H, D): "bqhd,bkhd->bhqk" and "bhqk,bkhd->bqhd".
With their operands permuted these are the products that everybody knows. Einsums that are still
there in the end get their own equations back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import fx

from freqopt.passes.nodes import operation, shape, value
from freqopt.passes.rewrite.adding import add_method
from freqopt.passes.spellings.softmax import CASTS, einsum_operands
from freqopt.passes.spellings.softmax_by_hand import softmax_at

LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Form(NamedTuple):
    """An einsum in order: its equation, the operands' places and dimensions, the result's."""

    equation: str
    places: tuple[int, int]
    orders: tuple[list[int], list[int]]
    result: list[int]


class _Reordered(NamedTuple):
    node: fx.Node
    arguments: tuple[Any, ...]
    example: Any
    users: list[fx.Node]
    result: fx.Node


@contextmanager
def einsums_in_order(graph: fx.Graph) -> Iterator[None]:
    """Reorder the einsums of a graph for as long as sites are found and replaced."""
    changed = [made for node in list(graph.nodes) if (made := _reorder(node)) is not None]
    try:
        yield
    finally:
        for each in changed:
            _restore(each)


def _reorder(node: fx.Node) -> _Reordered | None:
    if node.op != "call_function" or operation(node) != "einsum":
        return None
    operands = einsum_operands(node)
    labels = _labels(node, operands)
    if labels is None:
        return None
    weights = [_is_softmax(operand) for operand in operands]
    form = mixing_form(*labels, weights.index(True)) if any(weights) else scores_form(*labels)
    if form is None:
        return None
    arguments, example, users = node.args, value(node), list(node.users)
    with node.graph.inserting_before(node):
        pair = [
            _permuted(node, operands[place], order)
            for place, order in zip(form.places, form.orders, strict=True)
        ]
    node.args = (form.equation, *pair)
    result, back = node, form.result
    if back != sorted(back):
        node.meta["example_value"] = example.permute([back.index(d) for d in range(len(back))])
        with node.graph.inserting_after(node):
            result = _permuted(node, node, back)
        for user in users:
            user.replace_input_with(node, result)
    return _Reordered(node, arguments, example, users, result)


def _restore(each: _Reordered) -> None:
    """Undo `_reorder` where its einsum is still in the graph; drop what nobody uses."""
    if each.node._erased:
        return
    operands = [a for a in each.node.args if isinstance(a, fx.Node)]
    if each.result is not each.node:
        each.result.replace_all_uses_with(each.node)
        each.node.graph.erase_node(each.result)
        each.node.meta["example_value"] = each.example
    each.node.args = each.arguments
    for node in operands:
        if not node.users and operation(node) == "permute":
            node.graph.erase_node(node)


def _is_softmax(node: fx.Node) -> bool:
    """Whether a tensor is the result of a softmax, cast or through dropout."""
    while operation(node) in CASTS or operation(node) == "dropout":
        if not (node.args and isinstance(node.args[0], fx.Node)):
            return False
        node = node.args[0]
    return softmax_at(node) is not None


def _permuted(near: fx.Node, node: fx.Node, order: Sequence[int]) -> fx.Node:
    """A permutation of a tensor, or the tensor itself where it is in order."""
    if list(order) == sorted(order):
        return node
    return add_method(near.meta, "permute", node, *order)


def _labels(node: fx.Node, operands: Sequence[Any]) -> tuple[str, str, str] | None:
    """Labels of both operands and the result of an einsum, an ellipsis spelled out."""
    if len(operands) != 2 or not all(isinstance(o, fx.Node) for o in operands):
        return None
    left, arrow, right = str(node.args[0]).replace(" ", "").partition("->")
    first, comma, second = left.partition(",")
    if not arrow or not comma:
        return None
    free = [letter for letter in LETTERS if letter not in left + right]
    dots = max(
        len(shape(o)) - len(part.replace("...", ""))
        for o, part in ((operands[0], first), (operands[1], second))
    )
    if dots > len(free):
        return None
    spelled = "".join(free[:dots])
    parts = [part.replace("...", spelled) for part in (first, second, right)]
    sizes = [len(shape(node)) for node in (*operands, node)]
    repeated = any(len(set(part)) < len(part) for part in parts)
    if repeated or [len(part) for part in parts] != sizes or sizes[2] not in (3, 4):
        return None
    return parts[0], parts[1], parts[2]


def scores_form(first: str, second: str, result: str) -> Form | None:
    """q @ k^T: the result ends in the tokens of the query and those of the key."""
    batch, query, key = result[:-2], result[-2], result[-1]
    depth = set(first) & set(second) - set(result)
    if len(depth) != 1:
        return None
    (d,) = depth
    places = (0, 1) if query in first else (1, 0)
    pair = ((first, second)[place] for place in places)
    wanted = (f"{batch}{query}{d}", f"{batch}{key}{d}")
    return _form(tuple(pair), wanted, places, result, result)


def mixing_form(first: str, second: str, result: str, place: int) -> Form | None:
    """Weights @ v: the weights, operand `place`, end in the key's tokens, which are summed over."""
    summed = set(first) & set(second) - set(result)
    if len(summed) != 1:
        return None
    (key,) = summed
    places = (place, 1 - place)
    weights, values = ((first, second)[p] for p in places)
    depth = set(values) - set(weights)
    if len(depth) != 1 or not weights.endswith(key):
        return None
    (d,) = depth
    batch, query = weights[:-2], weights[-2]
    wanted = (weights, f"{batch}{key}{d}")
    return _form((weights, values), wanted, places, f"{batch}{query}{d}", result)


def _form(
    given: tuple[str, ...],
    wanted: tuple[str, str],
    places: tuple[int, int],
    ordered: str,
    result: str,
) -> Form | None:
    pairs = tuple(zip((*given, ordered), (*wanted, result), strict=True))
    if any(sorted(have) != sorted(want) for have, want in pairs):
        return None
    first, second, last = ([have.index(label) for label in want] for have, want in pairs)
    return Form(f"{wanted[0]},{wanted[1]}->{ordered}", places, (first, second), last)
