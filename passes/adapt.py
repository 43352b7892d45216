"""The closed loop: budgets that follow the error which the op's own probes measure.

Every call leaves a factor (H,) on the device, by which the next call of the site multiplies its
thresholds: smaller where the measured error was above the plan's bound, back towards 1 where it was
well below. Nothing waits for the device, and the graph stays one.
"""

from __future__ import annotations

import operator
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, fx

from freqopt.passes.nodes import tensor, value
from freqopt.passes.rewrite import add_constant, add_method
from freqopt.passes.site import Site

RELAX: Final = 0.7
"""Part of its bound below which a head's error lets its factor rise again."""

MOST_TIGHTER, MOST_LOOSER = 0.25, 1.25
"""Bounds of the change of a factor from one call to the next."""

LEAST_FACTOR: Final = 1 / 64
"""Least factor; at the other end, 1 is the plan's own budget."""


def next_factor(factor: Tensor, error: Tensor, bound: Tensor) -> Tensor:
    """The factor (H,) after a call: eager twin of what `feed_back` puts into graphs.

    error: (B, H) relative errors of the call, NaN where unknown, which changes nothing; the worst
    batch item counts. bound: (H,) positive. Error is taken to be proportional to the threshold.
    """
    ratio = (error.amax(0) / bound).nan_to_num(RELAX)
    tighter = ratio.clamp(min=1.0).reciprocal().clamp(min=MOST_TIGHTER)
    looser = (ratio / RELAX).clamp(min=1.0 / MOST_LOOSER, max=1.0).reciprocal()
    return (factor * tighter * looser).clamp(LEAST_FACTOR, 1.0)


class Loop(NamedTuple):
    """Nodes of a site's loop: budget (2, H) as the factor has it, bound (H,) and factor (H,)."""

    budget: fx.Node
    bound: fx.Node
    factor: fx.Node


def open_loop(gm: fx.GraphModule, site: Site, rows: Tensor | fx.Node) -> Loop:
    """Put a site's loop ahead of it.

    rows: (3, H) thresholds of both bands and bounds; or a node (4, H) of a module's own buffer,
    whose last row is the factor; else the factor is kept with the graph.
    """
    graph, meta = site.node.graph, site.node.meta
    if isinstance(rows, Tensor):
        rows = add_constant(gm, graph, f"freqopt_rows_{site.name}", rows.to(site.device))
    found = tensor(rows)
    assert found is not None
    with graph.inserting_before(site.node):
        if found.shape[0] == 4:
            factor = add_method(meta, "select", rows, 0, 3)
        else:
            ones = torch.ones(site.heads, device=site.device)
            factor = add_constant(gm, graph, f"freqopt_factor_{site.name}", ones)
        thresholds = add_method(meta, "narrow", rows, 0, 0, 2)
        budget = add_method(meta, "mul", thresholds, factor)
        bound = add_method(meta, "select", rows, 0, 2)
    return Loop(budget, bound, factor)


def feed_back(loop: Loop) -> None:
    """After the op that has the loop's budget, leave the factor for the next call."""
    graph, (budget, bound, factor) = loop.budget.graph, loop
    op = torch.ops.freqopt.split_attention.default
    (call,) = (node for node in budget.users if node.target is op)

    def method(name: str, node: fx.Node, *arguments: Any, **options: Any) -> fx.Node:
        return add_method(call.meta, name, node, *arguments, **options)

    with graph.inserting_before(call.next):
        error = graph.call_function(operator.getitem, (call, 2))
        error.meta = dict(call.meta, example_value=value(call)[2])
        ratio = method("nan_to_num", method("div", method("amax", error, 0), bound), RELAX)
        tighter = method("reciprocal", method("clamp", ratio, min=1.0))
        tighter = method("clamp", tighter, min=MOST_TIGHTER)
        looser = method("clamp", method("div", ratio, RELAX), min=1.0 / MOST_LOOSER, max=1.0)
        looser = method("reciprocal", looser)
        changed = method("mul", method("mul", factor, tighter), looser)
        method("copy_", factor, method("clamp", changed, LEAST_FACTOR, 1.0))
