"""Several models that share the denoising steps: one call, a plan for each, one file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_models import TinyVideo, make_model, make_sample

import freqopt
from freqopt import Plans
from freqopt.errors import CalibrationError, OptionError, PlanError


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def experts() -> dict[str, TinyVideo]:
    torch.manual_seed(1)
    other = TinyVideo(layers=1)
    return {"transformer": make_model(), "transformer_2": other}


OPTIONS: dict[str, Any] = {"target_error": 0.2, "progress": False}


def test_every_expert_has_the_plan_that_it_would_have_alone(tmp_path: Path) -> None:
    models = experts()

    def pipeline() -> None:
        for step in range(8):
            sample = make_sample(step)
            models["transformer" if step < 4 else "transformer_2"](**sample)

    plans = freqopt.calibrate(models, pipeline, **OPTIONS)
    assert isinstance(plans, Plans) and list(plans) == list(models)
    for name, seeds in (("transformer", range(4)), ("transformer_2", range(4, 8))):
        torch._dynamo.reset()
        calls = [make_sample(i) for i in seeds]
        alone = freqopt.calibrate(models[name], calls, **OPTIONS)
        assert plans[name] == alone.model_copy(update={"component": name})
        plans[name].check_model(models[name])
    assert len(plans["transformer"].sites) == 2 and len(plans["transformer_2"].sites) == 1
    path = tmp_path / "plans.json"
    plans.save(path)
    assert dict(Plans.load(path)) == dict(plans)
    assert all(name in str(plans) for name in plans) and "TinyVideo" in str(plans)
    with pytest.raises(PlanError, match="holds plans of several models"):
        freqopt.Plan.load(path)
    content = json.loads(path.read_text())
    content["plans"]["transformer_2"]["target_error"] = 0.5
    path.write_text(json.dumps(content))
    with pytest.raises(PlanError, match=r"plans.json: transformer_2 does not match its own hash"):
        Plans.load(path)
    plans["transformer"].save(path)
    with pytest.raises(PlanError, match=r"read by Plan.load"):
        Plans.load(path)
    path.write_text(path.read_text()[:100])
    with pytest.raises(PlanError, match="not complete JSON"):
        Plans.load(path)


def test_samples_that_do_not_fit_the_experts() -> None:
    models = experts()
    calls = [make_sample(0), make_sample(1)]
    for samples, said in (
        ({"transformer": calls}, "every model needs samples of its own name"),
        (calls, "one list of samples was given for several models"),
        (lambda: models["transformer"](**calls[0]), "without calling transformer_2"),
    ):
        with pytest.raises(CalibrationError, match=said):
            freqopt.calibrate(models, samples, **OPTIONS)
    with pytest.raises(OptionError, match="one at a time"):
        freqopt.calibrate(models, {n: calls for n in models}, target_psnr=30.0, progress=False)
    with pytest.raises(OptionError, match="belongs to several models"):
        freqopt.calibrate(models["transformer"], {"transformer": calls}, **OPTIONS)


def test_each_expert_resumes_from_a_checkpoint_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from freqopt.calibration.measure.requests import Measure

    models, seen = experts(), []
    samples = {name: [make_sample(0), make_sample(1)] for name in models}
    original = Measure.attend

    def stop(self: Measure, visit: Any) -> Any:
        seen.append(visit.site)
        if len(seen) == 3:  # the two sites of the first expert are measured
            raise KeyboardInterrupt
        return original(self, visit)

    with monkeypatch.context() as patch:
        patch.setattr(Measure, "attend", stop)
        with pytest.raises(KeyboardInterrupt):
            freqopt.calibrate(models, samples, checkpoint=tmp_path / "kept", **OPTIONS)
    assert [file.name for file in tmp_path.iterdir()] == ["kept.transformer"]
    torch._dynamo.reset()
    seen.clear()

    def watch(self: Measure, visit: Any) -> Any:
        seen.append(visit.site)
        return original(self, visit)

    monkeypatch.setattr(Measure, "attend", watch)
    resumed = freqopt.calibrate(models, samples, checkpoint=tmp_path / "kept", **OPTIONS)
    assert len(resumed) == 2 and list(tmp_path.iterdir()) == []
    assert seen == ["blocks.0.attn"]  # the one site of the second expert
