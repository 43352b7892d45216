"""What a compiled or attached model says: on its first call, and where it differs from its plan."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from passes_toys import HEADS, Toy, video
from torch import Tensor, nn

import freqopt
from freqopt.backend import freqopt_backend
from freqopt.kernels import chunked
from freqopt.models_zoo.video_dit import VideoDiT, VideoDiTConfig
from freqopt.options import Options
from freqopt.plan.plan import Plan, model_fingerprint
from freqopt.plan.records import Budget, Evidence, ModelIdentity, SitePlan, Versions
from freqopt.telling.attached import MANY_CALLS
from freqopt.telling.verdict import HOOKED, LIMITED, REPLACED, Compiled, judge

GRID = (3, 6, 10)
TINY = VideoDiTConfig(width=32, layers=3, mlp_width=64, rope_axes=(4, 6, 6))


def plan_of(
    model: nn.Module,
    *names: str,
    heads: int = HEADS,
    threshold: float = 0.5,
    error: float = 0.5,
    **fields: Any,
) -> Plan:
    budget = Budget(threshold=[threshold] * heads)
    site = SitePlan(
        heads=heads,
        head_dim=model.head_dim,
        tokens=180,
        decision="split",
        reason="measured",  # type: ignore[arg-type]
        budgets=[budget],
        density=[0.5] * heads,
        error=[error] * heads,
    )
    return Plan(
        model=ModelIdentity(class_name=type(model).__name__, fingerprint=model_fingerprint(model)),
        grids=[GRID],
        device="cpu",
        versions=Versions(freqopt="0", torch="0"),
        target_error=0.1,
        measured_error=0.1,
        worst_error=0.1,
        mean_density=0.5,
        sites=dict.fromkeys(names, site),
        evidence=Evidence(samples=2, held_out=2),
        **fields,
    )


class Timed(Toy):
    """The toy, called with a timestep that it does not mind."""

    head_dim = 8

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * (1 + 0 * timestep.mean())


class Broken(Timed):
    """A graph break between the blocks."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:  # type: ignore[override]
        out = super().forward(x, timestep)
        torch._dynamo.graph_break()
        return super().forward(x, timestep) + out


@pytest.fixture
def heard(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What the logger says, from INFO on."""
    with caplog.at_level(logging.INFO, "freqopt"):
        yield caplog


def call(model: nn.Module, *inputs: Tensor, **options: Any) -> Any:
    given = {"inner": "eager", **options}
    compiled = torch.compile(model, backend=freqopt_backend, options=given)
    with torch.no_grad():
        return compiled(*inputs)


def lines(heard: pytest.LogCaptureFixture) -> list[str]:
    """The lines for the user, in order."""
    return [m.removeprefix("freqopt: ") for m in heard.messages if m.startswith("freqopt: ")]


def test_one_line_says_that_all_is_split(heard: pytest.LogCaptureFixture) -> None:
    model, inputs = Timed(), (video(GRID), torch.tensor([5.0]))
    compiled = torch.compile(
        model,
        backend=freqopt_backend,
        options={"inner": "eager", "plan": plan_of(model, "blocks.0", "blocks.1")},
    )
    with torch.no_grad():
        for _ in range(3):
            compiled(*inputs)
    assert lines(heard) == ["Timed: 2 of 2 planned sites split"]
    assert not [r for r in heard.records if r.levelno >= logging.WARNING]


def kept(x: Tensor, name: str) -> Tensor:
    """Compiled by itself, and anew for every name, as hooked modules are for every one of them."""
    torch._dynamo.graph_break()
    return x * len(name)


class Renewed(Timed):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:  # type: ignore[override]
        out = super().forward(x, timestep)
        torch._dynamo.graph_break()
        for name in ("a", "b", "c", "d"):
            out = kept(out, name)
        return out


@pytest.mark.parametrize("limit, named", [(2, True), (20, False)])
def test_a_limit_of_recompilations_is_named(
    limit: int, named: bool, heard: pytest.LogCaptureFixture
) -> None:
    """Where a planned site is in no graph, and Dynamo gave up in that call: what to raise."""
    model = Renewed()
    plan = plan_of(model, "blocks.0", "blocks.1", "blocks.7")
    with torch._dynamo.config.patch(recompile_limit=limit):
        call(model, video(GRID), torch.tensor([5.0]), plan=plan)
    assert "2 of 3 planned sites split" in lines(heard)[-1]
    assert (LIMITED in lines(heard)[-1]) == named


def test_the_line_is_seen_without_logging_and_silenced_by_a_level(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = logging.getLogger("freqopt")
    monkeypatch.setattr(logging.getLogger(), "level", logging.WARNING)
    monkeypatch.setattr(ours, "level", logging.NOTSET)
    ours.manager._clear_cache()  # type: ignore[attr-defined]
    model = Timed()
    plan = plan_of(model, "blocks.0", "blocks.1")
    call(model, video(GRID), torch.tensor([5.0]), plan=plan)
    assert "freqopt: Timed: 2 of 2 planned sites split" in capsys.readouterr().err
    ours.setLevel(logging.WARNING)
    try:
        torch._dynamo.reset()
        call(Timed(), video(GRID), torch.tensor([5.0]), plan=plan)
        assert not capsys.readouterr().err
    finally:
        ours.setLevel(logging.NOTSET)


def test_a_plan_goes_before_the_default_length_and_not_before_a_given_one(
    heard: pytest.LogCaptureFixture,
) -> None:
    model, inputs = Timed(), (video(GRID), torch.tensor([5.0]))
    call(model, *inputs, threshold=0.5)
    assert "0 of 2 attention sites split: 180 tokens are fewer than min_tokens" in lines(heard)[0]
    assert lines(heard)[0].endswith("(2); pass min_tokens=0 to split them all the same")
    torch._dynamo.reset()
    plan = plan_of(model, "blocks.0", "blocks.1")
    call(model, *inputs, plan=plan)
    assert lines(heard)[1] == "Timed: 2 of 2 planned sites split"
    torch._dynamo.reset()
    with pytest.raises(freqopt.SiteError, match="0 of 2 planned sites split: 180 tokens"):
        call(model, *inputs, plan=plan, min_tokens=200, strict=True)


def test_a_planned_site_that_is_not_met(heard: pytest.LogCaptureFixture) -> None:
    model, inputs = Timed(), (video(GRID), torch.tensor([5.0]))
    plan = plan_of(model, "blocks.0", "blocks.1", "blocks.7")
    call(model, *inputs, plan=plan)
    assert "Timed: 2 of 3 planned sites split: not met in any graph (1)" in lines(heard)[0]
    torch._dynamo.reset()
    with pytest.raises(freqopt.SiteError, match="2 of 3 planned sites split"):
        call(model, *inputs, plan=plan, strict=True)


def test_a_model_without_attention(heard: pytest.LogCaptureFixture) -> None:
    call(nn.Linear(3, 3), torch.ones(2, 3), threshold=0.0)
    assert "Linear: 0 of 0 attention sites split: no attention was found" in lines(heard)[0]
    torch._dynamo.reset()
    with pytest.raises(freqopt.SiteError, match="no attention was found"):
        call(nn.Linear(3, 3), torch.ones(2, 3), threshold=0.0, strict=True)


def test_all_graphs_of_a_call_are_one_line(heard: pytest.LogCaptureFixture) -> None:
    model, inputs = Broken(), (video(GRID), torch.tensor([5.0]))
    call(model, *inputs, plan=plan_of(model, "blocks.0", "blocks.1"))
    assert lines(heard) == ["Broken: 2 of 2 planned sites split"]
    torch._dynamo.reset()
    call(model, *inputs, plan=plan_of(model, "blocks.0", "blocks.1", "elsewhere"))
    assert "torch.compile left the graph once" in lines(heard)[1]
    assert "test_first_call.py" in lines(heard)[1] and HOOKED not in lines(heard)[1]


def test_hooks_are_not_told_to_be_fullgraph(heard: pytest.LogCaptureFixture) -> None:
    model = Timed()

    def offload_hook(module: nn.Module, args: Any) -> None:
        torch._dynamo.graph_break()

    model.blocks[1].register_forward_pre_hook(offload_hook)
    call(model, video(GRID), torch.tensor([5.0]), threshold=0.0, min_tokens=10_000)
    assert HOOKED in lines(heard)[0] and "fullgraph" not in lines(heard)[0]


def test_a_forward_that_was_replaced_is_named(heard: pytest.LogCaptureFixture) -> None:
    model = Timed()
    block = model.blocks[1]
    block.forward = torch.compiler.disable(block.forward)  # type: ignore[method-assign]
    plan = plan_of(model, "blocks.0", "blocks.1")
    call(model, video(GRID), torch.tensor([5.0]), plan=plan)
    assert "1 of 2 planned sites split" in lines(heard)[0]
    assert REPLACED.format("blocks.1") in lines(heard)[0]


def test_of_code_that_is_known_not_to_be_traced_no_break_is_told() -> None:
    known = Compiled(Options(), replaced=("", "blocks.1"))
    told = judge("Timed", known, plan_of(Timed(), "blocks.0"), set())
    assert not told.good and told.line.endswith(REPLACED.format("the model itself"))


def test_a_failing_call_keeps_its_own_error(heard: pytest.LogCaptureFixture) -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x + 1
            torch._dynamo.graph_break()
            raise ValueError("the user's")

    with pytest.raises(ValueError, match="the user's"):
        call(Fails(), torch.ones(3), threshold=0.0, strict=True)


def test_a_call_from_a_handler_is_told_as_any(heard: pytest.LogCaptureFixture) -> None:
    """The exception that its caller handles is none of its own."""
    try:
        raise KeyError("the caller's")
    except KeyError:
        call(Timed(), video(GRID), torch.tensor([5.0]), threshold=0.0)
    assert len(lines(heard)) == 1


@pytest.mark.parametrize("time", [5.0, 950.0])
def test_timesteps_outside_the_plans_are_told_once(
    heard: pytest.LogCaptureFixture, time: float
) -> None:
    model = Timed()
    plan = plan_of(
        model, "blocks.0", "blocks.1", timestep_name="timestep", timestep_range=(920.0, 1000.0)
    )
    compiled = torch.compile(
        model, backend=freqopt_backend, options={"inner": "eager", "plan": plan}
    )
    with torch.no_grad():
        for now in (1000.0, time, time - 1, 970.0):
            compiled(video(GRID), torch.tensor([now]))
    told = [line for line in lines(heard) if "timestep 920 to 1000" in line]
    assert len(told) == (time < 900)
    assert not told or f"is used at {time:g}" in told[0]


def test_probes_far_from_the_plan_warn_once_and_are_counted(
    heard: pytest.LogCaptureFixture,
) -> None:
    freqopt.reset_counters()
    model, inputs = Timed(), (video(GRID), torch.tensor([5.0]))
    plan = plan_of(model, "blocks.0", "blocks.1", threshold=5.0, error=1e-4)
    compiled = torch.compile(
        model, backend=freqopt_backend, options={"inner": "eager", "plan": plan}
    )
    with torch.no_grad():
        for _ in range(3):
            compiled(*inputs)
    assert sum("times the error that the plan verified" in line for line in lines(heard)) == 1
    found = freqopt.counters()
    (total,) = found.models
    assert (total.model, total.split, total.sites_split, total.sites) == ("Timed", 6, 2, 2)
    assert str(found).splitlines()[1].startswith(" Timed: 2 of 2 sites split, 6 calls split")
    for site in found.sites:
        assert site.probe_mean is not None and site.probe_worst is not None
        assert site.probe_worst >= site.probe_mean > 2 * 1e-4 and site.verified == 1e-4
    assert found.to_dict()["models"][0]["split"] == 6


def test_a_plan_by_timestep_is_judged_over_many_calls(heard: pytest.LogCaptureFixture) -> None:
    """Its error is one over all timesteps; noisy ones alone may have more."""
    model, inputs = Timed(), (video(GRID), torch.tensor([5.0]))
    plan = plan_of(model, "blocks.0", "blocks.1", threshold=5.0, error=1e-4)
    for site in plan.sites.values():
        site.budgets.append(site.budgets[0])
    by_time = {"timestep_edges": [500.0], "timestep_name": "timestep"}
    plan = plan.model_copy(update=by_time)
    compiled = torch.compile(
        model, backend=freqopt_backend, options={"inner": "eager", "plan": plan}
    )
    worse = "times the error that the plan verified"
    with torch.no_grad():
        for _ in range(MANY_CALLS - 1):
            compiled(*inputs)
        freqopt.counters()
        assert not any(worse in line for line in lines(heard))
        for _ in range(MANY_CALLS):
            compiled(*inputs)
    freqopt.counters()
    assert sum(worse in line for line in lines(heard)) == 1


def test_the_probes_that_are_counted_are_those_of_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Tensor] = []
    split_forward = chunked.split_forward

    def record(*args: Any, **kwargs: Any) -> Any:
        found = split_forward(*args, **kwargs)
        kept.append(found.split.probe.error.clone())
        return found

    monkeypatch.setattr(chunked, "split_forward", record)
    compiled = torch.compile(
        Toy(),
        backend=freqopt_backend,
        dynamic=False,
        options={"inner": "eager", "threshold": 50.0, "min_tokens": 0},
    )
    with torch.no_grad():
        compiled(video(GRID, 2))
        freqopt.reset_counters()
        kept.clear()
        compiled(video(GRID, 2))
        compiled(video(GRID, 2))
    sites = freqopt.counters().sites
    assert len(kept) == 4 and len(sites) == 2
    for index, site in enumerate(sites):
        errors = torch.stack(kept[index::2])
        assert float(errors.max()) > 1e-4
        assert site.probe_mean == pytest.approx(float(errors.square().mean().sqrt()), rel=1e-4)
        assert site.probe_worst == pytest.approx(float(errors.max()), rel=1e-4)


class TestAttached:
    """Blocks that are compiled one by one, with budgets of their own."""

    @pytest.fixture
    def model(self) -> VideoDiT:
        model = VideoDiT(TINY).eval()
        model.head_dim = 16  # type: ignore[assignment]
        return model

    @pytest.fixture
    def plan(self, model: VideoDiT) -> Plan:
        heads = TINY.width // 16
        names = [f"blocks.{i}.attn" for i in range(3)]
        return plan_of(model, *names, heads=heads, error=1e-4, threshold=5.0)

    @staticmethod
    def run(model: VideoDiT, times: int = 2) -> None:
        with torch.no_grad():
            for _ in range(times):
                model(torch.randn(1, 3, 3, 24, 40), torch.rand(1))

    def test_layers_are_told_apart(
        self, model: VideoDiT, plan: Plan, heard: pytest.LogCaptureFixture
    ) -> None:
        freqopt.reset_counters()
        with freqopt.attach(model, plan):
            for block in model.blocks:
                block.compile(backend="freqopt", options={"inner": "eager"})
            self.run(model)
            found = freqopt.counters()
        assert [line for line in lines(heard) if "planned" in line] == [
            "VideoDiT: 3 of 3 planned sites split"
        ]
        assert [(s.site, s.calls, s.split) for s in found.sites] == [
            (f"blocks.{i}.attn", 2, True) for i in range(3)
        ]
        assert all(s.model == "VideoDiT" and s.probe_mean is not None for s in found.sites)
        assert sum("times the error that the plan verified" in x for x in lines(heard)) == 1

    def test_blocks_that_are_not_compiled(
        self, model: VideoDiT, plan: Plan, heard: pytest.LogCaptureFixture
    ) -> None:
        with freqopt.attach(model, plan):
            self.run(model)
            (line,) = lines(heard)
            assert "0 of 3 planned sites split" in line and "no compiled block ran" in line
            model.blocks[0].compile(backend="freqopt", options={"inner": "eager"})
            self.run(model)
        assert any(line.startswith("VideoDiT: 1 of 3 planned sites split") for line in lines(heard))

    def test_a_path_does_for_a_plan(self, model: VideoDiT, plan: Plan, tmp_path: Any) -> None:
        plan.save(tmp_path / "plan.json")
        freqopt.attach(model, tmp_path / "plan.json").remove()
        assert not model._forward_hooks and not model._forward_pre_hooks


def test_options_as_an_object(heard: pytest.LogCaptureFixture) -> None:
    model = Timed()
    options = freqopt.Options(plan=plan_of(model, "blocks.0", "blocks.1"), inner="eager")
    with torch.no_grad():
        compiled = torch.compile(model, backend="freqopt", options=options)  # type: ignore[call-overload]
        compiled(video(GRID), torch.tensor([5.0]))
    assert lines(heard) == ["Timed: 2 of 2 planned sites split"]


def test_a_pipeline_is_told_which_of_its_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pipe:
        def __init__(self) -> None:
            self.components = {"transformer": Toy(), "vae": nn.Linear(1, 1), "scheduler": 3}

    for refuse in (
        lambda: freqopt.calibrate(Pipe(), []),  # type: ignore[arg-type]
        lambda: freqopt.inspect(Pipe()),  # type: ignore[arg-type]
    ):
        with pytest.raises(
            freqopt.InputError, match=r"transformer \(Toy\).*pass pipe.transformer$"
        ):
            refuse()


def test_objects_print_short() -> None:
    model = Timed()
    plan = plan_of(model, "blocks.0", "blocks.1")
    assert len(repr(plan)) < 200 and "2 of 2 sites split" in repr(plan)
    assert plan._repr_html_().startswith("<pre>plan for Timed")
    found = freqopt.inspect(model, video(GRID), torch.tensor([1.0]))
    assert repr(found).startswith("Inspection(2 sites") and "<pre>" in found._repr_html_()
    assert repr(freqopt.counters()).startswith("Counters(")
