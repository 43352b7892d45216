"""Plans that travel: folders, the Hub by a stub, other targets along the curves."""

from __future__ import annotations

import math
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pieces_models as models
import pytest
import torch
from plans import plan_of

import freqopt
from freqopt.errors import CalibrationError, FileError, InputError, OptionError, PlanError
from freqopt.plan.plan import Plan
from freqopt.plan.plans import Plans
from freqopt.reporting.report import report_each


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_of(models.make(), models.inputs(), 1.0)


def test_a_folder_holds_each_component_and_a_page(plan: Plan, tmp_path: Path) -> None:
    other = plan.model_copy(update={"timestep_name": "timestep", "timestep_range": (0.5, 1.0)})
    freqopt.Plans({"transformer": plan, "transformer_2": other}).save_pretrained(tmp_path)
    found = freqopt.Plans.from_pretrained(tmp_path)
    assert {n: p.component for n, p in found.items()} == {
        "transformer": "transformer",
        "transformer_2": "transformer_2",
    }
    assert found["transformer_2"].sites == plan.sites
    page = (tmp_path / "README.md").read_text()
    assert "| transformer_2 | Video | 0.1000 |" in page and "0.5 to 1" in page
    assert Plan.from_pretrained(tmp_path, component="transformer").component == "transformer"
    with pytest.raises(PlanError, match="plans for transformer, transformer_2"):
        Plan.from_pretrained(tmp_path)
    files = [tmp_path / f"{name}.plan.json" for name in found]
    shutil.move(files[0], tmp_path / "kept")
    shutil.move(files[1], files[0])
    with pytest.raises(PlanError, match=r"is the plan of transformer_2.*0\.5 to 1.*swapped"):
        freqopt.Plans.from_pretrained(tmp_path)


def test_a_folder_is_what_was_saved_last(
    plan: Plan, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plans = {"transformer": plan, 'the "other": #2': plan}
    Plans(plans).save_pretrained(tmp_path)
    assert set(Plans.from_pretrained(tmp_path)) == set(plans) and not caplog.records
    Plans({"transformer": plan}).save_pretrained(tmp_path)
    left = tmp_path / 'the "other": #2.plan.json'
    assert list(Plans.from_pretrained(tmp_path)) == ["transformer"]
    assert left.is_file() and f"{left.name} left out" in caplog.text
    assert Plan.from_pretrained(tmp_path).component == "transformer"
    page = tmp_path / "README.md"
    text = page.read_text()
    page.write_text(text.replace('- "transformer"\n', '- "transformer"\n- the "other": #2\n'))
    assert set(Plans.from_pretrained(tmp_path)) == set(plans)
    head, _, rest = text.partition("freqopt_components:\n")
    page.write_text(head + rest.partition("\n")[2])  # as of an earlier version
    assert set(Plans.from_pretrained(tmp_path)) == set(plans)
    page.unlink()
    assert set(Plans.from_pretrained(tmp_path)) == set(plans)


def test_a_plan_alone_and_what_is_no_folder(plan: Plan, tmp_path: Path) -> None:
    plan.save_pretrained(tmp_path / "one")
    assert Plan.from_pretrained(tmp_path / "one") == plan
    (tmp_path / "empty").mkdir()
    with pytest.raises(PlanError, match="holds no plans"):
        Plan.from_pretrained(tmp_path / "empty")
    with pytest.raises(PlanError, match="no folder here"):
        Plan.from_pretrained(tmp_path / "absent")


class Hub(types.ModuleType):
    """Stands for huggingface_hub: repositories are folders."""

    def __init__(self, root: Path) -> None:
        super().__init__("huggingface_hub")
        self.root, self.made = root, []

    def HfApi(self) -> Hub:
        return self

    def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        self.made.append((name, private))

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> str:
        shutil.copytree(folder_path, self.root / repo_id)
        return f"https://hub/{repo_id}/commit/1"

    def snapshot_download(self, name: str, *, revision: Any, allow_patterns: list[str]) -> str:
        if not (self.root / name).is_dir():
            raise OSError("404")
        assert allow_patterns == ["*.plan.json", "README.md"]
        return str(self.root / name)


def test_what_cannot_be_a_folder_is_said_and_nothing_is_written(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "in it"):
        with pytest.raises(FileError, match="cannot write"):
            plan.save_pretrained(place)
    assert (tmp_path / "file").read_text() == "mine"
    several = freqopt.Plans({"good": plan, "b/ad": plan})
    with pytest.raises(InputError, match="'b/ad'"):
        several.save_pretrained(tmp_path / "plans")
    assert not list((tmp_path / "plans").glob("*"))


def test_the_hub_is_asked_for_what_is_no_folder(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert plan.push_to_hub("me/plans", private=True) == "https://hub/me/plans/commit/1"
    assert hub.made == [("me/plans", True)]
    assert Plan.from_pretrained("me/plans") == plan
    both = {"transformer": plan, "transformer_2": plan}
    freqopt.Plans(both).push_to_hub("me/both")
    assert set(freqopt.Plans.from_pretrained("me/both")) == set(both)
    with pytest.raises(PlanError, match="cannot be read from the Hugging Face Hub"):
        Plan.from_pretrained("me/absent")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(PlanError, match="pip install huggingface_hub"):
        Plan.from_pretrained("me/plans")


@pytest.fixture(scope="module")
def calibrated() -> Plan:
    inputs = models.inputs()
    samples = [{**inputs, "video": inputs["video"] * (1 + i / 10)} for i in range(4)]
    return freqopt.calibrate(
        models.make(), samples, target_density=0.6, rounds=0, progress=False, order="grid"
    )


def test_a_plan_moves_along_its_curves(calibrated: Plan) -> None:
    error = calibrated.measured_error
    looser, stricter = calibrated.at(target_error=2 * error), calibrated.at(target_error=error / 2)
    assert stricter.predicted and not calibrated.predicted and stricter.verified is None
    assert stricter.measured_error <= error / 2 * 1.0001
    assert looser.measured_error <= 2 * error * 1.0001
    assert looser.mean_density < calibrated.mean_density < stricter.mean_density
    assert "predicted" in str(stricter) and Plan.parse(stricter.text()) == stricter
    model, samples = models.make(), [models.inputs(), models.inputs()]
    known = [plan.verify(model, samples) for plan in (stricter, calibrated, looser)]
    errors = [plan.measured_error for plan in known]
    assert errors == sorted(errors) and errors[0] < errors[2]
    assert not known[0].predicted and known[0].verified is not None
    for plan in known:
        verified = plan.verified
        assert verified is not None and verified.adapters == [] and verified.dtype == "float32"
        assert len(verified.sample_errors) == 2 and "not verified" not in str(plan)
        with freqopt.optimize(models.make(), plan, route="eager") as handle, torch.no_grad():
            out, dense = handle.components["model"].model(**samples[0]), model(**samples[0])
            way = handle.components["model"].way
            seen = way.densities()
        assert set(seen) == {n for n, site in plan.sites.items() if site.decision == "split"}
        for name, density in seen.items():
            share = math.fsum(plan.sites[name].density) / plan.sites[name].heads
            assert math.isclose(density, share, rel_tol=1e-3), "not as measured"
        assert math.isclose(
            float((out - dense).norm() / dense.norm()), plan.measured_error, rel_tol=1e-3
        )


def test_targets_that_no_curve_reaches_are_refused(calibrated: Plan, plan: Plan) -> None:
    with pytest.raises(OptionError, match="4 times off"):
        calibrated.at(target_error=min(10 * calibrated.measured_error, 0.99))
    with pytest.raises(PlanError, match="no curves"):
        plan.at(target_error=0.05)
    with pytest.raises(CalibrationError):
        calibrated.verify(models.make(), [])


@pytest.mark.parametrize("target", ["0.03", None, True])
def test_a_target_that_is_no_number_is_refused(calibrated: Plan, target: Any) -> None:
    with pytest.raises(OptionError, match="must be a number"):
        calibrated.at(target_error=target)


@pytest.mark.parametrize("name", ["../up", "/up", "a/b", "a\\b", "", "a\nb", "a\0b", "\ud800"])
def test_names_of_a_stranger_lead_nowhere(name: str, plan: Plan, tmp_path: Path) -> None:
    """Plans in one file are called what its maker wrote there."""
    both = Plans({name: plan, "b": plan})
    both.save(tmp_path / "in" / "plans.json")
    found = Plans.load(tmp_path / "in" / "plans.json")
    for write in (found.save_pretrained, lambda place: report_each(found, place / "page.html")):
        with pytest.raises(InputError, match="cannot be part of a file's name"):
            write(tmp_path / "in")
    assert [p.name for p in tmp_path.rglob("*")] == ["in", "plans.json"]
