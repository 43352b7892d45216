"""Finds attention in a graph, in any spelling: anchors on a node, then walks to q, k and v.

Fused calls are anchors by themselves. Hand-written attention is anchored on its softmax: back
through scaling and masks to the product of queries and keys, on through casts and idle dropout to
the product with the values. Anything the walk does not recognise is not attention.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from freqopt.passes.graph_values import argument, example, op_name, same, shape_of
from freqopt.passes.site import Match

CASTS = frozenset(["to", "type", "type_as", "float", "half", "bfloat16", "contiguous", "clone"])


def find_matches(graph: fx.Graph) -> Iterator[Match]:
    """Every attention of a graph, in order."""
    for node in graph.nodes:
        name = op_name(node)
        if name == "scaled_dot_product_attention":
            yield match_fused(node)
        elif name == "softmax":
            match = match_softmax(node)
            if match is not None:
                yield match


def match_fused(node: fx.Node) -> Match:
    """F.scaled_dot_product_attention, positional or by keyword, traced or exported."""
    query, key, value = (argument(node, name) for name in ("query", "key", "value"))
    reason = None
    if argument(node, "is_causal", False):
        reason = "is causal"
    elif argument(node, "dropout_p", 0.0):
        reason = f"has dropout {argument(node, 'dropout_p')} (training)"
    scale = argument(node, "scale")
    if scale is not None and not isinstance(scale, (int, float)):
        reason, scale = "its scale is not a constant", None
    mask = argument(node, "attn_mask")
    return Match(node, query, key, value, mask, scale, "scaled_dot_product_attention",
                 reason=reason)  # fmt: skip


def match_softmax(softmax: fx.Node) -> Match | None:
    """softmax(scale * q @ k^T + mask) @ v, or None if this softmax is something else."""
    shape = shape_of(softmax)
    axis = argument(softmax, "dim", -1)
    if shape is None or len(shape) not in (3, 4) or axis not in (-1, len(shape) - 1):
        return None
    product = _product_with_values(softmax)
    if product is None:
        return None
    weights, out, value, extra_use = product
    walked = _logits(argument(softmax, "input"))
    if walked is None:
        return None
    query, key, transposed, factor, mask = walked
    match = Match(out, query, key, value, mask, factor, "softmax", key_transposed=transposed,
                  folded_heads=len(shape) == 3)  # fmt: skip
    match.reason = extra_use or _dropout_reason(weights)
    return match


def _product_with_values(
    softmax: fx.Node,
) -> tuple[list[fx.Node], fx.Node, fx.Node, str | None] | None:
    """Follow the probabilities to their product with the values.

    Returns the nodes in between, the product, the values, and why the region can't be cut out.
    """
    passed: list[fx.Node] = []
    node, extra = softmax, None
    while True:
        product = next((u for u in node.users if _is_value_product(u, node)), None)
        others = [u for u in node.users if u is not product]
        if product is not None:
            if others:
                extra = "its probabilities are used elsewhere too"
            value = _value_operand(product)
            return (passed, product, value, extra) if value is not None else None
        step = [u for u in others if op_name(u) in CASTS or op_name(u) == "dropout"]
        if len(step) != 1:
            return None
        if len(others) > 1:
            extra = "its probabilities are used elsewhere too"
        node = step[0]
        passed.append(node)


def _is_value_product(user: fx.Node, weights: fx.Node) -> bool:
    name = op_name(user)
    if name in ("matmul", "bmm"):
        return user.args[0] is weights
    if name == "einsum":
        operands = _einsum_operands(user)
        return len(operands) == 2 and operands[0] is weights and _is_value_einsum(user)
    return False


def _value_operand(product: fx.Node) -> fx.Node | None:
    operand = _einsum_operands(product)[1] if op_name(product) == "einsum" else product.args[1]
    return operand if isinstance(operand, fx.Node) else None


def _einsum_operands(node: fx.Node) -> list[Any]:
    rest = node.args[1:]
    if len(rest) == 1 and isinstance(rest[0], (tuple, list)):
        rest = tuple(rest[0])
    return list(rest)


def _labels(node: fx.Node) -> tuple[str, str, str] | None:
    """Labels of a two-operand einsum, renamed so that equal spellings compare equal."""
    left, _, right = str(node.args[0]).replace(" ", "").partition("->")
    if left.count(",") != 1 or "." in left:
        return None
    first, second = left.split(",")
    names = {label: chr(ord("a") + i) for i, label in enumerate(dict.fromkeys(first + second))}
    rename = lambda labels: "".join(names.get(c, "?") for c in labels)  # noqa: E731
    return rename(first), rename(second), rename(right)


def _is_value_einsum(node: fx.Node) -> bool:
    return _labels(node) in (("abcd", "abde", "abce"), ("abc", "acd", "abd"))


def _dropout_reason(passed: list[fx.Node]) -> str | None:
    for node in passed:
        if op_name(node) == "dropout":
            probability, training = argument(node, "p", 0.5), argument(node, "training", True)
            if probability and training:
                return f"has dropout {probability} (training)"
    return None


def _logits(node: Any) -> tuple[fx.Node, fx.Node, bool, float, fx.Node | None] | None:
    """Walk back from the softmax's input to q and k.

    Returns q, k, whether k still is transposed (.., D, N), the factor on q k^T, and the mask added.
    """
    factor, mask = 1.0, None
    while isinstance(node, fx.Node):
        name = op_name(node)
        if name in CASTS:
            node = node.args[0]
        elif name in ("mul", "div") and (found := _constant_factor(node)) is not None:
            node, constant = found
            factor *= constant
        elif name == "add" and mask is None:
            pair = [a for a in node.args[:2] if isinstance(a, fx.Node)]
            if len(pair) != 2:
                return None
            logits = [a for a in pair if _reaches_product(a)]
            if len(logits) != 1 or factor != 1.0:
                return None
            node, mask = logits[0], next(a for a in pair if a is not logits[0])
        elif name in ("masked_fill", "where") and mask is None:
            return _opaque_mask(node, factor)
        elif name in ("matmul", "bmm"):
            return _from_product(node.args[0], node.args[1], factor, mask)
        elif name == "baddbmm":
            return _from_baddbmm(node, factor, mask)
        elif name == "einsum":
            return _from_einsum(node, factor, mask)
        else:
            return None
    return None


def _opaque_mask(
    node: fx.Node, factor: float
) -> tuple[fx.Node, fx.Node, bool, float, fx.Node | None] | None:
    """Logits filled where a mask says so: found, but the mask is the node itself."""
    position = 0 if op_name(node) == "masked_fill" else 1
    options = [node.args[position]]
    if op_name(node) == "where":
        options.append(node.args[2])
    for option in options:
        found = _logits(option) if isinstance(option, fx.Node) else None
        if found is not None:
            query, key, transposed, inner, mask = found
            return query, key, transposed, inner * factor, mask if mask is not None else node
    return None


def _constant_factor(node: fx.Node) -> tuple[fx.Node, float] | None:
    """The tensor operand and the constant of a product or quotient by a number."""
    first, second = node.args[0], node.args[1]
    if isinstance(first, fx.Node) and isinstance(second, (int, float)):
        if op_name(node) == "div":
            return (first, 1.0 / second) if second else None
        return first, float(second)
    if isinstance(second, fx.Node) and isinstance(first, (int, float)) and op_name(node) == "mul":
        return second, float(first)
    return None


def _reaches_product(node: fx.Node) -> bool:
    """Whether a product of matrices stands behind casts and scaling."""
    while isinstance(node, fx.Node):
        name = op_name(node)
        if name in ("matmul", "bmm", "baddbmm", "einsum"):
            return True
        if name in CASTS or (name in ("mul", "div") and _constant_factor(node) is not None):
            node = next(a for a in node.args if isinstance(a, fx.Node))
        else:
            return False
    return False


def _from_product(
    query: Any, key_t: Any, factor: float, mask: fx.Node | None
) -> tuple[fx.Node, fx.Node, bool, float, fx.Node | None] | None:
    if not (isinstance(query, fx.Node) and isinstance(key_t, fx.Node)):
        return None
    query, q_factor = _unscaled(query)
    key_t, k_factor = _unscaled(key_t)
    key = _untransposed(key_t)
    scale = factor * q_factor * k_factor
    if key is not None:
        key, more = _unscaled(key)
        return query, key, False, scale * more, mask
    return query, key_t, True, scale, mask


def _unscaled(node: fx.Node) -> tuple[fx.Node, float]:
    """A tensor before its multiplication by a number, and the number."""
    factor = 1.0
    while op_name(node) in ("mul", "div") and (found := _constant_factor(node)) is not None:
        node, constant = found
        factor *= constant
    return node, factor


def _untransposed(node: fx.Node) -> fx.Node | None:
    """The tensor whose last two dims `node` swaps, or None if it does something else."""
    shape = shape_of(node)
    if shape is None:
        return None
    dims = len(shape)
    name = op_name(node)
    if name == "transpose":
        axes = (argument(node, "dim0"), argument(node, "dim1"))
        if sorted(a % dims for a in axes if isinstance(a, int)) != [dims - 2, dims - 1]:
            return None
    elif name == "permute":
        order = node.args[1:]
        order = order[0] if order and isinstance(order[0], (tuple, list)) else order
        if [o % dims for o in order] != [*range(dims - 2), dims - 1, dims - 2]:
            return None
    elif not (name == "getattr" and node.args[1] == "mT"):
        return None
    source = node.args[0]
    return source if isinstance(source, fx.Node) else None


def _from_baddbmm(
    node: fx.Node, factor: float, mask: fx.Node | None
) -> tuple[fx.Node, fx.Node, bool, float, fx.Node | None] | None:
    if argument(node, "beta", 1):
        return None
    alpha = argument(node, "alpha", 1)
    return _from_product(argument(node, "batch1"), argument(node, "batch2"), factor * alpha, mask)


def _from_einsum(
    node: fx.Node, factor: float, mask: fx.Node | None
) -> tuple[fx.Node, fx.Node, bool, float, fx.Node | None] | None:
    operands = _einsum_operands(node)
    if _labels(node) not in (("abcd", "abed", "abce"), ("abc", "adc", "abd")):
        return None
    if not all(isinstance(o, fx.Node) for o in operands):
        return None
    query, q_factor = _unscaled(operands[0])
    key, k_factor = _unscaled(operands[1])
    return query, key, False, factor * q_factor * k_factor, mask


def check_shapes(match: Match) -> str | None:
    """Why the tensors of a match do not form an attention over (B, H, N, D), or None."""
    shapes = [shape_of(n) if isinstance(n, fx.Node) else None for n in (
        match.query, match.key, match.value)]  # fmt: skip
    if any(s is None for s in shapes):
        return "its operands are not tensors of the graph"
    query, key, value = (s for s in shapes if s is not None)
    if not len(query) == len(key) == len(value) or len(query) not in (3, 4):
        return f"has {len(query)}-dimensional queries (supported: batch, heads, tokens, head_dim)"
    if match.key_transposed:
        key = (*key[:-2], key[-1], key[-2])
    if not same(query[-1], key[-1]) or not same(key[-1], value[-1]):
        return "head dims of query, key and value differ"
    if not isinstance(query[-1], int):
        return "its head dim is dynamic"
    if len(query) == 4 and not (isinstance(query[1], int) and isinstance(key[1], int)):
        return "its number of heads is dynamic"
    if not same(query[0], key[0]):
        return "batch sizes of query and key differ"
    return None


def default_scale(match: Match) -> float:
    """The factor on q k^T: written out, or the fused call's default."""
    if match.scale is not None:
        return float(match.scale)
    if match.form == "softmax":
        return 1.0
    shape = shape_of(match.query)
    return 1.0 / math.sqrt(shape[-1]) if shape is not None else 1.0


def output_dtype(match: Match) -> torch.dtype | None:
    """Type that the attention computes in: its output's, which autocast may have chosen."""
    value = example(match.node)
    return value.dtype if isinstance(value, torch.Tensor) else None
