"""Calibration end to end on a small model: the target holds where nothing was fitted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calibration_models import GRID, make_model, make_sample
from torch import Tensor, nn

import freqopt
from freqopt.calibration.measure import recorder
from freqopt.calibration.measure.requests import Measure
from freqopt.calibration.measure.spectrum import band_cutoff, key_spectrum, spectrum_axes
from freqopt.calibration.outputs import output_tensors, relative_error
from freqopt.errors import CalibrationError, OptionError
from freqopt.plan.plan import Plan


def error_with_plan(plan: Plan, sample: dict[str, Tensor]) -> float:
    """Error of the plan's budgets, run without the compiler and without calibration's code."""
    model = make_model().eval()
    with torch.no_grad():
        dense = model(**sample)["velocity"]
        for i, block in enumerate(model.blocks):
            name = f"blocks.{i}.attn"
            if plan.sites[name].decision == "split":
                bucket = sum(float(sample["timestep"]) > edge for edge in plan.timestep_edges)
                block.attn.budget = plan.budget(name, bucket)
        split = model(**sample)["velocity"]
    return float((split - dense).norm() / dense.norm())


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def calibrate(samples: Any = None, **options: Any) -> Plan:
    given = [make_sample(i) for i in range(4)] if samples is None else samples
    return freqopt.calibrate(make_model(), given, **{"progress": False, **options})


@pytest.fixture(scope="module")
def plan() -> Plan:
    return calibrate([make_sample(i) for i in range(8)], target_error=0.05)


def test_measured_error_is_within_the_target(plan: Plan) -> None:
    # Below 0.8 only because single blocks of so short a sequence flip whole heads.
    assert 0.7 * 0.05 <= plan.measured_error <= plan.target_error == 0.05
    assert plan.evidence.samples == plan.evidence.held_out == 4
    assert list(plan.sites) == ["blocks.0.attn", "blocks.1.attn"]
    assert plan.grids == [GRID]
    plan.check_model(make_model())


def test_error_holds_on_unseen_samples_run_by_other_code(plan: Plan) -> None:
    errors = [error_with_plan(plan, make_sample(seed)) for seed in range(100, 108)]
    rms = (sum(e * e for e in errors) / len(errors)) ** 0.5
    assert 0.5 * plan.target_error <= rms <= 1.1 * plan.target_error


def test_density_is_below_dense_and_reported(plan: Plan) -> None:
    split = [site for site in plan.sites.values() if site.decision == "split"]
    assert split and plan.mean_density < 0.8
    assert all(0 < d <= 1 for site in split for d in site.density)


def test_evidence_holds_curves_spectra_and_buckets(plan: Plan) -> None:
    evidence = plan.evidence.sites["blocks.0.attn"]
    curve = evidence.curve
    assert len(curve.error) == len(evidence.thresholds)
    for rows, grows in ((curve.density, False), (curve.error, True)):
        for head in range(2):
            column = [row[head] for row in rows]
            assert grows or column == sorted(column, reverse=True)
            assert (column[-1] > column[0]) == grows
    assert sum(evidence.energy) == pytest.approx(1, abs=1e-3)
    assert evidence.spectrum is not None
    assert [sum(row) for row in evidence.spectrum.power] == pytest.approx([1, 1], abs=1e-3)
    assert 0.1 < evidence.spectrum.low[0] < 1
    assert plan.timestep_name == "timestep" and len(plan.timestep_edges) == 3
    assert (
        [bucket.samples for bucket in evidence.buckets] == plan.evidence.bucket_samples == [1] * 4
    )
    gains = plan.sites["blocks.0.attn"].gains
    assert [len(row) for row in gains] == [2] * 4
    assert all(0 < gain < 10 for row in gains for gain in row)
    assert len({tuple(row) for row in gains}) == 4


def test_one_seed_one_plan() -> None:
    first, second = calibrate(target_error=0.1), calibrate(target_error=0.1)
    assert first == second


@pytest.mark.usefixtures("undrawn")
def test_plan_survives_its_file_and_reports(plan: Plan, tmp_path: Any) -> None:
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    freqopt.report(plan, tmp_path / "report.html")
    assert "TinyVideo" in (tmp_path / "report.html").read_text()


def test_tighter_targets_cost_more(plan: Plan) -> None:
    loose = calibrate(target_error=0.2)
    assert loose.mean_density < plan.mean_density and loose.measured_error <= 0.2


def test_target_so_loose_that_everything_is_low() -> None:
    plan = calibrate(target_error=0.9)
    assert plan.measured_error < 0.5 and any("loosest" in note for note in plan.evidence.notes)
    floor = min(min(row) for row in plan.evidence.sites["blocks.0.attn"].curve.density)
    assert plan.mean_density < 1.2 * floor


def test_target_below_rounding() -> None:
    with pytest.raises(CalibrationError, match="cannot be met: with every pair attended exactly"):
        calibrate(target_error=1e-9)


def test_callable_that_runs_a_pipeline() -> None:
    model = make_model()

    def pipeline() -> None:
        latents = make_sample(0)["video"]
        for step in range(4):
            latents = latents + 0.1 * torch.randn_like(latents)
            model(latents, torch.tensor([step / 4]))

    plan = freqopt.calibrate(model, pipeline, target_error=0.1, progress=False)
    assert plan.measured_error <= 0.1
    assert (plan.evidence.samples, plan.evidence.held_out) == (2, 2)


@pytest.mark.smoke
def test_one_sample_is_verified_on_itself_and_says_so() -> None:
    sample = make_sample(0)
    plan = calibrate([((sample["video"],), {"timestep": sample["timestep"]})], target_error=0.1)
    assert plan.measured_error <= 0.1 and "only one sample" in plan.evidence.notes[0]


def test_model_is_left_as_it_was() -> None:
    model = make_model().train()
    model.blocks[0].eval()
    before = {name: p.clone() for name, p in model.named_parameters()}
    freqopt.calibrate(model, [make_sample(0), make_sample(1)], target_error=0.2, progress=False)
    assert model.training and not model.blocks[0].training and model.blocks[1].training
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())


def test_nan_in_a_sample() -> None:
    bad = make_sample(1)
    bad["video"][0, 0, 0, 0, 0] = torch.nan
    with pytest.raises(CalibrationError, match="sample 1: 'video'"):
        calibrate([make_sample(0), bad])


def test_sample_that_overflows_the_model() -> None:
    bad = make_sample(0)
    bad["video"] = bad["video"] * 1e38
    with pytest.raises(CalibrationError, match="dense model's own output"):
        calibrate([bad, bad])


def test_model_without_attention() -> None:
    with pytest.raises(CalibrationError, match="no attention was found"):
        freqopt.calibrate(nn.Linear(4, 4), [{"input": torch.ones(1, 4)}], progress=False)


def test_model_whose_output_is_zero() -> None:
    model = make_model()
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    with pytest.raises(CalibrationError, match="zero everywhere"):
        freqopt.calibrate(model, [make_sample(0)], progress=False)


@pytest.mark.parametrize("target", [0.0, -1.0, 1.0, float("nan")])
def test_target_out_of_range(target: float) -> None:
    with pytest.raises(OptionError, match="outside"):
        calibrate(target_error=target)


def test_a_failing_site_stays_dense_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Measure.attend

    def fail(self: Measure, visit: Any) -> Tensor:
        if visit.site == "blocks.1.attn":
            raise RuntimeError("no kernel image")
        return original(self, visit)

    monkeypatch.setattr(Measure, "attend", fail)
    plan = calibrate(target_error=0.2)
    assert plan.sites["blocks.0.attn"].decision == "split"
    assert plan.sites["blocks.1.attn"].decision == "dense"
    assert "no kernel image" in plan.sites["blocks.1.attn"].reason


def test_a_site_that_cannot_be_replaced_stays_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    original = recorder.replace_site

    def fail(gm: Any, site: Any, target: Any) -> Any:
        if site.name == "blocks.0.attn":
            with site.node.graph.inserting_before(site.node):
                site.node.graph.call_function(target, (site.attention.query,))
            raise RuntimeError("half way")
        return original(gm, site, target)

    monkeypatch.setattr(recorder, "replace_site", fail)
    plan = calibrate(target_error=0.2)
    assert list(plan.sites) == ["blocks.1.attn"]
    assert "half way" in plan.evidence.dense_sites["blocks.0.attn"]


def test_attention_that_the_output_does_not_depend_on() -> None:
    model = make_model()
    for block in model.blocks:
        nn.init.zeros_(block.attn.out.weight)
    with pytest.raises(CalibrationError, match="does not depend on them"):
        freqopt.calibrate(model, [make_sample(0)], progress=False)


def test_interrupting_restores_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: Any, visit: Any) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(Measure, "attend", stop)
    model = make_model().train()
    with pytest.raises(KeyboardInterrupt):
        freqopt.calibrate(model, [make_sample(0)], progress=False)
    assert model.training and not model._forward_pre_hooks


@pytest.mark.parametrize("rich", [True, False])
def test_progress_tells_the_phases(
    rich: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if rich:
        monkeypatch.setenv("FORCE_COLOR", "1")  # as in a terminal
    else:
        monkeypatch.setitem(__import__("sys").modules, "rich", None)
        monkeypatch.setattr("freqopt.progress.PRINT_EVERY", 0.0)
    calibrate([make_sample(0), make_sample(1)], target_error=0.2, progress=True)
    shown = capsys.readouterr().err
    for phase in ("measuring", "probing", "verifying"):
        assert phase in shown
    assert "s left" in shown


def test_relative_error_covers_all_tensors_and_flags_bad_ones() -> None:
    want = output_tensors({"a": torch.tensor([3.0]), "b": [torch.tensor([4.0]), 7]})
    got = [want[0] + 0.3, want[1] + 0.4]
    assert relative_error(got, want) == pytest.approx(0.1)
    assert relative_error([want[0] * torch.nan, want[1]], want) == float("inf")


def test_spectrum_of_a_pure_wave_sits_in_its_bin() -> None:
    t, h, w = 8, 8, 8
    wave = torch.cos(2 * torch.pi * torch.arange(w) * 3 / w)  # 3/8 cycles per token
    key = wave.expand(1, 1, t, h, w).reshape(1, 1, -1, 1) * torch.ones(4) + 5.0
    power, low = key_spectrum(key, (t, h, w), 0)
    edges, cutoff = spectrum_axes((t, h, w))
    at = int(power[0].argmax())
    assert edges[at - 1] <= 0.375 <= edges[at]
    assert power[0, at] == pytest.approx(1.0, abs=1e-5)
    assert low.item() == pytest.approx(0.0, abs=1e-5)
    assert cutoff == 0.125


def test_the_cutoff_ignores_flat_axes() -> None:
    assert band_cutoff((1, 30, 52)) == pytest.approx(0.0625)
    assert band_cutoff((1, 1, 999)) == 0.5 / 64


@pytest.mark.usefixtures("undrawn")
def test_a_density_is_met_with_the_least_error(tmp_path: Path) -> None:
    samples = [make_sample(i) for i in range(4)]
    plans = [
        freqopt.calibrate(make_model(), samples, target_density=density, progress=False)
        for density in (0.35, 0.6)
    ]
    for plan, wanted in zip(plans, (0.35, 0.6), strict=True):
        assert 0.9 * wanted <= plan.mean_density <= wanted == plan.target_density
        assert plan.target_error == plan.measured_error > 0
        assert f"density {wanted} was asked for" in str(plan)
        densities = [d for site in plan.sites.values() for d in site.density]
        assert np.mean(densities) == pytest.approx(plan.mean_density, rel=1e-3)
    assert plans[1].measured_error < plans[0].measured_error
    plans[0].save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plans[0]
    assert "target: mean density" in freqopt.report(plans[0], tmp_path / "a.html").read_text()
    # a plan for the error that was reached is no cheaper than this one
    same = freqopt.calibrate(
        make_model(), samples, target_error=plans[0].measured_error, progress=False
    )
    assert same.mean_density > 0.85 * plans[0].mean_density


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"target_density": 0.0}, "outside"),
        ({"target_density": 0.05}, "cannot be reached: with the loosest budgets it is 0.2"),
        ({"target_density": 0.5, "target_psnr": 30.0}, "both given"),
    ],
)
def test_densities_that_cannot_be(wrong: dict[str, float], said: str) -> None:
    samples = [make_sample(i) for i in range(2)]
    with pytest.raises(OptionError, match=said):
        freqopt.calibrate(make_model(), samples, progress=False, **wrong)
