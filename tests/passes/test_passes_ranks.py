"""Sequence parallelism: tokens of several ranks are followed through functional collectives.

A process group that moves nothing stands for the others, as graphs are all that is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from passes_toys import WIDTH, sites_of
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore

from freqopt.backend import UNREAD
from freqopt.passes.find import find_sites
from freqopt.passes.reasons import Reason

GRID = (4, 6, 10)
HEADS, DIM = 4, WIDTH // 4


@pytest.fixture(params=[(2, 1), (4, 2)], ids=lambda p: f"rank{p[1]}of{p[0]}", autouse=True)
def ranks(request: pytest.FixtureRequest) -> Iterator[None]:
    count, rank = request.param
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=count)
    yield
    dist.destroy_process_group()


def exchange(x: Tensor) -> Tensor:
    group = dist.group.WORLD
    assert group is not None
    moved = collectives.all_to_all_single(x.flatten(), None, None, group)
    return collectives.wait_tensor(moved.reshape(x.shape))


def by_reshapes(x: Tensor) -> Tensor:
    """(B, N / P, H, D) as (B, N, H / P, D): one reshape, one exchange, as diffusers does."""
    parts = x.unflatten(2, (dist.get_world_size(), -1)).permute(2, 1, 0, 3, 4).contiguous()
    return exchange(parts).flatten(0, 1).permute(1, 0, 2, 3)


def by_pieces(x: Tensor) -> Tensor:
    """The same with lists of tensors."""
    parts = torch.stack([p.contiguous() for p in x.chunk(dist.get_world_size(), 2)])
    return torch.cat(list(exchange(parts).unbind(0)), 1)


def by_indices(x: Tensor) -> Tensor:
    """The same, rank by rank."""
    parts = torch.stack(list(x.chunk(dist.get_world_size(), 2)))
    got = exchange(parts)
    return torch.cat([got[i] for i in range(dist.get_world_size())], 1)


def by_gathering(x: Tensor) -> Tensor:
    """All tokens of all heads on every rank, of which it takes its own heads."""
    group = dist.group.WORLD
    assert group is not None
    everything = collectives.wait_tensor(collectives.all_gather_tensor(x, 1, group))
    return everything.chunk(dist.get_world_size(), 2)[dist.get_rank()]


def back(x: Tensor) -> Tensor:
    """(B, N, H / P, D) as (B, N / P, H, D)."""
    parts = x.unflatten(1, (dist.get_world_size(), -1)).permute(1, 3, 2, 0, 4).contiguous()
    return exchange(parts).flatten(0, 1).transpose(0, 2)


Gather = Callable[[Tensor], Tensor]
GATHERS = [by_reshapes, by_pieces, by_indices, by_gathering]


class Sharded(nn.Module):
    """Two attentions over tokens of which every rank has its part."""

    def __init__(self, gather: Gather, kinds: str = "video") -> None:
        super().__init__()
        self.gather, self.back, self.kinds = gather, back, kinds
        self.mask: Tensor | None = None
        self.patch = nn.Conv3d(4, WIDTH, (1, 2, 2), (1, 2, 2))
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (self.gather(f(x).unflatten(-1, (-1, DIM))) for f in self.qkv)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
        return self.back(out.transpose(1, 2)).flatten(2)

    def part(self, x: Tensor) -> Tensor:
        return x.chunk(dist.get_world_size(), 1)[dist.get_rank()]

    def forward(self, video: Tensor, words: Tensor) -> Tensor:
        x = self.patch(video).flatten(2).transpose(1, 2)
        if self.kinds == "joint":
            x = self.part(torch.cat([words, x], 1))
        elif self.kinds == "apart":
            x = torch.cat([self.part(words), self.part(x)], 1)
        else:
            x = self.part(x)
        for _ in range(2):
            x = x + self.attend(x)
        return x


def inputs(batch: int = 2) -> tuple[Tensor, Tensor]:
    t, h, w = GRID
    return torch.randn(batch, 4, t, 2 * h, 2 * w), torch.randn(batch, 8, WIDTH)


@pytest.mark.parametrize("gather", GATHERS)
def test_the_grid_is_that_of_all_ranks_together(gather: Gather) -> None:
    sites = sites_of(Sharded(gather), *inputs(batch=dist.get_world_size() // 2))
    assert [site.grid for site in sites] == [GRID] * 2
    assert all(site.eligible and site.kind == "self" for site in sites), sites[0].reason


@pytest.mark.parametrize("gather", GATHERS)
def test_text_that_was_sharded_with_the_video_lies_before_it(gather: Gather) -> None:
    sites = sites_of(Sharded(gather, "joint"), *inputs())
    assert [(s.eligible, s.grid, s.text_before) for s in sites] == [(True, GRID, 8)] * 2


@pytest.mark.parametrize("gather", GATHERS)
def test_kinds_of_tokens_sharded_apart_are_put_together(gather: Gather) -> None:
    count = dist.get_world_size()
    text, video = 8 // count, 240 // count
    starts = [i * (text + video) for i in range(count)]
    for site in sites_of(Sharded(gather, "apart"), *inputs()):
        assert (site.eligible, site.grid, site.text_before) == (True, GRID, 8), site.reason
        of_video = [(start + text, video) for start in starts]
        assert site.pieces == (*((start, text) for start in starts), *of_video)


@pytest.mark.parametrize("gather", GATHERS)
def test_heads_are_those_of_this_rank(gather: Gather) -> None:
    for site in sites_of(Sharded(gather), *inputs()):
        assert site.share is not None
        own = HEADS // dist.get_world_size()
        first = own * dist.get_rank()
        assert (site.heads, site.all_heads, site.share.ranks) == (own, HEADS, dist.get_world_size())
        assert site.share.numbers == tuple(range(first, first + own))


def by_turns(x: Tensor) -> Tensor:
    """(B, N / P, H, D) as (B, N, H / P, D), every rank with each P-th head."""
    parts = x.unflatten(2, (-1, dist.get_world_size())).permute(3, 1, 0, 2, 4).contiguous()
    return exchange(parts).flatten(0, 1).permute(1, 0, 2, 3)


def in_place(x: Tensor) -> Tensor:
    """As `by_reshapes`, by the collective that fills a tensor, as code for eager mode calls it."""
    parts = x.unflatten(2, (dist.get_world_size(), -1)).permute(2, 1, 0, 3, 4).contiguous()
    filled = torch.empty_like(parts)
    dist.all_to_all_single(filled, parts)
    return filled.flatten(0, 1).permute(1, 0, 2, 3)


def test_heads_that_are_dealt_out_one_by_one() -> None:
    rank, count = dist.get_rank(), dist.get_world_size()
    for site in sites_of(Sharded(by_turns), *inputs()):
        assert site.share is not None and site.share.numbers == tuple(range(rank, HEADS, count))


def test_a_collective_that_fills_a_tensor_is_followed() -> None:
    for site in sites_of(Sharded(in_place), *inputs()):
        assert (site.eligible, site.grid) == (True, GRID), site.reason
        assert site.share is not None and site.share.heads == HEADS


class Masked(Sharded):
    """Text that is padded: every rank has its part of the mask, and gathers it."""

    def __init__(self, gather: Gather, part: int | None = None) -> None:
        super().__init__(gather, "joint")
        self.which = part

    def forward(self, video: Tensor, words: Tensor) -> Tensor:
        x = self.patch(video).flatten(2).transpose(1, 2)
        shown = words[..., 0] > 0
        mask = torch.cat([shown, torch.ones(x.shape[:2], dtype=torch.bool)], 1)
        which = dist.get_rank() if self.which is None else self.which
        own = mask.chunk(dist.get_world_size(), 1)[which]
        group = dist.group.WORLD
        assert group is not None
        self.mask = collectives.all_gather_tensor(own.contiguous(), 1, group)[:, None, None]
        return self.attend(self.part(torch.cat([words, x], 1)))


def test_a_mask_that_was_gathered_is_the_one_that_was_shared_out() -> None:
    for site in sites_of(Masked(by_reshapes), *inputs()):
        assert (site.eligible, site.grid, site.text_before) == (True, GRID, 8), site.reason
        assert site.attention.mask is not None
    for site in sites_of(Masked(by_reshapes, part=0), *inputs()):  # another rank's part
        assert not site.eligible and site.why.reason is Reason.MASK_UNPROVEN


class Block(Sharded):
    """What one block sees: the tokens of its rank."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.attend(x)


@pytest.mark.parametrize("gather", GATHERS)
def test_a_rank_that_sees_its_own_tokens_only_needs_a_grid(gather: Gather) -> None:
    x = torch.randn(2, 240 // dist.get_world_size(), WIDTH)
    (site,) = sites_of(Block(gather), x)
    assert not site.eligible and "pass grid=" in site.reason
    (site,) = sites_of(Block(gather), x, grid=GRID)
    assert site.eligible and (site.grid, site.query_length) == (GRID, 240), site.reason
    (site,) = sites_of(Block(gather), x, grid=(4, 6, 11))
    assert not site.eligible


def test_keys_of_one_rank_are_not_those_of_all() -> None:
    """All-gathered keys against one rank's queries, and halves exchanged along the tokens."""

    class Gathered(Sharded):
        def attend(self, x: Tensor) -> Tensor:
            q, k, v = (f(x).unflatten(-1, (HEADS, DIM)) for f in self.qkv)
            group = dist.group.WORLD
            assert group is not None
            k, v = (collectives.all_gather_tensor(y, 1, group) for y in (k, v))
            out = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v)))
            return out.transpose(1, 2).flatten(2)

    assert not any(site.eligible for site in sites_of(Gathered(by_pieces), *inputs()))

    class Swapped(Sharded):
        def attend(self, x: Tensor) -> Tensor:
            parts = x.unflatten(1, (dist.get_world_size(), -1)).transpose(0, 1).contiguous()
            x = exchange(parts).transpose(0, 1).flatten(1, 2)
            q, k, v = (f(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for f in self.qkv)
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    assert not any(site.eligible for site in sites_of(Swapped(by_pieces), *inputs()))


def test_tensors_that_are_parts_of_larger_ones_stay_dense() -> None:
    """As under torch's context_parallel, whose collectives are below the graph."""
    graphs: list[fx.GraphModule] = []

    def look(gm: fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(gm)
        return gm.forward

    x = torch.randn(2, 240, WIDTH)
    model = Block(lambda x: x)
    model.back = lambda x: x
    torch.compile(model, backend=look)(x)
    (site,) = find_sites(graphs[0], grid=GRID)
    assert site.eligible
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    query = site.attention.query
    part = torch.empty(query.meta["example_value"].shape)
    query.meta["example_value"] = DTensor.from_local(part, mesh, [Shard(2)], run_check=False)
    (site,) = find_sites(graphs[0], grid=GRID)
    assert site.why.reason is Reason.DISTRIBUTED and site.why.reason in UNREAD


def test_heads_that_weights_share_out() -> None:
    model = Block(lambda x: x)
    model.back = lambda x: x
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    columns = {f"qkv.{i}": ColwiseParallel() for i in range(3)}
    parallelize_module(model, mesh, columns)
    (site,) = sites_of(model, torch.randn(2, 240, WIDTH), grid=GRID)
    own = HEADS // dist.get_world_size()
    first = own * dist.get_rank()
    assert site.eligible and (site.heads, site.all_heads) == (own, HEADS), site.reason
    assert site.share is not None and site.share.numbers == tuple(range(first, first + own))
