"""libfreqopt_ort.so on the CPU: right, preferred to the function body, and honest about errors."""

from __future__ import annotations

import ctypes
import json
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

import numpy as np
from attention_cases import CASES, Case, budget_for, make_tensors, relative
from onnx import TensorProto, helper
from onnx_cases import feed, session, split_model

import freqopt.kernels.op  # noqa: F401
from freqopt.exporters import ort_library
from freqopt.exporters.ort_library import FLAGS, SOURCES, build_library, check_library
from freqopt.exporters.problems import ArtifactError, NotAvailableError
from freqopt.exporters.runner import _to_tensor

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_library(tmp_path_factory.mktemp("library")))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_library_is_the_op(case: Case, dtype: torch.dtype, library: str) -> None:
    tensors = make_tensors(case)
    budget = budget_for(case, tensors, 0.3)
    query, key, value = (x.to(dtype) for x in tensors[:3])
    scale = case.dim**-0.5
    model = split_model(20, dtype, scale=scale, density=0.0, mid_band=int(case.mid), probes=64)
    found = session(model, library).run(None, feed(case, (query, key, value, tensors[3]), budget))
    out = torch.ops.freqopt.split_attention(
        query, key, value, budget, tensors[3], list(case.grid), case.before, case.after,
        scale, 0.0, case.mid, 64,
    )[0]  # fmt: skip
    assert relative(torch.from_numpy(found[0]), out) < TOLERANCE[dtype]


@pytest.mark.parametrize("with_library", [True, False], ids=["library", "body"])
def test_bfloat16(with_library: bool, library: str) -> None:
    case = CASES[1]
    tensors = make_tensors(case)
    budget = budget_for(case, tensors, 0.3)
    halves = {
        name: x.bfloat16() for name, x in zip(("query", "key", "value"), tensors[:3], strict=True)
    }
    model = split_model(20, torch.bfloat16, scale=0.2, density=0.0, mid_band=0, probes=64)
    runner = session(model, library if with_library else None)
    value = onnxruntime.OrtValue
    inputs = {k: value.ortvalue_from_numpy(v) for k, v in feed(case, tensors, budget).items()}
    for name, x in halves.items():
        raw = x.contiguous().view(torch.uint16).numpy()
        inputs[name] = value.ortvalue_from_numpy_with_onnx_type(raw, TensorProto.BFLOAT16)
    found = _to_tensor(runner.run_with_ort_values(None, inputs)[0])
    out = torch.ops.freqopt.split_attention(
        *halves.values(), budget, tensors[3], list(case.grid), case.before, case.after, 0.2, 0.0,
        False, 64,
    )[0]  # fmt: skip
    assert found.dtype == torch.bfloat16
    assert relative(found, out) < 1e-2


@pytest.mark.parametrize(("density", "mid", "probes"), [(0.25, True, 0), (0.1, False, 16)])
@pytest.mark.smoke
def test_library_attributes(density: float, mid: bool, probes: int, library: str) -> None:
    case = Case((4, 8, 9), after=4)
    tensors = make_tensors(case)
    budget = torch.zeros(2, case.heads)
    model = split_model(
        20, torch.float32, scale=0.2, density=density, mid_band=int(mid), probes=probes
    )
    found = session(model, library).run(None, feed(case, tensors, budget))
    out = torch.ops.freqopt.split_attention(
        *tensors[:3], budget, None, list(case.grid), 0, case.after, 0.2, density, mid, probes
    )[0]
    assert relative(torch.from_numpy(found[0]), out) < 1e-5


def test_library_wins_over_the_body(library: str, tmp_path: Path) -> None:
    case = Case((3, 6, 10), batch=1)
    model = split_model(20, torch.float32, scale=0.2, density=0.5, mid_band=0, probes=8)
    for name, operators in ((library, {"SplitAttention"}), (None, set())):
        options = onnxruntime.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(tmp_path / "profile")
        if name:
            options.register_custom_ops_library(name)
        runner = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        runner.run(None, feed(case, make_tensors(case), torch.zeros(2, 2)))
        events = json.loads(Path(runner.end_profiling()).read_text())
        ran = {event.get("args", {}).get("op_name") for event in events}
        assert ran & {"SplitAttention"} == operators
        assert ("Scan" in ran) == (name is None)


def test_failures_are_statuses(library: str) -> None:
    case = Case((3, 6, 10), batch=1)
    model = split_model(20, torch.float32, scale=0.2, density=0.5, mid_band=0, probes=8)
    runner = session(model, library)
    good = feed(case, make_tensors(case), torch.zeros(2, 2))
    for name, bad, message in [
        ("text_before", np.array([5]), "do not fit a sequence"),
        ("budget", np.zeros((2, 3), np.float32), "budget is"),
        ("key", np.zeros((1, 2, 7, 32), np.float32), "one self-attention"),
        ("key_mask", np.ones((1, 7), np.bool_), "does not broadcast"),
    ]:
        with pytest.raises(Exception, match=message):
            runner.run(None, {**good, name: bad})
    runner.run(None, good)


def test_abi_slots(tmp_path: Path) -> None:
    target = tmp_path / "slots.so"
    source = Path(__file__).parent / "ort_slots.cc"
    command = [ort_library.compiler(), *FLAGS, f"-I{SOURCES}", str(source), "-o", str(target)]
    subprocess.run(command, check=True)
    graph = helper.make_graph(
        [helper.make_node("Slots", ["x"], ["y"], domain="freqopt.test")],
        "slots",
        [helper.make_tensor_value_info("x", TensorProto.INT64, [None])],
        [helper.make_tensor_value_info("y", TensorProto.INT64, [None])],
    )
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("freqopt.test", 1)]
    runner = session(helper.make_model(graph, opset_imports=imports, ir_version=10), str(target))
    assert runner.run(None, {"x": np.array([1, 2])})[0].tolist() == [193]


def test_an_old_onnxruntime_is_told_so(library: str) -> None:
    """RegisterCustomOps meets a runtime that only knows versions before ours."""
    base_type = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
    status_type = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
    messages: list[bytes] = []

    def create_status(code: int, message: bytes) -> int:
        messages.append(message)
        return 1

    create = status_type(create_status)
    table = (ctypes.c_void_p * 1)(ctypes.cast(create, ctypes.c_void_p))
    get_api = base_type(lambda version: ctypes.addressof(table) if version < 17 else None)
    version = ctypes.CFUNCTYPE(ctypes.c_void_p)(
        lambda: ctypes.cast(ctypes.c_char_p(b"1.9.0"), ctypes.c_void_p).value
    )
    base = (ctypes.c_void_p * 2)(
        ctypes.cast(get_api, ctypes.c_void_p), ctypes.cast(version, ctypes.c_void_p)
    )
    register = ctypes.CDLL(library).RegisterCustomOps
    register.restype = ctypes.c_void_p
    assert register(None, ctypes.byref(base)) == 1
    assert b"needs onnxruntime 1.17" in messages[0] and b"1.9.0" in messages[0]


def newest(*libraries: Path) -> dict[str, tuple[int, ...]]:
    """The newest version of each system library that the files ask for, by objdump."""
    found: dict[str, tuple[int, ...]] = {}
    for path in libraries:
        listing = subprocess.run(
            ["objdump", "-T", str(path)], capture_output=True, text=True, check=True
        ).stdout
        for name, version in re.findall(r"\b(GLIBC|GLIBCXX|CXXABI|GCC)_([0-9.]+)\b", listing):
            found[name] = max(found.get(name, ()), tuple(map(int, version.split("."))))
    return found


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not shutil.which("objdump"), reason="needs x86_64 and objdump"
)
def test_library_loads_wherever_onnxruntime_does(tmp_path: Path) -> None:
    """Built with the GPU side, it asks for no newer system than onnxruntime's wheel itself."""
    empty = tmp_path / "cubins.cc"
    empty.write_text(
        '#include "split_cuda.h"\nnamespace freqopt {\n'
        "const Cubin kCubins[] = {{}};\nconst int kCubinCount = 0;\n}\n"
    )
    ours = newest(build_library(tmp_path, extra_sources=(empty,), defines=("FREQOPT_CUDA",)))
    theirs = newest(*Path(onnxruntime.__file__).parent.glob("capi/*.so*"))
    assert "GLIBC" in ours and set(ours) <= set(theirs)
    for name, version in ours.items():
        assert version <= theirs[name], f"{name} {version} is newer than onnxruntime's"


def test_missing_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(NotAvailableError, match=r"g\+\+"):
        build_library(tmp_path / "out")


def test_failing_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho no such flag >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("FREQOPT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(NotAvailableError, match="no such flag"):
        build_library(tmp_path / "out")


def test_library_of_another_architecture(library: str, tmp_path: Path) -> None:
    check_library(Path(library))
    raw = bytearray(Path(library).read_bytes())
    raw[18:20] = (183 if platform.machine() == "x86_64" else 62).to_bytes(2, "little")
    other = tmp_path / "other.so"
    other.write_bytes(raw)
    with pytest.raises(ArtifactError, match="was built for"):
        check_library(other)
    other.write_text("not a library")
    with pytest.raises(ArtifactError, match="not a Linux shared library"):
        check_library(other)
