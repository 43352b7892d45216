"""Calibration on two processes that share heads: one plan, that of one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from parallel_models import ranks, share_out, wan
from ranks import Ranks

import freqopt
from freqopt.plan.plan import Plan

QUICK: dict[str, Any] = {"rounds": 0, "passes": 8, "progress": False, "target_density": 0.7}


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with Ranks(2) as found:
        yield found


def samples(call: dict[str, Any], seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    video = call["hidden_states"]
    return [{**call, "hidden_states": torch.randn(video.shape, generator=generator)} for _ in "ab"]


def plans(folder: str) -> tuple[Plan, Plan]:
    """Of one process, and of both."""
    model, call = wan(layers=1)
    alone = freqopt.calibrate(model, samples(call), **QUICK)
    with torch.no_grad():
        share_out(model, call, ulysses_degree=2)
    path = Path(folder) / "kept"
    shared = freqopt.calibrate(model, samples(call), checkpoint=path, **QUICK)
    assert not path.exists()
    return alone, shared


def test_one_plan_comes_out(two: Ranks, tmp_path: Path) -> None:
    (alone, shared), (_, other) = two.call(plans, str(tmp_path))
    assert shared.text() == other.text()
    assert list(shared.sites) == list(alone.sites)
    assert shared.model.fingerprint == alone.model.fingerprint
    for name, site in shared.sites.items():
        wanted = alone.sites[name]
        assert (site.heads, site.decision, site.layouts) == (4, "split", wanted.layouts)
        assert site.chunks == wanted.chunks
        for found, expected in zip(site.budgets, wanted.budgets, strict=True):
            assert found.threshold == pytest.approx(expected.threshold, rel=1e-3)
        assert site.density == pytest.approx(wanted.density, rel=1e-3)
        assert site.error == pytest.approx(wanted.error, rel=1e-2)
        assert site.gains[0] == pytest.approx(wanted.gains[0], rel=1e-2)
        energy = shared.evidence.sites[name].energy
        assert energy == pytest.approx(alone.evidence.sites[name].energy, rel=1e-3)
        assert shared.evidence.sites[name].key_heads == 4
    assert len({round(d, 3) for d in alone.sites["blocks.0.attn1"].density}) > 1
    assert shared.measured_error == pytest.approx(alone.measured_error, rel=1e-2)


def different_samples() -> str:
    model, call = wan(layers=1)
    with torch.no_grad():
        share_out(model, call, ulysses_degree=2)
    with pytest.raises(freqopt.CalibrationError) as error:
        freqopt.calibrate(model, samples(call, seed=ranks()[0]), **QUICK)
    return str(error.value)


def test_different_samples_are_refused(two: Ranks) -> None:
    assert all("different samples" in said for said in two.call(different_samples))
