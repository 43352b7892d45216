"""Squeezes of an exported program that change nothing, taken out.

In PyTorch a squeeze of an extent that is not 1 leaves a tensor as it is. torch.onnx writes it as
ONNX's Squeeze all the same, which is an error there, so that no runtime loads the file.
"""

from __future__ import annotations

from torch import fx

from freqopt.passes.axes.dimensions import same
from freqopt.passes.nodes import shape

SQUEEZES = ("aten.squeeze.dim", "aten.squeeze.dims")


def drop_idle_squeezes(gm: fx.GraphModule) -> bool:
    """Take out, in place, the dimensions that squeezes leave as they are; whether there were any.

    An extent that is free counts as one that is not 1, as torch.export has it.
    """
    found = False
    for node in list(gm.graph.nodes):
        if str(node.target) not in SQUEEZES:
            continue
        source, given = node.args[:2]
        sizes = shape(source)
        if not sizes:
            continue
        dims = [given] if isinstance(given, int) else list(given)
        kept = [dim for dim in dims if same(sizes[dim], 1)]
        if len(kept) == len(dims):
            continue
        found = True
        if kept:
            node.args = (source, kept)
        else:
            node.replace_all_uses_with(source)
            gm.graph.erase_node(node)
    if found:
        gm.recompile()
    return found
