"""What a plan says of every held-out sample, targets for a share of them, budgets of passes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calibration_models import make_model, make_sample

import freqopt
from freqopt.calibration.measure.injections import Inject
from freqopt.calibration.runner import Runner
from freqopt.calibration.search.verify import Verdict, quantile_of, too_few
from freqopt.errors import OptionError
from freqopt.plan.plan import Plan


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def calibrate(count: int = 8, **options: Any) -> Plan:
    torch._dynamo.reset()
    samples = [make_sample(i) for i in range(count)]
    return freqopt.calibrate(make_model(), samples, **{"progress": False, **options})


def test_a_quantile_is_the_least_error_that_the_share_is_within() -> None:
    errors = [0.04, 0.01, 0.03, 0.02]
    assert [quantile_of(errors, share) for share in (0.25, 0.5, 0.51, 0.75, 0.9)] == [
        0.01,
        0.02,
        0.03,
        0.03,
        0.04,
    ]
    assert quantile_of([0.1 * i for i in range(10)], 0.9) == pytest.approx(0.8)
    assert quantile_of([0.1 * i for i in range(10)], 0.7) == pytest.approx(0.6)
    assert not too_few(0.9, 10) and "with 10 or more" in too_few(0.9, 9)
    assert not too_few(0.5, 2) and not too_few(0.95, 20) and too_few(0.95, 19)
    assert Verdict(errors, {}, 0.75).error == 0.03
    assert Verdict([3.0, 4.0], {}).error == pytest.approx(12.5**0.5)


def test_the_plan_says_what_every_held_out_sample_did(tmp_path: Path) -> None:
    plan = calibrate(4, target_error=0.1)
    verified = plan.verified
    assert verified is not None and len(verified.sample_errors) == plan.evidence.held_out == 2
    errors = np.array(verified.sample_errors)
    assert plan.measured_error == pytest.approx(np.sqrt((errors**2).mean()), rel=1e-4)
    assert plan.worst_error == errors.max() > errors.min()
    assert verified.spread == pytest.approx(errors.std(), rel=1e-3)
    assert (verified.dtype, verified.quantile_error, verified.model_ms) == ("float32", None, None)
    assert verified.adapters == [] and len(plan.evidence.compared) >= 2
    assert [each.taken for each in plan.evidence.compared].count(True) == 1
    assert all(0.0 < each.cost < 2.0 for each in plan.evidence.compared)
    text = str(plan)
    assert f"{plan.worst_error:.4f} worst" in text and "float32; no adapter" in text
    assert all(f"{error:.4f}" in text for error in errors)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_a_target_for_a_share_of_the_inputs_is_held_by_that_share() -> None:
    mean, most = (calibrate(target_error=0.08, quantile=q) for q in (None, 0.99))
    assert mean.target_quantile is None and most.target_quantile == 0.99
    assert most.verified is not None and most.verified.quantile_error == most.worst_error <= 0.08
    assert mean.worst_error > 0.08 or most.mean_density >= mean.mean_density
    assert most.measured_error < most.worst_error
    assert "target 0.08 for 99% of inputs" in str(most)
    held_out = most.evidence.held_out
    few = f"0.99 of {held_out} held-out samples is all of them, so the worst of them counts"
    assert any(note.startswith(f"{few}; with 100 or more") for note in most.evidence.notes)
    half = calibrate(target_error=0.08, quantile=0.5)
    assert half.verified is not None
    assert not any("is all of them" in note for note in half.evidence.notes)
    within = [error <= 0.08 for error in half.verified.sample_errors]
    assert sum(within) >= 2 and half.mean_density <= most.mean_density


@pytest.mark.parametrize(
    "options, said",
    [
        ({"quantile": 1.0}, "outside"),
        ({"quantile": 0.9, "target_density": 0.5}, "and of no other"),
        ({"passes": 0}, "must be 1 or more"),
        ({"rounds": -1}, "must be 0 or more"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        calibrate(2, **options)


def test_a_budget_of_passes_is_kept_and_heads_are_still_told_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    injected: list[tuple[str, int]] = []
    original = Runner.resume

    def resume(self: Runner, sample: Any, held: Any, request: Any, site: Any) -> Any:
        if isinstance(request, Inject):
            injected.append((next(iter(request.sites)), len(request.sites)))
        return original(self, sample, held, request, site)

    monkeypatch.setattr(Runner, "resume", resume)
    whole = calibrate(target_error=0.1)
    assert len(injected) == 4 * 4  # samples, heads
    injected.clear()
    few = calibrate(target_error=0.1, passes=12)
    assert 1 <= len(injected) < 8
    for name, site in few.sites.items():
        ratio = np.array(site.gains) / np.array(whole.sites[name].gains)
        assert ratio.min() > 0.4 and ratio.max() < 2.5
    assert few.measured_error <= 0.1 and not any(s.marginals for s in few.sites.values())
    assert few.mean_density < 1.3 * whole.mean_density
