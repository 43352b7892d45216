"""Which arguments of an operator are queries, keys and values, and what they measure.

By the names that its declaration gives them and by their shapes, never by an import.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from freqopt.passes.axes.dimensions import hint, same
from freqopt.passes.axes.foreign import namespace_of
from freqopt.passes.nodes import raw_name, shape, tensor
from freqopt.passes.site import Extent, Sizes

HEADS = {"heads", "num_heads", "n_heads", "head_num", "nheads"}
JOINED = {"qkv": 3, "mixed_qkv": 3, "kv": 2}
"""Arguments that hold several tensors in their third dimension from the end, and how many."""

NAMES = (("query", "q"), ("key", "k"), ("value", "v"))
ATTENTION = re.compile(r"(attn|attention|flash|sage|fmha|sdpa)", re.IGNORECASE)

Lengths = tuple[Extent, ...]


def shown_name(node: fx.Node) -> str:
    """What people know an operator by."""
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return str(schema.name)
    qualified = str(getattr(node.target, "_qualified_op_name", ""))
    if qualified.startswith("aten::"):
        return qualified
    return str(node.target) if isinstance(node.target, str) else raw_name(node)


def arguments_of(node: fx.Node) -> Mapping[str, Any] | None:
    """Arguments by name, defaults included; None where they cannot be told."""
    target = node.target
    if isinstance(target, torch._ops.OpOverloadPacket):
        overloads = target.overloads()
        only = overloads[0] if len(overloads) == 1 else "default"
        own = namespace_of(target) == "aten" and "default" in overloads
        target = getattr(target, only) if own or len(overloads) == 1 else target
    if isinstance(target, torch._ops.OpOverload):
        declared = target._schema.arguments
        given = {a.name: a.default_value if a.has_default_value() else None for a in declared}
        given |= dict(zip([a.name for a in declared], node.args, strict=False))
        return given | dict(node.kwargs)
    try:
        bound = inspect.signature(target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    bound.apply_defaults()
    return bound.arguments


def operands_in(
    node: fx.Node, given: Mapping[str, Any]
) -> tuple[list[str], tuple[fx.Node, fx.Node, fx.Node]] | None:
    """Queries, keys and values by the names and shapes of arguments, and which these are."""
    names, target = list(given), shown_name(node)
    tensors = [n for n in names if isinstance(given[n], fx.Node) and tensor(given[n]) is not None]
    for start in range(len(names) - 2):
        three = names[start : start + 3]
        named = all(_is_called(name, *known) for name, known in zip(three, NAMES, strict=True))
        if (named or (start == 0 and ATTENTION.search(target))) and set(three) <= set(tensors):
            query, key, values = (given[name] for name in three)
            if _are_operands(shape(query), shape(key), shape(values)):
                return three, (query, key, values)
    for joined, parts in JOINED.items():
        held = [name for name in tensors if name.lower().strip("_") == joined]
        if not held or len(shape(given[held[0]])) < 4 or not same(shape(given[held[0]])[-3], parts):
            continue
        one = given[held[0]]
        if parts == 3:
            return held[:1], (one, one, one)
        queries = [name for name in tensors if _is_called(name, *NAMES[0])]
        if queries:
            return [queries[0], held[0]], (given[queries[0]], one, one)
    return None


def _is_called(name: str, long: str, short: str) -> bool:
    return name.lower().strip("_") in (long, short) or name.lower().startswith((long, f"{short}_"))


def _are_operands(query: Lengths, key: Lengths, values: Lengths) -> bool:
    if len({len(query), len(key), len(values)}) != 1 or len(query) not in (3, 4):
        return False
    return same(query[-1], key[-1]) and all(
        same(a, b) for a, b in zip(key[:-1], values[:-1], strict=True)
    )


def sizes_of(
    query: Lengths, key: Lengths, rest: Mapping[str, Any], tokens_first: bool | None
) -> Sizes:
    """Heads, head dim and lengths. What nothing tells is guessed: heads are fewer than tokens."""
    if len(query) > 4 or len(key) > 4:  # several in one
        key = (*key[:-3], *key[-2:])
        query = (*query[:-3], *query[-2:]) if len(query) > 4 else query
        tokens_first = True
    elif len(key) == 4 and len(query) == 4 and same(query[1], 3):
        query = key = (query[0], *query[2:])
    heads = next((n for k, n in rest.items() if k in HEADS and isinstance(n, int) and n), None)
    if len(query) == 3 and heads is not None:  # (B, N, H * D)
        return Sizes(heads, heads, (hint(query[-1]) or 0) // heads, query[1], key[1])
    if len(query) == 3:
        queries, keys, several, shared = query[0], key[0], query[1], key[1]
        if (hint(several) or 0) > (hint(queries) or 0):
            queries, keys, several, shared = several, shared, queries, keys
    else:
        if tokens_first is None:
            tokens_first = (hint(query[1]) or 0) >= (hint(query[2]) or 0)
        token, head = (1, 2) if tokens_first else (2, 1)
        queries, keys, several, shared = query[token], key[token], query[head], key[head]
    return Sizes(hint(several) or 0, hint(shared) or 0, hint(query[-1]) or 0, queries, keys)
