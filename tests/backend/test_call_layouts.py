"""Grids of calls where a part of a model is compiled: other aspects, sizes and lengths of text."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import pieces_models as models
import pytest
import torch
from plans import plan_of
from torch import Tensor, nn

import freqopt
from freqopt.backend import freqopt_backend
from freqopt.capture.call_layouts import BySizes, layout_of_extents, tellers
from freqopt.passes.site import Source
from freqopt.plan.plan import Plan

LOUD: dict[str, Any] = {"min_tokens": 0, "inner": "eager"}
WIDE, TALL = models.GRID, (3, 10, 6)
SIZES = [
    WIDE,
    TALL,
    (3, 7, 10),
    (2, 9, 8),
    (1, 12, 15),
    (4, 5, 9),
    (3, 8, 9),
    (2, 6, 15),
    (3, 5, 11),
    (3, 9, 7),
    WIDE,
]


def call(grid: tuple[int, int, int], text: int = 12) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(sum(grid))
    t, h, w = grid
    return {
        "video": torch.randn(1, 4, t, 2 * h, 2 * w, generator=generator),
        "text": torch.randn(1, text, models.WIDTH, generator=generator),
    }


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_of(models.make(), call(WIDE), 1.0)


@pytest.fixture(scope="module")
def whole(plan: Plan) -> list[Tensor]:
    """Outputs of the model compiled whole, whose graph shows the grid of every call."""
    torch._dynamo.reset()
    compiled = torch.compile(models.make(), backend=freqopt_backend, options={**LOUD, "plan": plan})
    with torch.no_grad():
        return [compiled(**call(grid)) for grid in SIZES]


def ran(
    way: str,
    plan: Plan,
    change: Callable[[nn.Module], None] | None = None,
    calls: Sequence[dict[str, Tensor]] = (),
) -> list[Tensor]:
    """Outputs of the model in parts, for each call, by default one of each size."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    freqopt.reset_counters()
    model: Any = models.make()
    if change is not None:
        change(model)
    if way != "plan":
        freqopt.attach(model, plan)
    options = {**LOUD, "plan": plan} if way == "plan" else LOUD
    if change is None:
        for block in model.blocks:
            block.compile(backend=freqopt_backend, options=options)
    else:
        model = torch.compile(model, backend=freqopt_backend, options=options)
    with torch.no_grad():
        return [model(**each) for each in calls or map(call, SIZES)]


def distance(first: Tensor, second: Tensor) -> float:
    return float((first - second).norm() / second.norm())


@pytest.mark.parametrize(
    ("way", "change"),
    [
        ("attached", None),
        ("plan", models.breaking_linears),
        pytest.param("plan", None, marks=pytest.mark.slow),
        pytest.param("attached", models.breaking_linears, marks=pytest.mark.slow),
    ],
)
def test_every_call_has_its_own_grid_in_few_graphs(
    way: str, change: Any, plan: Plan, whole: list[Tensor]
) -> None:
    got = ran(way, plan, change)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert all(distance(a, b) < 1e-5 for a, b in zip(got, whole, strict=True))
    assert freqopt.counters().split == 3 * len(SIZES)
    if change is None:
        assert graphs <= 3, "one for the first size, one for any, one where an extent is 1"


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_an_inner_compiler_takes_the_numbers_of_calls(
    inner: str, plan: Plan, whole: list[Tensor]
) -> None:
    torch._dynamo.reset()
    freqopt.reset_counters()
    model = models.make()
    freqopt.attach(model, plan)
    for block in model.blocks:
        block.compile(backend=freqopt_backend, options={**LOUD, "inner": inner})
    with torch.no_grad():
        for grid, expected in list(zip(SIZES, whole, strict=True))[:3]:
            assert distance(model(**call(grid)), expected) < 1e-4
    assert freqopt.counters().split == 9


def test_the_grid_of_another_call_would_show(plan: Plan, whole: list[Tensor]) -> None:
    model = models.make()
    torch._dynamo.reset()
    options = {**LOUD, "grid": WIDE, "plan": plan}
    compiled = torch.compile(model, backend=freqopt_backend, options=options)
    with torch.no_grad():
        assert distance(compiled(**call(TALL)), whole[1]) > 1e-4


class Sides(models.Video):
    """Attention to the text, to the video, and to the video with text around it; the same code."""

    after = 0

    def __init__(self, layers: int) -> None:
        super().__init__(layers)
        self.tail = nn.Parameter(torch.randn(1, self.after, models.WIDTH))

    def forward(self, video: Tensor, text: Tensor) -> Tensor:
        x = self.patch(video).flatten(2).transpose(1, 2).contiguous()
        first, second, third = (block.attn for block in self.blocks)
        text = text + first(text)
        x = x + second(x)
        x = torch.cat([text, x, self.tail] if self.after else [text, x], 1)
        x = x + third(x)
        return self.head(x[:, text.shape[1] : x.shape[1] - self.after])


@pytest.mark.parametrize(
    ("way", "after"),
    [
        ("attached", 5),
        ("plan", 0),
        pytest.param("attached", 0, marks=pytest.mark.slow),
        pytest.param("plan", 5, marks=pytest.mark.slow),
    ],
)
def test_a_graph_for_a_video_alone_does_not_misread_one_behind_text(
    way: str, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "Video", Sides)
    monkeypatch.setattr(Sides, "after", after)
    own, calls = plan_of(models.make(), call(WIDE), 1.0), [call(grid) for grid in SIZES[:3]]
    layouts = [(known.before, known.after) for name in own.sites for known in own.known(name)]
    assert layouts == [(0, 0), (12, after)]
    torch._dynamo.reset()
    compiled = torch.compile(models.make(), backend=freqopt_backend, options={**LOUD, "plan": own})
    with torch.no_grad():
        expected = [compiled(**each) for each in calls]
    got = ran(way, own, models.breaking_linears, calls)
    assert all(distance(a, b) < 1e-5 for a, b in zip(got, expected, strict=True))
    assert split_calls(own) == [3, 3]


def split_calls(plan: Plan) -> list[int]:
    """Calls in which each site of a plan was split."""
    counts = [site for site in freqopt.counters().sites if site.split]
    return [sum(each.calls for each in counts if each.site == name) for name in plan.sites]


def test_text_of_another_length_on_both_sides_is_not_taken_for_the_calibrated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(models, "Video", Sides)
    monkeypatch.setattr(Sides, "after", 5)
    own = plan_of(models.make(), call(WIDE), 1.0)
    ran("attached", own, models.breaking_linears, [call(WIDE), call(TALL, 9)])
    assert split_calls(own) == [2, 1], "how much of other text comes first is not known"


class BetweenBlock(models.Block):
    """Attention to a video between a text and tokens of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.tail = nn.Parameter(torch.randn(1, 5, models.WIDTH))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        first = text.shape[1]
        around = torch.cat([text, x, self.tail.expand(len(x), -1, -1)], 1)
        x = x + self.attn(around)[:, first : first + x.shape[1]]
        return x + self.mlp(x)


@pytest.mark.parametrize("way", ["attached", "plan"])
def test_calls_as_calibrated_are_split_after_one_that_is_not(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "Block", BetweenBlock)
    own = plan_of(models.make(), call(WIDE), 1.0)
    assert [(k.before, k.after) for name in own.sites for k in own.known(name)] == [(12, 5)] * 3
    calls = [call(WIDE), call(TALL, 9), call((3, 7, 10), 8), call(WIDE), call(TALL)]
    ran(way, own, models.breaking_linears, calls)
    assert split_calls(own) == [3, 3, 3], "what is dense for one length must not be so for all"


class Packed(models.Video):
    """Attention to a video and a text behind it, both packed before: no call tells a grid."""

    def __init__(self, layers: int) -> None:
        super().__init__(layers)
        self.patch = nn.Linear(4, models.WIDTH)

    def forward(self, video: Tensor, text: Tensor) -> Tensor:
        x = torch.cat([self.patch(video), text], 1)
        for block in self.blocks:
            x = x + block.attn(x)
        return self.head(x[:, : video.shape[1]])


def packed(video: int, text: int = 12) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(video + text)
    return {
        "video": torch.randn(1, video, 4, generator=generator),
        "text": torch.randn(1, text, models.WIDTH, generator=generator),
    }


def test_tokens_of_another_grid_are_not_taken_for_text(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(models, "Video", Packed)
    own = plan_of(models.make(), packed(180), 1.0, given=WIDE)
    assert [known.after for name in own.sites for known in own.known(name)] == [12] * 3
    calls = [packed(180), packed(192), packed(150), packed(180), packed(200), packed(180)]
    with caplog.at_level(logging.WARNING, "freqopt"):
        ran("attached", own, models.breaking_linears, calls)
    assert split_calls(own) == [3, 3, 3]
    assert "it has 204 tokens, another number than calibration saw" in caplog.text


def test_lengths_of_calls_are_held_to_the_plans(
    plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    model = models.make()
    torch._dynamo.reset()
    freqopt.attach(model, plan)
    for block in model.blocks:
        block.compile(backend=freqopt_backend, options=LOUD)
    with torch.no_grad(), caplog.at_level(logging.WARNING, "freqopt"):
        model(**call(WIDE))
        assert "not verified" not in caplog.text
        model(**call((3, 7, 10)))
        assert "is used at 210 tokens" in caplog.text
        with pytest.raises(freqopt.PlanError, match="more than a factor of 8"):
            model(**call((1, 4, 4)))


def test_blocks_say_how_many_of_their_own_sites_are_split(
    plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    model = models.make()
    torch._dynamo.reset()
    options = {**LOUD, "plan": plan, "strict": True}
    for block in model.blocks:
        block.compile(backend=freqopt_backend, options=options)
    with torch.no_grad(), caplog.at_level(logging.INFO, "freqopt"):
        model(**call(WIDE))
    assert "Block: 1 of 1 planned sites split" in caplog.text


def test_a_call_of_a_block_alone_says_that_it_tells_nothing(
    plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    model = models.make()
    torch._dynamo.reset()
    freqopt.attach(model, plan)
    block = model.blocks[0]
    block.compile(backend=freqopt_backend, options=LOUD)
    with torch.no_grad(), caplog.at_level(logging.WARNING, "freqopt"):
        model(**call(WIDE))
        text = call(WIDE)["text"]
        x = torch.randn(1, models.WIDTH, 180).transpose(1, 2)  # in memory as in the model
        out = block(x, text)
    assert "video tells no grid of tokens in this call" in caplog.text
    assert distance(out, models.make().blocks[0](x, text)) < 1e-5


def test_a_block_that_is_compiled_before_its_model_is_called_says_so(
    plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    model = models.make()
    torch._dynamo.reset()
    freqopt.attach(model, plan)
    block = model.blocks[0]
    block.compile(backend=freqopt_backend, options=LOUD)
    with torch.no_grad(), caplog.at_level(logging.WARNING, "freqopt"):
        block(torch.randn(1, 180, models.WIDTH), call(WIDE)["text"])
    assert "no call of the model tells its grid" in caplog.text


def test_what_arguments_tell() -> None:
    sources = (Source("images_1", 2, 1), Source("images_1", 3, 2), Source("", 0, 5))
    held = {"images": [torch.zeros(1), torch.zeros(1, 4, 3, 12)], "shift": 2}
    assert BySizes(sources)(held) == (0, (3, 6, 5), 0)
    assert BySizes(sources)({"images": [torch.zeros(1), torch.zeros(1, 4, 3, 13)]}) is None
    assert BySizes(sources)({"images": torch.zeros(1)}) is None
    assert layout_of_extents([(1, 3, 4), (1, 6, 7)]) == (12, (1, 6, 7), 0)
    assert layout_of_extents([[(1, 6, 7), (1, 2, 2)]] * 2) == (0, (1, 6, 7), 4)
    assert layout_of_extents([[(1, 6, 7)], [(1, 7, 6)]]) is None
    assert layout_of_extents([(1, 6, 7), (1, 7, 6)]) is None
    ids = torch.cartesian_prod(torch.arange(1.0), torch.arange(5.0), torch.arange(7.0))
    found = {t.name: layout for t, layout in tellers({"ids": ids, "x": torch.randn(1, 9)}, [])}
    assert found == {"ids": (0, (1, 5, 7), 0)}
