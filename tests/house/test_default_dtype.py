"""Whatever PyTorch's default dtype and device, tensors are made with their own."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import freqopt
from freqopt import grid as grids
from freqopt.plan.plan import Plan
from freqopt.plan.records import Budget, Evidence, ModelIdentity, SitePlan, Versions

ROOT = Path(__file__).parents[2]
MAKERS = {"zeros", "ones", "full", "eye", "rand", "randn", "tensor", "linspace", "empty"}
GRID = (3, 6, 10)


def without_dtype(source: str) -> list[str]:
    """Calls of torch that make a tensor of the default dtype."""
    calls = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "torch"
    ]
    return [
        ast.unparse(call)
        for call in calls
        if (
            call.func.attr in MAKERS
            and not {"dtype", None} & {keyword.arg for keyword in call.keywords}
        )
        or (call.func.attr == "where" and all(map(is_number, call.args[1:3])))
    ]


def is_number(node: ast.expr) -> bool:
    """Whether an expression is a float written out; of two the default dtype is made."""
    text = ast.unparse(node).lstrip("-")
    return text in ("torch.inf", "torch.nan", "math.inf") or text.replace(".", "").isdigit()


def test_every_tensor_is_made_with_its_dtype() -> None:
    seen = 0
    for folder in ("freqopt", "kernels", "passes", "exporters"):
        for file in (ROOT / folder).rglob("*.py"):
            seen += 1
            found = without_dtype(file.read_text())
            assert not found, f"{file}: {found[0]} is of the default dtype"
    assert seen > 150
    assert without_dtype("torch.zeros(3)") and without_dtype("torch.where(x, 0.0, -torch.inf)")
    assert not without_dtype("torch.zeros(3, dtype=x)")


@pytest.fixture
def default(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_default_dtype()
    grids.token_order.cache_clear()
    grids._token_order_cpu.cache_clear()
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(before)


def results() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, 2, 185, 8, generator=generator, dtype=torch.float32).requires_grad_()
        for _ in range(3)
    )
    mask = torch.ones(1, 185, dtype=torch.bool)
    mask[:, -1] = False
    out, lse, stats = freqopt.split_attention(
        q,
        k,
        v,
        grid=GRID,
        text_after=5,
        key_mask=mask,
        threshold=1.0,
        order="content",
        chunk=256,
        return_lse=True,
        return_stats=True,
    )
    out.sum().backward()
    dense = freqopt.split_attention(q, k, v, grid=GRID, text_after=5, density=0.4)
    assert q.grad is not None and isinstance(dense, Tensor)
    return [out, lse, stats.density, stats.probe_error, q.grad, dense]


@pytest.mark.parametrize(
    "default", [torch.float64, torch.float16, torch.bfloat16], indirect=True, ids=str
)
def test_the_op_has_the_same_bits(default: None) -> None:
    found, kind = results(), torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(found, results(), strict=True)), kind
    assert all(x.dtype == torch.float32 for x in found)


@pytest.mark.parametrize("default", [torch.float16], indirect=True)
def test_budgets_are_real_under_a_default_device_of_meta(default: None) -> None:
    site = SitePlan(
        heads=2,
        head_dim=8,
        tokens=180,
        decision="split",
        reason="",
        budgets=[Budget(threshold=[0.1, 1e9])],
    )
    plan = Plan(
        model=ModelIdentity(class_name="A", fingerprint="x"),
        grids=[GRID],
        device="cpu",
        versions=Versions(freqopt="0", torch="2"),
        target_error=0.1,
        measured_error=0.1,
        worst_error=0.1,
        mean_density=0.5,
        sites={"a": site},
        evidence=Evidence(samples=1, held_out=1),
    )
    with torch.device("meta"):
        budget = plan.budgets("a")
        order = grids.token_order(GRID, torch.device("cpu"))
    assert budget.device.type == order.device.type == "cpu" and budget.dtype == torch.float32
    assert budget[0, 0].tolist() == [torch.tensor(0.1, dtype=torch.float32).item(), 1e9]
