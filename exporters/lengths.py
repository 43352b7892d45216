"""Lengths that an exported file's plan serves, held against inputs where these are free.

A file of free extents takes any number of tokens, and its plan up to `CARRY` times more or less
than it was calibrated at. A site's number of keys is written down as a formula of the inputs' sizes
("video[2] * (video[3] // 2)"), which is read here by hand: a manifest may come from a stranger.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from freqopt.decisions import check_length
from freqopt.errors import PlanError
from freqopt.passes.nodes import value
from freqopt.passes.site import Extent
from freqopt.plan.plan import CARRY

if TYPE_CHECKING:
    from freqopt.plan.plan import Plan

Length = int | str | None
"""Keys of a site: a number, a formula of the inputs' sizes, None where these do not tell it."""

LONGEST_FORMULA = 2000

OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


class _UnknownError(Exception):
    """A formula, or an expression, that is not read here."""


def length_of(graph: fx.GraphModule, extent: Extent) -> Length:
    """A site's number of keys as a manifest has it."""
    if isinstance(extent, int) or extent.node.expr.is_number:
        return int(extent)
    try:
        formula = _formula(extent.node.expr, _sizes_of(graph))
    except _UnknownError:
        return None
    return formula if len(formula) <= LONGEST_FORMULA else None


def check_example(plan: Plan, extents: Mapping[str, Extent]) -> None:
    """Tell the error to expect at an example's lengths, by site, where these are free in the file.

    Raises:
        PlanError: one that is too far from the plan's.
    """
    for name, extent in extents.items():
        if isinstance(extent, torch.SymInt) and extent.node.has_hint():
            if check_length(plan, name, int(extent.node.hint)):  # one line tells of all sites
                return


def bounds(plan: Plan, name: str) -> tuple[int, int]:
    """Least and largest number of keys that a plan serves at a site."""
    tokens = plan.sites[name].tokens
    return math.ceil(tokens / CARRY), tokens * CARRY


def length_notes(lengths: Mapping[str, Length], plan: Plan | None) -> list[str]:
    """What a file says of lengths that its plan does not serve. lengths: of its sites."""
    if plan is None:
        return []
    free: dict[tuple[Length, tuple[int, int]], list[str]] = {}
    for name, length in lengths.items():
        if not isinstance(length, int) and name in plan.sites:
            free.setdefault((length, bounds(plan, name)), []).append(name)
    return [_note(names, length, *served) for (length, served), names in free.items()]


def _note(names: list[str], length: Length, least: int, most: int) -> str:
    where = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
    served = f"the plan serves {least} to {most} tokens at {where}"
    if length is None:
        return (
            f"{served}; how many an input has cannot be told from its sizes, so that nothing "
            "refuses others: give the file none"
        )
    return (
        f"{served}, which are {length}: freqopt run refuses other inputs, and other runtimes take "
        "them: give them none"
    )


def check_served(manifest: Mapping[str, Any], inputs: Mapping[str, Tensor]) -> None:
    """Refuse inputs whose lengths the plan in a file does not serve.

    manifest: one that was checked. Inputs that are missing, or have other ranks, are left to who
    binds them.

    Raises:
        PlanError: a length that is too far off.
    """
    served = (manifest.get("plan") or {}).get("lengths", {})
    for name, site in manifest["sites"].items():
        if name not in served or not isinstance(site.get("length"), str):
            continue
        try:
            tokens = evaluated(site["length"], inputs)
        except _UnknownError:
            continue
        least, most = served[name]
        if not least <= tokens <= most:
            seen = ", ".join(f"{n} {tuple(t.shape)}" for n, t in inputs.items())
            raise PlanError(
                f"site {name!r} would attend over {tokens} tokens ({site['length']}, of {seen}) "
                f"and the plan in this file serves {least} to {most}: more than a factor of {CARRY}"
                " is not supported. Calibrate with samples of this size and export again"
            )


def evaluated(formula: str, inputs: Mapping[str, Tensor]) -> int:
    """What a formula comes to for inputs."""
    if len(formula) > LONGEST_FORMULA:
        raise _UnknownError(formula)
    try:
        return _number(ast.parse(formula, mode="eval").body, inputs)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError) as error:
        raise _UnknownError(formula) from error


def _number(tree: ast.expr, inputs: Mapping[str, Tensor]) -> int:
    if isinstance(tree, ast.BinOp) and type(tree.op) in OPERATORS:
        left, right = _number(tree.left, inputs), _number(tree.right, inputs)
        return OPERATORS[type(tree.op)](left, right)
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
        return -_number(tree.operand, inputs)
    if isinstance(tree, ast.Constant) and type(tree.value) is int:
        return tree.value
    if isinstance(tree, ast.Subscript) and isinstance(tree.value, ast.Name):
        tensor, dim = inputs.get(tree.value.id), _number(tree.slice, {})
        if tensor is not None and 0 <= dim < tensor.dim():
            return int(tensor.shape[dim])
    raise _UnknownError(ast.dump(tree)[:80])


def _sizes_of(graph: fx.GraphModule) -> dict[Any, str]:
    """By symbol, how the inputs of a graph tell it."""
    found: dict[Any, str] = {}
    for node in graph.graph.find_nodes(op="placeholder"):
        example = value(node)
        for dim, size in enumerate(example.shape if isinstance(example, Tensor) else ()):
            if isinstance(size, torch.SymInt):
                told = _told(size.node.expr, f"{node.target}[{dim}]")
                if told is not None:
                    found.setdefault(*told)
    return found


def _told(size: Any, text: str) -> tuple[Any, str] | None:
    """The symbol that a size tells, as s or as the two of 2 * s + 3, and how."""
    if len(size.free_symbols) != 1:
        return None
    (symbol,) = size.free_symbols
    factor = size.coeff(symbol)
    rest = size - factor * symbol
    if not (factor.is_Integer and rest.is_Integer and factor > 0):
        return None
    less = f"({text} - {rest})" if rest else text
    return symbol, less if factor == 1 else f"({less} // {factor})"


def _formula(expression: Any, sizes: Mapping[Any, str]) -> str:
    """An expression of symbols as Python, of sums, products and whole divisions."""
    if expression.is_Integer:
        return str(expression) if expression >= 0 else f"({expression})"
    if expression.is_Symbol:
        if expression not in sizes:
            raise _UnknownError(str(expression))
        return sizes[expression]
    parts = [_formula(part, sizes) for part in expression.args]
    if expression.is_Add:
        return f"({' + '.join(parts)})"
    if expression.is_Mul:
        return " * ".join(parts)
    if expression.is_Pow and expression.exp.is_Integer and 1 < expression.exp < 9:
        return " * ".join([parts[0]] * int(expression.exp))
    sign = {"FloorDiv": "//", "CleanDiv": "//", "Mod": "%", "PythonMod": "%"}
    name = type(expression).__name__
    if name in sign:
        left, right = (f"({part})" if " " in part else part for part in parts)
        return f"({left} {sign[name]} {right})"
    raise _UnknownError(str(expression))


def names_in(lengths: Iterable[Length]) -> set[str]:
    """Names of the inputs that formulas read."""
    trees = (ast.walk(ast.parse(each, mode="eval")) for each in lengths if isinstance(each, str))
    return {node.id for tree in trees for node in tree if isinstance(node, ast.Name)}
