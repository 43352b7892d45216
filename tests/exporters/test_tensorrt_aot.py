"""Chains of one-kernel nodes for TensorRT: mathematics, PTX, launches, file and registration.

Nothing here builds an engine. TENSORRT_PYTHON names a Python with NVIDIA's bindings (which the lean
runtime and stubs of the builder suffice to import) for the test of the registration itself.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
triton = pytest.importorskip("triton")

from forks import SUPPORT, forks
from test_tensorrt_export import Recorder, plan_for, small

from freqopt.errors import OptionError
from freqopt.exporters.manifest import Artifact
from freqopt.exporters.onnx.launch_arguments import parameter_sizes
from freqopt.exporters.problems import ArtifactError, ExportError, NotAvailableError
from freqopt.exporters.runner import run_artifact
from freqopt.exporters.tensorrt.aot import aot_plugin
from freqopt.exporters.tensorrt.aot.ptx import PLAIN_SHARED, reorder, strip_debug
from freqopt.exporters.tensorrt.cpp import build_engine
from freqopt.exporters.tensorrt.export import export_tensorrt

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("symbols")]
FREE = torch.export.Dim.AUTO
PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    model, _ = small()
    args = (torch.randn(2, 3, 5, 24, 32), torch.rand(2))
    return export_tensorrt(
        model,
        args,
        None,
        tmp_path_factory.mktemp("aot"),
        plan=plan_for(model),
        build="never",
        plugin="aot",
        dynamic_shapes=({0: FREE}, {0: FREE}),
    )


def nodes_of(artifact: Artifact) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((artifact.path / "aot" / "nodes.json").read_text())
    assert found
    return found


@pytest.mark.parametrize(
    ("case", "dtype", "tiles", "bound"),
    [
        (0, "float32", "fast", 1e-3),
        (2, "float16", "fast", 5e-3),
        (3, "float16", "small", 5e-3),
        (4, "float32", "small", 1e-3),
    ],
)
def test_chain_is_the_split(case: int, dtype: str, tiles: str, bound: float) -> None:
    """With text, grouped heads, odd grids and batch 2; both tilings."""
    done = forks(interpret=not torch.cuda.is_available()).run(
        SUPPORT / "aot_chain_run.py", case, dtype, tiles
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["out"] < bound and found["route"] and found["probe_error"] < 1e-2, found


def test_ptx_takes_inputs_integers_outputs(artifact: Artifact, tmp_path: Path) -> None:
    for node in nodes_of(artifact):
        expected = [8] * node["inputs"] + [4] * len(node["integers"]) + [8] * len(node["outputs"])
        for tactic in node["tactics"]:
            text = (artifact.path / "aot" / tactic["ptx"]).read_text()
            assert parameter_sizes(text) == expected, node["kernel"]
            assert f".entry {tactic['symbol']}(" in text
            assert f".reqntid {32 * tactic['warps']}" in text
            assert not [w for w in (".loc", ".debug", ".file", str(SUPPORT.parent)) if w in text]
            source = artifact.path / "aot" / tactic["ptx"]
            done = subprocess.run(
                [PTXAS, "-arch=sm_80", "-o", tmp_path / "out", source],
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr


def test_every_node_has_a_tactic_that_any_launch_gets(artifact: Artifact) -> None:
    for node in nodes_of(artifact):
        shared = [tactic["shared"] for tactic in node["tactics"]]
        assert min(shared) <= PLAIN_SHARED
        assert len(shared) == 1 or shared[0] > PLAIN_SHARED >= shared[1]


ATTEND = """
import json, sys
from pathlib import Path
from freqopt.exporters.tensorrt.aot.chain import Call, chain
from freqopt.exporters.tensorrt.aot import aot_plugin
from freqopt.exporters.tensorrt.aot.ptx import node_of
from freqopt.kernels.specialise import specialisations
from freqopt.kernels.variant import Variant
call = Call(2, 2, 315, 128, 315, 0, 0.0, 64)
about = Variant(90, "float16", 128, False)
(step,) = (s for s in chain(call) if s.kernel == "attend")
(given,) = (s for s in specialisations(about) if s.name == "attend")
print(json.dumps(node_of(step, call, about, 0.1, given, Path(sys.argv[1]))["tactics"]))
"""


def test_wide_heads_get_a_small_tactic_beside_the_fast_one(tmp_path: Path) -> None:
    script = tmp_path / "attend.py"
    script.write_text(ATTEND)
    done = forks(interpret=False).run(script, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    fast, less = json.loads(done.stdout)
    assert fast["shared"] > PLAIN_SHARED >= less["shared"]
    assert fast["grid"][0] == less["grid"][0] == [5, 0], "the same tiles, in fewer stages"


SIGNATURE = """
//
.version 8.7
.target sm_90a, debug
.visible .entry k(
	.param .u64 .ptr .global .align 1 k_param_0,
	.param .u32 k_param_1,
	.param .u64 .ptr .global .align 1 k_param_2,
	.param .u64 .ptr .global .align 1 k_param_3,
	.param .u64 .ptr .global .align 1 k_param_4
)
{
	.loc	1 2 3
	ld.param.u64 %rd1, [k_param_0];
	ld.param.u64 %rd2, [k_param_2];
}
	.file	1 "/somewhere/kernel.py"
	.section	.debug_abbrev
	{
	}
"""


def test_reordering_refuses_what_nobody_passes() -> None:
    arguments = ("out", "count", "x")
    wanted = [("u64", None), ("u64", "x"), ("u32", "count"), ("u64", "out")]
    text = reorder(SIGNATURE, arguments, wanted)
    names = [line.split()[-1].strip(",") for line in text.splitlines() if ".param ." in line]
    assert names == ["unread_0", "k_param_2", "k_param_1", "k_param_0"]
    assert "somewhere" not in strip_debug(SIGNATURE) and ", debug" not in strip_debug(SIGNATURE)
    with pytest.raises(RuntimeError, match="reads x, which nobody passes"):
        reorder(SIGNATURE, arguments, wanted[2:])
    with pytest.raises(RuntimeError, match="count is compiled as u32 and passed as u64"):
        reorder(SIGNATURE, arguments, [("u64", "x"), ("u64", "count"), ("u64", "out")])
    with pytest.raises(RuntimeError, match="reads scratch"):
        reorder(SIGNATURE.replace("[k_param_2]", "[k_param_3]"), arguments, wanted)
    with pytest.raises(RuntimeError, match="parameters for"):
        reorder(SIGNATURE, (*arguments, "more"), wanted)


class Extent:
    """A symbolic extent as TensorRT has them: no reflected operators."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __mul__(self, other: int) -> Extent:
        return Extent(self.value * other)


class Described:
    """Of TensorDesc, what the module uses; memory: whose memory an aliased one is."""

    def __init__(self, shape: tuple[Any, ...], kind: str, memory: Any = None) -> None:
        self.shape_expr, self.kind, self.memory = shape, kind, memory

    def aliased(self) -> Described:
        return Described(self.shape_expr, self.kind, self)


class Plugins:
    """tensorrt.plugin made up: keeps what is registered."""

    TensorDesc, KernelLaunchParams = Described, SimpleNamespace
    AutoTuneCombination = staticmethod(lambda *given: given)
    SymIntExprs = staticmethod(lambda length: [None] * length)
    SymInt32 = staticmethod(lambda value: ("int32", value))
    from_shape_expr = staticmethod(Described)

    def __init__(self) -> None:
        self.register, self.aot_impl, self.autotune = (self._keep(d) for d in ({}, {}, {}))

    @staticmethod
    def _keep(found: dict[str, Any]) -> Any:
        def named(name: str) -> Any:
            return lambda function: found.setdefault(name, function)

        named.found = found  # type: ignore[attr-defined]
        return named


TENSORRT = SimpleNamespace(
    float32="fp32", float16="fp16", bfloat16="bf16", int64="i64", int32="i32", int8="i8"
)


def test_launch_parameters_and_network(artifact: Artifact) -> None:
    """The file's nodes, walked as a network at batch 3: types, shapes, memory, grids."""
    plugins = Plugins()
    names = aot_plugin.register(artifact.path / "aot", plugins, TENSORRT)
    table = {node["name"]: node for node in nodes_of(artifact)}
    graph = onnx.load(artifact.model_path).graph
    chain = [node for node in graph.node if node.domain == "freqopt"]
    assert [node.op_type for node in chain] == names
    assert [node.op_type.rsplit("_", 1)[0] for node in chain] == [
        "summarise",
        "total",
        "centre",
        "first",
        "h_bar",
        "pool_tiles",
        "disperse",
        "score",
        "limits",
        "route",
        "probe",
        "merge",
        "estimate",
        "fit",
        "ridge",
        "attend",
    ]
    batch, heads, tokens, dim = 3, 2, 240, 32
    tensors: dict[str, Described] = {}
    for node in chain:
        row = table[node.op_type]
        assert len(node.input) == row["inputs"] and len(node.output) == len(row["outputs"])
        values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert values == {"plugin_namespace": b"freqopt", "plugin_version": b"1"}
        given = [
            tensors.get(name) or Described((Extent(batch), heads, tokens, dim), kind)
            for name, kind in zip(node.input, row["input_types"], strict=True)
        ]
        assert [d.kind for d in given] == row["input_types"]
        made = plugins.register.found[f"freqopt::{node.op_type}"](*given)
        tensors.update(zip(node.output, made, strict=True))
        implement = plugins.aot_impl.found[f"freqopt::{node.op_type}"]
        symbol, ptx, launch, integers = implement(*given, made, 0)
        tactic = row["tactics"][0]
        assert f".entry {symbol}(" in ptx and launch.block_x == 32 * tactic["warps"]
        assert launch.shared_mem == tactic["shared"]
        assert list(integers) == [("int32", value) for value in row["integers"]]
        grid = [getattr(launch, f"grid_{a}") for a in "xyz"[: len(tactic["grid"])]]
        plain = [g.value if isinstance(g, Extent) else g for g in grid]
        assert plain == [n * (batch if batched else 1) for n, batched in tactic["grid"]]
    rewritten = {n.op_type.split("_")[0] for n in chain for t in n.output if tensors[t].memory}
    assert rewritten == {"centre", "score", "route", "merge", "fit"}
    assert tensors[chain[-1].output[0]].shape_expr[1:] == (heads, tokens, dim)


def test_tactics_are_offered(artifact: Artifact, tmp_path: Path) -> None:
    """A node with two tactics: autotune names both, and the number chosen picks the PTX."""
    folder = tmp_path / "aot"
    shutil.copytree(artifact.path / "aot", folder)
    (node,) = (n for n in nodes_of(artifact) if n["kernel"] == "h_bar")
    (first,) = node["tactics"]
    node["tactics"] = [first, {**first, "symbol": "other", "warps": 1}]
    (folder / "nodes.json").write_text(json.dumps([node]))
    plugins = Plugins()
    aot_plugin.register(folder, plugins, TENSORRT)
    name = f"freqopt::{node['name']}"
    given = (Described((Extent(1), 2), "fp32"),)
    assert plugins.autotune.found[name](*given, ()) == [("FP32, FP32", "LINEAR", [1, 2])]
    chosen = [plugins.aot_impl.found[name](*given, (), tactic)[0] for tactic in (0, 1, 2)]
    assert chosen == [first["symbol"], first["symbol"], "other"]


def test_build_with_a_made_up_tensorrt(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up = Recorder()
    made_up.PreviewFeature = SimpleNamespace(ALIASED_PLUGIN_IO_10_03=1)
    flags = SimpleNamespace(PREFER_AOT_PYTHON_PLUGINS=1)
    made_up.NetworkDefinitionCreationFlag = flags
    given = (Path("m"), None, {}, 1)
    assert build_engine.build_engine(made_up, *given, ahead_of_time=True) == b"engine"
    assert "set_preview_feature" in made_up.calls and "load_library" not in made_up.calls
    assert not build_engine.register_nodes(artifact.path / "absent")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.delitem(sys.modules, "aot_plugin", raising=False)
    with pytest.raises(SystemExit, match=r"no usable tensorrt\.plugin"):
        build_engine.register_nodes(artifact.path / "aot")


def test_artifact_is_complete_and_guarded(artifact: Artifact, tmp_path: Path) -> None:
    assert not (artifact.path / "plugin").exists()
    kernels = artifact.manifest["kernels"]
    assert {k["capability"] for k in kernels} == {80} and "attend" in {k["kernel"] for k in kernels}
    moved = tmp_path / "moved"
    shutil.copytree(artifact.path, moved)
    with pytest.raises(NotAvailableError, match="without an engine"):
        run_artifact(moved, {})
    (moved / "aot" / "nodes.json").write_text("[]")
    with pytest.raises(ArtifactError, match="does not match its hash"):
        run_artifact(moved, {})


def test_what_chains_cannot_serve(tmp_path: Path) -> None:
    model, args = small()
    with pytest.raises(OptionError, match="cpp, aot"):
        export_tensorrt(model, args, None, tmp_path, plugin="python")
    with pytest.raises(ExportError, match="one PTX; name one"):
        export_tensorrt(model, args, None, tmp_path, plugin="aot", capabilities=[80, 90])
    made = export_tensorrt(model, args, None, tmp_path, plugin="aot", probes=0, build="never")
    assert any("no probes" in note for note in made.notes)


REGISTER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import tensorrt, aot_plugin
names = aot_plugin.register(Path(sys.argv[1]))
found = {c.name for c in tensorrt.get_plugin_registry().all_creators
         if c.plugin_namespace == "freqopt"}
assert set(names) == found, (names, found)
print(len(names), "registered with", tensorrt.__version__)
"""


def test_real_bindings_register_every_node(artifact: Artifact) -> None:
    python = os.environ.get("TENSORRT_PYTHON")
    if python is None:
        pytest.skip("TENSORRT_PYTHON names no Python with TensorRT's bindings")
    done = subprocess.run(
        [python, "-c", REGISTER, str(artifact.path / "aot")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{len(nodes_of(artifact))} registered with" in done.stdout
