"""Orders of tokens per key head: measured as the op makes them, chosen only where they pay."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calibration_orders import DIM, Likeness, make_model, smooth, things
from torch import Tensor

import freqopt
from freqopt.calibration.evidence import choices_of_plan
from freqopt.calibration.measure import clock, heads
from freqopt.calibration.measure.attention import AttentionCall, AttentionShape
from freqopt.calibration.measure.curves import measure_curves
from freqopt.calibration.measure.ladder import ORDERS, THRESHOLDS, Array
from freqopt.calibration.measure.recorder import Recorder
from freqopt.calibration.search.allocate import Allocation, SiteChoice, allocate, split_cost
from freqopt.calibration.search.choices import SiteChoices
from freqopt.calibration.search.cost import MeasuredCost, ProductCost
from freqopt.calibration.search.marginals import Unit, neighbour
from freqopt.calibration.search.verify import thresholds_key, thresholds_of
from freqopt.config import ALL
from freqopt.errors import CalibrationError, OptionError
from freqopt.plan.plan import Plan
from freqopt.plan.records import SiteTiming


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make_call(
    grid: tuple[int, int, int],
    *,
    key_heads: int = 2,
    batch: int = 1,
    before: int = 0,
    after: int = 0,
) -> AttentionCall:
    torch.manual_seed(0)
    tokens = grid[0] * grid[1] * grid[2] + before + after
    kinds = torch.randn(key_heads, 9, 16)[:, torch.randint(9, (tokens,))]
    key = kinds + 0.3 * torch.randn(batch, key_heads, tokens, 16)
    query = 1.5 * key.repeat_interleave(2 // key_heads, 1) + 0.2 * torch.randn(batch, 2, tokens, 16)
    value = kinds[..., :12] + torch.randn(batch, key_heads, tokens, 12)
    value = torch.nn.functional.pad(value, (0, 4))
    mask = None
    if before:
        mask = torch.ones(batch, tokens, dtype=torch.bool)
        mask[:, 1] = False
    return AttentionCall(query, key, value, mask, grid, before, after, 0.25)


@pytest.mark.parametrize(
    "case", [{"batch": 2}, {"key_heads": 1}, {"before": 3, "after": 5, "key_heads": 1}]
)
def test_curves_of_an_order_are_those_of_the_op(case: dict[str, Any]) -> None:
    call = make_call((5, 13, 20), **case)
    dense = call.dense()
    reading = measure_curves("a", call, dense, 64, sampled=64, orders=ORDERS)
    energy = dense.square().sum((0, 2, 3))
    own = reading.curves["own"]
    assert own.shape == (5, len(THRESHOLDS), 2)
    for (order, chunk), rung in itertools.product(enumerate(ORDERS), (4, 7, 9)):
        chunks = torch.full((call.key.shape[1],), chunk, dtype=torch.int32)
        out, density, probe = call.split(torch.full((2,), THRESHOLDS[rung]), 64, chunks, chunk)
        error = (out - dense).square().sum((0, 2, 3)) / energy
        for name, want in (
            ("own", error),
            ("density", density.mean(0)),
            ("probe", probe.square().mean(0)),
        ):
            got = reading.curves[name][order, rung]
            torch.testing.assert_close(got, want.double(), rtol=2e-3, atol=1e-7, msg=name)
    assert not torch.isclose(own[1:], own[0], rtol=1e-2)[:, 7].any()
    for first, second in itertools.combinations((1, 2, 3), 2):
        assert not torch.isclose(own[first], own[second], rtol=1e-2)[7].any()
    assert torch.equal(own[3], own[4])  # 4,096 are all there are


def test_orders_that_act_alike_are_measured_and_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "milliseconds", lambda run: float(run().shape[-1]))
    few, some, many = (make_call(grid) for grid in ((5, 7, 12), (5, 7, 16), (5, 13, 20)))
    own = measure_curves("a", few, few.dense(), 0, orders=ORDERS).curves["own"]
    assert all(torch.equal(curve, own[0]) for curve in own)
    own = measure_curves("a", some, some.dense(), 0, orders=ORDERS).curves["own"]
    assert all(torch.equal(curve, own[2]) for curve in own[3:])
    assert not any(torch.equal(own[1], own[i]) for i in (0, 2))
    assert clock.time_orders(few, ORDERS) == [] == clock.time_orders(many, ORDERS[:1])
    assert clock.time_orders(some, ORDERS) == [(512, 560.0), (1024, 560.0)]
    chunks = [chunk for chunk, _ in clock.time_orders(many, ORDERS)]
    assert chunks == [512, 1024, 4096]


def waves(grid: tuple[int, int, int]) -> AttentionCall:
    """Tokens that are like those near them and like no others."""
    torch.manual_seed(0)
    places = torch.cartesian_prod(*(torch.arange(extent).float() for extent in grid))
    angles = places @ (torch.randn(3, 32) * torch.tensor([1.0, 0.15, 0.15])[:, None])
    key = torch.cos(angles + 6 * torch.rand(32))[None, None]
    value = key.roll(1, -1) + 0.1 * torch.randn(key.shape)
    return AttentionCall(1.5 * key, key, value, None, grid, 0, 0, 0.7)


def test_orders_that_are_not_the_best_get_few_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    original = heads.tile_errors

    def counting(head: Any, thresholds: Tensor, tiles: Tensor, probe: Any) -> Any:
        taken.append(len(tiles))
        return original(head, thresholds, tiles, probe)

    monkeypatch.setattr(heads, "tile_errors", counting)
    grid = (4, 32, 40)  # 40 tiles
    kinds, field = make_call(grid), waves(grid)
    measure_curves("a", kinds, kinds.dense(), 64, orders=ORDERS)
    of_head = [32, 4, 4, 4, 4]
    assert taken[:6] == [*of_head, 12] and taken.count(4) == 8 and 2 <= taken.count(12) <= 4
    taken.clear()
    measure_curves("a", field, field.dense(), 64, orders=ORDERS)
    assert taken in ([*of_head, 12], [*of_head, 12, 12])
    taken.clear()
    measure_curves("a", field, field.dense(), 64, sampled=64, orders=ORDERS[:1])
    assert taken == [40]


def test_costs_of_orders() -> None:
    """The counted ones are near those timed on an H200; timed ones are what was timed."""
    timed = {32_760: (0.42, 0.52, 0.67, 1.05), 75_600: (0.76, 0.97, 1.30, 2.42)}
    for tokens, row in timed.items():
        for chunk, ms in zip((256, 1024, 4096, ALL), row, strict=True):
            shape = AttentionShape(24, tokens, 128)
            counted = 0.1 + ProductCost().order(shape, 24, chunk) / 2.9e11
            assert counted == pytest.approx(ms, rel=0.2), (tokens, chunk)
            assert ProductCost().order(shape, 4, chunk) < 0.2 * ProductCost().order(
                shape, 24, chunk
            )
    timing = SiteTiming(
        heads=24,
        tokens=600,
        head_dim=128,
        dense_ms=1.0,
        base_ms=0.1,
        density_ms=1.0,
        points=[],
        orders=[(1024, 0.3)],
    )
    shape = AttentionShape(24, 600, 128)
    cost = MeasuredCost({shape: timing})
    assert cost.order(shape, 8, 1024) == 0.3 and cost.order(shape, 8, ALL) == np.inf


class Priced(ProductCost):
    """Orders whose costs, for the whole site, are given as shares of its dense cost."""

    def order(self, shape: AttentionShape, key_heads: int, chunk: int) -> float:
        """See `CostModel`."""
        share = {1024: 0.05, ALL: 0.12}[chunk]
        return share * self.dense(shape) * shape.heads


def site_of_orders(rng: np.random.Generator, key_heads: int, rungs: int = 2) -> SiteChoices:
    """Two heads in two timestep buckets, three orders with some rungs each."""
    rows, columns = 4, 3 * rungs
    density = rng.uniform(0.02, 0.9, (rows, columns))
    error = rng.exponential(1e-3, (rows, columns))
    one, none = np.ones((rows, 1)), np.zeros((rows, 1))
    threshold = np.concatenate([[0.0], np.tile(np.arange(1.0, rungs + 1), 3)])
    curves = (np.concatenate(x, 1) for x in ((one, density), (none, error), (none, error)))
    order = np.concatenate([[0], np.repeat(np.arange(3), rungs)])
    return SiteChoices(
        "a",
        1024,
        64,
        threshold,
        *curves,
        (0.25, 0.75),
        order=order,
        key_heads=key_heads,
        chunks=(0, 1024, ALL),
    )


def valid(site: SiteChoices, index: tuple[int, ...]) -> bool:
    """Whether rows whose heads share a key head have one order, exact ones aside."""
    for key_head in range(site.key_heads):
        rows = [row for row in range(4) if row % 2 * site.key_heads // 2 == key_head]
        if len({int(site.order[index[row]]) for row in rows if index[row]}) > 1:
            return False
    return True


@pytest.mark.parametrize("key_heads", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_no_other_orders_cost_less_at_equal_error(key_heads: int, seed: int) -> None:
    site, cost = site_of_orders(np.random.default_rng(seed), key_heads), Priced()
    every = [x for x in itertools.product(range(7), repeat=4) if valid(site, x)]
    assert len(every) < 7**4
    rows, taken = np.arange(4), set()
    points = [(split_cost(site, np.array(x), cost), site.error[rows, list(x)].sum()) for x in every]
    dense = cost.dense(site.shape) * site.heads
    for multiplier in np.geomspace(1e7, 1e13, 25):
        (choice,) = allocate([site], multiplier, cost).choices
        assert choice.dense or valid(site, tuple(choice.index))
        found = split_cost(site, choice.index, cost)
        least = found + multiplier * site.error[rows, choice.index].sum()
        best = min(paid + multiplier * error for paid, error in points)
        assert least == pytest.approx(best, rel=1e-9)
        assert choice.dense == (dense <= least)
        taken.add(tuple(site.orders_of(choice.index)))
    assert len(taken) > 1


def test_neighbours_and_reach_keep_the_orders() -> None:
    site = site_of_orders(np.random.default_rng(0), 1, rungs=5)
    index = np.array([7, 0, 8, 6])  # the second order, one head exact
    assert site.orders_of(index).tolist() == [1]
    allocation = Allocation(0.0, [SiteChoice(index, dense=False)], 0.0, 0.0, 0.0, 0.0)
    for head, bucket in itertools.product(range(2), range(2)):
        changed = neighbour([site], allocation, Unit(0, head), bucket).choices[0].index
        assert (changed != index).sum() == 1 and site.orders_of(changed).tolist() == [1]
    near = site.near(index, 1e3)
    assert (near.density[:, [*range(1, 6), *range(11, 16)]] > 1.0).all()
    assert (near.density[[0, 2, 3], 6:11] <= 1.0).all()
    (chosen,) = thresholds_of([site], allocation).values()
    assert chosen.chunks == (1024,) and chosen.threshold.shape == (2, 2)
    grid = Allocation(0.0, [SiteChoice(np.array([1, 0, 2, 3]), False)], 0.0, 0.0, 0.0, 0.0)
    (by_grid,) = thresholds_of([site], grid).values()
    assert by_grid.chunks == ()
    plain = chosen._replace(chunks=())
    assert thresholds_key("a", {"s": chosen}) != thresholds_key("a", {"s": plain})


def calibrate(model: Likeness, samples: list[dict[str, Tensor]], **options: Any) -> Plan:
    settings = {"progress": False, "rounds": 0, "target_error": 0.04, **options}
    return freqopt.calibrate(model, samples, **settings)


def errors_with(plan: Plan, model: Likeness, sample: dict[str, Tensor]) -> tuple[float, Tensor]:
    """Relative error of the output, and density per head, by the public op."""
    (name,), video = plan.sites, sample["video"]
    with torch.no_grad():
        x = model.patch(video).flatten(2).transpose(1, 2)
        key, value = (
            layer(x).unflatten(-1, (-1, DIM)).transpose(1, 2)
            for layer in (model.to_key, model.to_value)
        )
        query = key.repeat_interleave(model.heads // model.key_heads, 1)
        out, stats = freqopt.split_attention(
            query,
            key,
            value,
            grid=video.shape[2:],
            order=torch.tensor(plan.sites[name].chunks),
            threshold=plan.budget(name)[0],
            return_stats=True,
        )
        dense = model(**sample)
        wrong = model.out(out.transpose(1, 2).flatten(2)) - dense
    return float(wrong.norm() / dense.norm()), stats.density[0]


@pytest.mark.parametrize("heads, key_heads", [(2, 1), (2, 2)])
def test_things_are_ordered_by_content(
    heads: int, key_heads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the same error with a part of the density; the plan is what was verified."""
    model, samples = make_model(heads, key_heads), [things(i) for i in range(2)]
    asked, real = [], AttentionCall.split

    def split(call: AttentionCall, threshold: Tensor, probes: int, *orders: Any) -> Any:
        asked.append((threshold.tolist(), [] if not orders or orders[0] is None else orders[0]))
        return real(call, threshold, probes, *orders)

    monkeypatch.setattr(AttentionCall, "split", split)
    plan = calibrate(model, samples)
    (name,), (site,) = plan.sites, plan.sites.values()
    assert site.decision == "split" and len(site.chunks) == key_heads
    assert set(site.chunks) <= set(ORDERS[1:])
    budget = pytest.approx(plan.budget(name)[0].tolist(), rel=1e-4)
    verified = [list(map(int, order)) for threshold, order in asked if threshold == budget]
    assert verified and all(order == site.chunks for order in verified)

    error, density = errors_with(plan, model, things(1))
    assert error == pytest.approx(plan.measured_error, rel=1e-3) and error <= 0.04
    assert density.tolist() == pytest.approx(site.density, rel=1e-3)
    assert all(0.7 < gain < 1.5 for gain in site.gains[0])  # the output is linear in the site's
    unseen, _ = errors_with(plan, model, things(5))
    assert unseen < 1.3 * 0.04

    by_grid = calibrate(model, samples, order="grid")
    assert not by_grid.sites[name].chunks and by_grid.measured_error <= 0.04
    assert plan.mean_density < 0.6 * by_grid.mean_density

    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    (rebuilt,) = choices_of_plan(plan)
    assert rebuilt.orders == 5 and rebuilt.chunks == ORDERS and rebuilt.key_heads == key_heads
    evidence = plan.evidence.sites[name]
    assert [curve.chunk for curve in evidence.content] == list(ORDERS[1:])
    assert not by_grid.evidence.sites[name].content


def test_smooth_fields_keep_the_grid() -> None:
    plan = calibrate(make_model(sharpness=2.0), [smooth(i) for i in range(2)], target_error=0.06)
    (site,) = plan.sites.values()
    assert site.decision == "split" and site.chunks == []
    (evidence,) = plan.evidence.sites.values()
    assert len(evidence.content) == 4


def test_an_order_that_takes_longer_than_it_saves_is_not_chosen() -> None:
    """The same things, in videos so short that ordering them takes as long as dense attention."""
    short = (2, 16, 20)
    plan = calibrate(make_model(), [things(i, short) for i in range(2)])
    (site,) = plan.sites.values()
    assert site.chunks == []


def test_a_resumed_calibration_has_the_same_orders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, samples, path = make_model(2, 1), [things(i) for i in range(2)], tmp_path / "c"
    whole = calibrate(model, samples)
    assert any(next(iter(whole.sites.values())).chunks)
    original, calls = Recorder.__call__, list[str]()

    def call(recorder: Recorder, *args: Any) -> Any:
        calls.append(type(recorder.desk.request).__name__)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return original(recorder, *args)

    monkeypatch.setattr(Recorder, "__call__", call)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, samples, checkpoint=path)
    assert calls.count("Measure") == 1
    with pytest.raises(CalibrationError, match="cannot be resumed"):
        calibrate(model, samples, checkpoint=path, order="grid")
    calls.clear()
    calls.extend([""] * 6)
    assert calibrate(model, samples, checkpoint=path) == whole
    assert "Measure" not in calls and not path.exists()


def test_an_order_that_there_is_not() -> None:
    with pytest.raises(OptionError, match="order 'content' is none; supported: auto, grid"):
        calibrate(make_model(), [things(0)], order="content")


def test_an_array_is_told_by_key_head() -> None:
    """Rows are heads by bucket: (buckets, key heads, heads that share one)."""
    site = SiteChoices("a", 600, 8, *[np.zeros((12, 1))] * 4, (0.5, 0.5), key_heads=3)
    rows: Array = np.arange(12.0)
    assert site.by_key_head(rows).tolist() == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
    assert site.of_rows(np.array([7, 8, 9])).tolist() == [7, 7, 8, 8, 9, 9] * 2
