"""Reads and removes the marks by which attention modules bring their own budgets into a graph.

See `freqopt.regional`: one graph then serves every layer, and budgets are operands like any other.
"""

from __future__ import annotations

from torch import fx

from freqopt.passes.naming import Names, Ways, site_name
from freqopt.passes.nodes import operation
from freqopt.passes.site import Known, Mark

FIELDS = 6
"""Numbers of one layout in a mark: the grid, text before and after, the mask."""


def take_marks(gm: fx.GraphModule, names: Names | None = None, inside: str = "") -> dict[str, Mark]:
    """Marks of a graph by the name of the site that they are for; the graph keeps none."""
    found: dict[str, Mark] = {}
    ways = Ways(names, inside)
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or operation(node) != "mark":
            continue
        source, budget, layouts, nth, largest_chunk = node.args
        assert isinstance(source, fx.Node) and isinstance(budget, fx.Node)
        assert isinstance(layouts, (list, tuple))
        assert isinstance(nth, int) and isinstance(largest_chunk, int)
        path, call = ways.place(node.meta.get("nn_module_stack") or {})
        found[site_name(path, call, nth)] = Mark(budget, layouts_of(layouts), largest_chunk)
        node.replace_all_uses_with(source)
        gm.graph.erase_node(node)
    return found


def layouts_of(numbers: object) -> tuple[Known, ...]:
    """Layouts from the numbers of a mark; see `numbers_of`."""
    assert isinstance(numbers, (list, tuple))
    rows = [numbers[i : i + FIELDS] for i in range(0, len(numbers), FIELDS)]
    return tuple(Known((t, h, w), before, after, m) for t, h, w, before, after, m in rows)


def numbers_of(layouts: tuple[Known, ...]) -> list[int]:
    """Layouts as the numbers of a mark, `FIELDS` each."""
    return [n for k in layouts for n in (*k.grid, k.before, k.after, k.mask)]
