"""Collectives that fill tensors: what readers of these see, and what is not followed.

A process group that moves nothing stands for the other ranks, as graphs are all that is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from engines import DIM, GRID, HEADS, WAYS, WIDTH, engine, gather_into, gather_list, to_heads, turn
from passes_toys import sites_of
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from freqopt.backend import UNREAD
from freqopt.capture.exchanges import show_exchanges
from freqopt.passes.reasons import Reason
from freqopt.passes.site import Site

TOKENS = 180


@pytest.fixture(params=[(2, 1), (4, 2)], ids=lambda p: f"rank{p[1]}of{p[0]}", autouse=True)
def ranks(request: pytest.FixtureRequest) -> Iterator[None]:
    count, rank = request.param
    show_exchanges()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=count)
    yield
    dist.destroy_process_group()


def heads_here() -> tuple[int, ...]:
    own = HEADS // dist.get_world_size()
    return tuple(range(own * dist.get_rank(), own * (dist.get_rank() + 1)))


OF_RANKS = [
    pytest.param((2, 1), False, id="rank1of2-static"),
    pytest.param((4, 2), True, id="rank2of4-dynamic"),
    pytest.param((2, 1), True, id="rank1of2-dynamic", marks=pytest.mark.slow),
    pytest.param((4, 2), False, id="rank2of4-static", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("ranks", "dynamic"), OF_RANKS, indirect=["ranks"])
@pytest.mark.parametrize("name", WAYS)
def test_chains_that_engines_write_are_followed(name: str, dynamic: bool) -> None:
    model, call = engine()
    model.run(WAYS[name])
    sites = sites_of(model, call["video"], dynamic=dynamic)
    assert len(sites) == 2
    for site in sites:
        assert site.eligible and site.kind == "self", site.reason
        assert site.share is not None and site.share.numbers == heads_here()
        assert [int(n) for n in site.grid or ()] == list(GRID)


class Attention(nn.Module):
    """One attention over a rank's tokens, whose queries, keys and values are exchanged somehow."""

    def __init__(self, exchange: Callable[[Tensor], Tensor], **others: Callable[[Tensor], Tensor]):
        super().__init__()
        self.exchange, self.others = exchange, others
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            self.others.get(name, self.exchange)(getattr(self, name)(x).unflatten(-1, (-1, DIM)))
            for name in "qkv"
        )
        return F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v)))


def site_of(model: nn.Module, grid: tuple[int, int, int] = GRID) -> Site:
    x = torch.randn(2, TOKENS // dist.get_world_size(), WIDTH)
    (site,) = [s for s in sites_of(model, x, grid=grid) if s.query_length == TOKENS]
    return site


def turned_later(x: Tensor) -> Tensor:
    """Positions are written after the exchange, into a tensor made like the exchanged one."""
    x = to_heads(x)
    return turn(x, torch.ones(x.shape[1], 1, DIM // 2))


def test_what_is_computed_from_exchanged_tensors_may_be_written() -> None:
    site = site_of(Attention(to_heads, q=turned_later, k=turned_later))
    assert site.eligible and site.share is not None, site.reason
    assert site.share.numbers == heads_here()


class Joint(nn.Module):
    """Text that every rank has all of, with the heads of this one beside the exchanged video."""

    def __init__(self, before: bool) -> None:
        super().__init__()
        self.patch, self.before = nn.Conv3d(4, WIDTH, (1, 2, 2), (1, 2, 2)), before
        self.video, self.text = (
            nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3)) for _ in range(2)
        )

    def forward(self, video: Tensor, words: Tensor) -> Tensor:
        x = self.patch(video).flatten(2).transpose(1, 2)
        x = x.chunk(dist.get_world_size(), 1)[dist.get_rank()]
        own = HEADS // dist.get_world_size()
        first, operands = own * dist.get_rank(), []
        for f, g in zip(self.video, self.text, strict=True):
            both = [
                to_heads(f(x).unflatten(-1, (-1, DIM))),
                g(words).unflatten(-1, (-1, DIM))[:, :, first : first + own],
            ]
            operands.append(torch.cat(both[::-1] if self.before else both, 1).transpose(1, 2))
        return F.scaled_dot_product_attention(*operands)


@pytest.mark.parametrize("before", [False, True])
def test_text_of_every_rank_beside_exchanged_video(before: bool) -> None:
    t, h, w = GRID
    (site,) = sites_of(Joint(before), torch.randn(2, 4, t, 2 * h, 2 * w), torch.randn(2, 8, WIDTH))
    assert (site.eligible, site.grid) == (True, GRID), site.reason
    assert site.text_before == (8 if before else 0)
    assert site.share is not None and site.share.numbers == heads_here()


def sent_and_got(x: Tensor) -> tuple[Tensor, Tensor]:
    """What goes to all ranks, (P, N / P, B, H / P, D), and memory for what comes."""
    count = dist.get_world_size()
    sent = x.unflatten(2, (count, -1)).transpose(0, 2).contiguous()
    return sent, torch.empty_like(sent)


def in_order(got: Tensor) -> Tensor:
    """(P, N / P, B, H / P, D) as (B, N, H / P, D)."""
    return got.flatten(0, 1).transpose(0, 1)


def in_halves(x: Tensor) -> Tensor:
    """Two exchanges, each of which fills a part."""
    sent, got = sent_and_got(x)
    half = sent.shape[-1] // 2
    for part in (slice(0, half), slice(half, None)):
        dist.all_to_all_single(got[..., part], sent[..., part].contiguous())
    return in_order(got)


def by_an_older_view(x: Tensor) -> Tensor:
    """What is read is a view of the memory, made before it was filled."""
    sent, got = sent_and_got(x)
    seen = in_order(got.view(got.shape))
    dist.all_to_all_single(got, sent)
    return seen.clone()


def into_a_view(x: Tensor) -> Tensor:
    """What is filled is a view of what is read."""
    sent, got = sent_and_got(x)
    dist.all_to_all_single(got.view(sent.shape), sent)
    return in_order(got)


def with_tokens_of_one_rank(x: Tensor) -> Tensor:
    """Filled, and written over in part by what this rank had."""
    sent, got = sent_and_got(x)
    dist.all_to_all_single(got, sent)
    got[0] = sent[0]
    return in_order(got)


def by_setting(x: Tensor) -> Tensor:
    """A functional exchange, whose result is put into memory piece by piece."""
    sent, got = sent_and_got(x)
    found = collectives.all_to_all_single(sent, None, None, dist.group.WORLD)
    for place in range(dist.get_world_size()):
        got[place] = found[place]
    return in_order(got)


def list_of_pieces(x: Tensor) -> Tensor:
    """Every rank's tokens, gathered into the pieces of one tensor."""
    count = dist.get_world_size()
    whole = torch.empty(x.shape[0], count * x.shape[1], *x.shape[2:])
    dist.all_gather(list(whole.chunk(count, 1)), x)
    return whole


def uneven(x: Tensor) -> Tensor:
    """Rows that are shared out unevenly."""
    sent, _ = sent_and_got(x)
    rows = sent.flatten(0, 1)
    sizes = [rows.shape[0] // dist.get_world_size()] * dist.get_world_size()
    sizes[0] += 1
    sizes[-1] -= 1
    got = torch.empty_like(rows)
    dist.all_to_all_single(got, rows, sizes, sizes)
    return got.transpose(0, 1)


NOT_FOLLOWED = [
    in_halves,
    by_an_older_view,
    into_a_view,
    with_tokens_of_one_rank,
    by_setting,
    list_of_pieces,
]


@pytest.mark.parametrize("exchange", NOT_FOLLOWED)
def test_parts_and_views_that_are_filled_stay_dense(exchange: Callable[[Tensor], Tensor]) -> None:
    """With a grid that fits, too: it says how tokens lie, not whose they are."""
    site = site_of(Attention(exchange))
    assert not site.eligible and site.why.reason is Reason.FILLED, site.reason
    assert site.why.reason in UNREAD


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_one_operand_is_enough(name: str) -> None:
    site = site_of(Attention(to_heads, **{name: into_a_view}))
    assert site.why.reason is Reason.FILLED, site.reason


def test_uneven_parts_tell_no_tokens() -> None:
    x = torch.randn(2, TOKENS // dist.get_world_size(), WIDTH)
    assert not any(site.eligible for site in sites_of(Attention(uneven), x))


class ReadTwice(nn.Module):
    """The same memory before and after it is filled: a rank's own tokens, then those of all."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept = [f(x).unflatten(-1, (-1, DIM)) for f in (self.q, self.k, self.v)]
        filled = [sent_and_got(y) for y in kept]
        for sent, got in filled:
            got.copy_(sent)
        before = F.scaled_dot_product_attention(*(got[0].permute(1, 2, 0, 3) for _, got in filled))
        for sent, got in filled:
            dist.all_to_all_single(got, sent)
        after = F.scaled_dot_product_attention(
            *(in_order(got).transpose(1, 2) for _, got in filled)
        )
        return before, after


def test_the_order_of_writes_counts() -> None:
    x = torch.randn(2, TOKENS // dist.get_world_size(), WIDTH)
    first, second = sites_of(ReadTwice(), x, grid=GRID)
    assert first.share is None and not first.eligible and first.query_length == x.shape[1]
    assert second.eligible and second.share is not None, second.reason
    assert second.share.numbers == heads_here()


class Ring(nn.Module):
    """A rank's queries against keys that another rank sent."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, DIM)).transpose(1, 2) for f in (self.q, self.k, self.v))
        got = [torch.empty_like(y) for y in (k, v)]
        for mine, other in zip((k, v), got, strict=True):
            dist.all_to_all_single(other.flatten(1), mine.flatten(1))
        return F.scaled_dot_product_attention(q, *got)


def test_keys_of_another_rank_are_not_its_own() -> None:
    x = torch.randn(dist.get_world_size(), TOKENS, WIDTH)
    (site,) = sites_of(Ring(), x, grid=GRID)
    assert site.why.reason is Reason.FILLED, site.reason


class Received(nn.Module):
    """The same, sent from rank to rank, where the compiler is told to put that into graphs."""

    def __init__(self, together: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.together = together

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, DIM)).transpose(1, 2) for f in (self.q, self.k, self.v))
        keys, values = torch.empty_like(k), torch.empty_like(v)
        if self.together:
            moves = [dist.P2POp(dist.isend, each, 0) for each in (k, v)]
            moves += [dist.P2POp(dist.irecv, each, 0) for each in (keys, values)]
            for request in dist.batch_isend_irecv(moves):
                request.wait()
        else:
            for each in (keys, values):
                dist.irecv(each, 0).wait()
        return F.scaled_dot_product_attention(q, keys, values)


@pytest.mark.parametrize("together", [False, True])
def test_keys_that_were_received_are_not_its_own(together: bool) -> None:
    if not hasattr(torch._dynamo.config, "enable_p2p_compilation"):
        pytest.skip("the compiler of this PyTorch puts no messages between ranks into graphs")
    with torch._dynamo.config.patch(enable_p2p_compilation=True):
        (site,) = sites_of(Received(together), torch.randn(2, TOKENS, WIDTH), grid=GRID)
    assert site.why.reason is Reason.FILLED, site.reason


class Masked(nn.Module):
    """Text that is padded, whose mask every rank has a part of and gathers."""

    def __init__(self, gather: Callable[[Tensor], Tensor], part: int | None, turned: bool) -> None:
        super().__init__()
        self.patch = nn.Conv3d(4, WIDTH, (1, 2, 2), (1, 2, 2))
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.gather, self.which, self.turned = gather, part, turned

    def forward(self, video: Tensor, words: Tensor) -> Tensor:
        x = self.patch(video).flatten(2).transpose(1, 2)
        mask = torch.cat([words[..., 0] > 0, torch.ones(x.shape[:2], dtype=torch.bool)], 1)
        which = dist.get_rank() if self.which is None else self.which
        own = mask.chunk(dist.get_world_size(), 1)[which].to(torch.uint8).contiguous()
        mask = self.gather(own).bool()
        if self.turned:
            mask = torch.cat(mask.chunk(dist.get_world_size(), 1)[::-1], 1)
        x = torch.cat([words, x], 1).chunk(dist.get_world_size(), 1)[dist.get_rank()]
        q, k, v = (
            to_heads(f(x).unflatten(-1, (-1, DIM))).transpose(1, 2)
            for f in (self.q, self.k, self.v)
        )
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])


@pytest.mark.parametrize("gather", [gather_into, gather_list])
def test_masks_that_were_gathered(gather: Callable[[Tensor], Tensor]) -> None:
    t, h, w = GRID
    inputs = torch.randn(2, 4, t, 2 * h, 2 * w), torch.randn(2, 8, WIDTH)
    (site,) = sites_of(Masked(gather, None, False), *inputs)
    assert (site.eligible, site.grid, site.text_before) == (True, GRID, 8), site.reason
    for other in (Masked(gather, 0, False), Masked(gather, None, True)):
        (site,) = sites_of(other, *inputs)
        assert site.why.reason is Reason.MASK_UNPROVEN
