"""Budgets by denoising timestep: chosen in the compiled graph, by the tensor's content alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import freqopt
from freqopt.backend import freqopt_backend
from freqopt.calibration.samples import collect_samples
from freqopt.capture.budgets import budget_at
from freqopt.errors import CalibrationError, OptionError, PlanError, SiteError
from freqopt.models_zoo.video_dit import VideoDiT, VideoDiTConfig
from freqopt.passes.find import find_sites
from freqopt.passes.rewrite.timestep import find_timestep
from freqopt.plan.plan import Plan, model_fingerprint
from freqopt.plan.records import Budget, Evidence, ModelIdentity, SitePlan, Versions

GRID = (4, 9, 11)
EDGES = [0.25, 0.75]
THRESHOLDS = ([0.05, 0.1], [0.4, 0.8], [2.0, 4.0])
TIMES = (0.125, 0.5, 1.0)
"""One in each bucket, exact in every dtype."""

LAYERS = 2


@pytest.fixture(scope="module")
def model() -> VideoDiT:
    torch.manual_seed(0)
    config = VideoDiTConfig(width=32, layers=LAYERS, mlp_width=64, rope_axes=(4, 6, 6))
    model = VideoDiT(config).eval()
    nn.init.normal_(model.head.weight, std=0.2)
    nn.init.normal_(model.modulation.weight, std=0.3)
    return model


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def make_plan(model: nn.Module, *, buckets: int = 3, only: int | None = None) -> Plan:
    """A plan by bucket, or one with the budgets of a single bucket for all timesteps."""
    rows = range(buckets) if only is None else [only]
    site = SitePlan(
        heads=2,
        head_dim=16,
        tokens=396,
        decision="split",
        reason="",
        budgets=[Budget(threshold=THRESHOLDS[b]) for b in rows],
        density=[0.5, 0.5],
        error=[0.1, 0.1],
    )
    return Plan(
        model=ModelIdentity(class_name="VideoDiT", fingerprint=model_fingerprint(model)),
        grids=[GRID],
        device="cpu",
        versions=Versions(freqopt="0", torch="0"),
        target_error=0.1,
        measured_error=0.1,
        worst_error=0.1,
        mean_density=0.5,
        timestep_name="timestep",
        timestep_edges=EDGES[: len(rows) - 1],
        sites={f"blocks.{i}.attn": site for i in range(LAYERS)},
        evidence=Evidence(samples=1, held_out=1),
    )


def video(batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, 4, 36, 44, generator=torch.Generator().manual_seed(1))


def compiled(model: nn.Module, plan: Plan, inner: str = "aot_eager") -> Any:
    options = {"plan": plan, "inner": inner, "min_tokens": 0, "strict": True}
    return torch.compile(model, backend=freqopt_backend, options=options, fullgraph=True)


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


_known: dict[tuple[tuple[float, ...], int], Tensor] = {}


def reference(model: nn.Module, bucket: int, *times: float) -> Tensor:
    """Output at these times with one bucket's budgets, from a plan that has no buckets."""
    key = (times, bucket)
    if key not in _known:
        whole = compiled(model, make_plan(model, only=bucket), "eager")
        with torch.no_grad():
            _known[key] = whole(video(len(times)), torch.tensor(times))
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
    return _known[key]


def test_the_buckets_differ_enough_to_tell_them_apart(model: VideoDiT) -> None:
    outputs = [reference(model, bucket, 0.5) for bucket in range(3)]
    for i in range(3):
        for j in range(i):
            assert (outputs[i] - outputs[j]).norm() > 1e-3 * outputs[i].norm()


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_one_graph_serves_all_timesteps(model: VideoDiT, inner: str) -> None:
    wanted = [reference(model, bucket, time) for bucket, time in enumerate(TIMES)]
    step = compiled(model, make_plan(model), inner)
    with torch.no_grad():
        for _ in range(2):  # and back again
            for want, time in zip(wanted, TIMES, strict=True):
                out = step(video(), torch.tensor([time]))
                assert (out - want).norm() < 1e-5 * want.norm()
    assert graphs() == 1
    assert not torch._dynamo.utils.counters["recompiles"]


def test_a_value_on_an_edge_belongs_below_it(model: VideoDiT) -> None:
    want = reference(model, 0, EDGES[0])
    with torch.no_grad():
        out = compiled(model, make_plan(model))(video(), torch.tensor([EDGES[0]]))
    assert (out - want).norm() < 1e-5 * out.norm()


@pytest.mark.parametrize("times, bucket", [([0.9, 0.9], 2), ([0.9, 0.5], 1), ([0.1, 0.9], 0)])
def test_a_batch_gets_the_most_exact_budget_of_its_items(
    model: VideoDiT, times: list[float], bucket: int
) -> None:
    want = reference(model, bucket, *times)
    with torch.no_grad():
        out = compiled(model, make_plan(model))(video(2), torch.tensor(times))
    assert (out - want).norm() < 1e-5 * out.norm()


class Wrapped(nn.Module):
    """The model behind another signature, as pipelines and wrappers have it."""

    def __init__(self, model: VideoDiT, how: str) -> None:
        super().__init__()
        self.blocks, self.how = model.blocks, how
        self.__dict__["inner"] = model

    def forward(self, x: Tensor, timestep: Any = None, **more: Any) -> Tensor:
        if self.how == "per token":  # (B, tokens), as image-to-video models pass it
            timestep = timestep.mean(1)
        if self.how == "kwargs":
            timestep = more["extra"]["timestep"]
        return self.inner(x, timestep.float().reshape(-1))


@pytest.mark.parametrize(
    "how, make",
    [
        ("kwargs", lambda t: {"extra": {"timestep": torch.tensor([t])}}),
        ("scalar", lambda t: {"timestep": torch.tensor(t)}),
        ("double", lambda t: {"timestep": torch.tensor([t], dtype=torch.float64)}),
        ("half", lambda t: {"timestep": torch.tensor([t], dtype=torch.bfloat16)}),
        ("per token", lambda t: {"timestep": torch.tensor([[t - 0.05, t + 0.05]])}),
    ],
)
def test_forms_of_the_timestep(model: VideoDiT, how: str, make: Any) -> None:
    wrapped = Wrapped(model, how)
    plan = make_plan(model)
    names = {name: plan.sites[name] for name in plan.sites}
    seen: list[str] = []

    def spy(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.extend(site.name for site in find_sites(gm))
        found = find_timestep(gm, "timestep")
        assert found is not None
        return gm.forward

    with torch.no_grad():
        torch.compile(wrapped, backend=spy)(video(), **make(0.5))
    torch._dynamo.reset()
    sites = dict(zip(seen, names.values(), strict=True))
    wanted = [reference(model, bucket, time) for bucket, time in enumerate(TIMES)]
    step = compiled(wrapped, plan.model_copy(update={"sites": sites}), "eager")
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        for want, time in zip(wanted, TIMES, strict=True):
            out = step(video(), **make(time))
            assert (out - want).norm() < 1e-4 * want.norm()
    assert graphs() == 1


class Batch:
    def __init__(self, t: Tensor) -> None:
        self.t = t


class Confusing(nn.Module):
    """Inputs and parameters whose names resemble the timestep's."""

    def __init__(self) -> None:
        super().__init__()
        self.t = nn.Parameter(torch.ones(1))
        self.timestep = nn.Linear(1, 1)

    def forward(self, x_t: Tensor, **more: Any) -> Tensor:
        x = self.timestep(x_t) + self.t
        if "t" in more:
            x = x * more["t"]
        return x * more["batch"].t if "batch" in more else x


@pytest.mark.parametrize(
    "more, value",
    [
        ({}, None),
        ({"t": torch.tensor([3.0])}, 3.0),
        ({"t": 3.0}, 3.0),
        ({"batch": Batch(torch.tensor([4.0]))}, 4.0),
    ],
)
def test_only_the_argument_itself_is_taken_for_the_timestep(
    more: dict[str, Any], value: float | None
) -> None:
    found: list[Any] = []

    def spy(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        node = find_timestep(gm, "t")
        placeholders = gm.graph.find_nodes(op="placeholder")

        def run(*args: Any) -> Any:
            found[:] = [None if node is None else float(args[placeholders.index(node)])]
            return gm.forward(*args)

        return run

    model = torch.compile(Confusing(), backend=spy)
    with torch.no_grad():
        model(torch.ones(2, 1), **more)
        if isinstance(more.get("t"), float):  # a Python number is an input from its second value on
            model(torch.ones(2, 1), t=5.0)
            value = 5.0
    assert found == [value]


def test_regional_compilation_selects_too(model: VideoDiT) -> None:
    wanted = [reference(model, bucket, time) for bucket, time in enumerate(TIMES)]
    with torch.no_grad():
        dense = model(video(), torch.tensor([0.9]))
    options = {"inner": "aot_eager", "min_tokens": 0, "strict": True}
    try:
        with freqopt.attach(model, make_plan(model)), torch.no_grad():
            for block in model.blocks:
                block.compile(backend=freqopt_backend, options=options, fullgraph=True)
            for bucket in (0, 2, 1, 0):
                out = model(video(), timestep=torch.tensor([TIMES[bucket]]))
                assert (out - wanted[bucket]).norm() < 1e-5 * out.norm()
            assert graphs() == 1
            with pytest.raises(PlanError, match="argument 'timestep' of the model"):
                model(video(), None)
    finally:
        for block in model.blocks:
            block._compiled_call_impl = None
    with torch.no_grad():
        assert torch.equal(model(video(), torch.tensor([0.9])), dense)
    assert not model._forward_pre_hooks


def test_attached_budgets_survive_a_move_of_the_model(model: VideoDiT) -> None:
    plan = make_plan(model)
    with freqopt.attach(model, plan), torch.no_grad():
        model.double().float()
        model(video(), torch.tensor([0.9]))
        for name in plan.sites:
            found = model.get_submodule(name).freqopt_budget
            torch.testing.assert_close(found.float(), plan.budget(name, 2))


def test_budget_at_is_the_row_of_the_bucket() -> None:
    table = torch.arange(12.0).reshape(3, 4)
    edges = torch.tensor(EDGES)
    for time, row in ((-1.0, 0), (0.25, 0), (0.2501, 1), (0.75, 1), (7.0, 2)):
        assert torch.equal(budget_at(table, edges, torch.tensor(time)), table[row])
    assert torch.equal(budget_at(table, edges, torch.tensor([[0.0, 2.0], [0.9, 1.0]])), table[2])
    assert torch.equal(budget_at(table, edges, torch.tensor([0.9, 0.5])), table[1])


def test_another_length_is_told_or_refused(
    model: VideoDiT, caplog: pytest.LogCaptureFixture
) -> None:
    plan = make_plan(model)
    shorter = video()[:, :, :1]  # 99 tokens, and the plan says 396
    with torch.no_grad():
        compiled(model, plan, "eager")(video(), torch.tensor([0.5]))
        assert "not verified" not in caplog.text
        torch._dynamo.reset()
        compiled(model, plan, "eager")(shorter, torch.tensor([0.5]))
        assert "at 4x9x11 (396 tokens) and is used at 99 tokens" in caplog.text
        assert "error of about 0.2 is expected" in caplog.text  # 0.1 * sqrt(4)
        torch._dynamo.reset()
        far = {name: s.model_copy(update={"tokens": 9999}) for name, s in plan.sites.items()}
        with pytest.raises(Exception, match="calibrated at 9999") as caught:
            compiled(model, plan.model_copy(update={"sites": far}), "eager")(
                video(), torch.tensor([0.5])
            )
    assert isinstance(getattr(caught.value, "inner_exception", caught.value), PlanError)


class Broken(nn.Module):
    """A graph break between the timestep and the blocks, which then see no timestep."""

    def __init__(self, model: VideoDiT) -> None:
        super().__init__()
        self.blocks = model.blocks
        self.__dict__["inner"] = model

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        inner = self.inner
        modulation = inner.modulation(inner.time(inner._embed_time(timestep))).unflatten(1, (6, -1))
        torch._dynamo.graph_break()
        from freqopt.models_zoo.video_dit import rotary_table

        x = inner.patchify(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, modulation, rotary_table(GRID, inner.config, x.device))
        return x


def test_a_graph_without_the_timestep_uses_the_most_exact_budget_and_says_so(
    model: VideoDiT, caplog: pytest.LogCaptureFixture
) -> None:
    broken, late = Broken(model), torch.tensor([0.9])

    def run(plan: Plan, strict: bool) -> Tensor:
        torch._dynamo.reset()
        options = {"plan": plan, "inner": "eager", "min_tokens": 0, "strict": strict, "grid": GRID}
        with torch.no_grad():
            out = torch.compile(broken, backend=freqopt_backend, options=options)(video(), late)
        assert isinstance(out, Tensor)
        return out

    careful = run(make_plan(model, only=0), False)
    out = run(make_plan(model), False)
    assert (out - careful).norm() < 1e-5 * out.norm()
    assert "no tensor input 'timestep'" in caplog.text and "most exact budget" in caplog.text
    with pytest.raises(Exception, match="no tensor input") as caught:
        run(make_plan(model), True)
    assert isinstance(getattr(caught.value, "inner_exception", caught.value), SiteError)


def samples_at(*times: float, name: str = "timestep") -> list[dict[str, Any]]:
    return [{"x": torch.ones(1), name: torch.tensor([t])} for t in times]


class Anything(nn.Module):
    """A model whose arguments may have any names."""

    def forward(self, **given: Tensor) -> dict[str, Tensor]:
        return given


def test_every_bucket_has_samples_to_fit_and_samples_held_out() -> None:
    for times in ((0.1, 0.2, 0.3), (0.0, 0.5, 0.5, 1.0), tuple(range(9)), (1, 1, 1, 1), (3, 4)):
        found = collect_samples(Anything(), samples_at(*map(float, times)))
        for part in (found.fit, found.held_out):
            assert {found.bucket(s) for s in part} == set(range(found.buckets))
        assert sum(found.bucket_samples) == len(found.fit) and found.buckets <= 4
    assert collect_samples(Anything(), samples_at(*map(float, range(16)))).buckets == 4
    assert collect_samples(Anything(), samples_at(0.0, 1.0, 2.0, 3.0), buckets=1).buckets == 1


def test_the_timestep_argument_is_found_or_given() -> None:
    for name in ("t", "sigma", "timesteps", "denoising_timestep"):
        found = collect_samples(Anything(), samples_at(0.0, 1.0, name=name))
        assert found.timestep_name == name
    odd = samples_at(0.0, 1.0, name="phase")
    assert collect_samples(Anything(), odd).timestep_name is None
    assert collect_samples(Anything(), odd, timestep="phase").timestep_name == "phase"
    both = [{"timestep_embedding": torch.ones(4), "timestep": torch.tensor(3.0)}]
    assert collect_samples(Anything(), both).timestep_name == "timestep"
    with pytest.raises(CalibrationError, match="named 'noise'.*its arguments are x, phase"):
        collect_samples(Anything(), odd, timestep="noise")


def test_no_bucket_at_all(model: VideoDiT) -> None:
    with pytest.raises(OptionError, match="timestep_buckets 0"):
        freqopt.calibrate(model, [], timestep_buckets=0)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_selection_on_a_gpu_never_waits_for_it(mode: str | None) -> None:
    torch.manual_seed(0)
    config = VideoDiTConfig(width=64, layers=LAYERS, mlp_width=64, rope_axes=(8, 12, 12))
    model = VideoDiT(config).cuda().eval()
    nn.init.normal_(model.head.weight, std=0.2)
    nn.init.normal_(model.modulation.weight, std=0.3)
    times = [torch.tensor([time], device="cuda") for time in TIMES]
    x = video().cuda()

    def of_heads_of_32(plan: Plan) -> Plan:
        sites = {
            name: site.model_copy(update={"head_dim": 32}) for name, site in plan.sites.items()
        }
        return plan.model_copy(update={"sites": sites})

    wanted = []
    with torch.no_grad():
        for bucket, time in enumerate(times):
            torch._dynamo.reset()
            plan = of_heads_of_32(make_plan(model, only=bucket))
            wanted.append(compiled(model, plan, "eager")(x, time))
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        plan = of_heads_of_32(make_plan(model))
        options = {"plan": plan, "min_tokens": 0, "strict": True, "mode": mode}
        step = torch.compile(model, backend=freqopt_backend, options=options, fullgraph=True)
        for _ in range(4):  # compile, warm up, record
            step(x, times[0])
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            outs = [step(x, time).clone() for time in (*times, times[0])]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert graphs() == 1
    for out, want in zip(outs, [*wanted, wanted[0]], strict=True):
        assert (out - want).norm() < 1e-3 * want.norm()
    assert (outs[0] - wanted[2]).norm() > 1e-3 * outs[0].norm()
