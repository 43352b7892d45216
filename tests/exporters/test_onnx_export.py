"""Exported models: onnxruntime equals torch, files say what they are, and bad input is refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from attention_cases import relative
from safetensors.torch import save_file
from typer.testing import CliRunner

from freqopt.cli.export import export_app, run_command_app
from freqopt.errors import InputError, OptionError, PlanError
from freqopt.exporters import runner
from freqopt.exporters.manifest import Artifact
from freqopt.exporters.onnx import export as onnx_export
from freqopt.exporters.onnx import library as ort_library
from freqopt.exporters.onnx.export import export_onnx, write_onnx
from freqopt.exporters.problems import ArtifactError, ExportError, NotAvailableError
from freqopt.exporters.program import Program, make_program
from freqopt.exporters.runner import run_artifact
from freqopt.models_zoo.video_dit import VideoDiT, VideoDiTConfig
from freqopt.plan.plan import Plan, model_fingerprint

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("symbols")]
FREE = torch.export.Dim.AUTO
DYNAMIC = ({0: FREE, 2: FREE, 3: FREE, 4: FREE}, {0: FREE})


def small_dit(dtype: torch.dtype = torch.float32, layers: int = 2) -> VideoDiT:
    torch.manual_seed(0)
    config = VideoDiTConfig(width=64, layers=layers, heads=2, mlp_width=64, rope_axes=(8, 12, 12))
    model = VideoDiT(config).eval()
    for parameter in model.parameters():  # zero gates and heads would hide a wrong attention
        if not parameter.any():
            nn.init.normal_(parameter, std=0.5)
    return model.to(dtype)


def call(frames: int, height: int, width: int, batch: int = 1, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    video = torch.randn(batch, 3, frames, height, width, generator=generator)
    return video, torch.rand(batch, generator=generator)


def inputs(args: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return dict(zip(("video", "timestep"), args, strict=True))


def plan_for(model: nn.Module, **sites: float) -> Plan:
    """A plan by hand: threshold of each split site (dots written as __)."""
    budgets = {
        name.replace("__", "."): {
            "heads": 2,
            "head_dim": 32,
            "tokens": 240,
            "decision": "split",
            "reason": "test",
            "budgets": [{"threshold": [value, 2 * value]}],
        }
        for name, value in sites.items()
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
            "sites": budgets,
            "evidence": {"samples": 1, "held_out": 1},
        }
    )


@pytest.fixture(scope="module", autouse=True)
def _translated_once() -> Iterator[None]:
    """Most tests write one program in many ways, and translating it is most of the time."""
    translate, made = onnx_export.translate, dict[tuple[int, int, bool], Any]()
    programs: list[Program] = []  # kept, as they are told apart by id

    def once(program: Program, opset: int, *, bodies: bool) -> Any:
        key = (id(program), opset, bodies)
        if key not in made:
            programs.append(program)
            made[key] = translate(program, opset, bodies=bodies)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_export, "translate", once)
        yield


@pytest.fixture(scope="module")
def dynamic() -> Program:
    return make_program(small_dit(), call(5, 24, 32, batch=2), dynamic_shapes=DYNAMIC)


@pytest.fixture(scope="module")
def artifact(dynamic: Program, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return write_onnx(dynamic, tmp_path_factory.mktemp("dynamic"))


def test_one_file_at_two_token_counts(dynamic: Program, artifact: Artifact) -> None:
    assert list(artifact.sites) == ["blocks.0.attn", "blocks.1.attn"]
    reference = dynamic.exported.module()
    for args in (call(5, 24, 32, batch=2), call(4, 36, 40, seed=1)):
        result = run_artifact(artifact, inputs(args), provider="cpu", threads=1)
        with torch.no_grad():
            expected = reference(*args)
        assert relative(result.outputs["output"], expected) < 1e-5
        assert relative(small_dit()(*args).detach(), expected) > 1e-4, "the split must show"
        assert result.split == "function body"
        assert "SplitAttention" not in result.nodes["CPUExecutionProvider"]


@pytest.mark.parametrize("opset", [18, 20, 23])
def test_opsets(dynamic: Program, tmp_path: Path, opset: int) -> None:
    made = write_onnx(dynamic, tmp_path, opset=opset, library=False)
    model = onnx.load(made.model_path)
    assert {i.version for i in model.opset_import if i.domain == ""} == {opset}
    onnx.checker.check_model(model, full_check=True)
    args = call(5, 24, 32, batch=2)
    found = run_artifact(made, inputs(args), threads=1).outputs["output"]
    with torch.no_grad():
        assert relative(found, dynamic.exported.module()(*args)) < 1e-5


def test_half_precision(tmp_path: Path) -> None:
    example = tuple(x.half() for x in call(5, 24, 32, batch=2))
    program = make_program(small_dit(torch.float16, layers=1), example, dynamic_shapes=DYNAMIC)
    made = write_onnx(program, tmp_path)
    for args in (example, tuple(x.half() for x in call(4, 36, 40, seed=1))):
        with torch.no_grad():
            expected = program.exported.module()(*args)
        found = run_artifact(made, inputs(args), provider="cpu", threads=1).outputs["output"]
        assert found.dtype == torch.float16
        assert relative(found, expected) < 1e-2


def test_plan_is_baked_in_and_can_be_exchanged(tmp_path: Path) -> None:
    model, args = small_dit(), call(5, 24, 32)
    plan = plan_for(model, blocks__1__attn=0.4)
    program = make_program(model, args, plan=plan)
    made = write_onnx(program, tmp_path, plan=plan, library=False)
    assert list(made.sites) == ["blocks.1.attn"]
    assert "no budget for it" in made.dense_sites["blocks.0.attn"]
    assert made.manifest["plan"]["model_fingerprint"] == model_fingerprint(model)
    assert made.manifest["plan"]["measured_error"] == 0.04
    with torch.no_grad():
        expected, dense = program.exported.module()(*args), model(*args)
    found = run_artifact(made, inputs(args), threads=1).outputs["output"]
    assert relative(found, expected) < 1e-5
    assert relative(expected, dense) > 1e-5

    proto = onnx.load(made.model_path)
    (budget,) = (i for i in proto.graph.initializer if i.name.startswith("freqopt.budget."))
    assert budget.name == "freqopt.budget.blocks.1.attn"
    zeros = onnx.numpy_helper.from_array(0 * onnx.numpy_helper.to_array(budget), budget.name)
    budget.CopyFrom(zeros)
    onnx.save(proto, tmp_path / "exact.onnx")
    exact = onnxruntime.InferenceSession(tmp_path / "exact.onnx")
    out = exact.run(None, {k: v.numpy() for k, v in inputs(args).items()})[0]
    assert relative(torch.from_numpy(out), dense) < 1e-5


def test_gpu_kernels_are_embedded_on_request(tmp_path: Path) -> None:
    model, args = small_dit(), call(3, 24, 32)  # kernels that test_tensorrt_export compiles too
    plan = plan_for(model, blocks__0__attn=0.4, blocks__1__attn=0.6)
    program = make_program(model, args, plan=plan)
    made = write_onnx(program, tmp_path, plan=plan, capabilities=[90])
    kernels = made.manifest["kernels"]
    assert {k["kernel"] for k in kernels} >= {"summarise", "route", "fit", "attend"}
    assert {(k["capability"], k["dtype"], k["head_dim"]) for k in kernels} == {(90, "float32", 32)}
    with torch.no_grad():
        expected = program.exported.module()(*args)
    found = run_artifact(made, inputs(args), provider="cpu", threads=1)
    assert found.split == "function body" and relative(found.outputs["output"], expected) < 1e-5
    with pytest.raises(ExportError, match="capability 75"):
        write_onnx(program, tmp_path, plan=plan, capabilities=[75])


def test_files_name_no_sources(artifact: Artifact) -> None:
    raw = artifact.model_path.read_bytes()
    for trace in (
        str(Path(__file__).parents[2]),
        "site-packages",
        "video_dit.py",
        "stack_trace",
    ):
        assert trace.encode() not in raw, trace


def test_external_data(dynamic: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_export.save_model, "__defaults__", (1000,))
    made = write_onnx(dynamic, tmp_path, library=False)
    assert set(made.manifest["files"]) == {"model.onnx", "model.onnx.data"}
    args = call(3, 24, 32)
    found = run_artifact(made, inputs(args), threads=1).outputs["output"]
    with torch.no_grad():
        assert relative(found, dynamic.exported.module()(*args)) < 1e-5
    (tmp_path / "model.onnx.data").unlink()
    with pytest.raises(ArtifactError, match="missing"):
        run_artifact(made.path, inputs(args))


@pytest.mark.slow
def test_more_than_two_gigabytes(tmp_path: Path) -> None:
    """What protobuf cannot hold goes beside the file, at the size that decides by itself."""
    width = 23_500
    model = nn.Linear(width, width, bias=False)
    assert model.weight.nbytes > 2**31
    args = (torch.randn(1, width),)
    made = export_onnx(model, args, None, tmp_path)
    assert set(made.manifest["files"]) == {"model.onnx", "model.onnx.data"}
    assert (tmp_path / "model.onnx.data").stat().st_size > 2**31
    assert made.model_path.stat().st_size < 2**20
    (name,) = (i["name"] for i in made.manifest["inputs"])
    found = run_artifact(made, {name: args[0]}, threads=1).outputs["output"]
    with torch.no_grad():
        assert relative(found, model(*args)) < 1e-5


def test_tampered_files(dynamic: Program, tmp_path: Path) -> None:
    made = write_onnx(dynamic, tmp_path)
    assert Artifact.load(tmp_path).sites == made.sites
    good = made.model_path.read_bytes()
    made.model_path.write_bytes(good + b"\0")
    with pytest.raises(ArtifactError, match="does not match its hash"):
        Artifact.load(tmp_path)
    made.model_path.write_bytes(good)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    for change, message in [
        ({"version": 99}, "version 99"),
        ({"format": "x"}, "not the manifest"),
        ({"split_version": 99}, "split_version"),
        ({"files": {"../model.onnx": {}, "model.onnx": {}}}, "no name of a file inside the folder"),
        ({"model": "other.onnx"}, "other.onnx is not among the files"),
    ]:
        (tmp_path / "manifest.json").write_text(json.dumps({**manifest, **change}))
        with pytest.raises(ArtifactError, match=message):
            Artifact.load(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ArtifactError, match="not complete JSON"):
        Artifact.load(tmp_path)
    with pytest.raises(ArtifactError, match="not an exported folder"):
        Artifact.load(tmp_path / "nowhere")


def test_runner_refuses(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    video, timestep = call(3, 24, 32)
    with pytest.raises(InputError, match="the model takes video"):
        run_artifact(artifact, {"video": video})
    with pytest.raises(InputError, match="float64"):
        run_artifact(artifact, {"video": video.double(), "timestep": timestep})
    with pytest.raises(InputError, match="timestep"):
        run_artifact(artifact, {"video": video, "timestep": timestep[None]})
    with pytest.raises(OptionError, match="unknown"):
        run_artifact(artifact, inputs((video, timestep)), provider="tpu")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(NotAvailableError, match="onnxruntime-gpu"):
            run_artifact(artifact, inputs((video, timestep)), provider="cuda")
        # A build that lists CUDA but cannot load it falls back in silence; the runner must not.
        listed = ["CUDAExecutionProvider", "CPUExecutionProvider"]
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: listed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(NotAvailableError, match="CUDAExecutionProvider"):
                run_artifact(artifact, inputs((video, timestep)))
    monkeypatch.setattr(onnxruntime, "__version__", "1.14.1")
    with pytest.raises(NotAvailableError, match="too old"):
        run_artifact(artifact, inputs((video, timestep)), provider="cpu")


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if bool(x.sum() > 0) else x - 1


def test_models_that_cannot_be_exported(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="depends on the data"):
        export_onnx(Branching(), (torch.randn(3),), None, tmp_path)
    with pytest.raises(ExportError, match="example call"):
        export_onnx(small_dit(), (torch.randn(3),), None, tmp_path)
    for opset in (17, 24):
        with pytest.raises(ExportError, match=f"opset {opset} is not supported; 18 to 23"):
            export_onnx(Branching(), (torch.randn(3),), None, tmp_path, opset=opset)
    (tmp_path / "file").touch()
    with pytest.raises(OptionError, match="is a file"):
        export_onnx(Branching(), (torch.randn(3),), None, tmp_path / "file")
    with pytest.raises(OptionError, match=r"torch\.nn\.Module"):
        export_onnx(lambda x: x, (torch.randn(3),), None, tmp_path)  # type: ignore[arg-type]
    other = plan_for(nn.Linear(3, 3), blocks__0__attn=0.4)
    with pytest.raises(PlanError, match="another depth"):
        export_onnx(small_dit(), call(3, 24, 32), None, tmp_path, plan=other)


def test_a_model_without_sites_and_without_a_compiler(
    tmp_path: Path, dynamic: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = export_onnx(nn.Linear(3, 3), (torch.randn(2, 3),), None, tmp_path / "linear")
    assert not made.sites and "no site was split" in made.notes[0] and made.library_path is None

    def missing() -> str:
        raise NotAvailableError("no C++ compiler was found")

    monkeypatch.setattr(ort_library, "compiler", missing)
    (tmp_path / "plain").mkdir()
    monkeypatch.setattr(onnx_export, "local_capabilities", lambda: ())
    made = write_onnx(dynamic, tmp_path / "plain")
    assert made.library_path is None and "no GPU is here" in made.notes[-1]
    monkeypatch.setattr(onnx_export, "local_capabilities", lambda: (80,))
    monkeypatch.setattr(onnx_export, "needed_variants", lambda *given: [])
    made = write_onnx(dynamic, tmp_path / "plain")
    assert made.library_path is None and "no C++ compiler" in made.notes[-1]
    assert "no C++ compiler" in str(made)


def test_commands(artifact: Artifact, tmp_path: Path) -> None:
    save_file(inputs(call(3, 24, 32)), tmp_path / "in.safetensors")
    arguments = [str(artifact.path), "--inputs", str(tmp_path / "in.safetensors")]
    arguments += ["--outputs", str(tmp_path / "out.safetensors"), "--provider", "cpu"]
    done = CliRunner().invoke(run_command_app, arguments)
    assert done.exit_code == 0, done.output
    assert "split sites by function body" in done.output
    assert (tmp_path / "out.safetensors").is_file()
    maker = tmp_path / "maker.py"
    maker.write_text("import torch\nmake = torch.nn.Linear(3, 3)\n")
    save_file({"0/input": torch.randn(2, 3)}, tmp_path / "samples.safetensors")
    arguments = ["onnx", f"{maker}:make", str(tmp_path / "out")]
    arguments += ["--samples", str(tmp_path / "samples.safetensors")]
    done = CliRunner().invoke(export_app, [*arguments, "--dynamic", "input:0"])
    assert done.exit_code == 0, done.output
    assert "no site was split" in done.output
    done = CliRunner().invoke(export_app, [*arguments, "--dynamic", "nothing:0"])
    assert isinstance(done.exception, OptionError)


def test_capabilities_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []
    monkeypatch.setattr(onnx_export, "export_onnx", lambda *a, **k: seen.append(k["capabilities"]))
    (tmp_path / "maker.py").write_text("import torch\nmake = torch.nn.Linear(3, 3)\n")
    save_file({"0/input": torch.randn(2, 3)}, tmp_path / "samples.safetensors")
    arguments = ["onnx", f"{tmp_path / 'maker.py'}:make", str(tmp_path / "out")]
    arguments += ["--samples", str(tmp_path / "samples.safetensors")]
    for more in ([], ["--capability", "80", "--capability", "90"]):
        done = CliRunner().invoke(export_app, [*arguments, *more])
        assert done.exit_code == 0, done.output
    assert seen == [None, [80, 90]]


def test_runner_tells_which_kernel_attended() -> None:
    result = runner.RunResult({}, "CUDAExecutionProvider", {}, "library", 0.5, {"attend_hopper": 2})
    assert "2 attended by attend_hopper" in str(result)


def test_runner_module_is_lazy() -> None:
    """Reading an artifact must not need onnxruntime."""
    assert not any(name.startswith("onnxruntime") for name in vars(runner))
