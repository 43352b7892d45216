"""What else attends sparsely or fast, and how it is called: for `benchmarks.rivals`.

Nothing of these packages is here, and none is installed by us: each `Source` says where it comes
from. Where a package takes lists of blocks it is given the op's own route; where it chooses blocks
itself it is given several settings, and tokens in raster order and in the grid's, of which the
better counts.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.tensors import Attention
from freqopt.config import KEY_BLOCK, QUERY_TILE
from freqopt.grid import token_order


class Route(NamedTuple):
    """The op's route in the grid's order: what each query tile attends exactly.

    exact_list: (B, H, tiles, blocks) int32, ascending, meaningful up to counts (B, H, tiles).
    own_ms: of the op's attention kernel alone on it, which attends what is not listed by summaries;
    None where there is no GPU.
    """

    density: float
    exact_list: Tensor
    counts: Tensor
    own_ms: float | None = None

    @property
    def setting(self) -> str:
        """What a rival is said to be given."""
        return f"our route at {100 * self.density:.3g} %"


class Rival(NamedTuple):
    """A way to compute the attention of a problem.

    density: share of pairs it attends exactly, None where it does not say; run: gives (B, H, N, D);
    order: of its output's tokens, None for the model's; setting: what it was asked for.
    """

    name: str
    density: float | None
    run: Callable[[], Tensor]
    order: Tensor | None = None
    setting: str = ""


class Source(NamedTuple):
    """Where rivals come from.

    module: what has to be importable; install: what brings it; make: the rivals of a problem, given
    routes at several densities. Imports are inside, so that an old version fails there, by name.
    """

    name: str
    module: str
    install: str
    make: Callable[[Attention, Sequence[Route]], Iterator[Rival]]


def importable(module: str) -> str | None:
    """None if a module can be imported, else what kept it from it."""
    try:
        importlib.import_module(module)
    except Exception as error:  # packages with kernels fail in many ways where no GPU fits
        return f"{type(error).__name__}: {error}"[:200]
    return None


class Ordered(NamedTuple):
    """A problem's tensors with their tokens in an order; None for the model's, which is raster."""

    name: str
    query: Tensor
    key: Tensor
    value: Tensor
    order: Tensor | None


def in_orders(a: Attention) -> list[Ordered]:
    """Raster and the grid's order. Putting tokens in order is not part of a rival's call."""
    order = token_order(a.grid, a.query.device).long()
    moved = (x[:, :, order].contiguous() for x in (a.query, a.key, a.value))
    raster = (x.contiguous() for x in (a.query, a.key, a.value))
    return [Ordered("raster", *raster, None), Ordered("grid", *moved, order)]


def dense(a: Attention, routes: Sequence[Route]) -> Iterator[Rival]:
    """PyTorch's dense attention, by backend."""
    if a.query.device.type != "cuda":
        yield Rival("dense", 1.0, lambda: F.scaled_dot_product_attention(a.query, a.key, a.value))
        return
    for name, backend in (
        ("dense cuDNN", SDPBackend.CUDNN_ATTENTION),
        ("dense flash", SDPBackend.FLASH_ATTENTION),
    ):

        def run(backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(a.query, a.key, a.value)

        yield Rival(name, 1.0, run)


def torchao(a: Attention, routes: Sequence[Route]) -> Iterator[Rival]:
    """Dense attention in FP8, on the flash attention that its authors activate."""
    from torch.nn.attention import activate_flash_attention_impl
    from torchao.prototype.attention.fp8_fa3.attention import fp8_fa3_sdpa

    activate_flash_attention_impl("FA3")
    yield Rival("torchao FP8", 1.0, lambda: fp8_fa3_sdpa(a.query, a.key, a.value))


def sage(a: Attention, routes: Sequence[Route]) -> Iterator[Rival]:
    """Dense attention in INT8."""
    from sageattention import sageattn

    yield Rival(
        "sageattention",
        1.0,
        lambda: sageattn(a.query, a.key, a.value, tensor_layout="HND", is_causal=False),
    )


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
        torch.zeros_like(counts),
        torch.zeros_like(listed),
        counts,
        listed,
        BLOCK_SIZE=(QUERY_TILE, KEY_BLOCK),
        seq_lengths=(tokens, tokens),
    )


def flex(a: Attention, routes: Sequence[Route]) -> Iterator[Rival]:
    """FlexAttention over the listed blocks: its error is what dropping the rest costs."""
    moved = in_orders(a)[1]
    for route in routes:
        mask = block_mask(a.query.shape[2], route.exact_list, route.counts)

        def run(mask: Any = mask) -> Tensor:
            out: Tensor = _compiled_flex()(moved.query, moved.key, moved.value, block_mask=mask)
            return out

        yield Rival("flex, same route", route.density, run, moved.order, route.setting)


class Lists(NamedTuple):
    """A route for a kernel whose query and key blocks are alike, on whole blocks.

    index: (B, H, query blocks, key blocks) int32, ascending up to counts (B, H, query blocks);
    sizes: (key blocks,) int32, of real tokens; tokens: the padded length.
    """

    index: Tensor
    counts: Tensor
    sizes: Tensor
    tokens: int


def block_lists(tokens: int, route: Route, block: int) -> Lists:
    """A route for blocks of 64 or 128 tokens; of 128 they hold every listed block of 64."""
    device = route.exact_list.device
    padded = -(-tokens // QUERY_TILE) * QUERY_TILE
    width = padded // KEY_BLOCK
    column = torch.arange(route.exact_list.shape[-1], device=device)
    known = column < route.counts[..., None]
    chosen = torch.zeros(*route.counts.shape, width + 1, dtype=torch.bool, device=device)
    # What is past a row's count goes into a column of its own, which is dropped.
    chosen.scatter_(-1, torch.where(known, route.exact_list, width).long(), True)
    chosen = chosen[..., :width]
    if block == KEY_BLOCK:
        chosen = chosen.repeat_interleave(QUERY_TILE // KEY_BLOCK, 2)
    else:
        chosen = chosen.unflatten(-1, (-1, block // KEY_BLOCK)).any(-1)
    counts = chosen.sum(-1).to(torch.int32)
    index = (~chosen).to(torch.int8).sort(stable=True).indices.to(torch.int32)
    starts = torch.arange(padded // block, device=device, dtype=torch.int32) * block
    sizes = (tokens - starts).clamp(0, block).to(torch.int32)
    return Lists(index.contiguous(), counts.contiguous(), sizes, padded)


def cudnn(a: Attention, routes: Sequence[Route]) -> Iterator[Rival]:
    """NVIDIA's block-sparse kernel on the op's route, in blocks of 64, and of 128 where it has it.

    Tokens are filled up to whole blocks beforehand, and the lists made: only the call is timed.
    """
    from cudnn.block_sparse_attention import block_sparse_attention_forward

    moved, tokens = in_orders(a)[1], a.query.shape[2]
    for route in routes:
        for block in (64, 128):
            lists = block_lists(tokens, route, block)
            padding = (0, 0, 0, lists.tokens - tokens)
            padded = [F.pad(x, padding).contiguous() for x in moved[1:4]]

            def run(padded: Any = padded, lists: Lists = lists, block: int = block) -> Tensor:
                out: Tensor = block_sparse_attention_forward(
                    *padded,
                    lists.index,
                    lists.index.shape[-1],
                    lists.sizes,
                    lists.counts,
                    sparse_block_size=block,
                    layout="bhsd",
                )[0]
                return out[:, :, :tokens]

            density = float(lists.counts.double().mean()) / lists.index.shape[-1]
            yield Rival(
                f"cuDNN block-sparse {block}, same route",
                density,
                run,
                moved.order,
                f"{route.setting}, blocks of {block}",
            )


def subblock(a: Attention, routes: Sequence[Route]) -> Iterator[Rival]:
    """SubBlock's router and kernels of SGLang: 4 x 4 sub-blocks, top-k, the rest dropped."""
    backends = "sglang.multimodal_gen.runtime.layers.attention.backends"
    router = importlib.import_module(f"{backends}.subblock_sparse").SubBlockRouter(n_k=4, n_q=4)
    attend = importlib.import_module(
        f"{backends}.subblock_sparse_attn"
    )._run_subblock_sparse_attention
    scale = a.query.shape[-1] ** -0.5
    for each in in_orders(a):
        query, key, value = (x.transpose(1, 2).contiguous() for x in each[1:4])
        for route in routes:
            sparsity = 1.0 - route.density
            # It rounds up to eight blocks: 6.2 % where 5 % of 32,760 tokens were asked for.
            density = float(router.route(query, key, sparsity, scale).density)

            def run(tensors: Any = (query, key, value), sparsity: float = sparsity) -> Tensor:
                plan = router.route(*tensors[:2], sparsity, scale)
                index = plan.index.sort(-1).values  # on Hopper the lists have to ascend
                out: Tensor = attend(*tensors, index, plan.topk, scale)
                return out.transpose(1, 2)

            setting = f"sparsity {sparsity:.3g}, {each.name} order"
            yield Rival("SubBlock", density, run, each.order, setting)


def sparge(a: Attention, routes: Sequence[Route]) -> Iterator[Rival]:
    """SpargeAttn with its own choice of blocks, in INT8; the rest is dropped."""
    from spas_sage_attn import spas_sage2_attn_meansim_topk_cuda as attend

    for each in in_orders(a):
        for route in routes:

            def run(each: Ordered = each, topk: float = route.density) -> Tensor:
                out: Tensor = attend(each.query, each.key, each.value, topk=topk, is_causal=False)
                return out

            setting = f"topk {route.density:.3g}, {each.name} order"
            yield Rival("SpargeAttn", route.density, run, each.order, setting)


def sol(a: Attention, routes: Sequence[Route]) -> Iterator[Rival]:
    """Sol-Attn: a threshold in standard deviations, means of the rest; the authors' tau is 1."""
    from sol_attn import sol_attn

    for each in in_orders(a):
        tensors = [x.transpose(1, 2).contiguous() for x in each[1:4]]
        for tau in (0.5, 1.0, 1.5, 2.0):

            def run(tensors: Any = tensors, tau: float = tau) -> Tensor:
                out: Tensor = sol_attn(*tensors, tau=tau, thresh_type="diag", kv_splits=1)
                return out.transpose(1, 2)

            yield Rival("Sol-Attn", None, run, each.order, f"tau {tau:g}, {each.name} order")


def pisa(a: Attention, routes: Sequence[Route]) -> Iterator[Rival]:
    """PISA: top-k exact, the rest by means and a first-order term."""
    from piecewise_attn import piecewise_sparse_attention as attend

    for each in in_orders(a):
        for route in routes:

            def run(each: Ordered = each, density: float = route.density) -> Tensor:
                out: Tensor = attend(each.query, each.key, each.value, density, 64)
                return out

            setting = f"density {route.density:.3g}, {each.name} order"
            yield Rival("PISA", route.density, run, each.order, setting)


SOURCES = (
    Source("dense", "torch", "comes with PyTorch", dense),
    Source("torchao", "torchao.prototype.attention", "pip install torchao", torchao),
    Source("SageAttention", "sageattention", "pip install sageattention==1.0.6", sage),
    Source("FlexAttention", "torch.nn.attention.flex_attention", "comes with PyTorch", flex),
    Source(
        "cuDNN", "cudnn.block_sparse_attention", "pip install 'nvidia-cudnn-frontend>=1.32'", cudnn
    ),
    Source(
        "SubBlock",
        "sglang.multimodal_gen.runtime.layers.attention.backends.subblock_sparse",
        "pip install 'sglang[diffusion]'",
        subblock,
    ),
    Source("SpargeAttn", "spas_sage_attn", "from github.com/thu-ml/SpargeAttn", sparge),
    Source("Sol-Attn", "sol_attn", "NVIDIA's Sol-Attn, from its authors", sol),
    Source("PISA", "piecewise_attn", "from github.com/xie-lab-ml/piecewise-sparse-attention", pisa),
)
"""All that is tried, in this order; none is left out because it wins."""
