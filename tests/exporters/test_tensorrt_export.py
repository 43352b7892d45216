"""What `export_tensorrt` writes: the file, the plugin's sources, and what it says it cannot do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

onnx = pytest.importorskip("onnx")
onnx_ir = pytest.importorskip("onnx_ir")
pytest.importorskip("onnxscript")
pytest.importorskip("triton")

from freqopt.errors import OptionError
from freqopt.exporters.manifest import Artifact
from freqopt.exporters.onnx.cubins import write_sources
from freqopt.exporters.onnx.export import needed_variants, translate
from freqopt.exporters.onnx.library import SOURCES, compiler
from freqopt.exporters.problems import ArtifactError, NotAvailableError
from freqopt.exporters.program import make_program
from freqopt.exporters.runner import run_artifact
from freqopt.exporters.tensorrt import export as tensorrt_export
from freqopt.exporters.tensorrt.cpp import build_engine
from freqopt.exporters.tensorrt.export import export_tensorrt
from freqopt.exporters.tensorrt.plugin import FOLDER, fit_nodes
from freqopt.models_zoo.video_dit import VideoDiT, VideoDiTConfig
from freqopt.plan.plan import Plan, model_fingerprint

pytestmark = pytest.mark.filterwarnings("ignore")
HERE = Path(__file__).parents[1] / "support"


def small() -> tuple[VideoDiT, tuple[torch.Tensor, ...]]:
    config = VideoDiTConfig(width=64, layers=1, heads=2, mlp_width=64, rope_axes=(8, 12, 12))
    return VideoDiT(config).eval(), (torch.randn(1, 3, 5, 24, 32), torch.rand(1))


def plan_for(model: VideoDiT, chunks: list[int] | None = None) -> Plan:
    site = {
        "chunks": chunks or [],
        "heads": 2,
        "head_dim": 32,
        "tokens": 240,
        "decision": "split",
        "reason": "test",
        "budgets": [{"threshold": [0.4, 0.8]}],
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
            "sites": {"blocks.0.attn": site},
            "evidence": {"samples": 1, "held_out": 1},
        }
    )


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    model, args = small()
    folder = tmp_path_factory.mktemp("tensorrt")
    return export_tensorrt(
        model, args, None, folder, plan=plan_for(model), build="never", capabilities=[90]
    )


def test_nodes_are_what_the_plugin_takes(artifact: Artifact) -> None:
    proto = onnx.load(artifact.model_path)
    assert not proto.functions
    (node,) = (n for n in proto.graph.node if n.domain == "freqopt")
    assert node.op_type == "SplitAttention"
    order = "freqopt.order.5x6x8"
    assert list(node.input[3:]) == ["freqopt.budget.blocks.0.attn", order, order]
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert attributes["text_before"] == attributes["query_text_before"] == 0
    assert attributes["own"] == 1
    assert attributes["scale"] == pytest.approx(32**-0.5)


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plugin, compiled against declarations of our own, in a program that asks it."""
    program = tmp_path_factory.mktemp("plugin") / "plugin"
    write_sources([], program.parent)
    folders = (HERE / "trt_stub", FOLDER, SOURCES, program.parent)
    includes = [f"-I{folder}" for folder in folders]
    launches = [path for path in sorted(SOURCES.glob("*.cc")) if path.name != "library.cc"]
    sources = [HERE / "trt_plugin.cc", *launches]
    command = [compiler(), "-std=c++17", *includes, *sources, "-ldl", "-o", program]
    subprocess.run(list(map(str, command)), check=True)
    return program


def attributes_of(node: Any) -> dict[str, Any]:
    """Numbers among a node's attributes."""
    kinds = (onnx.AttributeProto.FLOAT, onnx.AttributeProto.INT)
    numbers = (a for a in node.attribute if a.type in kinds)
    return {a.name: onnx.helper.get_attribute_value(a) for a in numbers}


def check_plugin(plugin: Path, node: Any, types: str, changed: dict[str, Any]) -> None:
    """A plugin takes a node's attributes and types of inputs and output, and misses none."""
    attributes = attributes_of(node) | changed  # no defaults of either side

    def ask(given: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        words = [f"{type(value).__name__}:{name}={value}" for name, value in given.items()]
        command = [str(plugin), node.op_type, types, *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = ask(attributes)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["name", node.op_type, "1"] in lines and ["creators", "2"] in lines
    fields = [line[1] for line in lines if line[0] == "field"]
    assert set(changed) <= set(fields) <= set(attributes)
    kept = {line[1]: float(line[2]) for line in lines if line[0] == "kept"}
    assert kept == pytest.approx({name: float(attributes[name]) for name in fields})
    assert len(node.input) == len(types) - 1 and lines[-1] == "taken 1 fewer 0 mixed 0".split()
    for name in fields:
        done = ask({n: value for n, value in attributes.items() if n != name})
        assert done.returncode == 3 and f"the attribute {name} is missing" in done.stderr


def test_the_plugin_reads_what_the_nodes_hold(artifact: Artifact, plugin: Path) -> None:
    proto = onnx.load(artifact.model_path)
    (node,) = (n for n in proto.graph.node if n.domain == "freqopt")
    changed = {"density": 0.375, "probes": 17, "text_before": 5, "query_text_before": 6, "own": 3}
    check_plugin(plugin, node, "hhhfllh", changed)


def test_an_order_by_content_is_a_plugin_of_its_own(plugin: Path) -> None:
    model, args = small()
    program = make_program(model, args, plan=plan_for(model, [512, 0]))
    fitted = translate(program, tensorrt_export.OPSET, bodies=False)
    assert fit_nodes(fitted) == []
    proto = onnx_ir.to_proto(fitted)
    order, split = (n for n in proto.graph.node if n.domain == "freqopt")
    assert (order.op_type, split.op_type) == ("ContentOrder", "SplitAttention")
    assert list(order.input[1:]) == ["freqopt.order.5x6x8", "freqopt.chunks.blocks.0.attn"]
    assert list(split.input[4:]) == [order.output[0]] * 2 and order.input[0] == split.input[1]
    held = {i.name: onnx.numpy_helper.to_array(i) for i in proto.graph.initializer}
    chunks = held["freqopt.chunks.blocks.0.attn"]
    assert chunks.tolist() == [512, 0] and chunks.dtype == "int32"
    check_plugin(plugin, order, "hlil", {"text_before": 4, "largest_chunk": 1 << 30})
    assert attributes_of(order) == {"text_before": 0, "largest_chunk": 512}
    assert {variant.content for variant in needed_variants(program, [80, 90])} == {True}


def test_chains_leave_orders_by_content_to_the_plugin(tmp_path: Path) -> None:
    model, args = small()
    plan = plan_for(model, [512, 0])
    made = export_tensorrt(model, args, None, tmp_path, plan=plan, plugin="aot", build="never")
    assert any("ordered by content, which chains" in note for note in made.notes)
    assert "plugin='cpp'" in " ".join(made.notes)


def test_the_folder_is_complete_and_guarded(artifact: Artifact, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(artifact.path, moved)
    assert Artifact.load(moved).sites == artifact.sites
    assert {k["capability"] for k in artifact.manifest["kernels"]} == {90}
    with pytest.raises(NotAvailableError, match=r"without an engine; run `python .*build_engine"):
        run_artifact(moved, {})
    (moved / "plugin" / "split_cuda.cc").write_text("changed")
    with pytest.raises(ArtifactError, match="does not match its hash"):
        run_artifact(moved, {})


def test_plugin_sources_build_where_the_folder_was_moved(
    artifact: Artifact, tmp_path: Path
) -> None:
    """All but the plugin itself, whose headers are NVIDIA's, links with a launch of ours."""
    moved = tmp_path / "plugin"
    shutil.copytree(artifact.path / "plugin", moved)
    (moved / "split_tensorrt.cc").unlink()
    sources = [*(path.name for path in sorted(moved.glob("*.cc"))), "cubins.S"]
    sources.append(str(HERE / "ort_launch.cc"))
    command = [compiler(), "-std=c++17", f"-I{moved}", *sources, "-ldl", "-o", "launch"]
    subprocess.run(command, cwd=moved, check=True)
    assert str(artifact.path) not in (moved / "cubins.S").read_text()


def test_plugin_compiles_against_tensorrt_headers(tmp_path: Path) -> None:
    extra = [p for p in os.environ.get("TENSORRT_INCLUDE", "").split(os.pathsep) if p]
    try:
        includes = build_engine.find_includes(extra)
    except SystemExit as missing:
        pytest.skip(f"{missing}; TENSORRT_INCLUDE names folders")
    command = [compiler(), "-std=c++17", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    command += [part for place in includes for part in ("-isystem", place)]
    command += [f"-I{SOURCES}", str(FOLDER / "split_tensorrt.cc"), "-o", str(tmp_path / "p.so")]
    subprocess.run(command, check=True)


def test_without_tensorrt_it_says_so(
    tmp_path: Path, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_export, "is_installed", lambda: False)
    model, args = small()
    with pytest.raises(NotAvailableError, match="TensorRT is not installed"):
        export_tensorrt(model, args, None, tmp_path, build="always")
    with pytest.raises(OptionError, match="auto, never, always"):
        export_tensorrt(model, args, None, tmp_path, build="maybe")
    assert "as asked" in artifact.notes[-1]
    unplanned = export_tensorrt(model, args, None, tmp_path, capabilities=[90])
    assert "TensorRT is not installed" in unplanned.notes[-1]
    assert (tmp_path / "plugin" / "split_tensorrt.cc").is_file()
    (node,) = (n for n in onnx.load(unplanned.model_path).graph.node if n.domain == "freqopt")
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert attributes["density"] == 0.25
    dense = export_tensorrt(torch.nn.Linear(3, 3), (torch.randn(2, 3),), None, tmp_path / "dense")
    assert not (dense.path / "plugin").exists() and (dense.path / "build_engine.py").is_file()


def test_build_engine_says_what_is_missing(artifact: Artifact, tmp_path: Path) -> None:
    if tensorrt_export.is_installed():
        pytest.skip("TensorRT is installed")
    done = subprocess.run(
        [sys.executable, str(artifact.path / "build_engine.py")], capture_output=True, text=True
    )
    assert done.returncode == 1 and "TensorRT is not installed here" in done.stderr


@pytest.mark.smoke
def test_profiles() -> None:
    assert build_engine.parse_profile("x=1x2:3x4:5x6") == ("x", ((1, 2), (3, 4), (5, 6)))
    assert build_engine.parse_profile("x=7x8")[1] == ((7, 8),) * 3
    for text in ("x=1x2:3", "x", "x=1:2", "=1x2", "x=axb"):
        with pytest.raises(SystemExit, match="MIN:OPT:MAX"):
            build_engine.parse_profile(text)


def test_missing_headers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_engine, "PLACES", ())
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(SystemExit, match="NvInferRuntime.h was not found"):
        build_engine.find_includes()


class Recorder:
    """Answers every TensorRT call with itself, so that the order of a build can be seen."""

    def __init__(self, refuse: str = "") -> None:
        self.refuse, self.calls = refuse, list[str]()

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            if name == self.refuse:
                return None
            return b"engine" if name == "build_serialized_network" else self

        plain = {"num_inputs": 0, "num_errors": 0, "WARNING": 1, "WORKSPACE": 1, "__version__": "0"}
        if name in plain:
            return plain[name]
        if name == "Logger":
            return type("Logger", (int,), {"WARNING": 1})
        if name in ("MemoryPoolType", "NetworkDefinitionCreationFlag"):
            return type(name, (), {"WORKSPACE": 1})
        return call


@pytest.mark.parametrize(
    ("refuse", "said"),
    [
        ("load_library", "could not load"),
        ("parse_from_file", "parser refused"),
        ("build_serialized_network", "no engine"),
    ],
)
def test_build_with_a_made_up_tensorrt(refuse: str, said: str) -> None:
    given = (Path("m"), Path("p"), {}, 1)
    made_up = Recorder()
    assert build_engine.build_engine(made_up, *given) == b"engine"
    assert made_up.calls.index("load_library") < made_up.calls.index("parse_from_file")
    with pytest.raises(SystemExit, match=said):
        build_engine.build_engine(Recorder(refuse), *given)
