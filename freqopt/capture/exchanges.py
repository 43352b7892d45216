"""Exchanges of lists of tensors, put into graphs: `dist.all_to_all`.

The compiler puts `dist.all_to_all_single` and `dist.all_gather` into graphs as functional
collectives that fill the tensors they are handed. Of `dist.all_to_all`, which engines share out
heads by as well (Wan's own code), it knows nothing: each call breaks the graph in two, and what
attention comes after it is of tensors that are ready-made.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@functools.cache
def show_exchanges() -> None:
    """Let the compiler write `dist.all_to_all` as a functional collective, in this process.

    Called before anything is captured. Eager calls are what they were, and so is a function that
    somebody else has told the compiler about.
    """
    if not dist.is_available():
        return
    with_graphs: Any = torch.compiler.substitute_in_graph
    try:
        with_graphs(dist.all_to_all)(_all_to_all)
    except ValueError:  # somebody else has
        return


def _all_to_all(
    output_tensor_list: list[Tensor],
    input_tensor_list: list[Tensor],
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> None:
    """`dist.all_to_all` for the compiler, which inlines this."""
    if async_op:  # its handle cannot be in a graph
        torch._dynamo.graph_break()
    import torch.distributed._functional_collectives as collectives

    among: Any = dist.group.WORLD if group is None else group
    ones = [1] * len(input_tensor_list)
    if all(
        x.shape == input_tensor_list[0].shape for x in (*input_tensor_list, *output_tensor_list)
    ):
        sent = torch.stack(input_tensor_list)
        got = collectives.all_to_all_single(sent, ones, ones, among)
        for filled, part in zip(output_tensor_list, got.unbind(0), strict=True):
            filled.copy_(part)
        return
    sent = torch.cat([x.flatten() for x in input_tensor_list])
    lengths = [x.numel() for x in output_tensor_list]
    got = collectives.all_to_all_single(
        sent, lengths, [x.numel() for x in input_tensor_list], among
    )
    for filled, part in zip(output_tensor_list, got.split(lengths), strict=True):
        filled.copy_(part.view(filled.shape))
