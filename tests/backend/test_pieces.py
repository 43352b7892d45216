"""Models whose graph is in pieces: measured, inspected and split as the same model without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pieces_models as models
import pytest
import torch
from plans import plan_of
from torch import Tensor, nn

import freqopt
from freqopt.backend import freqopt_backend
from freqopt.kernels import chunked
from freqopt.kernels.layout import Inputs, Settings
from freqopt.plan.plan import Plan
from freqopt.plan.records import Budget

LOUD = {"min_tokens": 0, "inner": "eager"}
LAYERS = 3

Change = Callable[[nn.Module], None]


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_of(models.make(), models.inputs(), 1.0)


def split_whole(plan: Plan, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The dense output of the model as it is, and that of it compiled whole with a plan."""
    torch._dynamo.reset()
    model = models.make()
    with torch.no_grad():
        dense = model(**inputs)
        out = torch.compile(model, backend=freqopt_backend, options={**LOUD, "plan": plan})(
            **inputs
        )
    return dense, out


def ran(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    torch._dynamo.reset()
    freqopt.reset_counters()
    with torch.no_grad():
        out: Tensor = model(**inputs)
    return out


def is_close(first: Tensor, second: Tensor) -> bool:
    return bool((first - second).norm() < 1e-5 * second.norm())


@pytest.fixture(scope="module")
def wholes(plan: Plan) -> dict[int, tuple[Tensor, Tensor]]:
    """The outputs of `split_whole` by batch."""
    return {batch: split_whole(plan, models.inputs(batch=batch)) for batch in (1, 2)}


CHANGES = [models.breaking_linears, models.breaking_blocks, models.brought_in]
WAYS = ["plan", "attached", "attached blocks"]


@pytest.mark.parametrize(
    ("way", "change", "batch"),
    [
        *((way, change, 2) for way in WAYS for change in CHANGES),
        ("plan", models.breaking_linears, 1),
        *(
            pytest.param(way, change, 1, marks=pytest.mark.slow)
            for way in WAYS
            for change in CHANGES
            if (way, change) != ("plan", models.breaking_linears)
        ),
    ],
)
def test_pieces_are_split_as_the_whole(
    way: str, change: Change, batch: int, plan: Plan, wholes: dict[int, tuple[Tensor, Tensor]]
) -> None:
    inputs = models.inputs(batch=batch)
    dense, expected = wholes[batch]
    assert (expected - dense).norm() > 1e-3 * dense.norm()
    model = models.make()
    change(model)
    compiled: Any = model
    if way != "plan":
        freqopt.attach(model, plan)
    if way == "attached blocks":
        for block in model.blocks:
            block.compile(backend=freqopt_backend, options=LOUD)
    else:
        options = LOUD if way == "attached" else {**LOUD, "plan": plan}
        compiled = torch.compile(model, backend=freqopt_backend, options=options)
    assert is_close(ran(compiled, inputs), expected)
    assert freqopt.counters().split == LAYERS


HEADS = (2, 4, 1)


@pytest.fixture(scope="module")
def of_other_heads() -> tuple[Plan, Tensor]:
    """A plan of layers of other numbers of heads, and the output of the model compiled whole."""
    plan = plan_of(models.make_of_heads(*HEADS), models.inputs(), 1.0)
    options = {**LOUD, "plan": plan}
    whole = torch.compile(models.make_of_heads(*HEADS), backend=freqopt_backend, options=options)
    return plan, ran(whole, models.inputs())


@pytest.mark.parametrize(
    ("way", "change"),
    [
        ("plan", models.breaking_linears),
        ("attached", models.breaking_blocks),
        ("attached blocks", models.breaking_linears),
        pytest.param("plan", models.breaking_blocks, marks=pytest.mark.slow),
        pytest.param("attached", models.breaking_linears, marks=pytest.mark.slow),
        pytest.param("attached blocks", models.breaking_blocks, marks=pytest.mark.slow),
    ],
)
def test_layers_of_other_numbers_of_heads_are_split_too(
    way: str, change: Change, of_other_heads: tuple[Plan, Tensor]
) -> None:
    """One graph may serve all numbers of heads, as symbols: a planned site compiles its own."""
    plan, expected = of_other_heads
    options, inputs = {**LOUD, "plan": plan}, models.inputs()
    model = models.make_of_heads(*HEADS)
    change(model)
    compiled: Any = model
    if way == "plan":
        compiled = torch.compile(model, backend=freqopt_backend, options=options)
    else:
        freqopt.attach(model, plan)
        for block in model.blocks if way == "attached blocks" else [model]:
            block.compile(backend=freqopt_backend, options=LOUD)
    assert is_close(ran(compiled, inputs), expected)
    assert freqopt.counters().split == LAYERS


def with_orders(plan: Plan, chunks: list[list[int]]) -> Plan:
    """Each layer with chunks of its own, and two buckets of a "timestep", the text's mean."""
    sites = {}
    for own, (name, site) in zip(chunks, plan.sites.items(), strict=True):
        later = Budget(threshold=[2 * x for x in site.budgets[0].threshold])
        changed = {"chunks": own, "budgets": [site.budgets[0], later]}
        sites[name] = site.model_copy(update=changed)
    changed = {"sites": sites, "timestep_name": "text", "timestep_edges": [5.0]}
    return plan.model_copy(update=changed)


@pytest.mark.parametrize("way", WAYS)
def test_orders_of_heads_reach_the_op(
    way: str, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks = [[0, 256], [256, 0], [256, 512]]
    plan = with_orders(plan, chunks)
    heard = []
    forward = chunked.split_forward

    def listening(inputs: Inputs, settings: Settings) -> chunked.Forward:
        heard.append((inputs.chunks.tolist(), inputs.threshold.tolist()))
        assert settings.largest_chunk >= max(heard[-1][0])
        return forward(inputs, settings)

    monkeypatch.setattr(chunked, "split_forward", listening)
    torch._dynamo.reset()
    model = models.make()
    models.breaking_linears(model)
    compiled: Any = model
    if way == "plan":
        compiled = torch.compile(model, backend=freqopt_backend, options={**LOUD, "plan": plan})
    else:
        freqopt.attach(model, plan)
        for block in model.blocks if way == "attached blocks" else [model]:
            block.compile(backend=freqopt_backend, options=LOUD)
    for bucket, shift in enumerate((0.0, 10.0)):
        heard.clear()
        inputs = models.inputs()
        with torch.no_grad():
            compiled(**{**inputs, "text": inputs["text"] + shift})
        # A piece without the timestep among its inputs spends the most exact of the budgets.
        used = 0 if way == "plan" else bucket
        wanted = [site.budgets[used].threshold for site in plan.sites.values()]
        assert [own for own, _ in heard] == chunks
        torch.testing.assert_close([own for _, own in heard], wanted)


def test_threshold_zero_is_dense_attention() -> None:
    plan, inputs = plan_of(models.make(), models.inputs(), 0.0), models.inputs()
    model = models.make()
    models.breaking_linears(model)
    compiled = torch.compile(model, backend=freqopt_backend, options={**LOUD, "plan": plan})
    assert is_close(ran(compiled, inputs), models.make()(**inputs))
    assert freqopt.counters().split == LAYERS


def test_attention_to_as_many_tokens_of_text_stays_exact(plan: Plan) -> None:
    """Self and cross attention then have one graph; the latter's module has no budget."""
    inputs = models.inputs(text=180)
    _, expected = split_whole(plan, inputs)
    model = models.make()
    models.breaking_linears(model)
    compiled = torch.compile(model, backend=freqopt_backend, options={**LOUD, "plan": plan})
    assert is_close(ran(compiled, inputs), expected)


def test_an_inner_compiler_takes_the_budgets_too(plan: Plan) -> None:
    inputs = models.inputs()
    _, expected = split_whole(plan, inputs)
    model = models.make()
    models.breaking_blocks(model)
    options = {"min_tokens": 0, "inner": "aot_eager", "plan": plan}
    assert is_close(
        ran(torch.compile(model, backend=freqopt_backend, options=options), inputs), expected
    )
    assert freqopt.counters().split == LAYERS


def test_one_graph_for_all_layers_of_a_compiled_block(plan: Plan) -> None:
    """The plan among the options of blocks: each takes its own budget, and nothing recompiles."""
    inputs = models.inputs()
    _, expected = split_whole(plan, inputs)
    model = models.make()
    for block in model.blocks:
        block.compile(backend=freqopt_backend, options={**LOUD, "plan": plan}, fullgraph=True)
    torch._dynamo.utils.counters.clear()
    assert is_close(ran(model, inputs), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_graph_that_does_not_tell_its_layer_stays_dense(plan: Plan) -> None:
    """A compiled function of a block: which block it is called with is not on the stack."""
    model = models.make()

    class Looping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            run = lambda block, x, text: block(x, text)  # noqa: E731
            self.run = [torch.compile(run, backend=freqopt_backend, options={**LOUD, "plan": plan})]

        def forward(self, video: Tensor, text: Tensor) -> Tensor:
            x = self.model.patch(video).flatten(2).transpose(1, 2)
            for block in self.model.blocks:
                x = self.run[0](block, x, text)
            return self.model.head(x)

    inputs = models.inputs()
    assert is_close(ran(Looping(), inputs), model(**inputs))
    found = freqopt.counters()
    assert found.split == 0 and any("serves several layers" in s.reason for s in found.sites)


def measured(model: nn.Module) -> Plan:
    samples = [{**models.inputs(), "video": models.inputs()["video"] + i} for i in range(2)]
    torch._dynamo.reset()
    return freqopt.calibrate(model, samples, target_error=0.2, progress=False, rounds=0)


@pytest.fixture(scope="module")
def measured_whole() -> Plan:
    """The plan of the model as it is."""
    return measured(models.make())


@pytest.mark.parametrize("change", CHANGES)
def test_pieces_are_measured_and_inspected(change: Change, measured_whole: Plan) -> None:
    expected = measured_whole
    model = models.make()
    change(model)
    found = measured(model)
    names = [f"blocks.{i}.attn" for i in range(LAYERS)]
    assert list(found.sites) == list(expected.sites) == names
    assert found.evidence.dense_sites.keys() == expected.evidence.dense_sites.keys()
    for name, site in found.sites.items():
        assert site.layouts == expected.sites[name].layouts
        assert site.density == pytest.approx(expected.sites[name].density, rel=1e-2)
    seen = freqopt.inspect(model, min_tokens=0, **models.inputs())
    assert [site.name for site in seen.sites if site.eligible] == names
    assert not seen.unseen


def test_a_model_compiled_in_place_is_measured_and_inspected_as_it_was() -> None:
    model, calls = models.make(), []

    def backend(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        calls.append(gm)
        return gm.forward

    model.compile(backend=backend)
    model.blocks[0].compile(backend=backend)
    seen = freqopt.inspect(model, min_tokens=0, **models.inputs())
    assert sum(site.eligible for site in seen.sites) == LAYERS and seen.graphs == 1
    samples = [models.inputs(), models.inputs()]
    plan = freqopt.calibrate(model, samples, target_error=0.2, progress=False, rounds=0)
    assert len(plan.sites) == LAYERS and not calls
    with torch.no_grad():
        model(**models.inputs())
    assert calls, "it is compiled again afterwards"


def test_a_given_grid_is_believed_where_queries_and_keys_come_ready_made() -> None:
    model, inputs = models.make(), models.inputs()
    models.breaking_linears(model)
    options = {**LOUD, "threshold": 0.0, "grid": models.GRID}
    compiled = torch.compile(model, backend=freqopt_backend, options=options)
    assert is_close(ran(compiled, inputs), models.make()(**inputs))
    assert freqopt.counters().split == LAYERS
    assert freqopt.counters().dense == LAYERS
