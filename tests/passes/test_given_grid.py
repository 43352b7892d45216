"""A grid that the user gives, where the number of tokens is symbolic: guarded, or refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from passes_toys import WIDTH, Attention, sites_of
from torch import Tensor, fx, nn

import freqopt
from freqopt.backend import freqopt_backend
from freqopt.passes.reasons import Reason

GRID = (5, 7, 9)


class Packed(nn.Module):
    """Attention over tokens that were packed before the model, with text in front or without."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, tokens: Tensor, text: Tensor | None = None) -> Tensor:
        if text is not None:
            tokens = torch.cat([text, tokens], 1)
        return self.attention(tokens)


class Graphs:
    """An inner backend that counts the graphs it is given, and their split sites."""

    def __init__(self) -> None:
        self.split: list[int] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        names = [str(node.target) for node in gm.graph.nodes]
        self.split.append(names.count("freqopt.split_attention.default"))
        return gm.forward


def compiled(model: nn.Module, graphs: Graphs, **options: Any) -> Any:
    torch._dynamo.reset()
    freqopt.reset_counters()
    given = {"threshold": 0.0, "min_tokens": 1, "inner": graphs, "grid": GRID, **options}
    return torch.compile(
        model, backend=freqopt_backend, dynamic=True, fullgraph=True, options=given
    )


@pytest.mark.parametrize("text", [0, 7])
def test_other_lengths_get_their_own_graph(text: int) -> None:
    model, graphs = Packed(), Graphs()
    run = compiled(model, graphs)

    def call(tokens: int, batch: int) -> list[int]:
        inputs = [torch.randn(batch, tokens, WIDTH)]
        inputs += [torch.randn(batch, text, WIDTH)] if text else []
        with torch.no_grad():
            torch.testing.assert_close(run(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)
        return list(graphs.split)

    assert call(5 * 7 * 9, 2) == [1]
    assert call(5 * 7 * 9, 3) == [1], "the batch is still symbolic"
    assert call(180, 2) == [1, 0], "another length is dense, in a graph of its own"
    assert call(200, 3) == [1, 0]
    assert call(5 * 7 * 9, 2) == [1, 0]
    counts = freqopt.counters()
    assert (counts.split, counts.dense) == (3, 2)
    assert any("grid=" in site.reason for site in counts.sites if not site.split)


def test_a_length_that_depends_on_data_stays_dense() -> None:
    """No guard can be put on it, so that nothing says that the grid is right."""

    class Selected(Packed):
        def forward(self, tokens: Tensor, text: Tensor | None = None) -> Tensor:
            chosen = tokens[0, :, 0].nonzero()[:, 0]
            torch._check(chosen.shape[0] > 1)
            return self.attention(tokens.index_select(1, chosen))

    model, graphs = Selected(), Graphs()
    x = torch.randn(1, 5 * 7 * 9, WIDTH)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True), torch.no_grad():
        torch.testing.assert_close(compiled(model, graphs)(x), model(x), rtol=1e-4, atol=1e-5)
    assert graphs.split == [0]
    assert "grid=" in freqopt.counters().sites[0].reason


def test_several_grids_serve_several_resolutions() -> None:
    model, graphs = Packed(), Graphs()
    run = compiled(model, graphs, grid=None, grids=[(3, 6, 10), GRID])
    for tokens, split in ((5 * 7 * 9, 1), (180, 1), (200, 0)):
        inputs = (torch.randn(2, tokens, WIDTH), torch.randn(2, 7, WIDTH))
        with torch.no_grad():
            torch.testing.assert_close(run(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)
        assert graphs.split[-1] == split
    assert len(graphs.split) == 3


class TokensFirst(nn.Module):
    """A layer whose tokens come first, (N, B, C), as in Megatron; with text, and positions."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, tokens: Tensor, text: Tensor, table: Tensor | None = None) -> Tensor:
        x = torch.cat([tokens, text]).permute(1, 0, 2)
        return self.attention(x if table is None else x * table).permute(1, 0, 2)


@pytest.mark.parametrize("table", [False, True])
def test_tokens_that_come_first_have_their_batch_behind_them(table: bool) -> None:
    """The second axis of such an input is no axis of the video."""
    model, graphs = TokensFirst(), Graphs()
    run = compiled(model, graphs, strict=True)
    inputs = [torch.randn(5 * 7 * 9, 2, WIDTH), torch.randn(7, 2, WIDTH)]
    inputs += [torch.rand(2, 5 * 7 * 9 + 7, WIDTH)] if table else []
    with torch.no_grad():
        torch.testing.assert_close(run(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)
    assert graphs.split == [1]


OVER_FRAMES = {
    "a video": ((5, 7, 9), lambda x: x.movedim(0, 2).flatten(0, 1), Reason.SLICES),
    "a batch in front": ((2, 5, 63), lambda x: x.transpose(1, 2).flatten(0, 1), Reason.SLICES),
    "a batch folded in": (
        (10, 63),
        lambda x: x.unflatten(0, (2, 5)).transpose(1, 2).flatten(0, 1),
        Reason.SLICES,
    ),
    "packed frames": ((5, 63), lambda x: x.transpose(0, 1), Reason.GRID_MISFIT),
}
"""Shapes of inputs before their channels, how they become (batch, frames, channels), and why that
is dense."""


@pytest.mark.parametrize("name", OVER_FRAMES)
def test_attention_in_time_is_none_of_tokens_that_come_first(name: str) -> None:
    """Frames come first there too, or behind a batch; the patches behind them are no batch."""
    sizes, ordered, reason = OVER_FRAMES[name]
    attention = Attention()
    (site,) = sites_of(lambda x: attention(ordered(x)), torch.randn(*sizes, WIDTH), grid=GRID)
    assert not site.eligible
    assert site.why.reason == reason, site.reason
