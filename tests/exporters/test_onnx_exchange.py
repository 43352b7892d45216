"""Another plan for an exported file: its budgets, its manifest, and plans that do not fit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from attention_cases import relative
from typer.testing import CliRunner

from freqopt.cli.export import export_app
from freqopt.errors import PlanError
from freqopt.exporters.exchange import exchange_plan
from freqopt.exporters.manifest import Artifact, announce
from freqopt.exporters.onnx import export as onnx_export
from freqopt.exporters.onnx.export import write_onnx
from freqopt.exporters.problems import ArtifactError
from freqopt.exporters.program import make_program
from freqopt.exporters.runner import run_artifact
from freqopt.models_zoo.video_dit import VideoDiT, VideoDiTConfig
from freqopt.plan.plan import Plan, model_fingerprint

pytestmark = pytest.mark.filterwarnings("ignore")
SITES = ("blocks.0.attn", "blocks.1.attn")
SPLIT, DENSE = 0.6, None


def small() -> tuple[VideoDiT, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    config = VideoDiTConfig(width=64, layers=2, heads=2, mlp_width=64, rope_axes=(8, 12, 12))
    model = VideoDiT(config).eval()
    for parameter in model.parameters():  # zero gates and heads would hide a wrong attention
        if not parameter.any():
            nn.init.normal_(parameter, std=0.5)
    return model, (torch.randn(1, 3, 5, 24, 32), torch.rand(1))


def plan_for(model: nn.Module, *sites: float | None) -> Plan:
    """A plan by hand: threshold of each site, or None where it stays dense."""
    made = {}
    for name, site in zip(SITES, sites, strict=True):
        budgets = [{"threshold": [site] * 2}] if site else []
        made[name] = {
            "heads": 2,
            "head_dim": 32,
            "tokens": 240,
            "reason": "test",
            "decision": "split" if site else "dense",
            "budgets": budgets,
        }
    return Plan.model_validate(
        {
            "model": {"class_name": "VideoDiT", "fingerprint": model_fingerprint(model)},
            "grids": [(5, 6, 8)],
            "device": "cpu",
            "versions": {"freqopt": "0", "torch": "2"},
            "target_error": 0.05,
            "measured_error": 0.04,
            "worst_error": 0.04,
            "mean_density": 0.3,
            "sites": made,
            "evidence": {"samples": 1, "held_out": 1},
        }
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Weights and budgets lie in the file beside the model, as above 2 GB."""
    model, args = small()
    program = make_program(model, args, plan=plan_for(model, SPLIT, SPLIT))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_export.save_model, "__defaults__", (1000,))
        folder = tmp_path_factory.mktemp("exported")
        return write_onnx(program, folder, plan=plan_for(model, SPLIT, SPLIT), library=False)


@pytest.fixture
def artifact(exported: Artifact, tmp_path: Path) -> Artifact:
    shutil.copytree(exported.path, tmp_path / "copy")
    return Artifact.load(tmp_path / "copy")


def output(artifact: Artifact) -> Tensor:
    inputs = dict(zip(("video", "timestep"), small()[1], strict=True))
    return run_artifact(artifact.path, inputs, provider="cpu", threads=1).outputs["output"]


def test_the_file_does_what_the_new_plan_says(artifact: Artifact) -> None:
    model, args = small()
    new = plan_for(model, 1.2, DENSE)
    before = output(artifact)
    changed = exchange_plan(artifact, new)
    with torch.no_grad():
        expected = make_program(model, args, plan=new).exported.module()(*args)
    assert relative(output(changed), expected) < 1e-5
    assert relative(before, expected) > 1e-4, "the plan must show"
    assert changed.manifest["plan"] != artifact.manifest["plan"]
    assert changed.sites == artifact.sites
    assert changed.notes == [
        "blocks.1.attn is dense in the plan: every pair is attended exactly, by the split's kernel"
    ]
    assert not list(changed.path.glob("*.partial"))
    onnx.checker.check_model(str(changed.model_path))


def test_sites_in_a_wrapper_have_the_plans_names() -> None:
    """By which another plan for the file finds them."""
    model, inputs = small()
    program = make_program(nn.DataParallel(model), inputs, plan=plan_for(model, SPLIT, DENSE))
    assert list(program.split) == [SITES[0]] and SITES[1] in program.dense
    buffers = dict(program.exported.named_buffers())
    assert any(name.endswith(SITES[0]) and "module" not in name for name in buffers)


def test_a_dense_site_of_the_file_stays_dense(tmp_path: Path) -> None:
    model, args = small()
    program = make_program(model, args, plan=plan_for(model, SPLIT, DENSE))
    made = write_onnx(program, tmp_path, plan=plan_for(model, SPLIT, DENSE), library=False)
    changed = exchange_plan(made.path, plan_for(model, SPLIT, SPLIT))
    assert changed.notes == ["the plan splits blocks.1.attn, which is not split here"]


def test_plans_that_do_not_fit(artifact: Artifact) -> None:
    model, _ = small()
    content = artifact.model_path.read_bytes()
    with pytest.raises(PlanError, match="fingerprint"):
        exchange_plan(artifact, plan_for(nn.Linear(3, 3), SPLIT, SPLIT))
    new = plan_for(model, SPLIT, SPLIT)
    unknown = new.model_copy(update={"sites": {SITES[0]: new.sites[SITES[0]]}})
    with pytest.raises(PlanError, match=r"does not know the site 'blocks\.1"):
        exchange_plan(artifact, unknown)
    assert artifact.model_path.read_bytes() == content


def test_files_that_have_no_budgets(artifact: Artifact) -> None:
    new = plan_for(small()[0], SPLIT, SPLIT)
    for change, message in [({"plan": None}, "without a plan"), ({"kind": "tensorrt"}, "TensorRT")]:
        other = Artifact(artifact.path, {**artifact.manifest, **change})
        with pytest.raises(ArtifactError, match=message):
            exchange_plan(other, new)
    artifact.model_path.write_bytes(b"damaged")
    with pytest.raises(ArtifactError, match="does not match its hash"):
        exchange_plan(artifact.path, new)


def test_command(artifact: Artifact, tmp_path: Path) -> None:
    plan_for(small()[0], 1.2, DENSE).save(tmp_path / "plan.json")
    arguments = ["plan", str(artifact.path), "--plan", str(tmp_path / "plan.json")]
    done = CliRunner().invoke(export_app, arguments)
    assert done.exit_code == 0, done.output
    assert "note: blocks.1.attn is dense in the plan" in done.output


@pytest.mark.parametrize("stop", ["announce", "replace", "adopt"])
def test_an_interrupted_exchange_leaves_a_folder_that_runs(
    artifact: Artifact, stop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It used to be refused for ever: the new file lay beside the old hash."""
    before, model = output(artifact), small()[0]
    new = plan_for(model, 1.2, DENSE)

    def interrupted(*given: Any) -> None:
        if stop == "replace":  # announced, and the model not yet in its place
            announce(*given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        where = "adopt" if stop == "adopt" else "announce"
        patch.setattr(f"freqopt.exporters.exchange.{where}", interrupted)
        with pytest.raises(KeyboardInterrupt):
            exchange_plan(artifact, new)
    found = Artifact.load(artifact.path)
    changed = stop == "adopt"
    assert (relative(output(found), before) > 1e-4) == changed
    assert (found.manifest["plan"] != artifact.manifest["plan"]) == changed
    assert exchange_plan(artifact.path, new).notes and not list(artifact.path.glob("*.partial"))
    assert relative(output(Artifact.load(artifact.path)), before) > 1e-4
