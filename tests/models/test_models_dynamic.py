"""Real models and toys under dynamic=True: sizes are symbols, floats of modules are inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_cases import load_all
from model_checks import look, problems
from passes_toys import WIDTH, Attention, Toy, heads, linear_tokens, sites_of, video
from quick_compilers import symbols_computed_anew
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from freqopt.backend import freqopt_backend
from freqopt.passes.axes.dimensions import same
from freqopt.passes.axes.divisions import learn_divisions


@pytest.fixture(autouse=True)
def _computed_anew() -> Iterator[None]:
    with symbols_computed_anew():
        yield


CASES = load_all()
ONE_OF_A_KIND = ("cosmos", "helios_history", "flux", "videomae_eager")
"""Patches by reshapes, a history, and floats of modules, packed and not; the rest is slow."""

KNOWN_TO_STAY = {
    "hunyuan15": "each of its blocks gets a graph of its own",
}


def check(name: str) -> None:
    case = CASES[name]
    grid, batch = case.variant(list(CASES).index(name))
    assert not problems(case, grid, look(case, grid, batch, dynamic=True))


@pytest.mark.parametrize("name", ONE_OF_A_KIND)
def test_attention_is_found_and_split(name: str) -> None:
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in CASES if name not in (*KNOWN_TO_STAY, *ONE_OF_A_KIND)]
)
def test_all_models(name: str) -> None:
    check(name)


def symbols(*sizes: int) -> list[torch.SymInt]:
    """Sizes of a tensor with symbolic shape."""
    mode = torch._subclasses.FakeTensorMode(shape_env=ShapeEnv())
    whole = torch.empty(sizes)
    for dim in range(len(sizes)):
        torch._dynamo.mark_dynamic(whole, dim)
    return list(mode.from_tensor(whole).shape)  # type: ignore[arg-type]


def test_a_reshape_tells_that_a_division_is_exact() -> None:
    height, width = symbols(12, 20)
    half, quarter = height // 2, width // 4
    assert not same(half * 2, height)
    learn_divisions([height, width], [half, 2, quarter, 4], [half, 2, quarter, 4])
    assert same(half * 2, height) and same(quarter * 4, width)
    assert same(half * quarter * 8, height * width)
    assert not same(width // 2 * 2, width) and not same(half * 2, width)


def test_a_reshape_that_only_might_keep_the_elements_tells_nothing() -> None:
    height, width = symbols(12, 20)
    half = height // 2
    learn_divisions([height], [half, 3], [half, 3])
    learn_divisions([height, width], [half, width, 2, 2], [half, width, 2, 2])
    assert not same(half * 2, height) and not same(half * 3, height)


def test_one_graph_for_all_sizes_of_rearranged_patches() -> None:
    model, graphs = Toy(linear_tokens).eval(), []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(gm)
        options = {"threshold": 0.0, "min_tokens": 1, "strict": True, "inner": "eager"}
        return freqopt_backend(gm, example_inputs, options=options)

    compiled = torch.compile(model, backend=backend, dynamic=True)
    with torch.no_grad():
        for grid in ((4, 6, 10), (5, 7, 9), (6, 9, 5)):
            x = video(grid, 2)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    (gm,) = graphs
    assert sum("split_attention" in str(node.target) for node in gm.graph.nodes) == 2


class Scaled(nn.Module):
    """A scale and a dropout that are floats of the module; under dynamic=True, graph inputs."""

    def __init__(self, by_hand: bool) -> None:
        super().__init__()
        self.by_hand, self.scale, self.drop = by_hand, 0.3, 0.0
        self.qkv, self.weight = nn.Linear(WIDTH, 3 * WIDTH), torch.randn(WIDTH, 3, 1, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = F.conv3d(x, self.weight, stride=(1, 2, 2)).flatten(2).transpose(1, 2)
        q, k, v = (heads(y) for y in self.qkv(tokens).chunk(3, -1))
        if self.by_hand:
            weights = (q @ k.transpose(-1, -2) * self.scale).softmax(-1)
            return F.dropout(weights, self.drop) @ v
        return F.scaled_dot_product_attention(q, k, v, dropout_p=self.drop, scale=self.scale)


@pytest.mark.parametrize("by_hand", [False, True])
def test_floats_of_a_module_are_read_and_guarded(by_hand: bool) -> None:
    """Another scale is another graph; dropout leaves the attention dense."""
    model, x = Scaled(by_hand), video(batch=2)
    options = {"threshold": 0.0, "min_tokens": 1, "strict": True, "inner": "eager"}
    compiled = torch.compile(model, backend=freqopt_backend, dynamic=True, options=options)
    with torch.no_grad():
        for model.scale in (0.3, 0.9):
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    (site,) = sites_of(model, x, dynamic=True)
    assert site.eligible and site.scale == 0.9
    model.drop = 0.5
    (site,) = sites_of(model, x, dynamic=True)
    assert not site.eligible and "dropout" in site.reason


def test_a_scale_that_the_graph_computes_stays_dense() -> None:
    """It is of the number of tokens here; a guard would compile anew for each of them."""

    class ByLength(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.toy = Toy()
            self.toy.blocks[0] = Attention(
                lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=q.shape[2] ** -0.25)
            )

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.toy(x)
            return out

    first, second = sites_of(ByLength(), video(), dynamic=True)
    assert not first.eligible and "scale" in first.reason
    assert second.eligible
