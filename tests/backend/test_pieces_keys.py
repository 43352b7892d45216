"""Text in the keys only, in models whose graph is in pieces: measured and split as in the whole."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pieces_models as models
import pytest
import torch
from plans import plan_of
from torch import Tensor, nn

import freqopt
from freqopt.backend import freqopt_backend
from freqopt.eager.lay import UNSEEN, Lay, believed
from freqopt.passes.reasons import Reason
from freqopt.passes.site import Known
from freqopt.plan.plan import Plan

LOUD = {"min_tokens": 0, "inner": "eager"}
LAYERS = 3
AROUND = {"before": (12, 0), "after": (0, 12), "both": (12, 12)}
MANY = Reason.MANY_KEYS(others=91)

Change = Callable[[nn.Module], None]


def is_close(first: Tensor, second: Tensor) -> bool:
    return bool((first - second).norm() < 1e-5 * second.norm())


def ran_whole(plan: Plan, where: str, inputs: dict[str, Tensor]) -> Tensor:
    """Compiled as one graph, in which the video's tokens are seen to be among the keys'."""
    torch._dynamo.reset()
    model = torch.compile(
        models.make_over_text(where), backend=freqopt_backend, options={**LOUD, "plan": plan}
    )
    with torch.no_grad():
        out: Tensor = model(**inputs)
    return out


@pytest.mark.parametrize(
    ("way", "where", "change"),
    [
        ("plan", "before", models.breaking_linears),
        ("attached", "after", models.breaking_linears),
        ("attached blocks", "both", models.breaking_blocks),
        pytest.param("attached blocks", "both", models.breaking_linears, marks=pytest.mark.slow),
        pytest.param("attached blocks", "before", models.breaking_blocks, marks=pytest.mark.slow),
    ],
)
def test_text_in_the_keys_only_is_split(
    way: str, where: str, change: Change, caplog: pytest.LogCaptureFixture
) -> None:
    """Queries and keys come ready-made, and are not as many: the plan says what the others are.

    Another number of tokens of text is believed where it is all on one side, and another grid is
    that of the call.
    """
    plan = plan_of(models.make_over_text(where), models.inputs(), 1.0)
    lengths = (12,) if where == "both" else (12, 5)
    calls = [models.inputs(length, batch=2) for length in lengths] + [models.inputs_on((3, 7, 10))]
    with torch.no_grad():
        dense = [models.make_over_text(where)(**inputs) for inputs in calls]
    expected = [ran_whole(plan, where, inputs) for inputs in calls[:1]]
    torch._dynamo.reset()
    model = models.make_over_text(where)
    change(model)
    compiled: Any = model
    if way == "plan":
        options = {**LOUD, "plan": plan}
        compiled = torch.compile(model, backend=freqopt_backend, options=options)
    else:
        freqopt.attach(model, plan)
        for block in model.blocks if way == "attached blocks" else [model]:
            block.compile(backend=freqopt_backend, options=LOUD)
    found = []
    for inputs in calls:
        freqopt.reset_counters()
        with torch.no_grad(), caplog.at_level(logging.WARNING, logger="freqopt"):
            found.append(compiled(**inputs))
        assert freqopt.counters().split == LAYERS
        if inputs is calls[0]:
            assert "was verified at" not in caplog.text, "its text counts as well"
    expected += [ran_whole(plan, where, inputs) for inputs in calls[1:]]
    for out, whole, exact in zip(found, expected, dense, strict=True):
        assert is_close(out, whole)
        assert (whole - exact).norm() > 1e-3 * exact.norm()


def test_a_text_more_than_half_as_long_as_the_video_leaves_it_dense() -> None:
    """As in the whole: queries of zeros for so many keys would cost more than the split saves."""
    plan = plan_of(models.make_over_text("before"), models.inputs(), 1.0)
    model = models.make_over_text("before")
    models.breaking_linears(model)
    options = {**LOUD, "plan": plan}
    compiled = torch.compile(model, backend=freqopt_backend, options=options)
    for length, split in ((90, LAYERS), (91, 0)):
        torch._dynamo.reset()
        freqopt.reset_counters()
        with torch.no_grad():
            compiled(**models.inputs(length))
        assert freqopt.counters().split == split
    assert {site.reason for site in freqopt.counters().sites} == {str(MANY)}


def test_an_eager_layer_is_told_what_calibration_saw() -> None:
    known = (Known((3, 6, 10), before=12),)
    lay = believed(known, {}, 180, 270)
    assert isinstance(lay, Lay)
    assert (lay.kind, lay.before, lay.after, lay.pads) == ("text in keys", 90, 0, (90, 0))
    assert believed(known, {}, 180, 271) == MANY
    assert believed(known, {}, 185, 192) is None
    assert believed(known, {}, 192, 192) == Lay("joint", (3, 6, 10), 12, 0, UNSEEN)


def test_it_is_measured_in_pieces() -> None:
    samples = [{**models.inputs(), "video": models.inputs()["video"] + i} for i in range(2)]
    model, known = models.make_over_text("both"), {"target_error": 0.2, "progress": False}
    expected = freqopt.calibrate(model, samples, rounds=0, **known)
    models.breaking_linears(model)
    found = freqopt.calibrate(model, samples, rounds=0, **known)
    assert list(found.sites) == list(expected.sites) == [f"blocks.{i}.attn" for i in range(LAYERS)]
    for name, site in found.sites.items():
        assert site.layouts == expected.sites[name].layouts
        assert [(each.before, each.after) for each in site.layouts] == [AROUND["both"]]
        assert site.density == pytest.approx(expected.sites[name].density, rel=1e-2)


class Skipping(nn.Module):
    """Runs its last block in some calls only, as step caches do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.skips = model, True

    def forward(self, video: Tensor, text: Tensor) -> Tensor:
        x = self.model.patch(video).flatten(2).transpose(1, 2)
        for block in self.model.blocks[: -1 if self.skips else None]:
            x = block(x, text)
        return self.model.head(x)


def test_a_layer_that_the_first_eager_call_skipped() -> None:
    """Nothing was written down when it runs; how its tokens lie is what calibration saw."""
    first, last = Skipping(models.make_over_text("before", 1)), models.inputs()
    first.skips = False
    plan = plan_of(first, last, 0.0)
    model = Skipping(models.make_over_text("before", 1))
    freqopt.optimize(model, plan, route="eager")
    with torch.no_grad():
        model(**last)
        freqopt.reset_counters()
        model.skips = False
        out = model(**last)
        assert freqopt.counters().split == 1
        assert is_close(out, first(**last))
