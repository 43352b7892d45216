"""Softmax that was written out: exp(x - max) / sum, before or after the product with the values.

To the base 2 as well, as kernels write it. Where something is added to the sum, as for a sink that
takes a part of every row, it is known for attention and left alone.

What is subtracted from a row of scores makes no difference to its softmax, whatever it is; models
take the row's largest score for the sake of numbers, which fused attention does as well.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import fx

from freqopt.passes.axes.dimensions import same
from freqopt.passes.nodes import argument, operation, shape
from freqopt.passes.reasons import Reason, Why


class Softmax(NamedTuple):
    """A softmax over keys: its scores, the node of its weights, and the nodes that make these.

    divided: the node that divides the product with the values instead, if the weights do not add
    up to 1 yet. factor: of the scores. objection: what forbids cutting it out.
    """

    scores: Any
    weights: fx.Node
    nodes: tuple[fx.Node, ...]
    divided: fx.Node | None = None
    factor: float = 1.0
    objection: Why | None = None


BASES = {"exp": 1.0, "exp2": math.log(2)}
"""Exponentials, and the factor of the scores that makes them ones to the base e."""


def softmax_at(node: fx.Node) -> Softmax | None:
    """The softmax over the last axis that ends in `node`, None if it is something else."""
    name = operation(node)
    if name == "softmax":
        axis = argument(node, 1, "dim", default=-1)
        last = axis in (-1, len(shape(node)) - 1)
        return Softmax(argument(node, 0, "input", "self"), node, (node,)) if last else None
    if name == "div" and len(node.args) == 2 and node.kwargs.get("rounding_mode") is None:
        return _quotient(node)
    if name == "exp" and node.args:
        return _of_log_sum(node)
    return None


def _quotient(node: fx.Node) -> Softmax | None:
    """exp(x) / exp(x).sum(-1, keepdim=True), or (exp(x) @ v) / that sum."""
    above, below = node.args
    if not (isinstance(above, fx.Node) and isinstance(below, fx.Node)):
        return None
    added, objection = None, None
    if operation(below) == "add":
        added, objection = below, Reason.WEIGHTS_CHANGED(operation="add")
        sums = [t for t in below.all_input_nodes if operation(t) == "sum" and reduces_rows(t)]
        below = sums[0] if sums else below
    if operation(below) != "sum" or not reduces_rows(below):
        return None
    exponential = argument(below, 0, "input", "self")
    if not isinstance(exponential, fx.Node) or operation(exponential) not in BASES:
        return None
    scores, factor = exponential.args[0], BASES[operation(exponential)]
    made = (exponential, below) if added is None else (exponential, below, added)
    if above is exponential:
        return Softmax(scores, node, (*made, node), None, factor, objection)
    if operation(above) in ("matmul", "bmm") and above.args[0] is exponential:
        if set(above.users) == {node}:
            return Softmax(scores, exponential, made, node, factor, objection)
    return None


def _of_log_sum(node: fx.Node) -> Softmax | None:
    """exp(x - x.logsumexp(-1, keepdim=True))."""
    difference = node.args[0]
    if not isinstance(difference, fx.Node) or operation(difference) != "sub":
        return None
    if len(difference.args) != 2 or difference.kwargs.get("alpha", 1) != 1:
        return None
    scores, total = difference.args
    if not isinstance(total, fx.Node) or operation(total) != "logsumexp":
        return None
    if argument(total, 0, "input", "self") is not scores or not reduces_rows(total):
        return None
    return Softmax(scores, node, (total, difference, node))


def reduces_rows(node: fx.Node) -> bool:
    """Whether a reduction is over the last axis, which it keeps with one entry."""
    before, after = shape(argument(node, 0, "input", "self")), shape(node)
    dim = argument(node, 1, "dim", "axis")
    dims = list(dim) if isinstance(dim, (tuple, list)) else [dim]
    return len(before) == len(after) and dims in ([-1], [len(before) - 1])


def shifted(node: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]] | None:
    """The scores of `scores - shift`, where the shift is one number per row, and how it is made."""
    if operation(node) != "sub" or len(node.args) != 2 or node.kwargs.get("alpha", 1) != 1:
        return None
    scores, shift = node.args
    if not (isinstance(scores, fx.Node) and isinstance(shift, fx.Node)):
        return None
    sizes, rows = shape(scores), shape(shift)
    if len(rows) != len(sizes) or not same(rows[-1], 1) or same(sizes[-1], 1):
        return None
    made: list[fx.Node] = []
    step: Any = shift
    while isinstance(step, fx.Node) and step is not scores and len(made) < 4:
        if not step.args or not _is_of_rows(step):
            return scores, ()
        made.insert(0, step)
        step = step.args[0]
    return scores, tuple(made) if step is scores else ()


def _is_of_rows(node: fx.Node) -> bool:
    return operation(node) in ("amax", "max", "detach", "getitem", "to", "values", "float")
