"""Grids that a model is told as plain numbers, beside tokens that come packed."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from at_definition import at_definition
from model_cases import build
from model_cases_packed import LTX, ltx_inputs
from pieces_models import WIDTH, Block, breaking_linears
from pipelines import far, sharper
from plans import plan_of
from torch import Tensor, fx, nn

import freqopt
from freqopt.backend import freqopt_backend
from freqopt.capture.call_layouts import BySizes, in_call
from freqopt.capture.given_ints import GivenInt, ints_in, sizes_given
from freqopt.eager.lay import believed
from freqopt.passes.site import Known, Source
from freqopt.plan.plan import Plan

Grid = tuple[int, int, int]

LOUD: dict[str, Any] = {"min_tokens": 0, "inner": "eager"}
WIDE, TALL, DEEP, LARGER = (3, 6, 10), (3, 10, 6), (6, 10, 3), (3, 7, 10)
GRIDS = (WIDE, TALL, DEEP, LARGER)
"""Three grids of 180 tokens, the first calibrated, and another size."""

ROUGH = 100.0
"""A threshold that only the tokens of a neighbourhood reach: which those are, the grid says."""

ROUTES = ("blocks", "plan", "whole", "eager")


class Packed(nn.Module):
    """Blocks over packed tokens, turned by a table of positions that is made of three numbers.

    Two more numbers have nothing to do with the grid, though one is the length of a tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 4)
        for block in self.blocks:
            block.attn.q.weight.data *= 4

    def forward(
        self, tokens: Tensor, repeats: int, deep: int, size: Any, text: Tensor, spare: int = 10
    ) -> Tensor:
        axes = [torch.arange(deep), torch.arange(size[0] // 2), torch.arange(size[1])]
        places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2)
        waves = (places.float() @ torch.ones(3, WIDTH)).sin()
        x = self.embed(tokens) * (2.0 + waves)
        x = x * (repeats / 6) * torch.arange(spare).float().mean() / 4.5
        for block in self.blocks:
            x = block(x, text)
        return self.head(x)


class Call(NamedTuple):
    """Arguments of a call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def packed_call(grid: Grid, *, named: bool = True) -> Call:
    generator = torch.Generator().manual_seed(sum(grid))
    t, h, w = grid
    arguments = {
        "tokens": torch.randn(1, t * h * w, 4, generator=generator),
        "repeats": 6,  # as many as rows
        "deep": t,
        "size": [2 * h, w] if named else (2 * h, w),
        "text": torch.randn(1, 7, WIDTH, generator=generator),
    }
    return Call((), arguments) if named else Call(tuple(arguments.values()), {})


def packed_model() -> nn.Module:
    torch.manual_seed(0)
    return Packed().eval()


def ltx_model() -> nn.Module:
    torch.manual_seed(0)
    return sharper(build("LTXVideoTransformer3DModel", **LTX))


def ltx_call(grid: Grid, *, named: bool = True) -> Call:
    torch.manual_seed(sum(grid))
    return Call((), ltx_inputs(grid, 1))


def sources_of(plan: Plan) -> set[tuple[Source, ...]]:
    return {known.sources for name in plan.sites for known in plan.known(name)}


def by_route(route: str, model: Any, plan: Plan) -> Any:
    """What to call."""
    torch._dynamo.reset()
    freqopt.reset_counters()
    if route == "eager":
        freqopt.optimize(model, plan, route="eager", strict=True)
        return model
    options = {**LOUD, "plan": plan}
    if route == "whole":
        return torch.compile(model, backend=freqopt_backend, options=options)
    if route == "blocks":
        freqopt.attach(model, plan)
        options = LOUD
    for block in getattr(model, "blocks", None) or model.transformer_blocks:
        block.compile(backend=freqopt_backend, options=options)
    return model


def first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


OFTEN = {
    ("ltx", "blocks"),
    ("ltx", "eager"),
    ("named", "plan"),
    ("named", "whole"),
    ("placed", "blocks"),
    ("placed", "eager"),
}
"""A class of diffusers, and a model that is told by name or by place, each in two of the routes,
and all routes among them. The others are slow."""


@pytest.mark.parametrize(
    ("made", "route"),
    [
        pytest.param(made, route, marks=[pytest.mark.slow] * ((made, route) not in OFTEN))
        for made in ("ltx", "named", "placed")
        for route in ROUTES
    ],
)
def test_every_call_is_split_on_the_grid_that_it_tells(made: str, route: str) -> None:
    make, call = (ltx_model, ltx_call) if made == "ltx" else (packed_model, packed_call)
    named = made != "placed"
    plan = _plan(make(), call(WIDE, named=named))
    model = by_route(route, make(), plan)
    for grid in GRIDS:
        args, kwargs = call(grid, named=named)
        with torch.no_grad():
            dense, got = first(make()(*args, **kwargs)), first(model(*args, **kwargs))
        expected = at_definition(make(), plan, grid, args, kwargs)
        assert far(got - dense, expected - dense) < 1e-2, grid
        if grid != WIDE:
            other = (grid[0], grid[2], grid[1])
            wrong = at_definition(make(), plan, other, args, kwargs)
            assert far(wrong - dense, expected - dense) > 0.1
    assert freqopt.counters().split == 2 * len(GRIDS)


def _plan(model: nn.Module, call: Call) -> Plan:
    """As calibration of models in pieces finds sites."""
    names = list(Packed.forward.__annotations__)
    given = call.kwargs or dict(zip(names, call.args, strict=False))
    plan = plan_of(model, given, ROUGH)
    if call.args:  # as if calibrated so
        places = {name: str(place) for place, name in enumerate(names)}
        sites = {}
        for name, site in plan.sites.items():
            layouts = [
                layout.model_copy(update={"sources": [_placed(s, places) for s in layout.sources]})
                for layout in site.layouts
            ]
            sites[name] = site.model_copy(update={"layouts": layouts})
        plan = plan.model_copy(update={"sites": sites})
    return plan


def _placed(source: tuple[str, int, int], places: dict[str, str]) -> tuple[str, int, int]:
    name, dim, step = source
    outer, _, key = name.partition("_")
    return "_".join(filter(None, (places[outer], key))), dim, step


@pytest.mark.parametrize("named", [True, False])
def test_calibration_finds_the_numbers_that_are_the_grid_and_no_others(
    named: bool, tmp_path: Path
) -> None:
    calls = [packed_call(grid, named=named) for grid in (WIDE, WIDE, TALL, TALL)]
    options: dict[str, Any] = {"target_density": 0.7, "rounds": 0, "progress": False}
    plan = freqopt.calibrate(packed_model(), list(map(tuple, calls)), order="grid", **options)
    first, second = ("deep", "size") if named else ("2", "3")
    expected = ((first, -1, 1), (f"{second}_0", -1, 2), (f"{second}_1", -1, 1))
    assert sources_of(plan) == {expected}
    layouts = {known.grid for name in plan.sites for known in plan.known(name)}
    assert layouts == {WIDE, TALL}
    plan.save(tmp_path / "plan.json")
    assert sources_of(Plan.load(tmp_path / "plan.json")) == {expected}


def test_a_number_left_to_its_default_is_one_that_may_be_given() -> None:
    class Defaults(Packed):
        def forward(self, tokens: Tensor, text: Tensor, deep: int = 3, high: int = 12) -> Tensor:  # type: ignore[override]
            return super().forward(tokens, 6, deep, (high, 10 if deep == 3 else 5), text)

    class Given(Packed):
        def forward(self, tokens: Tensor, text: Tensor, deep: int = 3, high: int = 12, wide: int = 10) -> Tensor:  # type: ignore[override]  # fmt: skip  # noqa: E501
            return super().forward(tokens, 6, deep, (high, wide), text)

    call = packed_call(WIDE).kwargs
    given = {name: call[name] for name in ("tokens", "text")}
    assert sources_of(plan_of(Defaults().eval(), given, ROUGH)) == {()}, "a number of its own"
    plan = plan_of(Given().eval(), given, ROUGH)
    assert sources_of(plan) == {(("deep", -1, 1), ("high", -1, 2), ("wide", -1, 1))}


def test_a_call_that_tells_no_numbers_is_dense_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    plan = plan_of(packed_model(), packed_call(WIDE).kwargs, ROUGH)
    call = packed_call(TALL).kwargs
    untold = {**call, "deep": torch.tensor(call["deep"])}
    with torch.no_grad():
        dense = packed_model()(**call)
        model = by_route("blocks", packed_model(), plan)
        with caplog.at_level(logging.WARNING, "freqopt"):
            assert far(model(**untold), dense) < 1e-5
        assert "as the numbers deep, size_0, size_1, and this call has none" in caplog.text
        model = by_route("blocks", packed_model(), plan)
        caplog.clear()
        assert far(model(**call), dense) > 1e-3
        with caplog.at_level(logging.WARNING, "freqopt"):
            assert far(model(**untold), dense) < 1e-5
        assert "deep tells no grid of tokens in this call" in caplog.text


def test_a_model_that_asks_for_the_very_type_of_ints_is_calibrated_without() -> None:
    class Exact(Packed):
        def forward(self, tokens: Tensor, repeats: int, *rest: Any, **options: Any) -> Tensor:
            if type(repeats) is not int:
                raise TypeError(f"repeats is {type(repeats)}")
            return super().forward(tokens, repeats, *rest, **options)

    plan = plan_of(Exact().eval(), packed_call(WIDE).kwargs, ROUGH)
    assert len(plan.sites) == 2 and sources_of(plan) == {()}


def test_inspect_tells_the_grid_of_the_call_in_pieces_too() -> None:
    plan = plan_of(packed_model(), packed_call(WIDE).kwargs, ROUGH)
    model = packed_model()
    breaking_linears(model)
    found = freqopt.inspect(model, plan=plan, min_tokens=0, **packed_call(TALL).kwargs)
    assert {site.grid for site in found.sites if site.decision == "split"} == {TALL}


def test_what_operations_make_of_numbers() -> None:
    height, width = GivenInt(12, "height"), GivenInt(10, "width")
    assert type(height + 1) is int and type(height * 2) is int and type(height // 5) is int
    half = height // 2
    assert isinstance(half, GivenInt) and (half, half.name, half.step) == (6, "height", 2)

    def made(function: Any, *args: Any, **kwargs: Any) -> dict[int, Source]:
        given = fx.node.map_aggregate((args, kwargs), lambda x: x)
        real = function(*args, **kwargs)
        return sizes_given(function, *given, real.shape, ints_in(given))

    rows, columns = Source("height", -1, 2), Source("width", -1, 1)
    assert made(torch.arange, 0, height, 2) == {0: rows}
    assert made(torch.zeros, 3, half, width, device="cpu") == {1: rows, 2: columns}
    assert made(torch.linspace, -1.0, 1.0, steps=width) == {0: columns}
    assert made(torch.arange, 3, height) == {}, "not as many"
    assert made(torch.full, (6, 4), height) == {}, "a number that is no size"
    assert made(torch.arange, GivenInt(11, "odd") // 2) == {}, "something is left over"
    assert made(torch.zeros, height * 1) == {}, "plain"


def test_layouts_of_a_call() -> None:
    ints = (Source("t", -1, 1), Source("size_0", -1, 2), Source("size_1", -1, 1))
    held = {"t": 3, "size": (20, 6)}
    assert BySizes(ints)(held) == (0, TALL, 0)
    for odd in (
        {**held, "t": True},
        {**held, "t": 0},
        {**held, "t": 3.0},
        {"t": 3, "size": (21, 6)},
    ):
        assert BySizes(ints)(odd) is None
    known = Known(WIDE, 0, 7, 0, ints)
    assert in_call(known, held, 187) == replace(known, grid=TALL)
    assert in_call(known, {"t": 3}, 187) is None and in_call(known, {**held, "t": 4}, 187) is None
    assert in_call(replace(known, sources=()), held, 187) == known
    lay = believed((known,), held, 190, 190)
    assert lay is not None and (lay.grid, lay.before, lay.after) == (TALL, 0, 10)
    assert believed((known,), {}, 187, 187) is None
    sizes = replace(known, sources=(Source("x", 0, 1), Source("x", 1, 1), Source("x", 2, 1)))
    assert in_call(sizes, {"x": torch.zeros(3, 3, 10)}, 187) == sizes, "one rank's part"
