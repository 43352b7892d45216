"""A video transformer on several ranks, its exchanges written as engines for several GPUs do.

They fill tensors that were made for the result: `all_to_all_single` into `torch.empty_like` around
transposes (xDiT, yunchang), lists of tensors (Wan's own code), functional collectives with heads in
front (xDiT), and gather parts of tokens into one tensor or a list. Written for these tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, DIM = 64, 4, 16
GRID = (3, 6, 10)

Exchange = Callable[[Tensor], Tensor]


def to_heads(x: Tensor) -> Tensor:
    """(B, N / P, H, D) of all heads as (B, N, H / P, D) of all tokens, as yunchang writes it."""
    count = dist.get_world_size()
    batch, own, heads, dim = x.shape
    sent = x.reshape(batch, own, count, heads // count, dim).transpose(0, 2).contiguous()
    got = torch.empty_like(sent)
    dist.all_to_all_single(got, sent, group=dist.group.WORLD)
    got = got.reshape(own * count, batch, heads // count, dim)
    return got.transpose(0, 1).contiguous().reshape(batch, own * count, heads // count, dim)


def to_tokens(x: Tensor) -> Tensor:
    """The way back: (B, N, H / P, D) as (B, N / P, H, D)."""
    count = dist.get_world_size()
    batch, tokens, own, dim = x.shape
    sent = x.reshape(batch, count, tokens // count, own, dim).transpose(0, 3).transpose(0, 1)
    sent = sent.contiguous().reshape(count, own, tokens // count, batch, dim)
    got = torch.empty_like(sent)
    dist.all_to_all_single(got, sent, group=dist.group.WORLD)
    got = got.reshape(own * count, tokens // count, batch, dim).transpose(0, 2).contiguous()
    return got.reshape(batch, tokens // count, own * count, dim)


def waited_for(x: Tensor) -> Tensor:
    """As `to_heads`, in the background until it is waited for: no graph holds such a handle."""
    count = dist.get_world_size()
    batch, own, heads, dim = x.shape
    sent = x.reshape(batch, own, count, heads // count, dim).transpose(0, 2).contiguous()
    got = torch.empty_like(sent)
    dist.all_to_all_single(got, sent, async_op=True).wait()
    return got.reshape(own * count, batch, heads // count, dim).transpose(0, 1).contiguous()


def permuted(x: Tensor) -> Tensor:
    """As `to_heads`, with the batch before the tokens, as DeepSpeed writes it."""
    count = dist.get_world_size()
    batch, own, heads, dim = x.shape
    sent = x.reshape([batch, own, count, heads // count, dim]).permute(2, 0, 1, 3, 4).contiguous()
    got = torch.empty_like(sent)
    dist.all_to_all_single(got, sent)
    got = got.permute(1, 0, 2, 3, 4)
    return got.reshape([batch, count * own, heads // count, dim]).contiguous()


def permuted_back(x: Tensor) -> Tensor:
    """The way back."""
    count = dist.get_world_size()
    batch, tokens, own, dim = x.shape
    sent = x.reshape([batch, count, tokens // count, own, dim]).permute(1, 0, 2, 3, 4).contiguous()
    got = torch.empty_like(sent)
    dist.all_to_all_single(got, sent)
    got = got.permute(1, 2, 0, 3, 4)
    return got.reshape([batch, tokens // count, count * own, dim]).contiguous()


class InFunction(torch.autograd.Function):
    """The same both ways, with a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, heads: bool) -> Tensor:
        ctx.heads = heads
        return to_heads(x) if heads else to_tokens(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return to_tokens(grads[0]) if ctx.heads else to_heads(grads[0]), None


def by_lists(x: Tensor, scatter: int, gather: int) -> Tensor:
    """Cut along one dimension, every rank gets its piece of all, joined along another."""
    sent = [part.contiguous() for part in x.chunk(dist.get_world_size(), dim=scatter)]
    got = [torch.empty_like(part) for part in sent]
    dist.all_to_all(got, sent)
    return torch.cat(got, dim=gather).contiguous()


def flat_exchange(x: Tensor) -> Tensor:
    """One exchange of all entries as they lie in memory."""
    moved = collectives.all_to_all_single(x.flatten(), None, None, dist.group.WORLD)
    return collectives.wait_tensor(moved).reshape(x.shape)


def heads_in_front(x: Tensor) -> Tensor:
    """(B, N / P, H, D) as (B, N, H / P, D), with heads as the first dimension meanwhile."""
    count = dist.get_world_size()
    batch, own, heads, dim = x.shape
    got = flat_exchange(x.transpose(1, 2).permute(1, 0, 2, 3).contiguous())
    got = got.reshape(count, heads // count, batch, own, dim).permute(2, 1, 0, 3, 4)
    return got.reshape(batch, heads // count, count * own, dim).transpose(1, 2)


def tokens_in_front(x: Tensor) -> Tensor:
    """The way back."""
    count = dist.get_world_size()
    batch, tokens, heads, dim = x.shape
    got = flat_exchange(x.permute(1, 0, 2, 3).contiguous())
    got = got.reshape(count, tokens // count, batch, heads, dim).permute(2, 0, 3, 1, 4)
    return got.reshape(batch, count * heads, tokens // count, dim).transpose(1, 2)


def gather_into(x: Tensor) -> Tensor:
    """(B, N / P, C) of all ranks as (B, N, C), gathered into one tensor."""
    count = dist.get_world_size()
    size = list(x.shape)
    got = torch.empty([count * size[0], *size[1:]], dtype=x.dtype, device=x.device)
    dist.all_gather_into_tensor(got, x, group=dist.group.WORLD)
    got = got.reshape([count, *size]).movedim(0, 1)
    return got.reshape([size[0], count * size[1], *size[2:]])


def gather_list(x: Tensor) -> Tensor:
    """The same into a list."""
    got = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(got, x)
    return torch.cat(got, dim=1).contiguous()


class Way(NamedTuple):
    """How an engine exchanges heads for tokens, back, and gathers tokens at the end."""

    to_heads: Exchange
    to_tokens: Exchange
    gather: Exchange


WAYS = {
    "filled": Way(to_heads, to_tokens, gather_into),
    "function": Way(
        lambda x: InFunction.apply(x, True), lambda x: InFunction.apply(x, False), gather_into
    ),
    "permuted": Way(permuted, permuted_back, gather_into),
    "lists": Way(lambda x: by_lists(x, 2, 1), lambda x: by_lists(x, 1, 2), gather_list),
    "heads first": Way(heads_in_front, tokens_in_front, gather_list),
    "gathered": Way(
        lambda x: gather_list(x).chunk(dist.get_world_size(), 2)[dist.get_rank()],
        to_tokens,
        gather_list,
    ),
}


def turn(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary positions, written into a tensor made for them. x: (B, N, H, D)."""
    even, odd = x[..., 0::2], x[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = even * angles.cos() - odd * angles.sin()
    out[..., 1::2] = even * angles.sin() + odd * angles.cos()
    return out


class Block(nn.Module):
    """Attention and a layer, with as many tokens as a rank has."""

    def __init__(self, packed: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.ffn = nn.Linear(WIDTH, WIDTH)
        self.packed = packed
        self.way: Way | None = None

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        q = turn(self.norm_q(self.q(x)).unflatten(-1, (HEADS, DIM)), angles)
        k = turn(self.norm_k(self.k(x)).unflatten(-1, (HEADS, DIM)), angles)
        v = self.v(x).unflatten(-1, (HEADS, DIM))
        if self.way is not None and self.packed:
            q, k, v = self.way.to_heads(torch.cat([q, k, v]).contiguous()).chunk(3, dim=0)
        elif self.way is not None:
            q, k, v = self.way.to_heads(q), self.way.to_heads(k), self.way.to_heads(v)
        out = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v)))
        out = out.transpose(1, 2)
        if self.way is not None:
            out = self.way.to_tokens(out)
        x = x + self.o(out.flatten(2))
        return x + self.ffn(x)


class Engine(nn.Module):
    """A small video transformer; `way` None is the model on one rank."""

    def __init__(self, packed: bool = False) -> None:
        super().__init__()
        self.patch = nn.Conv3d(4, WIDTH, (1, 2, 2), (1, 2, 2))
        self.blocks = nn.ModuleList(Block(packed) for _ in range(2))
        self.head = nn.Linear(WIDTH, 16)
        self.way: Way | None = None

    def run(self, way: Way | None) -> None:
        self.way = way
        for block in self.blocks:
            block.way = way

    def part(self, x: Tensor, dim: int) -> Tensor:
        if self.way is None:
            return x
        return x.chunk(dist.get_world_size(), dim)[dist.get_rank()]

    def forward(self, video: Tensor) -> tuple[Tensor]:
        x = self.patch(video)
        at = torch.stack(torch.meshgrid(*(torch.arange(n) for n in x.shape[2:]), indexing="ij"))
        speeds = torch.linspace(0.2, 1.0, DIM // 2)
        angles = at.flatten(1).sum(0)[:, None, None] * speeds
        x, angles = self.part(x.flatten(2).transpose(1, 2), 1), self.part(angles, 0)
        for block in self.blocks:
            x = block(x, angles)
        x = self.head(x)
        return (x if self.way is None else self.way.gather(x),)


def engine(**options: Any) -> tuple[Engine, dict[str, Tensor]]:
    """The model with weights so large that attention is far from even, and a call over GRID."""
    torch.manual_seed(0)
    model = Engine(**options).eval()
    with torch.no_grad():
        for block in model.blocks:
            for norm in (block.norm_q, block.norm_k):
                norm.weight.copy_(1.0 + 2.0 * torch.rand(WIDTH))
    t, h, w = GRID
    return model, {"video": torch.randn(2, 4, t, 2 * h, 2 * w)}


FACTORY = """
import torch.distributed as dist
from engines import WAYS, engine


def make():
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    model, _ = engine()
    model.run(WAYS["filled"])
    return model
"""
"""A file whose `make` gives a command a model that two ranks share."""
