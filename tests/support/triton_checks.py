"""The Triton kernels against the reference, on whatever device there is; run by test_triton.py.

In Triton's interpreter float32 and float16 only (its bfloat16 dot is wrong); on a GPU every dtype.
Given one order, routes must be equal.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import pytest
import torch
from attention_cases import (
    CASES,
    CONTENT_CASES,
    RECTANGULAR_CASES,
    Case,
    budget_for,
    clustered,
    dense,
    h_bar_of,
    logits_of,
    make_tensors,
    orders_of,
    reference_log_sums,
    reference_split,
    relative,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interpreted import prepare_interpreter

from freqopt.calibration.measure.attention import AttentionCall
from freqopt.calibration.measure.heads import HeadAlone, HeadsTogether, head_tokens
from freqopt.config import ALL, QUERY_TILE
from freqopt.kernels import autotune, content_order, overlap, reference, tuned, workspace
from freqopt.kernels.chunked import Orders
from freqopt.kernels.forward import long as long_split
from freqopt.kernels.forward import order as order_launch
from freqopt.kernels.forward import short, split
from freqopt.kernels.forward.call import Call, Order
from freqopt.kernels.forward.density import threshold_of_density
from freqopt.kernels.forward.order import order_by_content
from freqopt.kernels.forward.sampled import SampledCall
from freqopt.kernels.forward.summaries import summarise
from freqopt.kernels.hopper import launch as hopper
from freqopt.kernels.layout import Settings, pack_route, unpack_route
from freqopt.kernels.tiles import launch_for

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if ON_GPU else [])
TOLERANCE = {torch.float32: 2e-3, torch.float16: 5e-3, torch.bfloat16: 1e-2}
if not ON_GPU:
    prepare_interpreter()


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN, or 77: what a kernel forgets to write shows."""
    plain = torch.empty

    def poisoned(*size: Any, **options: Any) -> torch.Tensor:
        fresh: torch.Tensor = plain(*size, **options)
        return fresh.fill_(torch.nan if fresh.is_floating_point() else 77)

    monkeypatch.setattr(torch, "empty", poisoned)


def run(
    case: Case,
    tensors: tuple,
    budget: torch.Tensor,
    probes: int = 64,
    density: float = 0.0,
    log_sum: bool = False,
) -> tuple:
    """The op's results, given the definition's orders."""
    there = tuple(x if x is None else x.to(DEVICE) for x in tensors)
    orders = Orders(*(x if x is None else x.to(DEVICE) for x in orders_of(case, tensors)))
    inputs = case.inputs(there, budget.to(DEVICE), orders)
    settings = Settings(case.dim**-0.5, density, probes, log_sum=log_sum)
    return tuple(x.cpu() for x in split.split_forward(inputs, settings))


MATRIX_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 4e-2}
"""Of the first-order matrix: what it is fitted to is a difference."""


def call_on(case: Case, key: torch.Tensor, value: torch.Tensor) -> Call:
    """The call of a case's keys, in the grid's order; its queries are not read."""
    layout = case.sequence
    order = Order.shared(layout.base_order(key.device))
    tiles = launch_for(key.dtype, case.dim)
    return Call(key, key, value, None, layout, order, layout, order, True, 1.0, tiles)


def cast(tensors: tuple, dtype: torch.dtype) -> tuple:
    return (*(x.to(dtype) for x in tensors[:3]), tensors[3])


def seldom(*values: Any) -> Any:
    """A case of a kind that others are of: in the interpreter it is slow, on a GPU always run."""
    return pytest.param(*values, marks=[] if ON_GPU else [pytest.mark.slow])


FIRST, *OTHERS = DTYPES
PROBLEMS = [
    *((case, FIRST) for case in CASES),
    *((CASES[place], dtype) for place in (1, 4) for dtype in OTHERS),
    *(seldom(CASES[place], dtype) for place in (0, 2, 3, 5, 6) for dtype in OTHERS),
]
"""All cases in one type, those with text and a mask in the others; the rest seldom."""


@pytest.mark.parametrize(("case", "dtype"), PROBLEMS, ids=str)
def test_kernels_are_the_reference(case: Case, dtype: torch.dtype) -> None:
    tensors = cast(make_tensors(case), dtype)
    budget = budget_for(case, tensors, 0.3)
    expected, wanted = reference_split(case, tensors, budget)
    out, reached, error, route, coefficients, *_, matrix = run(case, tensors, budget)
    assert torch.equal(route, wanted.route)
    assert out.dtype == matrix.dtype == dtype
    turned = wanted.probe.matrix(h_bar_of(case, tensors))
    assert relative(matrix, turned) < MATRIX_TOLERANCE[dtype]
    assert wanted.probe.update.norm() > 0.05 * turned.norm()
    assert relative(out, expected) < TOLERANCE[dtype]
    assert torch.allclose(reached, wanted.density, atol=1e-6)
    assert torch.allclose(error, wanted.probe.error, atol=2e-2)
    assert torch.allclose(coefficients[..., 0], wanted.probe.c, atol=5e-2)


@pytest.mark.parametrize("probes", [5, 100])
def test_the_update_is_the_reference_for_other_numbers_of_probes(probes: int) -> None:
    """Fewer than it has rows for, and more than it is fitted to."""
    case = Case((3, 6, 10), dim=24, heads=2, kv_heads=1, batch=1)
    tensors = make_tensors(case)
    budget = budget_for(case, tensors, 0.3)
    _, wanted = reference_split(case, tensors, budget, probes)
    _, _, error, *_, matrix = run(case, tensors, budget, probes)
    assert relative(matrix, wanted.probe.matrix(h_bar_of(case, tensors))) < 1e-3
    assert wanted.probe.update.norm() > 0
    assert torch.allclose(error, wanted.probe.error, rtol=1e-2)


GIVEN_CASES = CONTENT_CASES + RECTANGULAR_CASES
DENSITY_CASES = [CASES[1], RECTANGULAR_CASES[0]]
if not ON_GPU:  # each pair of a batch item and a head takes the interpreter seconds
    RECTANGULAR = dataclasses.replace(RECTANGULAR_CASES[0], batch=1, heads=2, kv_heads=1)
    CONTENT = dataclasses.replace(CONTENT_CASES[0], heads=2)
    GIVEN_CASES = [CONTENT, *CONTENT_CASES[1:], RECTANGULAR, *RECTANGULAR_CASES[1:]]
    DENSITY_CASES = [dataclasses.replace(CASES[1], batch=1), RECTANGULAR]


@pytest.mark.parametrize("case", GIVEN_CASES, ids=str)
def test_given_an_order_kernels_are_the_reference(case: Case) -> None:
    """Orders per head, and queries that are other tokens than the keys."""
    tensors = make_tensors(case)
    budget = budget_for(case, tensors, 0.3)
    expected, wanted = reference_split(case, tensors, budget)
    found = run(case, tensors, budget, log_sum=True)
    assert torch.equal(found[3], wanted.route)
    assert relative(found[0], expected) < TOLERANCE[torch.float32]
    assert torch.allclose(found[1], wanted.density, atol=1e-6)
    assert torch.allclose(found[2], wanted.probe.error, atol=2e-2)
    sums = reference_log_sums(case, tensors, wanted)
    torch.testing.assert_close(found[5], sums, rtol=1e-3, atol=5e-3)
    exact = run(case, tensors, torch.zeros(case.heads), log_sum=True)
    assert relative(exact[0], dense(case, tensors)) < TOLERANCE[torch.float32]
    truth = logits_of(case, tensors).logsumexp(-1)
    torch.testing.assert_close(exact[5], truth, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_no_number_stays_in_its_row(bad: float) -> None:
    """Its tile is attended exactly, as in the definition, and the other rows of it are right."""
    case = Case((3, 6, 10), batch=1)
    tensors = make_tensors(case)
    tensors[0][0, 1, 20, 3] = bad
    budget = torch.full((case.heads,), 1.0)
    expected, wanted = reference_split(case, tensors, budget)
    out, _, _, route, *_ = run(case, tensors, budget)
    assert torch.equal(route, wanted.route)
    others = torch.arange(case.length) != 20
    assert not out[0, 1, 20].isfinite().all()
    assert relative(out[:, :, others], expected[:, :, others]) < TOLERANCE[torch.float32]
    dense_route = run(case, make_tensors(case), torch.full((case.heads,), torch.nan))[3]
    assert (dense_route == reference.EXACT).all(), "a threshold that is none"


def test_numbers_of_an_order_stay_among_the_tokens() -> None:
    """The device is not waited for to look at them, so none may lead past the memory."""
    case = RECTANGULAR_CASES[0]
    tensors = make_tensors(case)
    inputs = case.inputs(
        tuple(x if x is None else x.to(DEVICE) for x in tensors),
        torch.ones(case.heads, device=DEVICE),
        Orders(
            torch.full((case.batch, case.kv_heads, case.sequence.tokens), 2**30).int().to(DEVICE),
            torch.full((case.batch, case.heads, case.query_side.tokens), -(2**30)).int().to(DEVICE),
        ),
    )
    out = split.split_forward(inputs, Settings(case.dim**-0.5, 0.0, 4))[0]
    written = out.isfinite().all(-1).sum(-1)
    text = case.query_side.text
    assert (written == text + 1).all(), "all stand at one place, and the rest is NaN"


def made_order(keys: torch.Tensor, base: torch.Tensor, chunks: list[int]) -> torch.Tensor:
    """The order (B, H, T) that the kernels make of keys (B, H, T, D)."""
    order = torch.full(keys.shape[:3], -1, device=DEVICE, dtype=torch.int32)
    given = torch.tensor(chunks, device=DEVICE, dtype=torch.int32)
    base = base.to(DEVICE, torch.int32)
    order_by_content(keys.to(DEVICE), base, given, max(chunks), 0, order)
    return order.cpu()


def is_permutation(order: torch.Tensor) -> bool:
    return bool((order.sort(-1).values == torch.arange(order.shape[-1])).all())


@pytest.mark.parametrize(
    ("tokens", "dim", "chunks", "far", "dtype"),
    [
        (300, 40, [512, 256], False, torch.float32),
        (700, 64, [ALL, 0], False, torch.float16),
        (1100, 24, [ALL, 1024], True, torch.float16),
    ],
)
def test_orders_leave_the_spread_of_the_definitions(
    tokens: int,
    dim: int,
    chunks: list[int],
    far: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """far: levels as those of segments that are too large for one program."""
    if far:
        levels = {size: found for size, found in order_launch.LEVELS.items() if size <= 256}
        monkeypatch.setattr(order_launch, "LEVELS", levels)
        for module in (order_launch, content_order):
            monkeypatch.setattr(module, "SEGMENT_SAMPLES", 256)
    keys = clustered(tokens, dim).to(dtype)
    base = torch.randperm(tokens, generator=torch.Generator().manual_seed(1))
    order = made_order(keys, base, chunks)
    wanted = content_order.content_order(keys, base, torch.tensor(chunks))
    assert is_permutation(order)
    left, least = (content_order.spread(keys, x) for x in (order, wanted))
    assert (left < 1.01 * least).all()
    for head, chunk in enumerate(chunks):
        for start in range(0, tokens, chunk or 1):
            part = slice(start, start + (chunk or 1))
            assert set(order[0, head, part].tolist()) == set(base[part].tolist())


def test_orders_of_keys_that_are_equal_few_or_no_numbers() -> None:
    base = torch.randperm(200, generator=torch.Generator().manual_seed(2))
    equal = made_order(torch.full((1, 2, 200, 16), 0.7), base, [ALL, 256])
    assert torch.equal(equal[0].long(), base.expand(2, -1))
    assert made_order(torch.ones(1, 1, 1, 16), base[:1] * 0, [256]).tolist() == [[[0]]]
    keys = clustered(200)
    clean = made_order(keys, base, [ALL, ALL])
    keys[0, 0, 17], keys[0, 0, 5, 3] = torch.nan, torch.inf
    spoilt = made_order(keys, base, [ALL, ALL])
    assert is_permutation(spoilt) and torch.equal(spoilt[:, 1], clean[:, 1])


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("case", DENSITY_CASES, ids=str)
def test_the_threshold_of_a_density_is_the_definitions(
    case: Case, long: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = make_tensors(case)
    expected, wanted = reference_split(case, tensors, torch.zeros(case.heads), density=0.2)
    if long:
        monkeypatch.setattr(workspace, "LONG_TOKENS", 1)
        monkeypatch.setattr(long_split, "chunk_tiles", lambda *given: 2)
    found = run(case, tensors, torch.zeros(case.heads), density=0.2)
    # A score within rounding of the threshold may fall on either side.
    pairs = wanted.route.shape[2] * wanted.route.shape[3]
    assert ((found[1] - wanted.density).abs() <= 1.01 / pairs).all()
    if torch.equal(found[1], wanted.density):
        assert torch.equal(unpack_route(found[3], case.sequence.tokens), wanted.route)
    assert relative(found[0], expected) < 2e-2


SAMPLED_CASES = [dataclasses.replace(x, batch=1) for x in (CASES[1], CONTENT_CASES[0])]


@pytest.mark.parametrize("case", SAMPLED_CASES, ids=str)
def test_sampled_tiles_are_those_of_the_whole_call(case: Case) -> None:
    """At thresholds in turn, so that nothing of one is left for the next."""
    tensors = make_tensors(case)
    there = tuple(x if x is None else x.to(DEVICE) for x in tensors)
    orders = Orders(*(x if x is None else x.to(DEVICE) for x in orders_of(case, tensors)))
    inputs = case.inputs(there, torch.zeros(case.heads, device=DEVICE), orders)
    sampled = SampledCall(inputs, Settings(case.dim**-0.5, 0.0, 64))
    tiles = torch.tensor([sampled.score.shape[2] - 1, 0], dtype=torch.int32, device=DEVICE)
    layout = case.sequence
    index = layout.base_order(torch.device("cpu")).expand(case.batch, case.heads, -1)
    if orders.key is not None:
        index = orders.key.cpu().repeat_interleave(case.heads // case.kv_heads, 1)
    row = (tiles.cpu().long()[:, None] * QUERY_TILE + torch.arange(QUERY_TILE)).flatten()
    token = index.long()[..., row.clamp(max=layout.tokens - 1)] + layout.text_before
    thresholds = (0.9, 2.5)
    fitted, errors = sampled.fit(thresholds)
    found = dict(sampled.attend(tiles, thresholds, fitted))
    assert list(found) == [1, 0]
    for rung, threshold in enumerate(thresholds):
        whole = run(case, tensors, torch.full((case.heads,), threshold))
        wanted = whole[0].gather(2, token[..., None].expand(-1, -1, -1, case.dim))
        assert relative(found[rung].cpu(), wanted) < 2e-3, threshold
        assert torch.allclose(errors[rung].cpu(), whole[2], atol=1e-3)
        assert torch.allclose(fitted.coefficients[rung].cpu(), whole[4], atol=1e-3)
        assert relative(fitted.matrix[rung].cpu(), whole[8]) < 2e-3


def test_heads_are_measured_together_as_one_by_one() -> None:
    """Errors of tiles at some thresholds: by the kernels, and in float32 summed up by block."""
    torch.manual_seed(0)
    grid = (3, 9, 20)  # 4 whole tiles and a ragged one
    query, key, value = torch.randn(3, 1, 2, 540 + 9, 32).unbind(0)
    drift = torch.linspace(-2, 2, 549)[:, None]
    there = [x.to(DEVICE) for x in (1.5 * query + drift, (key - drift)[:, :1], value[:, :1])]
    call = AttentionCall(*there, None, grid, 4, 5, 0.25)
    thresholds = (0.5, 2.0)
    tiles = torch.tensor([4, 1], device=DEVICE)
    for order in (None, torch.randperm(540).to(torch.int32)[None, None].to(DEVICE)):
        together = HeadsTogether(call, order, thresholds, 64)
        found = together.errors(tiles)
        for head in range(2):
            alone = HeadAlone(head_tokens(call, head, order), thresholds, 64)
            wanted = alone.errors(tiles)
            torch.testing.assert_close(
                together.score[:, head], alone.score[:, 0], rtol=1e-3, atol=1e-4
            )
            torch.testing.assert_close(
                together.probe_error[:, head], alone.probe_error[:, 0], rtol=0.02, atol=1e-6
            )
            for got, known in zip(found, wanted, strict=True):
                scale = known.abs().max().item()
                torch.testing.assert_close(got[:, head], known[:, 0], rtol=0.02, atol=1e-3 * scale)


@pytest.mark.parametrize("spread", [0.01, 1.0, 8.0])
def test_a_density_is_reached_and_passed_by_a_twentieth_at_most(spread: float) -> None:
    """Over scores that lie together, and over scores of many orders of magnitude."""
    tiles, blocks, generator = 60, 199, torch.Generator().manual_seed(1)
    scores = (torch.randn(1, 2, tiles, blocks, generator=generator) * spread).exp().to(DEVICE)
    listed = torch.arange(tiles, dtype=torch.int32, device=DEVICE) if spread == 1.0 else None
    for asked in (0.02, 0.1, 0.5):
        limits = threshold_of_density(
            lambda: [(listed, scores)],
            scores.shape,
            asked,
            scores.device,
            own=False,
        )
        found = (scores >= limits[..., None, None]).double().mean((2, 3))
        wanted = -(-asked * tiles * blocks // 1) / (tiles * blocks)
        assert (found >= wanted).all()
        assert (found <= asked * 1.05).all(), (asked, found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [CASES[1], CASES[4]], ids=str)
def test_threshold_zero_is_dense_attention(case: Case, dtype: torch.dtype) -> None:
    tensors = cast(make_tensors(case), dtype)
    out, reached, *_ = run(case, tensors, torch.zeros(case.heads))
    assert relative(out, dense(case, tensors)) < TOLERANCE[dtype]
    assert torch.equal(reached, torch.ones_like(reached))


@cache
def heads_together() -> tuple:
    """A call of two tiles, on a GPU of three, and what it gives where all heads fit."""
    grid = (2, 7, 13) if ON_GPU else (1, 7, 13)
    case = Case(grid, heads=6, kv_heads=3, batch=3, before=3, after=2, masked=True)
    tensors = make_tensors(case)
    budget = budget_for(case, tensors, 0.3)
    return case, tensors, budget, run(case, tensors, budget, 16)


@pytest.mark.parametrize(("items", "heads"), [(1, 1), (1, 2), (2, 2)])
def test_heads_in_turns_are_heads_together(
    items: int, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, tensors, budget, together = heads_together()
    per_head = workspace.bytes_per_key_head(
        case.sequence.tokens, case.sequence.tokens, case.dim, 4, 2
    )
    fitting = heads if items == 1 else items * case.kv_heads
    monkeypatch.setattr(workspace, "WORKSPACE", fitting * per_head + per_head // 2)
    calls = []
    forward = short.split_heads

    def counted(call: Call, *rest: Any) -> Any:
        calls.append(call.per_head)
        return forward(call, *rest)

    monkeypatch.setattr(short, "split_heads", counted)
    in_turns = run(case, tensors, budget, 16)
    assert (
        calls
        == {(1, 1): [(1, 2)] * 9, (1, 2): [(1, 4), (1, 2)] * 3, (2, 2): [(2, 6), (1, 6)]}[
            items, heads
        ]
    )
    assert all(torch.equal(a, b) for a, b in zip(in_turns, together, strict=True))


HOPPER_CASES = [
    Case((4, 8, 8), dim=128, heads=2, kv_heads=1),
    Case((5, 9, 11), dim=128, heads=4, kv_heads=2),
    Case((5, 9, 11), dim=64, heads=4, kv_heads=2),
    Case((1, 1, 333), dim=128),
    Case((1, 1, 60), dim=128),
    Case((1, 1, 60), dim=64, after=1),
    Case((11, 13, 17), dim=128, batch=1),
    Case((11, 13, 17), dim=64, heads=4, kv_heads=2, before=5, after=130, masked=True),
    Case((7, 8, 9), dim=128, heads=4, kv_heads=2, before=256, masked=True),
    Case((7, 8, 9), dim=128, after=77),
    Case((7, 8, 9), dim=64, before=128),
]


LONG_CASES = [
    (Case((5, 7, 9), batch=2, before=3, after=5, masked=True), 0.0),
    (Case((3, 7, 19), dim=40, heads=2, kv_heads=1, batch=1, after=70, masked=True), 0.0),
    (Case((2, 9, 17), dim=16, heads=2, kv_heads=1, batch=1), 0.3),
    (Case((1, 1, 600), dim=64, heads=1, kv_heads=1, batch=1), 0.07),
]
if ON_GPU:
    LONG_CASES += [(HOPPER_CASES[i], 0.0) for i in (1, 2, 5, 7, 8)]


@pytest.mark.parametrize(("case", "density"), LONG_CASES, ids=str)
def test_chunks_of_tiles_are_all_tiles_together(
    case: Case, density: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long sequences' way through a small workspace, forced onto short ones: the same bits."""
    tensors = make_tensors(case) if not ON_GPU else cast(make_tensors(case), torch.bfloat16)
    budget = budget_for(case, tensors, 0.3)
    together = run(case, tensors, budget, 16, density)
    monkeypatch.setattr(workspace, "LONG_TOKENS", 1)
    monkeypatch.setattr(long_split, "chunk_tiles", lambda *given: 2)
    attended = []
    attend = long_split.attend

    def counted(*given: Any, **options: Any) -> None:
        attended.append(len(given[-1]))
        attend(*given, **options)

    monkeypatch.setattr(long_split, "attend", counted)
    in_chunks = list(run(case, tensors, budget, 16, density))
    tiles, blocks = together[3].shape[2:]
    assert sum(attended) == tiles and len(attended) == -(-tiles // 2)
    assert in_chunks[3].shape == (*together[3].shape[:3], -(-blocks // 4))
    assert torch.equal(pack_route(together[3]), in_chunks[3])
    in_chunks[3] = unpack_route(in_chunks[3], case.sequence.tokens)
    for found, wanted in zip(in_chunks, together, strict=True):
        assert torch.equal(found, wanted)


BESIDE_CASES = [
    Case((3, 6, 8), heads=1, kv_heads=1, batch=2, before=3, after=5, masked=True),
    Case((3, 5, 9), dim=40, heads=2, kv_heads=1, batch=1, after=70, masked=True),
    Case((1, 1, 60), dim=16, heads=2, kv_heads=1),
]
if ON_GPU:
    BESIDE_CASES += [LONG_CASES[0][0], LONG_CASES[1][0]]
    BESIDE_CASES += [Case((11, 13, 17), dim=128, batch=1), Case((9, 30, 52), heads=24, dim=128)]


@pytest.mark.parametrize(
    ("case", "probes"),
    [
        *((case, 16) for case in BESIDE_CASES),
        (BESIDE_CASES[1], 64),
        *(seldom(case, 64) for case in (BESIDE_CASES[0], *BESIDE_CASES[2:])),
    ],
    ids=str,
)
def test_probes_beside_the_scores_are_probes_after_them(
    case: Case, probes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The probes' chain on a stream of its own, from their own tiles' scores: the same bits."""
    tensors = make_tensors(case) if not ON_GPU else cast(make_tensors(case), torch.bfloat16)
    budget = budget_for(case, tensors, 0.3) if case.sequence.tokens < 5000 else torch.ones(24)
    monkeypatch.setattr(overlap, "OVERLAP_ROWS", 1 << 62)
    after = run(case, tensors, budget, probes)
    routed = []
    own = short.route_probes

    def counted(*given: Any, **options: Any) -> Any:
        routed.append(own(*given, **options))
        return routed[-1]

    monkeypatch.setattr(short, "route_probes", counted)
    monkeypatch.setattr(overlap, "OVERLAP_ROWS", 1)
    for _ in range(3 if ON_GPU else 1):
        beside = run(case, tensors, budget, probes)
        for found, wanted in zip(beside, after, strict=True):
            assert torch.equal(found, wanted)
    tokens = case.sequence.tokens
    tile = reference.probe_positions(tokens, probes, routed[-1].route.device) // QUERY_TILE
    expected = after[3].to(tile.device)[:, :, tile]
    assert torch.equal(routed[-1].route, expected)


def test_same_input_same_bits() -> None:
    case = CASES[3] if ON_GPU else CASES[0]
    tensors = make_tensors(case)
    budget = budget_for(case, tensors, 0.3)
    first, second = run(case, tensors, budget), run(case, tensors, budget)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@st.composite
def random_cases(draw: st.DrawFn) -> Case:
    """Small in the interpreter; on a GPU of several tiles and blocks."""
    longest = 18 if ON_GPU else 8
    dim = draw(st.sampled_from([40, 64, 128, 168] if ON_GPU else [24, 32, 40]))
    kv_heads = draw(st.integers(1, 2))
    return Case(
        (draw(st.integers(1, longest)), draw(st.integers(1, 12)), draw(st.integers(4, 13))),
        dim=dim,
        kv_heads=kv_heads,
        heads=kv_heads * draw(st.integers(1, 3)),
        batch=draw(st.integers(1, 2)),
        before=draw(st.sampled_from([0, 0, 1, 70])),
        after=draw(st.sampled_from([0, 0, 3, 130])),
        masked=draw(st.booleans()),
        chunk=draw(st.sampled_from([0, 0, 256])),
        queries=draw(st.sampled_from([None, None, (1, 1, 1), (2, 9, 11)])),
    )


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same (B, H, N, D) values with other strides."""
    if layout == "B,H,N,D":
        return x.contiguous()
    if layout == "a slice of B,N,3,H,D":
        fused = x.new_zeros(x.shape[0], x.shape[2], 3, x.shape[1], x.shape[3])
        fused[:, :, 1] = x.transpose(1, 2)
        return fused[:, :, 1].transpose(1, 2)
    if layout == "last stride 2":
        return torch.stack([x, x + 1], -1)[..., 0]
    return x


LAYOUTS = ["B,N,H,D", "B,H,N,D", "a slice of B,N,3,H,D", "last stride 2"]


@settings(
    max_examples=16 if ON_GPU else 6,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(
    case=random_cases(),
    seed=st.integers(0, 99),
    density=st.floats(0.05, 0.95),
    layouts=st.lists(st.sampled_from(LAYOUTS), min_size=3, max_size=3),
    dtype=st.sampled_from(DTYPES),
    probes=st.sampled_from([0, 1, 16, 64]),
)
def test_random_calls_are_the_reference(
    case: Case, seed: int, density: float, layouts: list[str], dtype: torch.dtype, probes: int
) -> None:
    tensors = cast(make_tensors(case, seed), dtype)
    budget = budget_for(case, tensors, density)
    expected, wanted = reference_split(case, tensors, budget, probes)
    moved = tuple(laid_out(x, layout) for x, layout in zip(tensors[:3], layouts, strict=True))
    out, reached, _, route, *_ = run(case, (*moved, tensors[3]), budget, probes)
    assert torch.equal(route, wanted.route)
    assert torch.allclose(reached, wanted.density, atol=1e-6)
    assert relative(out, expected) < TOLERANCE[dtype]


def test_every_launch_candidate_gives_the_same_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "applies", lambda query: False)
    problem = autotune.Problem((3, 7, 13), 1, 32, torch.float16, torch.device(DEVICE))
    shipped, tried = launch_for(problem.dtype, problem.head_dim), 0
    for part in autotune.parts_of(problem, shipped):
        wanted = part.run(shipped)
        for candidate in part.candidates:
            assert all(value in tuned.ALLOWED[name] for name, value in candidate.items())
            assert autotune.agrees(part.run(shipped.changed(candidate)), wanted), candidate
            tried += 1
    assert tried > 40


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [32, 64, 72, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_head_dim_on_the_gpu(dim: int, dtype: torch.dtype) -> None:
    for chunk in (0, 512):
        case = Case(
            (7, 13, 17), dim=dim, heads=4, kv_heads=2, batch=1, after=21, masked=True, chunk=chunk
        )
        tensors = cast(make_tensors(case), dtype)
        budget = budget_for(case, tensors, 0.25)
        expected, wanted = reference_split(case, tensors, budget)
        out, _, _, route, *_ = run(case, tensors, budget)
        assert torch.equal(route, wanted.route)
        assert relative(out, expected) < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", HOPPER_CASES, ids=str)
def test_hopper_kernel_is_the_reference(case: Case, dtype: torch.dtype) -> None:
    tensors = cast(make_tensors(case), dtype)
    if not hopper.applies(tensors[0].cuda()):
        pytest.skip("the Gluon kernel is for compute capability 9.0")
    for density in (0.05, 0.3):
        budget = budget_for(case, tensors, density)
        expected, wanted = reference_split(case, tensors, budget)
        out, _, _, route, *_ = run(case, tensors, budget)
        assert torch.equal(route, wanted.route)
        assert relative(out, expected) < TOLERANCE[dtype]
    out, *_ = run(case, tensors, torch.zeros(case.heads))
    assert relative(out, dense(case, tensors)) < TOLERANCE[dtype]
    again, *_ = run(case, tensors, torch.zeros(case.heads))
    assert torch.equal(out, again)


@pytest.mark.gpu
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("length", [1, 7, 40])
@pytest.mark.parametrize(
    ("case", "layout", "dtype"),
    [
        (HOPPER_CASES[0], "B,N,H,D", torch.bfloat16),
        (HOPPER_CASES[5], "B,H,N,D", torch.float16),
        (HOPPER_CASES[6], "a slice of B,N,3,H,D", torch.float16),
        (HOPPER_CASES[7], "a slice of B,N,3,H,D", torch.bfloat16),
        (HOPPER_CASES[7], "B,N,H,D", torch.float16),
        (Case((11, 13, 17), dim=128, heads=6, kv_heads=3, before=5), "B,N,H,D", torch.bfloat16),
    ],
    ids=str,
)
def test_hopper_preparation_is_the_portable_one(
    case: Case,
    layout: str,
    dtype: torch.dtype,
    length: int,
    ordered: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Keys and values of a large mean, in ranges of one block, several and all."""
    tensors = (3 * x.cuda() + 5 for x in make_tensors(case)[1:3])
    key, value = (laid_out(x.to(dtype), layout) for x in tensors)
    if not hopper.prepares(key, value):
        pytest.skip("the Gluon kernel is for compute capability 9.0")
    monkeypatch.setattr(hopper, "range_length", lambda *given: length)
    call = call_on(case, key, value)
    found, again = (summarise(call, ordered=ordered) for _ in range(2))
    monkeypatch.setattr(hopper, "prepares", lambda *given: False)
    wanted = summarise(call, ordered=ordered)
    assert torch.equal(found.key, wanted.key) and torch.equal(found.value, wanted.value)
    for name, most in (
        ("key_shift", 1e-6),
        ("spread", 1e-4),
        ("key_var", 1e-3),
        ("low_value", 1e-3),
        ("h_bar", 1e-2),
    ):
        x, y = getattr(found, name), getattr(wanted, name)
        assert x.dtype == y.dtype and relative(x, y) < most, name
        assert torch.equal(x, getattr(again, name)), name
    # A single block's mean is the head's: centred, rounding is all that is left of it.
    x, y = (s.low_key.float() + s.key_shift[:, :, None] for s in (found, wanted))
    assert relative(x, y) < 1e-3
    assert torch.equal(found.low_key, again.low_key)


@pytest.mark.gpu
def test_strides_that_no_wide_copy_takes_go_to_the_portable_kernels() -> None:
    case = HOPPER_CASES[0]
    key = make_tensors(case)[1].cuda().half()
    odd = torch.cat([key, key[..., :8]], -1)[..., :128]
    assert not hopper.prepares(odd, odd)
    found, wanted = (summarise(call_on(case, x, x)) for x in (odd, key))
    assert torch.equal(found.key, wanted.key)
    assert relative(found.h_bar, wanted.h_bar) < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("text", [0, 90])
def test_larger_grids_on_the_gpu(text: int) -> None:
    before, after = text, text // 7
    case = Case((21, 30, 26), dim=128, heads=2, kv_heads=2, batch=1, before=before, after=after)
    tensors = cast(make_tensors(case), torch.bfloat16)
    budget = budget_for(case, tensors, 0.1)
    expected, wanted = reference_split(case, tensors, budget)
    out, _, error, route, *_ = run(case, tensors, budget)
    assert (route != wanted.route).float().mean() < 1e-4
    assert relative(out, expected) < 1e-2
    truth = dense(case, tensors)
    true_error = relative(case.sequence.video_of(out), case.sequence.video_of(truth))
    assert abs(float(error.mean()) / true_error - 1) < 0.35


@pytest.mark.gpu
def test_a_million_tokens_need_less_than_their_keys_and_values() -> None:
    import freqopt

    generator = torch.Generator("cuda").manual_seed(0)
    query, key, value = (
        torch.randn(1, 1, 2**20, 128, device="cuda", generator=generator, dtype=torch.bfloat16)
        for _ in range(3)
    )
    allocated = 3 * query.numel() * query.element_size()

    def call(**budget: float) -> torch.Tensor:
        return freqopt.split_attention(query, key, value, grid=(64, 128, 128), **budget)

    kept = call(threshold=2.0)
    for budget in ({"threshold": 2.0}, {"density": 0.01}):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = call(**budget)
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - before - out.numel() * out.element_size()
        assert extra <= 0.4 * 2 * allocated / 3
        assert torch.equal(out, kept) == ("threshold" in budget)
        assert out.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["after", "beside", "long"])
@pytest.mark.parametrize("dim", [64, 128])
def test_cuda_graph_replays_with_other_content(
    dim: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import freqopt

    if way == "long":
        monkeypatch.setattr(workspace, "LONG_TOKENS", 1)
    monkeypatch.setattr(overlap, "OVERLAP_ROWS", 1 if way == "beside" else 1 << 62)
    case = Case((7, 13, 17), dim=dim, batch=1)
    query, key, value, _ = (x if x is None else x.cuda().half() for x in make_tensors(case))
    static = [query.clone(), key.clone(), value.clone()]

    def call() -> torch.Tensor:
        return freqopt.split_attention(*static, grid=case.grid, threshold=0.7)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for seed in (1, 2):
        other = [x.cuda().half() for x in make_tensors(case, seed)[:3]]
        for held, new in zip(static, other, strict=True):
            held.copy_(new)
        graph.replay()
        expected = freqopt.split_attention(*other, grid=case.grid, threshold=0.7)
        assert torch.equal(captured, expected)


@pytest.mark.gpu
def test_gradients_on_the_gpu_are_those_of_the_cpu() -> None:
    import freqopt.kernels.op  # noqa: F401

    case = CASES[1]
    tensors = make_tensors(case)
    budget = budget_for(case, tensors, 0.4)
    grads = []
    for device in ("cpu", "cuda"):
        leaves = [x.to(device).detach().requires_grad_() for x in tensors[:3]]
        out = torch.ops.freqopt.split_attention(
            *leaves,
            budget.to(device),
            tensors[3].to(device),
            list(case.grid),
            case.before,
            case.after,
            case.dim**-0.5,
            0.0,
            64,
        )[0]
        out.square().sum().backward()
        grads.append([x.grad.cpu() for x in leaves])
    for on_cpu, on_gpu in zip(*grads, strict=True):
        assert relative(on_gpu, on_cpu) < 1e-2
