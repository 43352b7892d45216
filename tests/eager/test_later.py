"""Models that were split, and are dense in a later call: each reason is said once, or an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pieces_models as models
import pytest
import torch
import torch.nn.functional as F
from plans import plan_of
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

import freqopt
from freqopt.errors import SiteError
from freqopt.plan.plan import Plan

pytestmark = pytest.mark.filterwarnings(
    "ignore:There is a performance drop", "ignore:flex_attention called"
)

Change = Callable[[models.Video, dict[str, Tensor]], Callable[[], Tensor]]


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_of(models.make(), models.inputs(), 1.0)


def doubled(model: models.Video, inputs: dict[str, Tensor]) -> Callable[[], Tensor]:
    model.double()
    return lambda: model(**{name: each.double() for name, each in inputs.items()})


def transformed(model: models.Video, inputs: dict[str, Tensor]) -> Callable[[], Tensor]:
    def run(video: Tensor) -> Tensor:
        return model(video=video, text=inputs["text"])

    return lambda: torch.func.vmap(run)(inputs["video"][None])[0]


def attending(mix: Callable[..., Tensor]) -> Change:
    """All attention to the video is written in another way."""

    def change(model: models.Video, inputs: dict[str, Tensor]) -> Callable[[], Tensor]:
        class Another(models.Attention):
            def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
                own = (linear(x).unflatten(-1, (2, -1)) for linear in (self.q, self.k, self.v))
                return self.out(mix(*(t.transpose(1, 2) for t in own)).transpose(1, 2).flatten(2))

        for block in model.blocks:
            block.attn.__class__ = Another
        return lambda: model(**inputs)

    return change


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1)
    scores *= 0.25  # which is not put off
    return scores.softmax(-1) @ v


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


UNMET = "no attention was met there"
LATER: list[tuple[str, Change, str]] = [
    ("eager", doubled, "dtype torch.float64 has no kernel"),
    ("eager", transformed, "inside torch.jit.trace or a transform of torch.func"),
    ("regional", transformed, "inside torch.jit.trace or a transform of torch.func"),
    ("compile", transformed, "inside torch.jit.trace or a transform of torch.func"),
    ("eager", attending(causal), "it is causal"),
    ("eager", attending(by_hand), UNMET),
    ("eager", attending(flex_attention), UNMET),
    ("compile", doubled, "dtype torch.float64 has no kernel"),
]


@pytest.mark.parametrize(("route", "change", "words"), LATER)
@torch.no_grad()
def test_a_later_call_that_is_dense_is_told_once_or_an_error(
    route: Any, change: Change, words: str, plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    inputs = models.inputs()
    for strict in (False, True):
        torch._dynamo.reset()
        model, twin = models.make(), models.make()
        dense = change(twin, inputs)()
        inner = {} if route == "eager" else {"inner": "eager"}
        with freqopt.optimize(model, plan, route=route, strict=strict, **inner):
            model(**inputs)
            caplog.clear()
            call = change(model, inputs)
            if strict:
                with pytest.raises(SiteError, match=words):
                    call()
                continue
            for _ in range(3):
                assert (call() - dense).abs().max() < 1e-5
            told = [record.message for record in caplog.records if words in record.message]
            sites = 1 if route != "compile" or change is transformed else len(model.blocks)
            assert len(told) == sites, told


@torch.no_grad()
def test_a_call_in_which_a_cache_skips_attention_is_none_of_these(
    plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    model, inputs = models.make(), models.inputs()
    with freqopt.optimize(model, plan, route="eager", strict=True):
        model(**inputs)
        attn = model.blocks[1].attn
        kept = torch.zeros(1, 180, models.WIDTH)
        attn.forward = lambda x, context=None: 2 * kept - kept + x  # as pyramid broadcast does
        caplog.clear()
        model(**inputs)
        model.blocks[0].forward = lambda x, text: x
        model(**inputs)
        del attn.forward
        model(**inputs)
    assert not caplog.records


@torch.no_grad()
def test_other_reasons_are_said_too_and_what_is_split_again_is_split(
    plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    model, inputs = models.make(), models.inputs()
    dense = model(**inputs)
    run = transformed(model, inputs)
    with freqopt.optimize(model, plan, route="eager"):
        split = model(**inputs)
        assert (split - dense).abs().max() > 1e-5
        caplog.clear()
        for _ in range(2):
            run()
            assert torch.equal(model(**inputs), split)
            classes = [block.attn.__class__ for block in model.blocks]
            attending(causal)(model, inputs)()
            for block, own in zip(model.blocks, classes, strict=True):
                block.attn.__class__ = own
    lines = [record.message for record in caplog.records]
    assert len(lines) == 2 and all("0 of 3 planned sites split in this call" in s for s in lines)


def another_block(model: models.Video) -> int:
    model.blocks[1] = models.make().blocks[1]
    return 1


def another_attention(model: models.Video) -> int:
    model.blocks[0].attn = models.make().blocks[0].attn
    return 1


def all_others(model: models.Video) -> int:
    model.blocks = models.make().blocks
    return 3


def a_block_less(model: models.Video) -> int:
    del model.blocks[2]
    return 1


REPLACED = "its module is in the model no more"


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("replace", [another_block, another_attention, all_others, a_block_less])
@torch.no_grad()
def test_a_module_that_was_replaced_is_told_once_or_an_error(
    replace: Callable[[models.Video], int],
    strict: bool,
    plan: Plan,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What is in its place has no budget: it was dense without a word."""
    model, inputs = models.make(), models.inputs()
    held = list(model.blocks), [block.attn for block in model.blocks]
    with freqopt.optimize(model, plan, route="eager", strict=strict):
        split = model(**inputs)
        caplog.clear()
        count = replace(model)
        for _ in range(2):
            if strict:
                with pytest.raises(SiteError, match=f"{REPLACED}.* \\({count}\\)"):
                    model(**inputs)
            else:
                assert (model(**inputs) - split).abs().max() > 1e-5
        told = [record.message for record in caplog.records if REPLACED in record.message]
        assert len(told) == (not strict), told
        model.blocks = torch.nn.ModuleList(held[0])
        for block, attn in zip(model.blocks, held[1], strict=True):
            block.attn = attn
        assert torch.equal(model(**inputs), split)


@torch.no_grad()
def test_what_was_replaced_is_split_once_it_is_optimized_again(plan: Plan) -> None:
    model, inputs = models.make(), models.inputs()
    handle = freqopt.optimize(model, plan, route="eager", strict=True)
    split = model(**inputs)
    all_others(model)
    handle.disable()
    with freqopt.optimize(model, plan, route="eager", strict=True):
        assert torch.equal(model(**inputs), split)


@torch.no_grad()
def test_modules_that_were_moved_or_wrapped_or_skipped_were_not_replaced(
    plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    model, inputs = models.make(), models.inputs()
    with freqopt.optimize(model, plan, route="eager", strict=True):
        split = model(**inputs)
        caplog.clear()
        models.wrapping_blocks(model)
        assert torch.equal(model(**inputs), split)
        model.further, kept = model.blocks[2], model.blocks[2].forward
        model.blocks[1].inner.forward = lambda x, text: x  # as a step cache skips it
        model.blocks[2] = models.Wrapped(torch.nn.Identity())
        model.blocks[2].forward = kept
        model(**inputs)
    assert not caplog.records


@torch.no_grad()
def test_a_module_that_something_else_holds_and_calls_is_split_as_before(plan: Plan) -> None:
    """The model does not name it any more, and still calls it."""
    model, inputs = models.make(), models.inputs()

    class Calls(torch.nn.Module):
        def __init__(self, held: torch.nn.Module) -> None:
            super().__init__()
            self.held = [held]

        def forward(self, x: Tensor, text: Tensor) -> Tensor:
            return self.held[0](x, text)

    with freqopt.optimize(model, plan, route="eager", strict=True):
        split = model(**inputs)
        model.blocks[1] = Calls(model.blocks[1])
        assert torch.equal(model(**inputs), split)
