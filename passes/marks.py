"""Reads and removes the marks by which attention modules bring their own budgets into a graph.

See `freqopt.regional`: one graph then serves every layer, and budgets are operands like any other.
"""

from __future__ import annotations

from torch import fx

from freqopt.passes.find import module_path
from freqopt.passes.nodes import operation
from freqopt.passes.site import Mark


def take_marks(gm: fx.GraphModule) -> dict[str, Mark]:
    """Marks of a graph by the path of the module that set them; the graph keeps none."""
    found: dict[str, Mark] = {}
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or operation(node) != "mark":
            continue
        source, budget, extents, mid_band = node.args
        assert isinstance(source, fx.Node) and isinstance(budget, fx.Node)
        assert isinstance(extents, (list, tuple))
        numbers = [n for n in extents if isinstance(n, int)]
        grids = tuple(
            (numbers[i], numbers[i + 1], numbers[i + 2]) for i in range(0, len(numbers), 3)
        )
        found[module_path(node)] = Mark(budget, grids, bool(mid_band))
        node.replace_all_uses_with(source)
        gm.graph.erase_node(node)
    return found
