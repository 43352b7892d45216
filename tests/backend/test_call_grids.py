"""Grids that only data holds, read at every call: two aspects of one length, references, sizes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from passes_toys import WIDTH, Attention
from torch import Tensor, fx, nn

import freqopt
from freqopt.errors import OptionError, SiteError

WIDE, TALL = (1, 14, 12), (1, 12, 14)
OPTIONS: dict[str, Any] = {"threshold": 30.0, "min_tokens": 0, "strict": True, "inner": "eager"}


class Packed(nn.Module):
    """Text before tokens packed into one axis, whose positions are data."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()

    def forward(self, tokens: Tensor, words: Tensor, ids: Tensor) -> Tensor:
        tokens = tokens + ids.sum(-1, keepdim=True).sin()
        out: Tensor = self.attn(torch.cat([words, tokens], 1))
        return out[:, words.shape[1] :]


def places(*extents: int, image: int = 0) -> Tensor:
    found = torch.cartesian_prod(*(torch.arange(float(extent)) for extent in extents))
    return found + torch.tensor([float(image), 0.0, 0.0])


def call(*grids: tuple[int, int, int], batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.cat([places(*grid, image=i) for i, grid in enumerate(grids)])
    return torch.randn(batch, len(ids), WIDTH), torch.randn(batch, 7, WIDTH), ids


def compiled(model: nn.Module, graphs: list[fx.GraphModule] | None = None, **options: Any) -> Any:
    """The model compiled; its graphs are noted where they are asked for."""

    def inner(gm: fx.GraphModule, example: list[Any]) -> Callable[..., Any]:
        assert graphs is not None
        graphs.append(gm)
        return gm.forward

    given = OPTIONS | options | ({} if graphs is None else {"inner": inner})
    torch._dynamo.reset()
    return torch.compile(model, backend="freqopt", options=given)


def splits(graphs: list[fx.GraphModule]) -> int:
    return sum("split_attention" in str(node.target) for gm in graphs for node in gm.graph.nodes)


@pytest.mark.parametrize(
    "inner", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_landscape_and_portrait_in_one_graph_each_get_their_own_grid(inner: str) -> None:
    model, calls = Packed().eval(), [call(WIDE), call(TALL), call((2, 7, 12))]
    assert len({len(ids) for _, _, ids in calls}) == 1
    grids = [WIDE, TALL]
    with torch.no_grad():
        shared = compiled(model, grids=grids, inner=inner)
        got = [shared(*x) for x in calls]
        alone = [
            compiled(model, grid=grid)(*x)
            for grid, x in zip([WIDE, TALL, (2, 7, 12)], calls, strict=True)
        ]
        swapped = compiled(model, grid=WIDE)(*calls[1])
    for mine, own in zip(got, alone, strict=True):
        torch.testing.assert_close(mine, own, rtol=1e-5, atol=1e-5)
    assert (swapped - alone[1]).norm() > 1e-3 * alone[1].norm(), "the grids make no difference"


def test_many_resolutions_need_no_more_graphs_than_dynamo_does() -> None:
    model, sizes = Packed().eval(), [(1, h, 10) for h in (8, 9, 11, 12, 13, 14, 15, 16, 17, 18, 19)]
    graphs: list[fx.GraphModule] = []
    plain: list[fx.GraphModule] = []
    freqopt.reset_counters()
    with torch.no_grad():
        split = compiled(model, graphs, grids=sizes)
        got = [split(*call(size)) for size in sizes]
        torch._dynamo.reset()
        dense = torch.compile(model, backend=lambda gm, example: plain.append(gm) or gm.forward)
        expected = [dense(*call(size)) for size in sizes]
    assert len(graphs) == len(plain) == 2 and splits(graphs) == 2
    assert [x.shape for x in got] == [x.shape for x in expected]
    assert freqopt.counters().split == len(sizes)


def test_training_goes_through_a_grid_that_is_read() -> None:
    model, x = Packed(), call((1, 5, 9))
    compiled(model, grids=[(1, 5, 9)], threshold=0.0)(*x).square().sum().backward()
    got = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    model(*x).square().sum().backward()
    for mine, p in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(mine, p.grad, rtol=1e-3, atol=1e-3)


def test_a_reference_beside_the_target_is_left_exact() -> None:
    model, x = Packed().eval(), call(WIDE, (1, 8, 10))
    (site,) = freqopt.inspect(model, *x, min_tokens=0, grids=[WIDE]).sites
    assert site.eligible and (site.grid, site.text_before, site.text_after) == (WIDE, 7, 80)
    with torch.no_grad():
        read = compiled(model, grids=[WIDE])(*x)
        said = compiled(model, grid=WIDE, after=80)(*x)
        whole = compiled(model, grid=WIDE, before=7, after=80)(*x)
    torch.testing.assert_close(read, said)
    torch.testing.assert_close(read, whole)


def test_other_tokens_that_do_not_add_up_are_told() -> None:
    (site,) = freqopt.inspect(Packed(), *call(WIDE), min_tokens=0, grid=WIDE, after=3).sites
    assert not site.eligible and "168 + 3 = 171" in site.reason.replace("0 + 1x14x12", "168")
    with pytest.raises(OptionError, match="without grid"):
        freqopt.inspect(Packed(), *call(WIDE), after=3)


def test_positions_alone_are_told_and_strict_raises(caplog: pytest.LogCaptureFixture) -> None:
    model, x = Packed().eval(), call(WIDE)
    (site,) = freqopt.inspect(model, *x, min_tokens=0).sites
    assert not site.eligible and "ids holds their positions" in site.reason
    with torch.no_grad():
        with pytest.raises(Exception, match="pass grids="):
            compiled(model)(*x)
        with caplog.at_level(logging.WARNING, "freqopt"):
            got = compiled(model, strict=False)(*x)
        torch.testing.assert_close(got, model(*x))
    assert "of a grid (1, 14, 12): pass grids=" in caplog.text


def test_grids_of_one_length_are_not_guessed() -> None:
    class NoPositions(Packed):
        def forward(self, tokens: Tensor, words: Tensor) -> Tensor:
            return super().forward(tokens, words, tokens.new_zeros(tokens.shape[1], 3))

    tokens, words, _ = call(WIDE)
    (site,) = freqopt.inspect(NoPositions(), tokens, words, grids=[WIDE, TALL], min_tokens=0).sites
    assert not site.eligible and "as many tokens" in site.reason
    (site,) = freqopt.inspect(NoPositions(), tokens, words, grids=[WIDE], min_tokens=0).sites
    assert site.eligible and site.grid == WIDE


def test_a_call_whose_positions_tell_nothing_is_dense(caplog: pytest.LogCaptureFixture) -> None:
    model, x = Packed().eval(), call(WIDE)
    order = torch.randperm(168, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), caplog.at_level(logging.WARNING, "freqopt"):
        split = compiled(model, grids=[WIDE], strict=False)
        assert (split(*x) - model(*x)).norm() > 1e-4
        moved = (*x[:2], x[2][order])
        torch.testing.assert_close(split(*moved), model(*moved), rtol=1e-4, atol=1e-5)
        x[2].copy_(x[2][order])  # the very tensor that was read before
        torch.testing.assert_close(split(*x), model(*x), rtol=1e-4, atol=1e-5)
    assert "ids: no positions" in caplog.text
    torch._dynamo.reset()
    x = call(WIDE)
    with torch.no_grad():
        split = compiled(model, grids=[WIDE], strict=True)
        split(*x)
        for _ in range(2):
            with pytest.raises(SiteError, match="ids: no positions"):
                split(*x[:2], x[2][order])


def test_two_positions_of_one_length_that_disagree_tell_nothing() -> None:
    class Two(Packed):
        def forward(self, tokens: Tensor, words: Tensor, ids: Tensor, other: Tensor) -> Tensor:
            return super().forward(tokens, words, ids + other)

    x = call(WIDE)
    (site,) = freqopt.inspect(Two(), *x, places(*TALL), grids=[(1, 3, 5)], min_tokens=0).sites
    assert not site.eligible
    (site,) = freqopt.inspect(Two(), *x, places(*WIDE), grids=[(1, 3, 5)], min_tokens=0).sites
    assert site.eligible and site.grid == WIDE


Shapes = list[list[tuple[int, int, int]]]


class Shaped(nn.Module):
    """Tokens of several grids in one axis, whose extents are ints among the arguments."""

    def __init__(self, reads: bool = True) -> None:
        super().__init__()
        self.reads, self.attn = reads, Attention()

    def forward(self, tokens: Tensor, words: Tensor, shapes: Shapes) -> Tensor:
        if self.reads:
            rows = [torch.arange(t * h)[:, None] + 0.1 * torch.arange(w) for t, h, w in shapes[0]]
            tokens = tokens + torch.cat([row.flatten() for row in rows])[:, None].sin()
        out: Tensor = self.attn(torch.cat([words, tokens], 1))
        return out


def shaped(*grids: tuple[int, int, int]) -> tuple[Tensor, Tensor, Shapes]:
    tokens, words, _ = call(*grids)
    return tokens, words, [list(grids)] * 2


def test_extents_among_the_arguments_tell_the_grid_of_every_call() -> None:
    model = Shaped().eval()
    grids = [WIDE, TALL, (1, 16, 12), (1, 11, 13), (1, 13, 11)]
    calls = [*(shaped(grid) for grid in grids), shaped(WIDE, (1, 5, 6))]
    with torch.no_grad():
        split = compiled(model, grids=[(1, 8, 8)])
        got = [split(*x) for x in calls]
        own = [compiled(model, grid=grid)(*x) for grid, x in zip(grids, calls, strict=False)]
        own.append(compiled(model, grid=WIDE, after=30)(*calls[-1]))
    for mine, alone, x in zip(got, own, calls, strict=True):
        torch.testing.assert_close(mine, alone, rtol=1e-5, atol=1e-5)
        assert (mine - model(*x)).norm() > 1e-3 * mine.norm()


def test_extents_that_the_model_does_not_read_tell_nothing() -> None:
    """The compiler guards them not, so that a graph would serve calls with others."""
    for reads in (True, False):
        model = Shaped(reads)
        (site,) = freqopt.inspect(model, *shaped(WIDE), min_tokens=0, grids=[(1, 8, 8)]).sites
        assert site.eligible is reads
