"""What else can attend sparsely or fast here: measured beside the op by `benchmarks.attention`.

FlexAttention comes with PyTorch and is given the op's own route; it serves the exact blocks and
nothing else, so its error is what block sparsity costs without the low band. Others are measured
where they are installed.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.tensors import Attention
from freqopt.config import KEY_BLOCK, QUERY_TILE
from freqopt.grid import token_order


class Rival(NamedTuple):
    """A way to compute the attention of a problem.

    density: share of pairs it attends exactly; order: of its output's tokens, None for the model's.
    """

    name: str
    density: float
    run: Callable[[], Tensor]
    order: Tensor | None = None


def installed(a: Attention) -> list[Rival]:
    """Rivals that need no route: dense ones in low precision, where their packages are."""
    found = []
    if importlib.util.find_spec("sageattention"):
        from sageattention import sageattn

        def run() -> Any:
            return sageattn(a.query, a.key, a.value, tensor_layout="HND", is_causal=False)

        found.append(Rival("sageattention", 1.0, run))
    return found


def at_density(a: Attention, density: float, exact_list: Tensor, counts: Tensor) -> list[Rival]:
    """Rivals at a density: FlexAttention on the op's lists, and SpargeAttn with its own choice.

    exact_list: (B, H, tiles, blocks) int32, ascending, meaningful up to counts (B, H, tiles).
    """
    found = [flex_on_route(a, density, exact_list, counts)]
    if importlib.util.find_spec("spas_sage_attn"):
        from spas_sage_attn import spas_sage2_attn_meansim_topk_cuda as sparge

        def run() -> Any:
            return sparge(a.query, a.key, a.value, topk=density, is_causal=False)

        found.append(Rival("spargeattn", density, run))
    return found


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def block_mask(tokens: int, exact_list: Tensor, counts: Tensor) -> Any:
    """The route's exact blocks as FlexAttention takes them, every listed block whole."""
    from torch.nn.attention.flex_attention import BlockMask

    # Indices past the count are never read, but have to be valid.
    column = torch.arange(exact_list.shape[-1], device=exact_list.device)
    listed = torch.where(column < counts[..., None], exact_list, 0)
    return BlockMask.from_kv_blocks(
        torch.zeros_like(counts), torch.zeros_like(listed), counts, listed,
        BLOCK_SIZE=(QUERY_TILE, KEY_BLOCK), seq_lengths=(tokens, tokens),
    )  # fmt: skip


def flex_on_route(a: Attention, density: float, exact_list: Tensor, counts: Tensor) -> Rival:
    """FlexAttention over the listed blocks, on tensors that are put in token order beforehand.

    Neither that reordering nor the finding of the route is part of the call.
    """
    order = token_order(a.grid, a.query.device).long()
    query, key, value = (x[:, :, order].contiguous() for x in (a.query, a.key, a.value))
    mask, flex = block_mask(a.query.shape[2], exact_list, counts), _compiled_flex()
    return Rival(
        "flex, same route", density, lambda: flex(query, key, value, block_mask=mask), order
    )
