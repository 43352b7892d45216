"""libfreqopt_ort.so: where it loads, which onnxruntime it wants, and how it is built."""

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
from attention_cases import Case, make_tensors
from onnx import TensorProto, helper
from onnx_cases import feed, session, split_model

from freqopt.exporters.onnx import library as ort_library
from freqopt.exporters.onnx.cubins import write_sources
from freqopt.exporters.onnx.library import FLAGS, SOURCES, build_library, check_library
from freqopt.exporters.problems import ArtifactError, NotAvailableError


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Without a single kernel: what is tested here launches none."""
    folder = tmp_path_factory.mktemp("library")
    return str(build_library(folder, write_sources([], folder)))


def test_the_library_is_for_the_cuda_provider(library: str, tmp_path: Path) -> None:
    """Where it is registered its operator stands in for the body, and it has none for the CPU."""
    case = Case((3, 6, 10), batch=1)
    model = split_model(20, torch.float32, scale=0.2, density=0.5, probes=8)
    with pytest.raises(Exception, match="Could not find an implementation for SplitAttention"):
        session(model, library)
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    runner = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    runner.run(None, feed(case, make_tensors(case), torch.zeros(2)))
    events = json.loads(Path(runner.end_profiling()).read_text())
    ran = {event.get("args", {}).get("op_name") for event in events}
    assert "Scan" in ran and "SplitAttention" not in ran


def test_abi_slots(tmp_path: Path) -> None:
    target = tmp_path / "slots.so"
    source = Path(__file__).parents[1] / "support" / "ort_slots.cc"
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
def test_library_loads_wherever_onnxruntime_does(library: str) -> None:
    """It asks for no newer system than onnxruntime's wheel itself."""
    ours = newest(Path(library))
    theirs = newest(*Path(onnxruntime.__file__).parent.glob("capi/*.so*"))
    assert "GLIBC" in ours and set(ours) <= set(theirs)
    for name, version in ours.items():
        assert version <= theirs[name], f"{name} {version} is newer than onnxruntime's"


def test_missing_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(NotAvailableError, match=r"g\+\+"):
        build_library(tmp_path / "out", [])


def test_failing_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho no such flag >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("FREQOPT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(NotAvailableError, match="no such flag"):
        build_library(tmp_path / "out", [])


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
