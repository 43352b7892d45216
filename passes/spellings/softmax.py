"""Attention written out by hand, anchored on its softmax.

Walks back from the softmax through scaling, casts and masks to the product of queries and keys, and
on through casts and idle dropout to the product with the values. What the walk does not recognise
is not attention: softmax over other axes, scores without values, gates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from freqopt.passes.axes.dimensions import same
from freqopt.passes.masks.memory import is_written_between, writers
from freqopt.passes.masks.writes import is_idle, written_by
from freqopt.passes.nodes import (
    argument,
    constant,
    is_pointwise,
    operation,
    shape,
    tensor,
)
from freqopt.passes.reasons import Reason, Why
from freqopt.passes.site import Attention
from freqopt.passes.spellings.softmax_by_hand import Softmax, shifted, softmax_at

CASTS = frozenset(["to", "type", "type_as", "float", "half", "bfloat16", "contiguous", "clone"])
LONGER = frozenset(["cat", "pad", "constant_pad_nd"])
PARTS = frozenset(["getitem", "narrow", "slice"])
PRODUCTS = frozenset(["matmul", "bmm", "baddbmm", "einsum"])


@dataclass(frozen=True)
class Logits:
    """Walked back: factor * query @ key^T (+ mask); key is (.., D, N) if `transposed`.

    readers: the nodes that read query and key, at which time their entries count. objection: what
    else happens to the scores, on account of which they are not those of attention.
    """

    query: fx.Node
    key: fx.Node
    transposed: bool
    factor: float
    mask: fx.Node | None
    nodes: tuple[fx.Node, ...]
    readers: tuple[fx.Node, fx.Node]
    objection: Why | None = None


def match_softmax(node: fx.Node) -> Attention | None:
    """softmax(factor * q @ k^T + mask) @ v, or None if this softmax is something else."""
    if len(shape(node)) not in (3, 4) or (softmax := softmax_at(node)) is None:
        return None
    weights = follow_weights(softmax)
    if weights is None:
        return None
    product, values, between, objection = weights
    walked = walk_logits(softmax.scores)
    if walked is None or not _fit(walked, values, product):
        return None
    unlike = None
    if walked.mask is not None and softmax.factor != 1:
        unlike = Reason.SCORES_CHANGED(operation="exp2")
    last = () if softmax.divided is None else (softmax.divided,)
    nodes = (*reversed(walked.nodes), *softmax.nodes, *between, product, *last)
    if objection is None and _is_read_elsewhere(nodes):
        objection = Reason.SCORES_USED()
    operands = (
        (walked.query, walked.readers[0]),
        (walked.key, walked.readers[1]),
        (values, product),
    )
    if objection is None and any(is_written_between(*each, nodes[-1]) for each in operands):
        objection = Reason.OVERWRITTEN()
    return Attention(
        node=softmax.divided or product,
        query=walked.query,
        key=walked.key,
        value=values,
        mask=walked.mask,
        scale=walked.factor * softmax.factor,
        objection=softmax.objection or objection or walked.objection or unlike,
        nodes=nodes,
        key_transposed=walked.transposed,
    )


def _is_read_elsewhere(nodes: Sequence[fx.Node]) -> bool:
    """Whether tensors on the way to the last of some nodes are read, or written, by others too."""
    users = (user for node in nodes[:-1] for user in node.users)
    if any(tensor(user) is not None and user not in nodes and not is_idle(user) for user in users):
        return True
    return any(writer not in nodes for node in nodes[:-1] for writer in writers(node))


def _fit(walked: Logits, values: fx.Node, product: fx.Node) -> bool:
    """Whether the shapes are those of attention: one head dim, as many values as keys."""
    query, key, value_ = shape(walked.query), shape(walked.key), shape(values)
    if not len(query) == len(key) == len(value_) == len(shape(product)):
        return False
    if walked.transposed:
        key = (*key[:-2], key[-1], key[-2])
    return same(query[-1], key[-1]) and same(key[-1], value_[-1]) and same(key[-2], value_[-2])


def follow_weights(
    softmax: Softmax,
) -> tuple[fx.Node, fx.Node, tuple[fx.Node, ...], Why | None] | None:
    """Follow attention weights to their product with the values.

    Returns the product, the values, the nodes between, and what forbids cutting them out.
    """
    node = softmax.weights
    objection: Why | None = None
    between: list[fx.Node] = []
    while True:
        product = next((u for u in node.users if values_of(u, node) is not None), None)
        others = [
            u for u in node.users if u is not product and u not in softmax.nodes and not is_idle(u)
        ]
        if product is not None:
            values = values_of(product, node)
            assert values is not None
            return product, values, tuple(between), Reason.WEIGHTS_USED() if others else objection
        steps = [u for u in others if operation(u) in CASTS or operation(u) == "dropout"]
        if not steps and objection is None:
            steps = [u for u in others if _changes(u)]
            objection = Reason.WEIGHTS_CHANGED(operation=operation(steps[0])) if steps else None
        if len(steps) != 1:
            return None
        if len(others) > 1:
            objection = Reason.WEIGHTS_USED()
        node = steps[0]
        between.append(node)
        if operation(node) == "dropout" and _drops(node):
            objection = Reason.DROPOUT(sign="training")


def _changes(node: fx.Node) -> bool:
    """Whether weights go through a node as weights: gated, say, or without those of a sink."""
    name = operation(node)
    return len(shape(node)) > 2 and (name in PARTS or is_pointwise(name))


def _drops(node: fx.Node) -> bool:
    probability = constant(argument(node, 1, "p", default=0.5))
    if isinstance(probability, (int, float)) and not probability:
        return False
    return bool(argument(node, 2, "training", "train", default=True))


def values_of(user: fx.Node, weights: fx.Node) -> fx.Node | None:
    """The values, if `user` is the product of `weights` with them."""
    name = operation(user)
    if name in ("matmul", "bmm"):
        first, second = argument(user, 0, "input", "self"), argument(user, 1, "other", "mat2")
        found = second if first is weights else None
    elif name == "einsum":
        operands = einsum_operands(user)
        forms = (("abcd", "abde", "abce"), ("abc", "acd", "abd"))
        fits = len(operands) == 2 and operands[0] is weights and einsum_labels(user) in forms
        found = operands[1] if fits else None
    else:
        return None
    return found if isinstance(found, fx.Node) else None


def einsum_operands(node: fx.Node) -> list[Any]:
    """Operands given one by one or as one list."""
    rest = list(node.args[1:])
    return list(rest[0]) if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else rest


def einsum_labels(node: fx.Node) -> tuple[str, str, str] | None:
    """Labels of a two-operand einsum, renamed in order of appearance so that spellings compare."""
    left, _, right = str(node.args[0]).replace(" ", "").partition("->")
    if left.count(",") != 1 or "." in left:
        return None
    first, second = left.split(",")
    names = {label: chr(ord("a") + i) for i, label in enumerate(dict.fromkeys(first + second))}
    a, b, c = (
        "".join(names.get(label, "?") for label in labels) for labels in (first, second, right)
    )
    return a, b, c


def walk_logits(node: Any) -> Logits | None:
    """Walk back from a softmax's input to queries and keys; None if it is no scaled product."""
    if not isinstance(node, fx.Node):
        return None
    name = operation(node)
    if name in CASTS:
        return _through(node, walk_logits(node.args[0]))
    if name in ("mul", "div") and (scaled := scaled_by(node)) is not None:
        source, factor = scaled
        inner = walk_logits(source)
        if inner is None:
            return None
        scaled_mask = None if inner.mask is None else Reason.SCORES_CHANGED(operation=name)
        inner = replace(inner, objection=inner.objection or scaled_mask)
        return _through(node, replace(inner, factor=inner.factor * factor))
    if (still := _moved_by_number(node)) is not None:
        return _through(node, walk_logits(still))
    if (difference := shifted(node)) is not None:
        scores, made = difference
        inner = walk_logits(scores)
        return None if inner is None else replace(inner, nodes=(node, *made[::-1], *inner.nodes))
    if name == "add":
        weighed = node.kwargs.get("alpha", 1) != 1
        return _altered(node) if weighed else _masked_sum(node)
    if name in ("masked_fill", "where"):
        return _filled(node)
    if name in ("matmul", "bmm"):
        second = argument(node, 1, "other", "mat2")
        return _product(node, argument(node, 0, "input", "self"), second, 1.0)
    if name == "baddbmm":
        return _product_and_sum(node)
    if name == "einsum":
        operands = einsum_operands(node)
        forms = (("abcd", "abed", "abce"), ("abc", "adc", "abd"))
        if einsum_labels(node) not in forms or not all(isinstance(o, fx.Node) for o in operands):
            return None
        query, first, query_reader = unscaled(operands[0], node)
        key, second, key_reader = unscaled(operands[1], node)
        readers = query_reader, key_reader
        return Logits(query, key, False, first * second, None, (node,), readers)
    return _altered(node) if is_pointwise(name) or name in LONGER else None


def _moved_by_number(node: fx.Node) -> fx.Node | None:
    """The scores, where one number is added to all, or subtracted: no softmax knows of it."""
    if operation(node) not in ("add", "sub") or len(node.args) != 2:
        return None
    first, second = node.args
    if isinstance(first, fx.Node) and _is_finite(second):
        return first if _is_finite(node.kwargs.get("alpha", 1)) else None
    if operation(node) == "add" and not node.kwargs and _is_finite(first):
        return second if isinstance(second, fx.Node) else None
    return None


def _is_finite(item: Any) -> bool:
    number = constant(item)
    return isinstance(number, (int, float)) and math.isfinite(number)


def _altered(node: fx.Node) -> Logits | None:
    """Logits that go through something else, such as tanh, a learned temperature or a sink."""
    for source in node.all_input_nodes:
        same_form = len(shape(source)) == len(shape(node))
        inner = walk_logits(source) if same_form and not _alters(source) else None
        if inner is not None and inner.objection is None:
            why = Reason.SCORES_CHANGED(operation=operation(node))
            return _through(node, replace(inner, objection=why))
    return None


def _alters(node: fx.Node) -> bool:
    """Whether a node would be altered itself; one such step is followed, not chains of them."""
    known = (*CASTS, "mul", "div", "add", "masked_fill", "where")
    return is_pointwise(operation(node)) and operation(node) not in known


def _through(node: fx.Node, inner: Logits | None) -> Logits | None:
    return None if inner is None else replace(inner, nodes=(node, *inner.nodes))


def _masked_sum(node: fx.Node) -> Logits | None:
    """Logits plus a mask, in either order."""
    pair = [a for a in node.args[:2] if isinstance(a, fx.Node)]
    if len(pair) != 2:
        return None
    for logits, mask in (pair, pair[::-1]):
        inner = walk_logits(logits)
        if inner is not None and inner.mask is None:
            return _through(node, replace(inner, mask=mask))
    return None


def _filled(node: fx.Node) -> Logits | None:
    """Logits filled where a mask says so: the filled tensor itself stands for the mask."""
    positions = (0,) if operation(node) == "masked_fill" else (1, 2)
    for position in positions:
        inner = walk_logits(argument(node, position, "input", "self"))
        if inner is not None:
            twice = None
            if inner.mask is not None:
                twice = Reason.SCORES_CHANGED(operation=operation(node))
            filled = replace(inner, mask=inner.mask or node, objection=inner.objection or twice)
            return _through(node, filled)
    return None


def scaled_by(node: fx.Node) -> tuple[fx.Node, float] | None:
    """The tensor and the constant of a product with, or quotient by, a number.

    None where it is rounded, which no factor is.
    """
    if node.kwargs.get("rounding_mode") is not None:
        return None
    first, second = node.args[0], node.args[1] if len(node.args) > 1 else node.kwargs.get("other")
    numbers = constant(first), constant(second)
    if isinstance(first, fx.Node) and isinstance(numbers[1], (int, float)):
        if operation(node) == "div":
            return (first, 1.0 / numbers[1]) if numbers[1] else None
        return first, float(numbers[1])
    if (
        isinstance(second, fx.Node)
        and isinstance(numbers[0], (int, float))
        and operation(node) == "mul"
    ):
        return second, float(numbers[0])
    return None


def unscaled(node: fx.Node, reader: fx.Node) -> tuple[fx.Node, float, fx.Node]:
    """A tensor before it was multiplied by numbers, their product, and the node that reads it.

    One that was multiplied in place is no longer there. reader: of the tensor itself.
    """
    factor = 1.0
    while operation(node) in ("mul", "div") and not written_by(node):
        scaled = scaled_by(node)
        if scaled is None:
            break
        reader, (node, number) = node, scaled
        factor *= number
    return node, factor, reader


def _product(node: fx.Node, query: Any, key: Any, factor: float) -> Logits | None:
    """q @ k^T, either operand scaled before or after the transposition."""
    if not (isinstance(query, fx.Node) and isinstance(key, fx.Node)):
        return None
    query, first, query_reader = unscaled(query, node)
    key, second, key_reader = unscaled(key, node)
    upright = untransposed(key)
    factor *= first * second
    if upright is None:
        return Logits(query, key, True, factor, None, (node,), (query_reader, key_reader))
    upright, third, key_reader = unscaled(upright, key_reader)
    readers = query_reader, key_reader
    return Logits(query, upright, False, factor * third, None, (node,), readers)


def _product_and_sum(node: fx.Node) -> Logits | None:
    """`baddbmm`: a product alone, or on top of a mask."""
    beta, alpha = argument(node, 3, "beta", default=1), argument(node, 4, "alpha", default=1)
    operands = argument(node, 1, "batch1"), argument(node, 2, "batch2")
    factor = constant(alpha)
    if not isinstance(factor, (int, float)):  # of a size, say
        return None
    inner, added = _product(node, *operands, float(factor)), argument(node, 0, "input")
    if inner is None or not beta:
        return inner
    return replace(inner, mask=added) if beta == 1 and isinstance(added, fx.Node) else None


def untransposed(node: fx.Node) -> fx.Node | None:
    """The tensor whose last two dimensions `node` exchanges, None if it does something else."""
    dims = len(shape(node))
    name = operation(node)
    if name == "transpose":
        pair = (argument(node, 1, "dim0"), argument(node, 2, "dim1"))
        if not all(isinstance(a, int) for a in pair):
            return None
        if sorted(a % dims for a in pair) != [dims - 2, dims - 1]:
            return None
    elif name == "permute":
        order = node.args[1:]
        order = tuple(order[0]) if order and isinstance(order[0], (tuple, list)) else order
        given = [o % dims if isinstance(o, int) else -1 for o in order]
        if given != [*range(dims - 2), dims - 1, dims - 2]:
            return None
    elif name != "mT":
        return None
    source = node.args[0]
    return source if isinstance(source, fx.Node) else None
