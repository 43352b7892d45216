"""Orders by content in compiled graphs: what a grid cannot serve, plans' orders, and exports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from passes_toys import DIM, HEADS, Toy, video
from torch import Tensor, fx, nn

import freqopt
from freqopt.config import ALL
from freqopt.errors import OptionError
from freqopt.exporters.program import make_program
from freqopt.plan.plan import Plan, model_fingerprint
from freqopt.plan.records import Budget, Evidence, ModelIdentity, SitePlan, Versions

GRID = (6, 8, 16)


class TwoKinds(nn.Module):
    """Self-attention over tokens (B, N, 32) that come without a grid, then over a memory's."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.other, self.out = nn.Linear(32, 96), nn.Linear(32, 64), nn.Linear(32, 32)

    def forward(self, tokens: Tensor, memory: Tensor) -> Tensor:
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (2, 16)).transpose(1, 2)

        q, k, v = (heads(x) for x in self.qkv(tokens).chunk(3, -1))
        x = F.scaled_dot_product_attention(q, k, v)
        k, v = (heads(x) for x in self.other(memory).chunk(2, -1))
        x = F.scaled_dot_product_attention(x, k, v)
        return self.out(x.transpose(1, 2).flatten(2))


def run(
    model: nn.Module, inputs: tuple[Tensor, ...], **options: Any
) -> tuple[Tensor, list[tuple[Any, ...]]]:
    """The output, and the arguments of the op's calls, constants of the graph as tensors."""
    found: list[tuple[Any, ...]] = []

    def inner(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        def read(argument: Any) -> Any:
            if isinstance(argument, fx.Node) and argument.op == "get_attr":
                return getattr(gm, str(argument.target))
            return argument

        found.extend(
            tuple(map(read, node.args))
            for node in gm.graph.nodes
            if str(node.target) == "freqopt.split_attention.default"
        )
        return gm.forward

    torch._dynamo.reset()
    options = {"inner": inner, "min_tokens": 1, **options}
    with torch.no_grad():
        compiled = torch.compile(model, backend="freqopt", options=options, dynamic=False)
        return compiled(*inputs), found


def test_without_a_grid_only_when_it_is_asked_for() -> None:
    model, inputs = TwoKinds().eval(), (torch.randn(2, 700, 32), torch.randn(2, 530, 32))
    expected = model(*inputs)
    plain, calls = run(model, inputs, threshold=0.0)
    assert not calls
    torch.testing.assert_close(plain, expected)
    out, calls = run(model, inputs, threshold=0.0, order="content", chunk="all", strict=True)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    own, other = calls
    assert own[5:8] == ([1, 1, 700], 0, 0) and own[12] == ALL and len(own) == 13
    assert own[11].tolist() == [ALL, ALL]
    assert other[5:8] == ([1, 1, 530], 0, 0) and other[15] == [1, 1, 700, 0, 0]
    rough, _ = run(model, inputs, order="content")
    assert 1e-4 < (rough - expected).norm() / expected.norm() < 0.3


def test_inspection_says_by_content() -> None:
    model, inputs = TwoKinds().eval(), (torch.randn(1, 300, 32), torch.randn(1, 310, 32))
    for order, eligible in ((None, False), ("content", True)):
        sites = freqopt.inspect(model, *inputs, min_tokens=1, order=order).sites
        assert [site.eligible for site in sites] == [eligible] * 2
        assert all(("by content" in site.reason) == eligible for site in sites)


def test_keys_of_a_cache_are_named_as_such() -> None:
    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(16, 32)

        def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            q = self.q(x).unflatten(-1, (2, 16)).transpose(1, 2)
            return F.scaled_dot_product_attention(q, keys[:, :, :400], values[:, :, :400])

    model = Cached()
    inputs = torch.randn(1, 180, 16), torch.randn(1, 2, 540, 16), torch.randn(1, 2, 540, 16)
    (site,) = freqopt.inspect(model, *inputs, min_tokens=1).sites
    assert "cache" in site.reason and not site.eligible
    out, calls = run(model, inputs, threshold=0.0, order="content")
    assert len(calls) == 1
    torch.testing.assert_close(out, model(*inputs), rtol=1e-4, atol=1e-5)


def test_a_mask_keeps_it_dense() -> None:
    class Masked(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    q, k, v = torch.randn(3, 1, 2, 300, 16)
    mask = torch.rand(1, 1, 300, 300) > 0.5
    _, calls = run(Masked(), (q, k, v, mask), threshold=0.0, order="content")
    assert not calls


def test_dynamic_lengths_are_read_at_the_call() -> None:
    model = TwoKinds().eval()
    compiled = torch.compile(
        model,
        backend="freqopt",
        dynamic=True,
        options={"inner": "eager", "min_tokens": 1, "threshold": 0.0, "order": "content"},
    )
    torch._dynamo.reset()
    with torch.no_grad():
        for lengths in ((300, 400), (500, 290)):
            inputs = [torch.randn(1, n, 32) for n in lengths]
            torch.testing.assert_close(compiled(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)


def with_chunks(chunks: list[int]) -> Plan:
    """A plan that splits the first of two sites, with its heads' chunks."""
    shape: dict[str, Any] = {"heads": HEADS, "head_dim": DIM, "tokens": 6 * 8 * 16, "reason": ""}
    budget = Budget(threshold=[0.5] * HEADS)
    sites = {
        "blocks.0": SitePlan(decision="split", budgets=[budget], chunks=chunks, **shape),
        "blocks.1": SitePlan(decision="dense", **shape),
    }
    return Plan(
        model=ModelIdentity(class_name="Toy", fingerprint=model_fingerprint(Toy())),
        grids=[GRID],
        device="cpu",
        versions=Versions(freqopt="0", torch="0"),
        target_error=0.03,
        measured_error=0.02,
        worst_error=0.02,
        mean_density=0.5,
        sites=sites,
        evidence=Evidence(samples=1, held_out=1),
    )


def test_a_plan_says_how_each_head_is_ordered() -> None:
    _, calls = run(Toy(), (video(GRID),), plan=with_chunks([0, 512]))
    ordered = [call for call in calls if len(call) > 11]
    assert len(ordered) == 1 and ordered[0][11].tolist() == [0, 512] and ordered[0][12] == 512
    assert ordered[0][5] == list(GRID)


def test_an_exported_program_orders_the_same_heads() -> None:
    program = make_program(Toy(), (video(GRID),), plan=with_chunks([0, 512]))
    site = program.split["blocks.0"]
    assert site.chunks == "freqopt.chunks.blocks.0" and site.largest_chunk == 512
    held = dict(program.exported.named_buffers())
    assert held[site.chunks].tolist() == [0, 512]
    assert not site.other_queries and list(program.dense) == ["blocks.1"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"order": "contents"}, "'grid' or 'content'"),
        ({"chunk": 512}, "without order='content'"),
        ({"order": "content", "chunk": 100}, "power of two"),
        ({"order": "grid", "plan": with_chunks([])}, "plan and order"),
    ],
)
def test_bad_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(Exception, match=said) as caught:
        run(Toy(), (video(GRID),), **options)
    error: BaseException | None = caught.value
    while error is not None and not isinstance(error, OptionError):
        error = getattr(error, "inner_exception", None) or error.__cause__
    assert isinstance(error, OptionError)
