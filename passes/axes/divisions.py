"""Divisions of symbolic sizes that leave no remainder, learned from reshapes.

A patchifier splits a height s into (s // 2, 2). That s is even is neither written in the graph nor
known to the shape environment, but a reshape keeps the number of elements, and s // 2 is never
above s / 2: where the elements would be as many if all new quotients were exact, they are exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.functions import FloorDiv

from freqopt.passes.site import Extent

_exact: WeakKeyDictionary[ShapeEnv, dict[Any, Any]] = WeakKeyDictionary()


def learn_divisions(
    before: Sequence[Extent], after: Sequence[Extent], asked: Sequence[Extent]
) -> None:
    """Note the quotients among the sizes of a reshape that are exact.

    before, after: all sizes of the tensor; the graph's maker has seen that they multiply to the
    same number. asked: the sizes that the call names (those of `after` where it leaves one open),
    as `after` may give a 2 back as s // (s // 2).
    """
    symbolic = next((size for size in after if isinstance(size, torch.SymInt)), None)
    if symbolic is None:
        return
    old, new, named = ([_expression(s) for s in sizes] for sizes in (before, after, asked))
    learned = {a: b for a, b in zip(new, named, strict=True) if isinstance(a, FloorDiv) and a != b}
    quotients = {
        size: size.args[0] / size.args[1]
        for size in named
        if isinstance(size, FloorDiv)
        and size not in old
        and size.args[1].is_positive
        and not size.args[0].has(FloorDiv)
    }
    if math.prod(old) == math.prod(quotients.get(size, size) for size in named):
        learned |= quotients
    if learned:
        _exact.setdefault(symbolic.node.shape_env, {}).update(learned)


def learn_length(length: torch.SymInt, known: Extent) -> None:
    """Note that a length that depends on data is one that is known."""
    learned = _exact.setdefault(length.node.shape_env, {})
    expression, meaning = _expression(length), _expression(known)
    if not isinstance(meaning, int):
        meaning = meaning.xreplace(learned)
    if expression.is_Symbol and not (isinstance(meaning, int) or meaning.has(expression)):
        learned[expression] = meaning


def learn_share(size: Extent, length: Extent, count: int) -> None:
    """Note that `chunk` left no remainder: a length, one of `count` equal ones, divides a size."""
    whole, part = _expression(size), _expression(length)
    if not isinstance(length, torch.SymInt) or isinstance(part, int):
        return
    quotients = [q for q in part.atoms(FloorDiv) if q.args[1] == count]
    exact = {q: whole / count for q in quotients if q.args[0] - whole == count - 1}
    _exact.setdefault(length.node.shape_env, {}).update(exact)


def _expression(size: Extent | bool) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else int(size)


def equal_by_divisions(a: Extent | bool, b: Extent | bool) -> bool:
    """Whether two sizes are equal given the divisions that are known to be exact."""
    known = next((_exact.get(x.node.shape_env) for x in (a, b) if isinstance(x, torch.SymInt)), {})
    if not known:
        return False
    difference = _expression(a) - _expression(b)
    return bool(difference.has(*known) and difference.xreplace(known).expand() == 0)
