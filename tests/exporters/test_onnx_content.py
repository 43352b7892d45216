"""Orders by content in ONNX: the bodies given an order, the orders themselves, and whole files."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import numpy as np
from attention_cases import (
    CONTENT_CASES,
    RECTANGULAR_CASES,
    Case,
    budget_for,
    clustered,
    dense,
    make_tensors,
    orders_of,
    reference_split,
    relative,
)
from onnx_cases import feed, order_model, session, split_model

import freqopt
from freqopt.config import ALL
from freqopt.errors import OptionError, PlanError
from freqopt.exporters.exchange import exchange_plan
from freqopt.exporters.manifest import Artifact
from freqopt.exporters.onnx.content import CONTENT_NAME
from freqopt.exporters.onnx.export import write_onnx
from freqopt.exporters.program import make_program
from freqopt.exporters.runner import run_artifact
from freqopt.kernels.content_order import content_order, spread
from freqopt.plan.plan import Plan, model_fingerprint

pytestmark = pytest.mark.filterwarnings("ignore")
ALL_RESULTS = ("out", "route", "coefficients", "probe_error")


@cache
def split_session(own: int, dim: int, density: float = 0.0) -> onnxruntime.InferenceSession:
    attributes = {"scale": dim**-0.5, "density": density, "probes": 64, "own": own}
    return session(split_model(20, torch.float32, ALL_RESULTS, takes_order=True, **attributes))


@pytest.mark.parametrize("case", CONTENT_CASES + RECTANGULAR_CASES, ids=str)
def test_given_an_order_the_body_is_the_definition(case: Case) -> None:
    tensors, orders = make_tensors(case), orders_of(case, make_tensors(case))
    budget = budget_for(case, tensors, 0.3)
    expected, split = reference_split(case, tensors, budget)
    runner = split_session(int(case.queries is None), case.dim)
    found = runner.run(None, feed(case, tensors, budget, orders))
    out, route, coefficients, error = map(torch.from_numpy, found)
    assert torch.equal(route, split.route.long())
    assert relative(out, expected) < 1e-5
    torch.testing.assert_close(coefficients[..., 0], split.probe.c, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(error, split.probe.error, rtol=1e-3, atol=1e-4)
    exact = runner.run(["out"], feed(case, tensors, 0 * budget, orders))[0]
    assert relative(torch.from_numpy(exact), dense(case, tensors)) < 1e-5


def test_a_density_among_queries_of_other_tokens() -> None:
    case = RECTANGULAR_CASES[0]
    tensors, orders = make_tensors(case), orders_of(case, make_tensors(case))
    expected, split = reference_split(case, tensors, torch.zeros(case.heads), density=0.2)
    runner = split_session(0, case.dim, 0.2)
    found = runner.run(None, feed(case, tensors, torch.zeros(case.heads), orders))
    assert torch.equal(torch.from_numpy(found[1]), split.route.long())
    assert relative(torch.from_numpy(found[0]), expected) < 1e-5


@cache
def order_session(opset: int = 20) -> onnxruntime.InferenceSession:
    model = order_model(opset, torch.float32)
    onnx.checker.check_model(model, full_check=True)
    return session(model)


def order_of(
    tokens: Tensor, base: Tensor, chunks: list[int], before: int = 0, opset: int = 20
) -> Tensor:
    given = {
        "tokens": tokens.numpy(),
        "base": base.numpy(),
        "chunks": np.array(chunks, np.int32),
        "text_before": np.array([before]),
    }
    return torch.from_numpy(order_session(opset).run(None, given)[0])


def is_permutation(order: Tensor) -> bool:
    return bool((order.sort(-1).values == torch.arange(order.shape[-1])).all())


@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize(
    ("tokens", "dim", "chunks"),
    [(300, 40, [512, 256]), (1027, 64, [ALL, 1024]), (1100, 16, [256, 0]), (2500, 72, [ALL, 512])],
)
def test_the_order_leaves_as_little_spread_as_the_definitions(
    tokens: int, dim: int, chunks: list[int], opset: int
) -> None:
    keys = clustered(tokens, dim)
    base = torch.randperm(tokens, generator=torch.Generator().manual_seed(1))
    order = order_of(keys, base, chunks, opset=opset)
    wanted = content_order(keys, base, torch.tensor(chunks))
    assert is_permutation(order)
    left, least = spread(keys, order), spread(keys, wanted)
    assert (left < 1.01 * least).all()
    assert (least[chunks.index(max(chunks))] < 0.8 * spread(keys, base.expand(1, 2, -1))).any()
    for head, chunk in enumerate(chunks):
        if not chunk:
            assert torch.equal(order[0, head], base)
        for start in range(0, tokens, chunk or tokens):
            part = slice(start, start + (chunk or tokens))
            assert set(order[0, head, part].tolist()) == set(base[part].tolist())


def test_few_tokens_text_and_shared_chunks() -> None:
    keys = clustered(90, 24, heads=4)
    assert torch.equal(order_of(keys[:, :, :1], torch.tensor([0]), [ALL]), torch.zeros(1, 4, 1))
    base = torch.arange(83)
    order = order_of(keys, base, [256, 0], before=5)
    alone = order_of(keys[:, :, 5:88].contiguous(), base, [256, 256, 0, 0])
    assert is_permutation(order) and torch.equal(order, alone)
    assert torch.equal(order[0, 2:], base.expand(2, -1)) and not torch.equal(order[0, 0], base)


def test_keys_that_are_equal_or_no_numbers() -> None:
    base = torch.randperm(500, generator=torch.Generator().manual_seed(2))
    order = order_of(torch.full((1, 1, 500, 16), 0.7), base, [ALL])
    assert torch.equal(order[0, 0], base)
    keys = clustered(600)
    clean = order_of(keys, torch.arange(600), [ALL])
    keys[0, 0, 17], keys[0, 0, 5, 3] = torch.nan, torch.inf
    spoilt = order_of(keys, torch.arange(600), [ALL])
    assert is_permutation(spoilt) and torch.equal(spoilt[:, 1], clean[:, 1])


class TwoKinds(nn.Module):
    """Self-attention over tokens (B, N, 32) without a grid, then over those of a memory."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.other, self.out = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(32, 32)

    def project(self, tokens: Tensor) -> tuple[Tensor, ...]:
        return tuple(_by_heads(x) for x in self.qkv(tokens).split([32, 16, 16], -1))

    def remember(self, memory: Tensor) -> tuple[Tensor, ...]:
        return tuple(_by_heads(x) for x in self.other(memory).chunk(2, -1))

    def forward(self, tokens: Tensor, memory: Tensor) -> Tensor:
        x = F.scaled_dot_product_attention(*self.project(tokens), enable_gqa=True)
        x = F.scaled_dot_product_attention(x, *self.remember(memory))
        return self.out(x.transpose(1, 2).flatten(2))


def _by_heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, 16)).transpose(1, 2)


def two_kinds() -> tuple[TwoKinds, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = TwoKinds().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    generator = torch.Generator().manual_seed(1)
    made = (
        torch.randn(6, 32, generator=generator)[torch.randint(6, (2, n), generator=generator)]
        + 0.3 * torch.randn(2, n, 32, generator=generator)
        for n in (420, 330)
    )
    return model, tuple(made)


def plan_for(model: nn.Module, threshold: float, *chunks: list[int]) -> Plan:
    """A plan by hand for the sites of `TwoKinds`."""
    sites = {
        name: {
            "heads": 2,
            "head_dim": 16,
            "tokens": 420,
            "decision": "split",
            "reason": "test",
            "budgets": [{"threshold": [threshold, threshold]}],
            "chunks": own,
        }
        for name, own in zip(site_names(), chunks, strict=True)
    }
    return Plan.model_validate(
        {
            "model": {"class_name": "TwoKinds", "fingerprint": model_fingerprint(model)},
            "grids": [(1, 1, 7)],
            "device": "cpu",
            "versions": {"freqopt": "0", "torch": "2"},
            "target_error": 0.05,
            "measured_error": 0.04,
            "worst_error": 0.04,
            "mean_density": 0.3,
            "sites": sites,
            "evidence": {"samples": 1, "held_out": 1},
        }
    )


@cache
def site_names() -> tuple[str, ...]:
    model, inputs = two_kinds()
    inspected = freqopt.inspect(model, *inputs, min_tokens=1, order="content")
    assert all(site.eligible for site in inspected.sites)
    return tuple(site.name for site in inspected.sites)


def output(artifact: Artifact, inputs: tuple[Tensor, Tensor]) -> Tensor:
    given = dict(zip(("tokens", "memory"), inputs, strict=True))
    return run_artifact(artifact, given, provider="cpu", threads=1).outputs["output"]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """On no grid: that of a plan would be the only one that the file serves."""
    model, inputs = two_kinds()
    free = torch.export.Dim.AUTO
    plan = plan_for(model, 0.7, [ALL], [ALL, 256])
    program = make_program(model, inputs, plan=plan, dynamic_shapes=({1: free}, {1: free}))
    return write_onnx(program, tmp_path_factory.mktemp("content"), plan=plan, library=False)


def everything(proto: onnx.ModelProto) -> tuple[onnxruntime.InferenceSession, list[str]]:
    """A session that returns what our nodes make as well, and the names of that, in order."""
    names = [n.output[0] for n in proto.graph.node if n.op_type in (CONTENT_NAME, "SplitAttention")]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return session(proto), names


def test_a_file_of_sites_that_only_content_serves(artifact: Artifact) -> None:
    """Two lengths from one file: the op's results given the orders that the file makes."""
    model, inputs = two_kinds()
    assert tuple(artifact.sites) == site_names() and not artifact.dense_sites
    own, other = artifact.sites.values()
    assert (own["kv_heads"], own["other_queries"], other["other_queries"]) == (1, False, True)
    proto = onnx.load(artifact.model_path)
    held = {i.name: onnx.numpy_helper.to_array(i).tolist() for i in proto.graph.initializer}
    assert [held[site["chunks"]] for site in (own, other)] == [[ALL], [ALL, 256]]
    runner, names = everything(proto)
    for given in (inputs, tuple(x[:, : x.shape[1] - 100].contiguous() for x in inputs)):
        fed = {"tokens": given[0].numpy(), "memory": given[1].numpy()}
        made = map(torch.from_numpy, runner.run(names, fed))
        order, first, key_order, query_order, second = made  # one order where tokens are the same
        with torch.no_grad():
            q, k, v = model.project(given[0])
            expected = freqopt.split_attention(q, k, v, order=order, threshold=0.7)
            truth = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
            assert relative(first, expected) < 1e-5
            assert 1e-3 < relative(first, truth) < 0.5
            k, v = model.remember(given[1])
            sizes = {"query_grid": (1, 1, given[0].shape[1]), "query_order": query_order}
            expected = freqopt.split_attention(first, k, v, order=key_order, threshold=0.7, **sizes)
            truth = F.scaled_dot_product_attention(first, k, v)
            assert relative(second, expected) < 1e-5
            assert 1e-3 < relative(second, truth) < 0.5
        for tokens, found, chunks in ((k, key_order, [ALL, 256]), (first, query_order, [ALL, 256])):
            base = torch.arange(tokens.shape[2])
            wanted = content_order(tokens, base, torch.tensor(chunks))
            assert (spread(tokens, found) < 1.02 * spread(tokens, wanted)).all()


def test_chunks_are_exchanged_with_the_budgets(artifact: Artifact, tmp_path: Path) -> None:
    model, inputs = two_kinds()
    shutil.copytree(artifact.path, tmp_path / "copy")
    exact = exchange_plan(tmp_path / "copy", plan_for(model, 0.0, [512], [0, 0]))
    proto = onnx.load(exact.model_path)
    held = {i.name: onnx.numpy_helper.to_array(i).tolist() for i in proto.graph.initializer}
    assert [held[site["chunks"]] for site in exact.sites.values()] == [[512], [0, 0]]
    largest = [a.i for n in proto.graph.node for a in n.attribute if a.name == "largest_chunk"]
    assert largest == [512, 0, 0]
    with torch.no_grad():
        assert relative(output(exact, inputs), model(*inputs)) < 1e-5
    rough = exchange_plan(tmp_path / "copy", plan_for(model, 0.7, [512], [0, 0]))
    with torch.no_grad():
        assert relative(output(rough, inputs), output(artifact, inputs)) > 1e-4


def test_a_file_by_the_grid_takes_no_orders_by_content(artifact: Artifact) -> None:
    model, _ = two_kinds()
    sites = {n: {**site, "chunks": None} for n, site in artifact.sites.items()}
    by_grid = Artifact(artifact.path, {**artifact.manifest, "sites": sites})
    with pytest.raises(PlanError, match="by content and the file by the grid: export again"):
        exchange_plan(by_grid, plan_for(model, 0.7, [ALL], [ALL, 256]))


def test_without_a_plan_only_when_it_is_asked_for() -> None:
    model, inputs = two_kinds()
    plain = make_program(model, inputs)
    assert not plain.split and set(plain.dense) == set(site_names())
    asked = make_program(model, inputs, order="content", chunk="all")
    assert {site.largest_chunk for site in asked.split.values()} == {ALL} and not asked.dense
    for wrong in ({"order": "contents"}, {"order": "content", "chunk": 100}):
        with pytest.raises(OptionError):
            make_program(model, inputs, **wrong)
