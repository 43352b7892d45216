"""What one call of a model tells of grids, in a graph of that call alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from freqopt.capture.call_grids import OneCall
from freqopt.capture.call_layouts import told_by_sizes
from freqopt.capture.call_shapes import told_by_lists
from freqopt.capture.signatures import forward_signature, named_arguments
from freqopt.capture.under_way import arguments_by_name
from freqopt.passes.site import Known


class GivenCall:
    """The arguments of a call of a model."""

    def __init__(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        leaves = pytree.tree_leaves((tuple(args), dict(kwargs)))
        self.examples = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self.named = named_arguments(forward_signature(model), tuple(args), dict(kwargs))
        self.arguments = arguments_by_name(model, tuple(args), dict(kwargs))

    def tells(self, gm: fx.GraphModule, layouts: Iterable[Known]) -> OneCall:
        """What its tensors, sizes, ints and lists of extents tell, as constants of the graph.

        layouts: of sites, as calibration saw them.
        """
        calls = OneCall(gm, self.examples)
        if calls.inputs:
            calls.told += told_by_lists(calls.inputs[0], self.named)
            calls.told += told_by_sizes(calls.inputs[0], self.arguments, layouts)
        return calls
