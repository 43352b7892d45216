"""freqopt.inspect: what it says of sites, breaks and what no backend sees."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from passes_toys import WIDTH, Attention, Toy, conv3d_tokens, video
from torch import Tensor, nn

import freqopt
from freqopt.backend import freqopt_backend
from freqopt.errors import InputError, OptionError
from freqopt.inspection import InspectedSite, Inspection
from freqopt.positions import grid_of_positions, layout_of_positions

GRID = (3, 6, 10)


class Broken(nn.Module):
    """Blocks in a loop, with something in each that Dynamo leaves the graph for."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.weight = nn.Parameter(torch.randn(WIDTH, 3, 1, 2, 2))
        self.blocks = nn.ModuleList(Attention() for _ in range(3))
        self.last = Attention()

    def forward(self, x: Tensor) -> Tensor:
        x = conv3d_tokens(x, self.weight)
        for block in self.blocks:
            x = block(x)
            if self.where == "loop":
                torch._dynamo.graph_break()
        if self.where == "after":
            torch._dynamo.graph_break()
        q = x[:, None]
        if self.where == "inline":
            for _ in range(1):
                torch._dynamo.graph_break()
                q = F.scaled_dot_product_attention(q, q, q)
        return self.last(q[:, 0])


def test_sites_decisions_and_reasons() -> None:
    found = freqopt.inspect(Toy(text="after"), video(GRID), torch.randn(1, 7, WIDTH))
    assert isinstance(found, Inspection) and found.graphs == 1
    assert not found.graph_breaks and not found.unseen
    assert found.sites[0] == InspectedSite(
        name="blocks.0",
        kind="joint",
        heads=2,
        head_dim=8,
        query_length=187,
        key_length=187,
        grid=GRID,
        text_before=0,
        text_after=7,
        eligible=True,
        decision="dense",
        reason="187 tokens are fewer than min_tokens = 4096",
    )
    found = freqopt.inspect(Toy(), video(GRID), min_tokens=100)
    assert [site.decision for site in found.sites] == ["split", "split"]
    assert found.sites[0].reason == "dense attention on a known grid"
    found = freqopt.inspect(Toy(), video(GRID), min_tokens=100, grid=(6, 3, 10))
    assert found.sites[0].grid == (6, 3, 10)


@pytest.mark.smoke
def test_it_prints_as_a_table_with_equal_layers_in_one_row() -> None:
    printed = str(freqopt.inspect(Toy(), video(GRID), min_tokens=1))
    first, head, row = printed.splitlines()
    assert first == "2 attention sites in 1 graph(s): 2 can be split, 2 will be"
    assert head.split() == "site kind heads tokens grid text decision reason".split()
    assert row.split()[:6] == ["blocks.0-1", "self", "2", "x", "8", "180"]
    assert "3x6x10" in row and "split" in row


def test_it_goes_into_json() -> None:
    found = freqopt.inspect(Toy(), video(GRID))
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["sites"][1]["name"] == "blocks.1" and plain["sites"][1]["grid"] == list(GRID)


def test_a_break_is_named_with_place_and_advice() -> None:
    found = freqopt.inspect(Broken("after"), video(GRID))
    assert found.graphs == 2 and not found.unseen
    (broken,) = found.graph_breaks
    assert "graph_break" in broken.reason and "test_inspection.py:" in broken.where
    assert "fullgraph=True" in str(found)
    # The graph after the break has lost the way back to the video; the whole call has not.
    found = freqopt.inspect(Broken("after"), video(GRID), min_tokens=0)
    assert [site.eligible for site in found.sites] == [True] * 4
    assert [site.decision for site in found.sites] == ["split"] * 3 + ["dense"]
    assert "graph is in pieces" in found.sites[-1].reason


def test_blocks_after_a_break_in_a_loop_share_a_graph_and_are_seen() -> None:
    found = freqopt.inspect(Broken("loop"), video(GRID))
    assert not found.unseen
    assert [site.name for site in found.sites] == ["blocks.0", "blocks.1", "blocks.2", "last"]
    assert any("graph_break" in broken.reason for broken in found.graph_breaks)


def test_attention_that_no_backend_sees_is_named() -> None:
    found = freqopt.inspect(Broken("inline"), video(GRID))
    assert found.unseen == [""]
    printed = str(found)
    assert "outside all graphs" in printed and "the model itself" in printed


def test_what_was_compiled_for_looking_is_forgotten() -> None:
    model, graphs = Toy(), []

    def backend(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    for _ in range(10):  # more often than the limit of recompilations
        freqopt.inspect(model, video(GRID))
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(video(GRID))
    assert len(graphs) == 1


def test_what_another_backend_gave_up_is_looked_at_again() -> None:
    """Dynamo skips a function for good once a loop in it has broken, in all models of its class."""
    whole = Broken("nowhere")
    before = freqopt.inspect(whole, video(GRID))
    assert before.graphs == 1 and len(before.sites) == 4 and not before.graph_breaks
    with torch.no_grad():
        torch.compile(Broken("loop"), backend="eager")(video(GRID))
    assert freqopt.inspect(whole, video(GRID)) == before


def test_a_compiled_model_is_inspected_as_it_was_before() -> None:
    compiled = torch.compile(Toy(), backend=freqopt_backend, options={"inner": "eager"})
    assert [s.name for s in freqopt.inspect(compiled, video(GRID)).sites] == [
        "blocks.0",
        "blocks.1",
    ]


def test_model_and_random_state_are_left_alone() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.toy, self.drop = Toy(), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(self.toy(x))

    model = Noisy().train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    freqopt.inspect(model, video(GRID), min_tokens=1)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    torch.set_rng_state(state)
    video(GRID)
    assert torch.equal(torch.get_rng_state(), after)
    assert model.training and all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())


def test_bad_input_is_refused() -> None:
    with pytest.raises(InputError, match=r"torch\.nn\.Module"):
        freqopt.inspect(lambda x: x, video(GRID))  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="three positive extents"):
        freqopt.inspect(Toy(), video(GRID), grid=(3, 6))


def test_a_model_without_attention() -> None:
    found = freqopt.inspect(nn.Linear(4, 4), torch.randn(2, 4))
    assert not found.sites and "no attention was found" in str(found)


class Flat(nn.Module):
    """Attention over tokens whose grid is in the values of their positions only."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, tokens: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.attention(tokens + ids.sum(-1, keepdim=True))
        return out


def places(*extents: int) -> torch.Tensor:
    return torch.cartesian_prod(*(torch.arange(float(extent)) for extent in extents))


def test_the_grid_that_positions_hold_is_told() -> None:
    tokens = torch.randn(2, 180, WIDTH)
    for ids, grid in ((places(3, 6, 10), (3, 6, 10)), (places(1, 18, 10), (1, 18, 10))):
        found = freqopt.inspect(Flat(), tokens, ids=ids, min_tokens=1)
        assert found.positions == {"ids": grid} and not found.sites[0].eligible
        assert f"ids holds the positions of a {'x'.join(map(str, grid))} grid" in str(found)
        given = freqopt.inspect(Flat(), tokens, ids=ids, grid=grid, min_tokens=1)
        assert given.sites[0].grid == grid and "pass grid=" not in str(given)


@pytest.mark.parametrize(
    "ids",
    [
        places(3, 6, 10)[torch.randperm(180, generator=torch.Generator().manual_seed(0))],
        torch.cat([places(1, 6, 10), places(1, 10, 6)]),
        places(1, 1, 180),
        -places(3, 6, 10),
        torch.zeros(180, 3),
        torch.stack([places(3, 6, 10), places(6, 3, 10)]),
        torch.randn(180, 64),
        torch.zeros(0, 180, 3),
        torch.zeros(0, 3),
    ],
)
def test_other_positions_tell_no_grid(ids: torch.Tensor) -> None:
    assert grid_of_positions(ids) is None


COUNTING = torch.arange(9.0)[:, None].expand(9, 3)
UNEVEN = [torch.tensor(axis) for axis in ([0, 1, 9, 17], [0, 1, 2], [0, 2, 3])]


def reference(image: int, *extents: int) -> torch.Tensor:
    return places(*extents) + torch.tensor([float(image), 0.0, 0.0])


@pytest.mark.parametrize(
    ("ids", "layout"),
    [
        (places(3, 6, 10).flip(-1), (0, (3, 6, 10), 0)),
        (places(3, 6, 10) ** 2, (0, (3, 6, 10), 0)),
        (places(3, 6, 10)[:-1], (0, (2, 6, 10), 59)),
        (torch.cat([places(3, 6, 10), places(1, 6, 10)]), (0, (3, 6, 10), 60)),
        (torch.cat([places(1, 14, 12), reference(1, 1, 8, 10)]), (0, (1, 14, 12), 80)),
        (torch.cat([places(1, 8, 10), reference(1, 1, 14, 12)]), (80, (1, 14, 12), 0)),
        (torch.cat([places(1, 6, 10), reference(1, 1, 6, 10)]), (0, (2, 6, 10), 0)),
        (torch.cat([torch.zeros(12, 3), places(1, 14, 12)]), (12, (1, 14, 12), 0)),
        (torch.cat([COUNTING, 9 + places(1, 5, 7)]), (9, (1, 5, 7), 0)),
        (torch.cartesian_prod(*UNEVEN), (0, (4, 3, 3), 0)),
        (places(5, 7, 9).T[None].expand(2, -1, -1), (0, (5, 7, 9), 0)),
        (torch.stack([places(5, 7, 9).T, places(5, 7, 9).T + 1], -1)[None], (0, (5, 7, 9), 0)),
    ],
)
def test_the_main_grid_and_what_lies_around_it_are_told(
    ids: torch.Tensor, layout: tuple[int, tuple[int, int, int], int]
) -> None:
    assert layout_of_positions(ids) == layout
