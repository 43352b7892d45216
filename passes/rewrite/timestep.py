"""Budgets by denoising timestep: finds the timestep among a graph's inputs, selects on the device.

The bucket is computed in the graph from the timestep tensor, so another timestep neither recompiles
nor waits for the device. Only operations that every backend and exporter knows are used.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from freqopt.errors import SiteError
from freqopt.passes.bodies import bring, way_into
from freqopt.passes.decision import Decision
from freqopt.passes.nodes import tensor
from freqopt.passes.rewrite.adding import add_constant, add_method

logger = logging.getLogger(__name__)

LEADING = ("placeholder", "get_attr")
"""Nodes that stand before all computation."""


def select_by_timestep(gm: fx.GraphModule, decisions: Sequence[Decision], strict: bool) -> None:
    """Replace budgets per timestep bucket by nodes that select among them in the graph.

    Where the graph has no such timestep, the most exact of a site's budgets serves them all.

    Raises:
        SiteError: under `strict`, where it has none.
    """
    timed = [d for d in decisions if d.split and d.timestep is not None]
    groups = dict.fromkeys((d.timestep, d.site.device) for d in timed)
    for timestep, device in groups:
        assert timestep is not None
        members = [d for d in timed if (d.timestep, d.site.device) == (timestep, device)]
        source = find_timestep(gm, timestep.name)
        inside = [d for d in members if source is not None and _is_reached(gm, d)]
        if source is not None and inside:
            tables = [_table(d).to(device) for d in inside]
            nodes = select_budgets(gm, source, timestep.edges, tables)
            for decision, node in zip(inside, nodes, strict=True):
                decision.budget = bring(node, decision.site.node.graph)
        others = [d for d in members if d not in inside]
        if not others:
            continue
        message = (
            f"{others[0].site.name} and {len(others) - 1} other sites: their graph has no tensor "
            f"input {timestep.name!r}, by which the plan selects budgets (it is a Python number "
            "there, or another graph after a graph break), so the most exact budget of all "
            "timesteps is used; pass the timestep as a tensor, or use freqopt.attach"
        )
        if strict:
            raise SiteError(message)
        logger.warning("%s", message)
        for decision in others:
            decision.budget = _table(decision).amin(0)


def _is_reached(gm: fx.GraphModule, decision: Decision) -> bool:
    """Whether values of the graph can be had where the site is, in it or in a body inside it."""
    return way_into(gm.graph, decision.site.node.graph) is not None


def _table(decision: Decision) -> Tensor:
    assert isinstance(decision.budget, Tensor)
    return decision.budget


def find_timestep(gm: fx.GraphModule, name: str) -> fx.Node | None:
    """The tensor input of a graph that holds the model's argument `name`, None if there is none.

    An entry of a dict of arguments and an attribute of that name count as well.
    """
    found = [
        node
        for node in gm.graph.find_nodes(op="placeholder")
        if tensor(node) is not None and _argument_name(node) == name
    ]
    return found[0] if found else None


def _argument_name(node: fx.Node) -> str | None:
    """Name of the argument that an input holds: t of L['t'], L['kwargs']['t'] or L['batch'].t.

    Dynamo tells where inputs come from; other graphs call them by their name. Names made of both,
    such as L_x_t_, would not tell an argument x_t from an entry t of x.
    """
    source = getattr(node.meta.get("grapharg"), "source", None)
    if source is None:
        return str(node.target)
    text = source.name() if callable(source.name) else source.name
    if re.search(r"_(?:modules|parameters|buffers)\b", text):
        return None
    match = re.search(r"""(?:\[['"](\w+)['"]\]|\.(\w+))\)*$""", text)
    return (match[1] or match[2]) if match else None


def select_budgets(
    gm: fx.GraphModule, timestep: fx.Node, edges: Sequence[float], tables: Sequence[Tensor]
) -> list[fx.Node]:
    """Nodes of the budgets (2, H) that hold at the graph's timestep, one for each table.

    Batch items may have timesteps of their own, and tokens too, whose mean counts; the budget is
    then the most exact of those of the items, as one budget serves the batch.

    Args:
        timestep: a node, () or (B,) or (B, ...) of any real dtype.
        edges: as in `Timestep`.
        tables: (buckets, 2, H) float32 budgets, on the device of the sites.
    """
    graph, device = gm.graph, tables[0].device
    flat = torch.cat([table.flatten(1) for table in tables], 1)
    bounds = torch.tensor(list(edges), dtype=torch.float32, device=device)
    bounds_node = add_constant(gm, graph, "freqopt_timestep_edges", bounds)
    flat_node = add_constant(gm, graph, "freqopt_timestep_budgets", flat)
    example = tensor(timestep)
    assert example is not None

    def method(name: str, node: fx.Node, *arguments: Any) -> fx.Node:
        return add_method({}, name, node, *arguments)

    with graph.inserting_before(next(n for n in graph.nodes if n.op not in LEADING)):
        times = method("to", timestep, device, torch.float32)
        if example.dim() > 1:
            times = method("mean", method("flatten", times, 1), 1)
        above = method("gt", method("reshape", times, -1, 1), bounds_node)
        rows = method("index_select", flat_node, 0, method("sum", above, -1))
        row = method("amin", rows, 0)
        chosen, start = [], 0
        for table in tables:
            part = method("narrow", row, 0, start, table[0].numel())
            chosen.append(method("view", part, *table.shape[1:]))
            start += table[0].numel()
    return chosen
