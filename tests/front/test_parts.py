"""Optimized models that are not called as they were optimized: dense is told, on every route."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pieces_models as models
import pytest
import torch
from pipelines import far
from plans import plan_of
from torch import Tensor, nn

import freqopt
from freqopt.errors import SiteError
from freqopt.plan.plan import Plan

ROUTES = ("eager", "regional", "compile")
OUTSIDE = "attention at blocks.0.attn was called in no call of the model"
OTHER = "another backend than freqopt's compiled the model, or blocks of it"


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_of(models.make(), models.inputs(), 1.0)


@pytest.fixture(autouse=True)
def anew() -> None:
    torch._dynamo.reset()
    freqopt.reset_counters()


def tokens() -> Tensor:
    """What a block is called with."""
    return torch.randn(1, 180, models.WIDTH, generator=torch.Generator().manual_seed(0))


def its_forward(model: nn.Module) -> Callable[..., Any]:
    return model.forward


def a_block(model: models.Video) -> Callable[..., Any]:
    return lambda video, text: model.blocks[0](tokens(), text)


def compiled_forward(model: nn.Module) -> Callable[..., Any]:
    return torch.compile(model.forward, backend="aot_eager")


def compiled_block(model: models.Video) -> Callable[..., Any]:
    block = torch.compile(model.blocks[0], backend="aot_eager")
    return lambda video, text: block(tokens(), text)


def replaced_forward(model: nn.Module) -> Callable[..., Any]:
    model.forward = torch.compile(model.forward, backend="aot_eager")
    return model


def blocks_in_place(model: models.Video) -> Callable[..., Any]:
    for block in model.blocks:
        block.compile(backend="aot_eager")
    return model


def blocks_forwards(model: models.Video) -> Callable[..., Any]:
    for block in model.blocks:
        block.forward = torch.compile(block.forward, backend="aot_eager")
    return model


def wrapped_blocks(model: models.Video) -> Callable[..., Any]:
    for index, block in enumerate(model.blocks):
        model.blocks[index] = torch.compile(block, backend="aot_eager")
    return model


def in_place(model: models.Video) -> Callable[..., Any]:
    model.compile(backend="aot_eager")
    return model


Call = Callable[[Any], Callable[..., Any]]

TOLD: list[tuple[str, Call, str]] = [
    ("compile", its_forward, OUTSIDE),
    ("compile", a_block, OUTSIDE),
    *((route, compiled_forward, OTHER) for route in ROUTES),
    *((route, compiled_block, OTHER) for route in ("eager", "compile")),
    *((route, replaced_forward, OTHER) for route in ROUTES),
    *((route, blocks_in_place, OTHER) for route in ("eager", "regional")),
    *((route, blocks_forwards, OTHER) for route in ("eager", "regional")),
    ("eager", wrapped_blocks, OTHER),
]


@pytest.mark.parametrize(("route", "way", "words"), TOLD)
def test_what_is_dense_is_told_once(
    route: Any, way: Call, words: str, plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    model, inputs = models.make(), models.inputs()
    with torch.no_grad():
        dense = way(copy.deepcopy(model))(**inputs)
        torch._dynamo.reset()
        with freqopt.optimize(model, plan, route=route, inner="eager"):
            call = way(model)
            for _ in range(3):  # without a compiler the first is split, as it is written down
                out = call(**inputs)
            assert torch.allclose(out, dense, atol=1e-5)
    assert caplog.text.count(words) == 1


@pytest.mark.parametrize(("route", "way", "words"), TOLD)
def test_it_is_an_error_where_all_must_be_split(
    route: Any, way: Call, words: str, plan: Plan
) -> None:
    model, inputs = models.make(), models.inputs()
    with (
        torch.no_grad(),
        freqopt.optimize(model, plan, route=route, inner="eager", strict=True),
        pytest.raises(SiteError, match=words),
    ):
        call = way(model)
        for _ in range(2):
            call(**inputs)


@pytest.mark.parametrize("called_before", [True, False])
@torch.no_grad()
def test_forward_is_an_error_where_blocks_are_compiled_too(called_before: bool, plan: Plan) -> None:
    model, inputs = models.make(), models.inputs()
    with freqopt.optimize(model, plan, route="regional", inner="eager", strict=True):
        if called_before:
            model(**inputs)
        words = "video tells no grid" if called_before else "no call of the model tells its grid"
        for _ in range(2):
            with pytest.raises(SiteError, match=words):
                model.forward(**inputs)
        model(**inputs)
    torch._dynamo.reset()
    with freqopt.optimize(model, plan, route="regional", inner="eager", strict=True):
        model.blocks[0](tokens(), inputs["text"])  # on the calibrated grid


BEFORE: list[Call] = [in_place, replaced_forward, blocks_in_place, blocks_forwards, wrapped_blocks]


@pytest.mark.parametrize("way", BEFORE)
def test_what_was_compiled_before_is_served_without_the_compiler_and_put_back(
    way: Call, plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    """It was dense from the second call on, with a line that said that all was split."""
    expected, model, inputs = models.make(), models.make(), models.inputs()
    with torch.no_grad():
        with freqopt.optimize(expected, plan, route="eager", strict=True):
            split = expected(**inputs)
        way(model)
        dense = model(**inputs)
        before = [dict(module.__dict__) for module in model.modules()]
        with caplog.at_level("INFO", "freqopt"), freqopt.optimize(model, plan, route="eager"):
            for _ in range(3):
                assert far(model(**inputs), split) < 1e-5
        assert (
            caplog.text.count("runs without the compiler while") == 1 and OTHER not in caplog.text
        )
        after = [module.__dict__ for module in model.modules()]
        for one, other in zip(before, after, strict=True):
            for name in ("forward", "_compiled_call_impl"):
                assert one.get(name) is other.get(name)
        assert far(dense, split) > 1e-3 and torch.equal(model(**inputs), dense)


def test_what_was_compiled_anew_meanwhile_is_kept(plan: Plan) -> None:
    model = blocks_in_place(models.make())
    with freqopt.optimize(model, plan, route="eager"):
        blocks_in_place(model)
        compiled = [block._compiled_call_impl for block in model.blocks]
    assert [block._compiled_call_impl for block in model.blocks] == compiled


@pytest.mark.parametrize("route", ROUTES)
def test_modules_that_run_by_themselves_in_a_call_are_not_told(
    route: Any, plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    """As hooks break the graph at every layer."""
    model, inputs = models.make(), models.inputs()
    with torch.no_grad():
        dense = model(**inputs)
        models.breaking_linears(model)
        with freqopt.optimize(model, plan, route=route, inner="eager", strict=True):
            for _ in range(3):
                assert far(model(**inputs), dense) > 1e-3
    assert OUTSIDE not in caplog.text and OTHER not in caplog.text


class Untraced(models.Video):
    """A model whose forward the compiler leaves alone."""

    @torch.compiler.disable
    def forward(self, video: Tensor, text: Tensor) -> Tensor:
        return super().forward(video, text)


@pytest.mark.parametrize(
    ("route", "words"), [("eager", OUTSIDE), ("regional", ""), ("compile", OTHER)]
)
def test_a_model_that_another_backend_was_to_compile_and_cannot_is_told(
    route: Any, words: str, plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    """Its own compiled blocks are split as ever."""
    for strict in (False, True):
        model, inputs = models.make(), models.inputs()
        model.__class__ = Untraced
        with torch.no_grad():
            dense = model(**inputs)
            with freqopt.optimize(model, plan, route=route, inner="eager", strict=strict):
                compiled = torch.compile(model, backend="aot_eager")
                if words and strict:
                    with pytest.raises(SiteError, match=words):
                        compiled(**inputs)
                else:
                    outputs = [compiled(**inputs) for _ in range(2)]
                    assert all((far(out, dense) > 1e-3) is not bool(words) for out in outputs)
                    assert caplog.text.count(words) == 1 if words else OTHER not in caplog.text


@pytest.mark.parametrize("call", [a_block, compiled_block])
def test_a_compiled_block_alone_is_split_and_says_on_which_grid(
    call: Call, plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    model = models.make()
    with (
        torch.no_grad(),
        freqopt.optimize(model, plan, route="regional", inner="eager", strict=True),
        caplog.at_level("INFO", "freqopt"),
    ):
        call(model)(**models.inputs())
        split = [site.site for site in freqopt.counters().sites if site.split and site.calls]
    assert split == ["blocks.0.attn"]
    assert caplog.text.count("no call of the model tells its grid") == 1


def test_a_copy_of_what_is_compiled_as_a_whole_has_nothing_of_it(plan: Plan) -> None:
    model = models.make()
    with freqopt.optimize(model, plan, route="compile", inner="eager", strict=True):
        twin = copy.deepcopy(model)
    with torch.no_grad():
        dense = model.forward(**models.inputs())
        with freqopt.optimize(twin, plan, route="eager", strict=True):
            assert far(twin(**models.inputs()), dense) > 1e-3
        assert torch.equal(twin(**models.inputs()), dense)
    assert not any(module._forward_pre_hooks for module in twin.modules())
