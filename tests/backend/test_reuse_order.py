"""`reuse_order`: whose order serves which calls, and when it is made anew."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import freqopt
from freqopt.errors import OptionError
from freqopt.options import parse_options

TOKENS = 420


class Layer(nn.Module):
    """Self-attention over tokens (B, N, 32) that come without a grid."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, tokens: Tensor) -> Tensor:
        heads = (x.unflatten(-1, (2, 16)).transpose(1, 2) for x in self.qkv(tokens).chunk(3, -1))
        x = F.scaled_dot_product_attention(*heads)
        return self.out(x.transpose(1, 2).flatten(2))


class Layers(nn.Module):
    """Two layers, the second over a memory as well: its queries are other tokens than its keys."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Layer(1), Layer(2)

    def forward(self, tokens: Tensor, memory: Tensor) -> Tensor:
        x = tokens + self.first(tokens)
        q = self.second.qkv(x)[..., :32].unflatten(-1, (2, 16)).transpose(1, 2)
        k, v = (
            m.unflatten(-1, (2, 16)).transpose(1, 2)
            for m in self.second.qkv(memory)[..., 32:].chunk(2, -1)
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def tokens(seed: int, count: int = TOKENS, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    kinds = 2 * torch.randn(6, 32, generator=generator)
    which = torch.randint(6, (batch, count), generator=generator)
    return kinds[which] + 0.3 * torch.randn(batch, count, 32, generator=generator)


class Counting:
    """An inner backend that counts runs of graphs that make orders, and of others."""

    def __init__(self, inner: str = "eager") -> None:
        self.inner, self.graphs, self.made, self.given = inner, 0, 0, 0

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        op = torch.ops.freqopt.split_attention.default
        calls = gm.graph.find_nodes(op="call_function", target=op)
        makes = any(len(call.args) > 12 and call.args[12] for call in calls)
        self.graphs += 1
        compiled = torch._dynamo.lookup_backend(self.inner)(gm, example_inputs)

        def run(*arguments: Any) -> Any:
            self.made += makes
            self.given += not makes
            return compiled(*arguments)

        return run


def compiled(
    model: nn.Module, reuse: int | None, inner: Any = "eager", **options: Any
) -> Callable[..., Any]:
    torch._dynamo.reset()
    given = {"inner": inner, "min_tokens": 1, "order": "content", "chunk": 256, **options}
    if reuse is not None:
        given["reuse_order"] = reuse
    return torch.compile(model, backend="freqopt", options=given, dynamic=False)


@torch.no_grad()
def outputs(run: Callable[..., Any], *calls: Sequence[Tensor]) -> list[Tensor]:
    return [run(*call) for call in calls]


def test_one_call_is_as_without_it() -> None:
    model, calls = Layers().eval(), [(tokens(i), tokens(i + 9, 330)) for i in range(3)]
    plain = outputs(compiled(model, None), *calls)
    same = outputs(compiled(model, 1), *calls)
    assert all(torch.equal(a, b) for a, b in zip(plain, same, strict=True))


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_an_order_serves_so_many_calls(inner: str) -> None:
    """The first call's keys order the next two, and the fourth makes its own."""
    model, counting = Layers().eval(), Counting(inner)
    calls = [(tokens(i), tokens(i + 9, 330)) for i in range(4)]
    plain = outputs(compiled(model, None, inner), *calls)
    kept = outputs(compiled(model, 3, counting), *calls)
    assert (counting.made, counting.given) == (2, 2)
    for i, (a, b) in enumerate(zip(plain, kept, strict=True)):
        assert torch.equal(a, b) == (i in (0, 3)), i
    again = outputs(compiled(model, 3, inner), calls[0], calls[0])
    torch.testing.assert_close(again[1], again[0])


def test_threshold_zero_is_dense_whatever_the_order() -> None:
    model = Layers().eval()
    calls = [(tokens(i), tokens(i + 9, 330)) for i in range(3)]
    for call, out in zip(calls, outputs(compiled(model, 3, threshold=0.0), *calls), strict=True):
        torch.testing.assert_close(out, model(*call).detach(), rtol=1e-4, atol=1e-5)


def test_layers_and_models_that_share_a_graph_share_no_order() -> None:
    layers, counting = [Layer(i).eval() for i in range(3)], Counting()
    options = {"inner": counting, "min_tokens": 1, "order": "content", "reuse_order": 2}
    torch._dynamo.reset()
    for layer in layers:
        layer.compile(backend="freqopt", options=options, dynamic=False)
    alone = [outputs(compiled(Layer(i).eval(), None, chunk=1024), [tokens(5)])[0] for i in range(3)]
    torch._dynamo.reset()
    found = [outputs(layer, [tokens(5)])[0] for layer in layers]
    assert (counting.graphs, counting.made, counting.given) == (2, 3, 0)
    assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))
    outputs(layers[1], [tokens(6)])
    assert (counting.made, counting.given) == (3, 1)


def test_threads_share_no_order() -> None:
    model, counting = Layer().eval(), Counting()
    run = compiled(model, 2, counting)
    outputs(run, [tokens(0)])
    other = threading.Thread(target=outputs, args=(run, [tokens(1)]))
    other.start()
    other.join()
    assert (counting.made, counting.given) == (2, 0)
    outputs(run, [tokens(2)])
    assert (counting.made, counting.given) == (2, 1)


def test_other_sizes_begin_anew() -> None:
    """Under dynamic shapes one graph serves both lengths, and both batches."""
    model, counting = Layer().eval(), Counting()
    torch._dynamo.reset()
    options = {"inner": counting, "min_tokens": 1, "order": "content", "reuse_order": 9}
    run = torch.compile(model, backend="freqopt", options=options, dynamic=True)
    sizes = [(420, 2), (420, 2), (430, 2), (430, 2), (430, 3), (420, 2)]
    for seed, (count, batch) in enumerate(sizes):
        (out,) = outputs(run, [tokens(seed, count, batch)])
        assert out.isfinite().all() and out.shape == (batch, count, 32)
    assert (counting.graphs, counting.made, counting.given) == (2, 4, 2)


class Stepped(Layer):
    """Told which step it is, and how many of its tokens are to be attended."""

    def forward(self, tokens: Tensor, step: int, kept: int) -> Tensor:
        q, k, v = (x.unflatten(-1, (2, 16)).transpose(1, 2) for x in self.qkv(tokens).chunk(3, -1))
        x = F.scaled_dot_product_attention(q, k[:, :, :kept], v[:, :, :kept])
        return x.transpose(1, 2).flatten(2) * step


def test_numbers_that_are_no_sizes_are_none_of_its_business() -> None:
    model, counting = Stepped().eval(), Counting()
    torch._dynamo.reset()
    options = {"inner": counting, "min_tokens": 1, "order": "content", "reuse_order": 9}
    run = torch.compile(model, backend="freqopt", options=options, dynamic=True)
    for step, kept in ((3, 300), (4, 300), (5, 300), (6, 280), (7, 280)):
        (out,) = outputs(run, [tokens(step), step, kept])  # type: ignore[list-item]
        assert out.isfinite().all()
    assert (counting.graphs, counting.made, counting.given) == (2, 2, 3)


def test_gradients_and_functions_keep_nothing(caplog: pytest.LogCaptureFixture) -> None:
    counting = Counting()
    run = compiled(Layer(), 4, counting)
    for seed in range(2):
        run(tokens(seed)).sum().backward()
    assert (counting.made, counting.given) == (2, 0)

    def function(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)

    x = tokens(0).unflatten(-1, (2, 16)).transpose(1, 2)
    counting = Counting()
    with caplog.at_level("WARNING"):
        outputs(compiled(function, 4, counting), [x], [x])  # type: ignore[arg-type]
    assert (counting.made, counting.given) == (2, 0)
    assert sum("no module runs this graph" in r.message for r in caplog.records) == 1


def test_a_new_plan_of_attached_budgets_begins_anew() -> None:
    """Chunks that come with the module are looked at in every call."""
    from freqopt.reuse import _Kept

    budget = torch.zeros(2, 2)
    kept = _Kept([], (3,), [(budget, budget._version)], 5)
    assert kept.serves((3,), [budget]) and not kept.serves((4,), [budget])
    assert not kept.serves((3,), [budget.clone()])
    budget[1] = 512
    assert not kept.serves((3,), [budget])


def test_sites_by_the_grid_are_left_alone() -> None:
    counting = Counting()
    model = Layer().eval()
    run = compiled(model, 4, counting, order="grid", chunk=None, grid=(1, 20, 21))
    outputs(run, [tokens(0)], [tokens(1)])
    assert (counting.made, counting.given) == (0, 2)


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "2"])
def test_bad_numbers(wrong: object) -> None:
    with pytest.raises(OptionError, match="reuse_order"):
        parse_options({"reuse_order": wrong})
    assert freqopt.Options(reuse_order=3).reuse_order == 3
