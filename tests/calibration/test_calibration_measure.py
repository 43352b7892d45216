"""The recorder that stands at a site: what it passes on and what it sums up."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import freqopt
from freqopt.calibration.measure import attention
from freqopt.calibration.measure.attention import (
    head_chunks,
    head_energy,
    head_error,
)
from freqopt.calibration.measure.injections import (
    INJECTED,
    MOST_AMPLIFIED,
    Inject,
    Injection,
    one_head,
)
from freqopt.calibration.measure.ladder import CHOICES, REFINEMENT, THRESHOLDS
from freqopt.calibration.measure.readings import FINE, Survey, pack, unpack
from freqopt.calibration.measure.recorder import Desk, Recorder
from freqopt.calibration.measure.requests import (
    Measure,
    Request,
    Result,
    SiteThresholds,
    Split,
)
from freqopt.errors import InputError

GRID = (3, 8, 10)


def make_call(
    *, before: int = 0, after: int = 0, kv_heads: int = 2, batch: int = 1, masked: bool = False
) -> dict[str, Any]:
    torch.manual_seed(1)
    tokens = 240 + before + after
    query = torch.randn(batch, 2, tokens, 16)
    key, value = (torch.randn(batch, kv_heads, tokens, 16) for _ in "kv")
    mask = None
    if masked:
        mask = torch.ones(batch, tokens, dtype=torch.bool)
        mask[:, tokens - 3 :] = False
    tokens = dict(query=query, key=key, value=value, key_mask=mask)
    return {**tokens, "grid": GRID, "text_before": before, "text_after": after, "scale": 0.4}


def dense(call: dict[str, Any]) -> Tensor:
    mask = None if call["key_mask"] is None else call["key_mask"][:, None, None, :]
    grouped = call["key"].shape[1] != 2
    tokens = call["query"], call["key"], call["value"]
    return F.scaled_dot_product_attention(*tokens, attn_mask=mask, scale=0.4, enable_gqa=grouped)


def asked(request: Request, call: dict[str, Any], site: str = "a") -> tuple[Tensor, Result]:
    """What a recorder passes on when asked, and the result that it wrote into."""
    desk = Desk(request)
    return Recorder(desk, site)(**call), desk.result


def surveyed(result: Result) -> Survey:
    survey = Survey()
    survey.add_readings(result.readings, 0)
    return survey


CASES = [{}, {"before": 5, "after": 7, "masked": True}, {"kv_heads": 1}, {"batch": 2}]


@pytest.mark.parametrize("case", CASES)
def test_measuring_passes_on_the_dense_result(case: dict[str, Any]) -> None:
    call = make_call(**case)
    out, result = asked(Measure(), call)
    torch.testing.assert_close(out, dense(call))
    survey = surveyed(result)
    site = survey.sites["a"]
    assert site.shape == result.shapes["a"] == (2, call["query"].shape[2], 16)
    assert site.grids == {GRID} and not site.failure
    assert list(survey.measurable()) == ["a"] and not result.densities


@pytest.mark.parametrize("case", CASES)
def test_sums_are_those_of_the_public_op(case: dict[str, Any]) -> None:
    call = make_call(**case)
    truth, result = asked(Measure(), call)
    sums = surveyed(result).sites["a"].total()
    energy = truth.square().sum((0, 2, 3))
    torch.testing.assert_close(sums.energy, (energy / energy.sum()).double())
    for rung in (2, 6, 9):
        out, stats = freqopt.split_attention(**call, threshold=THRESHOLDS[rung], return_stats=True)
        error = (out - truth).square().sum((0, 2, 3))
        along = ((out - truth) * truth).sum((0, 2, 3))
        for name, want in (
            ("density", stats.density.mean(0)),
            ("own", error / energy),
            ("site", error / energy.sum()),
            ("bias", along / energy),
            ("site_bias", along.square() / energy / energy.sum()),
            ("probe", stats.probe_error.square().mean(0)),
        ):
            got = sums.mean(name)[rung]
            torch.testing.assert_close(got, want.double(), rtol=1e-3, atol=1e-7, msg=name)


def test_buckets_are_kept_apart_and_added_up() -> None:
    survey = Survey()
    for bucket, scale in ((0, 0.1), (2, 0.8), (2, 0.9)):
        _, result = asked(Measure(), {**make_call(), "scale": scale})
        facts, tensors = pack(result.readings)
        survey.add_readings(unpack(json.loads(json.dumps(facts)), tensors), bucket)
    site = survey.sites["a"]
    assert {b: s.calls for b, s in site.buckets.items()} == {0: 1, 2: 2}
    total = site.buckets[0].curves["own"] + site.buckets[2].curves["own"]
    torch.testing.assert_close(site.total().curves["own"], total)
    assert site.total().calls == 3 and site.spectrum is not None and site.spectrum.calls == 3
    flat, peaked = (site.buckets[b].mean("own")[-1].mean() for b in (0, 2))
    assert 0.0 < flat < peaked


def test_a_split_request_uses_the_sites_thresholds_and_others_stay_dense() -> None:
    call, threshold = make_call(), torch.tensor([0.5, 2.0])
    request = Split({"a": SiteThresholds(threshold)})
    out, result = asked(request, call)
    want = freqopt.split_attention(**call, threshold=threshold, return_stats=True)
    torch.testing.assert_close(out, want[0])
    torch.testing.assert_close(result.densities["a"][0], want[1].density[0])
    other, result = asked(request, call, "b")
    torch.testing.assert_close(other, dense(call))
    assert not result.densities


def test_a_site_that_fails_is_dense_and_noted_or_stops_the_run() -> None:
    call = make_call()
    out, result = asked(Measure(tiles={"a": 0}), call)
    torch.testing.assert_close(out, dense(call))
    assert result.failures["a"].startswith("ZeroDivisionError: ") and not result.readings
    survey = Survey()
    survey.add_sites(result.shapes, result.failures)
    assert not survey.measurable() and survey.failures() == result.failures
    _, result = asked(Measure(skipped=survey.failures(), tiles={"a": 0}), call)
    assert not result.failures
    with pytest.raises(InputError, match="threshold is"):
        asked(Split({"a": SiteThresholds(torch.ones(3))}), make_call())


def test_densities_between_the_rungs_are_those_of_the_op() -> None:
    for case in CASES:
        call = make_call(**case)
        curves = asked(Measure(), call)[1].readings[0].curves
        fine = curves[FINE][0]
        assert fine.shape == (len(CHOICES), 2)
        assert torch.equal(torch.tensor(CHOICES[::REFINEMENT]), torch.tensor(THRESHOLDS))
        for index in (5, 18, 30):
            _, stats = freqopt.split_attention(**call, threshold=CHOICES[index], return_stats=True)
            torch.testing.assert_close(
                fine[index], stats.density.mean(0).double(), atol=1e-6, rtol=1e-5
            )
        rungs = fine[::REFINEMENT]
        torch.testing.assert_close(rungs, curves["density"][0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_an_injection_is_an_amplified_error(case: dict[str, Any]) -> None:
    call, truth = make_call(**case), dense(make_call(**case))
    threshold = torch.full((2,), 3.0)
    split, _ = freqopt.split_attention(**call, threshold=threshold, return_stats=True)
    for head in (0, 1):
        request = Inject({"a": Injection(threshold, one_head(2, head))})
        out, result = asked(request, call, "b")
        torch.testing.assert_close(out, truth)
        assert not result.injected
        out, result = asked(request, call)
        moved, own = out - truth, split - truth
        assert not moved[:, 1 - head].any()
        own[:, 1 - head] = 0.0
        own_error = float(own.norm() / truth.norm())
        factor = min(max(INJECTED / own_error, 1.0), MOST_AMPLIFIED)
        torch.testing.assert_close(moved, factor * own, atol=1e-5, rtol=1e-3)
        injected = result.injected["a"]
        assert float(injected[head]) == pytest.approx((factor * own_error) ** 2, rel=1e-3)
        assert own_error > 1e-3 and not injected[1 - head]


@pytest.mark.parametrize("case", CASES)
def test_injections_of_many_heads_have_a_sign_and_one_size(case: dict[str, Any]) -> None:
    call, truth = make_call(**case), dense(make_call(**case))
    threshold, signs, level = torch.full((2,), 3.0), torch.tensor([-1.0, 1.0]), 0.02
    split, _ = freqopt.split_attention(**call, threshold=threshold, return_stats=True)
    out, result = asked(Inject({"a": Injection(threshold, signs)}, level), call)
    own = split - truth
    sizes = own.square().sum((0, 2, 3)).sqrt() / truth.norm()
    assert float(sizes.min()) > 2e-3
    factor = signs * level / 2**0.5 / sizes
    torch.testing.assert_close(out - truth, factor[None, :, None, None] * own, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(result.injected["a"], torch.full((2,), level**2 / 2))


def test_head_chunks_cover_all_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(2, 5, 7, 3), torch.randn(2, 5, 7, 3)
    whole = head_energy(x), *head_error(x, y)
    monkeypatch.setattr(attention, "CHUNK_BYTES", 400)
    assert len(list(head_chunks(x))) == 3
    for got, want in zip((head_energy(x), *head_error(x, y)), whole, strict=True):
        torch.testing.assert_close(got, want)
