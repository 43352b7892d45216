"""The backend: options, plans, what is split and what is not, and that nothing else changes."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from passes_toys import DIM, HEADS, WIDTH, Attention, Toy, video
from torch import Tensor, fx, nn

import freqopt.backend
import freqopt.decisions
from freqopt.backend import freqopt_backend
from freqopt.break_even import CPU_TOKENS, default_min_tokens
from freqopt.config import DEFAULT_DENSITY, DEFAULT_PROBES
from freqopt.decisions import records_cuda_graphs
from freqopt.errors import OptionError, PlanError
from freqopt.options import parse_options
from freqopt.plan.plan import Plan
from freqopt.plan.records import Budget, Evidence, ModelIdentity, SitePlan, Versions

GRID = (6, 8, 16)
TOKENS = 6 * 8 * 16
OP = "freqopt.split_attention.default"


class Inner:
    """The inner backend of the tests: keeps the graphs it is given, and runs them."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        self.graphs.append(gm)
        return gm.forward

    def calls(self) -> list[fx.Node]:
        return [n for gm in self.graphs for n in gm.graph.nodes if str(n.target) == OP]

    def budgets(self) -> list[Tensor]:
        found = []
        for gm in self.graphs:
            for node in gm.graph.nodes:
                if str(node.target) == OP:
                    constant = node.args[3]
                    assert isinstance(constant, fx.Node) and constant.op == "get_attr"
                    found.append(getattr(gm, str(constant.target)))
        return found


@pytest.fixture(autouse=True)
def fresh_warning() -> Iterator[None]:
    freqopt.backend._warn_of_no_plan.cache_clear()
    yield


def run(model: nn.Module, inputs: tuple[Tensor, ...], **options: Any) -> tuple[Tensor, Inner]:
    inner = options.setdefault("inner", Inner())
    compiled = torch.compile(model, backend=freqopt_backend, options=options, dynamic=False)
    with torch.no_grad():
        return compiled(*inputs), inner


def make_plan(*, heads: int = HEADS, names: tuple[str, ...] = ("blocks.0", "blocks.1")) -> Plan:
    """Splits the first site and leaves the second dense."""
    split = SitePlan(
        heads=heads,
        head_dim=DIM,
        tokens=TOKENS,
        decision="split",
        reason="calibrated",
        budgets=[Budget(threshold=[0.5] * heads)],
    )
    dense = SitePlan(
        heads=heads, head_dim=DIM, tokens=TOKENS, decision="dense", reason="too sensitive"
    )
    return Plan(
        model=ModelIdentity(class_name="Toy", fingerprint="0" * 16),
        grids=[GRID],
        device="cpu",
        versions=Versions(freqopt="0", torch="0"),
        target_error=0.03,
        measured_error=0.02,
        worst_error=0.02,
        mean_density=0.5,
        sites=dict(zip(names, (split, dense), strict=True)),
        evidence=Evidence(samples=1, held_out=1),
    )


@pytest.mark.smoke
def test_threshold_zero_is_exact_and_a_threshold_is_not() -> None:
    model, inputs = Toy(), (video(GRID, 2),)
    with torch.no_grad():
        expected = model(*inputs)
    got, inner = run(model, inputs, threshold=0.0, min_tokens=1, strict=True)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert [node.args[-2:] for node in inner.calls()] == [(0.0, 0)] * 2
    got, inner = run(model, inputs, threshold=1e9, min_tokens=1, strict=True)
    assert not torch.allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert [node.args[-2:] for node in inner.calls()] == [(0.0, DEFAULT_PROBES)] * 2
    assert all(bool((budget == 1e9).all()) for budget in inner.budgets())


def test_short_sequences_stay_dense() -> None:
    model, inputs = Toy(), (video(GRID),)
    assert CPU_TOKENS > TOKENS
    assert not run(model, inputs, threshold=0.0)[1].calls()
    assert not run(model, inputs, threshold=0.0, min_tokens=TOKENS + 1)[1].calls()
    assert len(run(model, inputs, threshold=0.0, min_tokens=TOKENS)[1].calls()) == 2


def test_the_default_length_agrees_with_what_was_measured() -> None:
    """Split where that was faster on the GPU, dense where it was not."""
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    recorded = {
        heads: default_min_tokens(gpu, heads, 128, cuda_graphs=True) for heads in (2, 24, 40)
    }
    assert recorded[40] <= 4096 < recorded[24] <= 8192 < recorded[2] <= 32768
    launched = default_min_tokens(gpu, 24, 128)
    assert 7000 < launched < 8500
    assert default_min_tokens(gpu, 24, 64) > launched > default_min_tokens(gpu, 48, 128)
    assert default_min_tokens(cpu, 2, 8) == default_min_tokens(cpu, 48, 128) == CPU_TOKENS


@pytest.mark.parametrize(
    ("options", "recorded"),
    [
        ({}, False),
        ({"mode": "default"}, False),
        ({"mode": "reduce-overhead"}, True),
        ({"mode": "max-autotune"}, True),
        ({"mode": "max-autotune-no-cudagraphs"}, False),
        ({"mode": "reduce-overhead", "inner": "eager"}, False),
    ],
)
def test_modes_that_record_cuda_graphs_are_known(options: dict[str, Any], recorded: bool) -> None:
    assert records_cuda_graphs(parse_options(options)) is recorded


def test_the_default_length_counts_the_heads_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, bool]] = []

    def answer(device: torch.device, heads: int, head_dim: int, *, cuda_graphs: bool) -> int:
        asked.append((heads, head_dim, cuda_graphs))
        return 1

    monkeypatch.setattr(freqopt.decisions, "default_min_tokens", answer)
    assert len(run(Toy(), (video(GRID, 3),), threshold=0.0)[1].calls()) == 2
    assert set(asked) == {(3 * HEADS, DIM, False)}


def test_without_a_plan_a_cautious_density_and_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, "freqopt"):
        for _ in range(2):
            torch._dynamo.reset()
            _, inner = run(Toy(), (video(GRID),), min_tokens=1)
            assert [n.args[-2:] for n in inner.calls()] == [(DEFAULT_DENSITY, DEFAULT_PROBES)] * 2
    (warning,) = [r.getMessage() for r in caplog.records if r.name.startswith("freqopt")]
    assert "freqopt.calibrate(model, samples)" in warning


@pytest.mark.parametrize("saved", [False, True])
def test_a_plan_says_what_is_split_and_how(saved: bool, tmp_path: Path) -> None:
    plan = make_plan()
    plan.save(tmp_path / "plan.json")
    given = str(tmp_path / "plan.json") if saved else plan
    _, inner = run(Toy(), (video(GRID),), plan=given, min_tokens=1, strict=True)
    (call,), (budget,) = inner.calls(), inner.budgets()
    torch.testing.assert_close(budget, plan.budget("blocks.0")[0])
    assert call.args[-2:] == (0.0, DEFAULT_PROBES)


def test_a_changed_plan_file_is_read_again(tmp_path: Path) -> None:
    import os

    path = tmp_path / "plan.json"
    for number, threshold in enumerate((0.25, 0.75)):
        plan = make_plan()
        site = plan.sites["blocks.0"].model_copy(
            update={"budgets": [Budget(threshold=[threshold] * HEADS)]}
        )
        plan.model_copy(update={"sites": {**plan.sites, "blocks.0": site}}).save(path)
        os.utime(path, ns=(number, number))
        torch._dynamo.reset()
        _, inner = run(Toy(), (video(GRID),), plan=path, min_tokens=1)
        assert bool((inner.budgets()[0] == threshold).all())


@pytest.mark.parametrize(
    "plan", [make_plan(names=("layers.0", "layers.1")), make_plan(heads=HEADS + 1)]
)
def test_a_plan_of_another_model_is_refused(plan: Plan) -> None:
    with pytest.raises(freqopt.PlanError, match="made for another model") as caught:
        run(Toy(), (video(GRID),), plan=plan, min_tokens=1)
    assert "TORCHDYNAMO_VERBOSE" not in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is PlanError and str(again) == str(caught.value)


def test_a_missing_plan_file_is_an_error() -> None:
    with pytest.raises(freqopt.PlanError, match="cannot read the plan"):
        run(Toy(), (video(GRID),), plan="/nowhere/plan.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"treshold": 0.1}, "did you mean threshold"),
        ({"min_token": 1}, "did you mean min_tokens"),
        ({"adapt": True}, "unknown option 'adapt' \\(options: plan, grid, "),
        ({"grid": (3, 6)}, "three positive extents"),
        ({"grid": (3, 6, 0)}, "three positive extents"),
        ({"grid": (3, 6, 1.5)}, "three positive extents"),
        ({"threshold": -1.0}, "0 \\(exact\\) or larger"),
        ({"threshold": float("nan")}, "0 \\(exact\\) or larger"),
        ({"threshold": "high"}, "must be a number"),
        ({"threshold": True}, "must be a number"),
        ({"min_tokens": -1}, "number of tokens"),
        ({"min_tokens": 1.5}, "number of tokens"),
        ({"strict": 1}, "True or False"),
        ({"inner": 3}, "name of a backend"),
        ({"inner": "freqopt"}, "itself"),
        ({"plan": "x.json", "threshold": 0.1}, "both given"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parse_options(options)


def test_options_of_none_are_options_not_given() -> None:
    assert parse_options({"plan": None, "grid": None}) == parse_options(None)
    assert parse_options({"grid": [3, 6, 10]}).grid == (3, 6, 10)


class Odd(nn.Module):
    """One attention whose head_dim no kernel has on CUDA, over a video."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.weight = nn.Parameter(torch.randn(WIDTH, 3, 1, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        tokens = F.conv3d(x, self.weight, stride=(1, 2, 2)).flatten(2).transpose(1, 2)
        out: Tensor = self.attention(tokens)
        return out


def test_a_site_without_a_kernel_stays_dense_or_raises_under_strict(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import freqopt.kernels.op as op

    monkeypatch.setattr(op, "check_site", lambda *_: "head_dim 7 has no kernel (supported: 8)")
    with caplog.at_level(logging.WARNING, "freqopt"):
        got, inner = run(Odd(), (video(GRID),), threshold=0.0, min_tokens=1)
    assert not inner.calls() and got.shape == (1, TOKENS, WIDTH)
    assert "attention at attention stays dense: head_dim 7 has no kernel" in caplog.text
    torch._dynamo.reset()
    with pytest.raises(freqopt.SiteError, match="head_dim 7"):
        run(Odd(), (video(GRID),), threshold=0.0, min_tokens=1, strict=True)


def test_a_rewrite_that_fails_leaves_the_site_as_it_was(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import freqopt.passes.rewrite.rewrite as rewrite

    model, inputs = Toy(), (video(GRID),)
    with torch.no_grad():
        expected = model(*inputs)

    def fail(*_: Any) -> None:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(rewrite, "_take_over", fail)
    with caplog.at_level(logging.WARNING, "freqopt"):
        got, inner = run(model, inputs, threshold=0.0, min_tokens=1)
    assert not inner.calls() and "rewriting it failed: RuntimeError: no such thing" in caplog.text
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    torch._dynamo.reset()
    with pytest.raises(freqopt.SiteError, match="no such thing"):
        run(model, inputs, threshold=0.0, min_tokens=1, strict=True)


def test_a_bug_in_the_passes_does_not_break_the_model(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import freqopt.passes.manager as manager

    def fail(*_: Any, **__: Any) -> None:
        raise KeyError("oops")

    monkeypatch.setattr(manager, "find_on_grids", fail)
    model, inputs = Toy(), (video(GRID),)
    with caplog.at_level(logging.WARNING, "freqopt"):
        got, _ = run(model, inputs, threshold=0.0)
    assert "this graph stays as it is" in caplog.text
    with torch.no_grad():
        torch.testing.assert_close(got, model(*inputs), rtol=0, atol=0)


def test_a_grid_that_does_not_fit_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = Toy(), (video(GRID),)
    with caplog.at_level(logging.WARNING, "freqopt"):
        _, inner = run(model, inputs, threshold=0.0, min_tokens=1, grid=(6, 8, 17))
    assert not inner.calls() and "grid=(6, 8, 17) fits no attention of this graph" in caplog.text
    torch._dynamo.reset()
    with pytest.raises(freqopt.SiteError, match="fits no attention"):
        run(model, inputs, threshold=0.0, min_tokens=1, grid=(6, 8, 17), strict=True)


def test_strict_accepts_what_was_never_meant_to_be_split() -> None:
    """Cross attention, text encoders, short sequences and sites that the plan leaves dense."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.toy, self.text, self.cross = Toy(), Attention(), Attention()

        def forward(self, x: Tensor, text: Tensor) -> Tensor:
            return self.cross(self.toy(x), self.text(text))

    _, inner = run(
        Both(), (video(GRID), torch.randn(1, 9, WIDTH)), threshold=0.0, min_tokens=50, strict=True
    )
    assert len(inner.calls()) == 2


def test_lengths_on_either_side_of_min_tokens_get_their_own_graphs() -> None:
    inner = Inner()
    options = {"threshold": 0.0, "min_tokens": TOKENS, "inner": inner}
    model = Toy()
    compiled = torch.compile(model, backend=freqopt_backend, options=options, dynamic=True)
    counts = []
    with torch.no_grad():
        for grid in ((6, 8, 17), (7, 9, 16), (5, 6, 10), (4, 7, 9), (8, 9, 15)):
            inputs = (video(grid, 2),)
            torch.testing.assert_close(compiled(*inputs), model(*inputs), rtol=1e-3, atol=1e-4)
            counts.append((len(inner.graphs), len(inner.calls())))
    assert counts == [(1, 2), (1, 2), (2, 2), (2, 2), (2, 2)]


def test_decisions_and_times_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "freqopt"):
        run(Toy(), (video(GRID),), threshold=0.0, min_tokens=1)
    assert "blocks.1: split, threshold 0" in caplog.text
    assert "2 of 2 attention sites rewritten (find " in caplog.text
    assert "passes took" in caplog.text


def test_gradients_pass_through_the_rewritten_model() -> None:
    model = Toy()
    compiled = torch.compile(
        model,
        backend=freqopt_backend,
        dynamic=False,
        options={"threshold": 0.0, "min_tokens": 1, "inner": "eager", "strict": True},
    )
    x = video(GRID)
    model(x).square().mean().backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    compiled(x).square().mean().backward()
    got = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(got) == len(expected) == 13
    # The gradient of a key's bias is 0 but for rounding: each is measured against the largest.
    largest = max(float(theirs.abs().max()) for theirs in expected)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4 * largest)


@pytest.mark.parametrize("dynamic", [False, True])
def test_aot_autograd_takes_the_rewritten_graph(dynamic: bool) -> None:
    model, inputs = Toy(), (video(GRID, 2),)
    compiled = torch.compile(
        model,
        backend=freqopt_backend,
        dynamic=dynamic,
        options={"threshold": 0.0, "min_tokens": 1, "inner": "aot_eager", "strict": True},
    )
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)
