"""Adapters of peft, loaded and changed by diffusers' own calls on pipelines that are optimized.

At every stage all planned sites are split, the output is the dense one at threshold 0, and the same
on every route at a plan.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import Piped, far, made
from torch import Tensor

import freqopt
from freqopt.capture.conditions import adapters_of
from freqopt.errors import SiteError
from freqopt.front.state import choose_route, state_of
from freqopt.plan.measured import Verified
from freqopt.plan.plan import Plan

peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")

LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]
Stage = Callable[[Any], None]

LIFE: dict[str, tuple[Stage, list[str]]] = {
    "loaded": (lambda pipe: pipe.load("style"), ["style"]),
    "weighted": (lambda pipe: pipe.set_adapters(["style"], [0.4]), ["style"]),
    "disabled": (lambda pipe: pipe.disable_lora(), []),
    "enabled": (lambda pipe: pipe.enable_lora(), ["style"]),
    "fused": (lambda pipe: pipe.fuse_lora(lora_scale=0.5), ["style"]),
    "unfused": (lambda pipe: pipe.unfuse_lora(), ["style"]),
    "two": (lambda pipe: pipe.load("tint"), ["tint"]),
    "both": (lambda pipe: pipe.set_adapters(["style", "tint"], [0.7, 0.2]), ["style", "tint"]),
    "deleted": (lambda pipe: pipe.delete_adapters("tint"), ["style"]),
    "unloaded": (lambda pipe: pipe.unload_lora_weights(), []),
}
"""Stages of a pipeline in order, and the adapters that change what it computes."""


def config(rank: int, layers: list[str] = LAYERS) -> Any:
    return peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=layers, init_lora_weights=False
    )


class Loading:
    """A pipeline whose adapters were saved into a folder; `load` reads one by name."""

    def __init__(self, piped: Piped, folder: Path) -> None:
        self.piped, self.folder = piped, folder
        model: Any = piped.pipe.transformer
        for number, name in enumerate(("style", "tint")):
            torch.manual_seed(number)
            model.add_adapter(config(3 + number), adapter_name=name)
            layers = peft.get_peft_model_state_dict(model, adapter_name=name)
            piped.pipe.save_lora_weights(folder / name, transformer_lora_layers=layers)
            model.unload_lora()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.piped.pipe, name)

    def load(self, name: str, **options: Any) -> None:
        self.piped.pipe.load_lora_weights(str(self.folder / name), adapter_name=name, **options)


@pytest.fixture
def heard() -> Iterator[Callable[[], list[str]]]:
    """What freqopt warned of so far."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("freqopt")
    logger.addHandler(handler)
    yield lambda: list(said)
    logger.removeHandler(handler)


def split_sites() -> set[str]:
    """Sites that were split since the counters were reset."""
    return {site.site for site in freqopt.counters().sites if site.split and site.calls}


def lived(
    pipe: Loading, plan: Plan | None = None, stages: Sequence[str] = tuple(LIFE)
) -> dict[str, Tensor]:
    """The pipeline's output at some stages. plan: whose sites have to be split at each."""
    outputs = {}
    for name in stages:
        change, adapters = LIFE[name]
        change(pipe)
        freqopt.reset_counters()
        outputs[name] = pipe.piped.run()
        assert adapters_of(pipe.transformer) == adapters, name
        assert plan is None or split_sites() == set(plan.sites), name
    return outputs


class Known:
    """A pipeline, its plans at threshold 0 and elsewhere, and its outputs without a compiler."""

    def __init__(self, name: str, folder: Path) -> None:
        self.piped = made(name)
        zero, plans = self.piped.plans(0.0), self.piped.plans(1.0)
        self.zero, self.plan = zero["transformer"], plans["transformer"]
        self.pipe = Loading(self.piped, folder)
        self.dense = lived(self.pipe)
        with self.optimized(self.plan, "eager"):
            self.eager = lived(self.pipe, self.plan)

    def optimized(self, plan: Plan, route: Any) -> freqopt.Handle:
        return freqopt.optimize(
            self.piped.pipe, {"transformer": plan}, route=route, inner="eager", strict=True
        )


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Known]:
    return functools.cache(lambda name: Known(name, tmp_path_factory.mktemp(name)))


def test_the_stages_differ(known: Callable[[str], Known]) -> None:
    for name in ("wan", "flux"):
        dense, eager = known(name).dense, known(name).eager
        without = dense["unloaded"]
        for stage in ("loaded", "weighted", "fused", "two", "both"):
            assert far(dense[stage], without) > 2e-3, (name, stage)
        assert far(dense["disabled"], without) < 1e-6
        assert all(far(eager[stage], dense[stage]) > 1e-3 for stage in LIFE)


ALL = tuple(LIFE)
FEW = ("loaded", "weighted", "fused", "unfused", "unloaded")

LIVES = [
    ("wan", "eager", ALL),
    ("flux", "eager", ALL),
    ("wan", "regional", FEW),
    *(
        pytest.param(name, route, ALL, marks=pytest.mark.slow)
        for name in ("wan", "flux")
        for route in ("regional", "compile")
    ),
]


@pytest.mark.parametrize(("name", "route", "stages"), LIVES)
def test_adapters_change_on_an_optimized_pipeline(
    name: str, route: str, stages: tuple[str, ...], known: Callable[[str], Known]
) -> None:
    found = known(name)
    torch._dynamo.reset()
    limit = torch._dynamo.config.patch(recompile_limit=64)  # each stage compiles anew
    with limit, found.optimized(found.zero, route):
        zero = lived(found.pipe, found.zero, stages)
    with limit, found.optimized(found.plan, route):
        planned = lived(found.pipe, found.plan, stages)
    assert max(far(zero[stage], found.dense[stage]) for stage in stages) < 1e-5
    assert max(far(planned[stage], found.eager[stage]) for stage in stages) < 1e-5


@pytest.mark.parametrize(("name", "route"), [("flux", "regional"), ("wan", "compile")])
def test_a_pipeline_with_an_adapter_is_optimized(
    name: str, route: str, known: Callable[[str], Known]
) -> None:
    found = known(name)
    found.pipe.load("style")
    choice = choose_route(state_of(found.pipe.transformer, found.plan))
    assert choice.route == "eager" and "an adapter" in choice.why
    with found.optimized(found.plan, route):
        freqopt.reset_counters()
        assert far(found.piped.run(), found.eager["loaded"]) < 1e-5
        assert split_sites() == set(found.plan.sites)
        found.pipe.unload_lora_weights()
        assert far(found.piped.run(), found.eager["unloaded"]) < 1e-5


def test_a_merged_adapter_leaves_no_trace(known: Callable[[str], Known]) -> None:
    found = known("wan")
    model = found.pipe.transformer
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found.pipe.load("style")
    found.pipe.fuse_lora()
    found.pipe.unload_lora_weights()
    try:
        assert choose_route(state_of(model, found.plan)).route == "regional"
        with found.optimized(found.plan, "eager"):
            assert far(found.piped.run(), found.eager["loaded"]) < 1e-5
    finally:
        model.load_state_dict(before)


def verified(plan: Plan, adapters: list[str]) -> Plan:
    """The same, and a record of the adapters that it was verified with."""
    record = Verified(sample_errors=[0.1], spread=0.0, dtype="float32", adapters=adapters)
    return plan.model_copy(update={"verified": record})


def test_what_differs_is_told(
    known: Callable[[str], Known], heard: Callable[[], list[str]]
) -> None:
    found = known("wan")
    with found.optimized(verified(found.plan, []), "eager") as handle:
        found.piped.run()
        assert not heard() and "it has the adapter" not in str(handle)
        found.pipe.load("style")
        found.piped.run(num_inference_steps=4)
        (told,) = heard()
        assert "it has the adapter style" in told and "no adapter" in told
        assert "transformer: it has the adapter style, which was not verified" in str(handle)
        found.pipe.unload_lora_weights()
        assert "it has the adapter" not in str(handle)
    with found.optimized(verified(found.plan, ["style"]), "eager") as handle:
        assert "transformer: it lacks the adapter style, which was not verified" in str(handle)


def test_a_plan_knows_the_adapters_that_it_was_calibrated_with(
    known: Callable[[str], Known],
) -> None:
    found = known("wan")
    found.pipe.load("style")
    quick = {"rounds": 0, "progress": False, "order": "grid", "timestep_buckets": 1}
    with freqopt.optimize(
        found.piped.pipe,
        prompts=[{**found.piped.call, "num_inference_steps": 4}],
        target_density=0.7,
        route="eager",
        calibration=quick,
    ) as handle:
        plan = handle.plans["transformer"]
        assert plan.verified is not None and plan.verified.adapters == ["style"]
        assert "not verified" not in str(handle)
        found.pipe.set_adapters(["style"], [0.3])
        assert "not verified" not in str(handle)
        found.pipe.unload_lora_weights()
        assert "it lacks the adapter style" in str(handle)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("route", ["regional", "compile"])
def test_more_adapters_than_the_compiler_takes_are_not_dense_in_silence(
    route: Any, strict: bool, known: Callable[[str], Known], heard: Callable[[], list[str]]
) -> None:
    found = known("wan")
    model: Any = found.pipe.transformer
    torch._dynamo.reset()
    handle = freqopt.optimize(
        found.piped.pipe, {"transformer": found.plan}, route=route, inner="eager", strict=strict
    )
    try:
        with handle, torch._dynamo.config.patch(recompile_limit=1):
            found.piped.run()
            assert not heard()
            model.add_adapter(config(2, ["to_q"]), adapter_name="style")
            if strict:
                with pytest.raises(SiteError, match="recompile_limit"):
                    found.piped.run()
                return
            freqopt.reset_counters()
            found.piped.run()
            assert not split_sites()
            (told,) = heard()
            assert "recompile_limit" in told and "route='eager'" in told
            found.piped.run()
            assert len(heard()) == 1
    finally:
        model.unload_lora()


def test_adapters_that_take_each_others_place_compile_nothing_anew(tmp_path: Path) -> None:
    piped = made("wan")
    plan = piped.plans(0.0)["transformer"]
    pipe = Loading(piped, tmp_path)
    pipe.enable_lora_hotswap(target_rank=8)
    pipe.load("style")
    with freqopt.optimize(piped.pipe, plan, route="regional", inner="eager", strict=True):
        first = piped.run()
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        other = str(pipe.folder / "tint")
        piped.pipe.load_lora_weights(other, adapter_name="style", hotswap=True)
        freqopt.reset_counters()
        second = piped.run()
        assert split_sites() == set(plan.sites)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert far(second, first) > 1e-3 and far(second, piped.run()) < 1e-5


def test_an_adapter_is_loaded_while_weights_are_offloaded(tmp_path: Path) -> None:
    piped = made("wan")
    plan = piped.plans(0.0)["transformer"]
    pipe = Loading(piped, tmp_path)
    pipe.load("style")
    expected = piped.run()
    pipe.unload_lora_weights()
    device = torch.device("cpu")
    pipe.transformer.enable_group_offload(device, device, offload_type="leaf_level")
    with freqopt.optimize(piped.pipe, plan, strict=True) as handle:
        assert handle.components["transformer"].choice.route == "eager"
        piped.run()
        pipe.load("style")  # diffusers takes its hooks off, and puts them on anew
        freqopt.reset_counters()
        assert far(piped.run(), expected) < 1e-5
        assert split_sites() == set(plan.sites)
