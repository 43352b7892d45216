"""Nothing of a stranger's folder runs, and none of its files is opened that is not listed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper

from freqopt.errors import InputError, OptionError
from freqopt.exporters import runner
from freqopt.exporters.manifest import Artifact, write_manifest
from freqopt.exporters.onnx import library as ort_library
from freqopt.exporters.problems import ArtifactError, NotAvailableError
from freqopt.exporters.runner import run_artifact
from freqopt.exporters.tensorrt.cpp import build_engine

VIDEO = {"x": torch.ones(2)}


def write_folder(folder: Path, *, kind: str = "onnx", **more: Any) -> Artifact:
    """A model that adds its weight, which lies in the file, and a manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    weight = helper.make_tensor("w", TensorProto.FLOAT, [2], [1.0, 2.0])
    save_model(folder, weight)
    files = ["model.onnx", *more.pop("files", [])]
    content = {"sites": {}, "dense_sites": {}, **more}
    return write_manifest(folder, kind=kind, model="model.onnx", files=files, content=content)


def save_model(folder: Path, weight: Any, **attributes: Any) -> None:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "g",
        [value("x", TensorProto.FLOAT, [2])],
        [value("y", TensorProto.FLOAT, [2])],
        [weight],
    )
    imports = [helper.make_opsetid("", 20)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10, **attributes)
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def list_file(folder: Path, name: str) -> None:
    """As a stranger would, whose hashes are right."""
    data = (folder / name).read_bytes()
    entry = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    rewrite(folder, lambda m: m["files"].update({name: entry}))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FREQOPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """A runtime that says it has CUDA, and runs on the CPU; libraries that it was asked to load."""
    loaded: list[Path] = []
    monkeypatch.setattr(runner, "PROVIDERS", dict.fromkeys(("cpu", "cuda"), "CPUExecutionProvider"))
    monkeypatch.setattr(runner, "check_library", loaded.append)
    monkeypatch.setattr(runner, "attend_counts", lambda path: {})
    monkeypatch.setattr(
        onnxruntime.SessionOptions, "register_custom_ops_library", lambda self, path: None
    )
    yield loaded


def test_a_model_without_programs_runs(tmp_path: Path, cache: Path) -> None:
    result = run_artifact(write_folder(tmp_path / "a").path, VIDEO, provider="cpu")
    assert result.outputs["y"].tolist() == [2.0, 3.0]


def test_a_library_of_a_stranger_is_not_loaded(
    tmp_path: Path, cache: Path, on_cuda: list[Path]
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.so").write_bytes(b"\x7fELF" + bytes(60))
    made = write_folder(tmp_path / "a", files=["x.so"], library="x.so")
    with pytest.raises(ArtifactError, match=r"x\.so is a program.*--trust.*--no-library"):
        run_artifact(made.path, VIDEO, provider="cuda")
    assert not on_cuda
    assert run_artifact(made.path, VIDEO, provider="cuda", library=False).split.startswith("noth")
    run_artifact(made.path, VIDEO, provider="cuda", trust=True)
    assert on_cuda == [made.path / "x.so"]


@pytest.mark.parametrize("word", ["no", "false", "True", 1, None])
def test_trust_is_said_in_no_other_words(
    word: Any, tmp_path: Path, cache: Path, on_cuda: list[Path]
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.so").write_bytes(b"\x7fELF" + bytes(60))
    made = write_folder(tmp_path / "a", files=["x.so"], library="x.so")
    with pytest.raises(OptionError, match="True or False"):
        run_artifact(made.path, VIDEO, provider="cuda", trust=word)
    assert not on_cuda


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        (None, "inputs is a NoneType"),
        ([torch.ones(2)], "inputs is a list"),
        ({"x": torch.ones(2).numpy()}, "'x' is a ndarray"),
        ({"x": torch.ones(2, device="meta")}, "'x' is on meta"),
    ],
)
def test_inputs_of_another_kind_are_named(inputs: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        run_artifact(write_folder(tmp_path / "a").path, inputs, provider="cpu")


def test_a_library_of_this_machine_is_loaded_from_the_cache(
    tmp_path: Path, cache: Path, on_cuda: list[Path]
) -> None:
    """Not from the folder, where it could be exchanged after it was looked at."""
    own = cache / "ort" / "abc" / ort_library.LIBRARY_NAME
    own.parent.mkdir(parents=True)
    own.write_bytes(b"ours")
    (tmp_path / "a").mkdir()
    shutil.copy(own, tmp_path / "a" / "lib.so")
    made = write_folder(tmp_path / "a", files=["lib.so"], library="lib.so")
    run_artifact(made.path, VIDEO, provider="cuda")
    assert on_cuda == [own]


@pytest.mark.parametrize(
    "name",
    ["../x.so", "/tmp/x.so", "C:\\x.so", "..\\x.so", "a/../x.so", "./x.so", "", "a\0b", "x//y"],
)
def test_names_that_leave_the_folder(tmp_path: Path, name: str) -> None:
    folder = write_folder(tmp_path / "a").path
    (tmp_path / "x.so").write_bytes(b"outside")
    entry = {"sha256": "0" * 64, "bytes": 7}
    for change in ({"library": name}, {"model": name}):
        rewrite(folder, lambda m, change=change: m.update(change))
        rewrite(folder, lambda m: m["files"].update({name: entry}))
        with pytest.raises(ArtifactError, match="not as freqopt writes it"):
            Artifact.load(folder)


def test_a_library_that_is_not_listed_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a").path
    (folder / "x.so").write_bytes(b"unlisted")
    rewrite(folder, lambda m: m.update(library="x.so"))
    with pytest.raises(ArtifactError, match=r"x\.so is not among the files"):
        Artifact.load(folder)


@pytest.mark.skipif(os.name != "posix", reason="links and pipes as on POSIX")
def test_links_and_pipes_are_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a").path
    shutil.copy(folder / "model.onnx", tmp_path / "elsewhere.onnx")
    (folder / "model.onnx").unlink()
    (folder / "model.onnx").symlink_to(tmp_path / "elsewhere.onnx")
    with pytest.raises(ArtifactError, match="a link to somewhere else"):
        Artifact.load(folder)
    (folder / "model.onnx").unlink()
    os.mkfifo(folder / "model.onnx")
    with pytest.raises(ArtifactError, match="a pipe"):
        Artifact.load(folder)


@pytest.mark.parametrize("inside", ["initializer", "function"])
def test_weights_in_a_file_that_is_not_listed(tmp_path: Path, inside: str) -> None:
    folder = write_folder(tmp_path / "a").path
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2])
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="secret.bin")
    (folder / "secret.bin").write_bytes(bytes(8))
    if inside == "initializer":
        save_model(folder, weight)
    else:
        function = helper.make_function(
            "d",
            "F",
            [],
            ["z"],
            [helper.make_node("Constant", [], ["z"], value=weight)],
            [helper.make_opsetid("", 20)],
        )
        plain = helper.make_tensor("w", TensorProto.FLOAT, [2], [1.0, 2.0])
        save_model(folder, plain, functions=[function])
    list_file(folder, "model.onnx")
    with pytest.raises(ArtifactError, match=r"'secret\.bin', which is not among"):
        run_artifact(folder, VIDEO, provider="cpu")
    list_file(folder, "secret.bin")
    if inside == "initializer":
        assert run_artifact(folder, VIDEO, provider="cpu").outputs["y"].tolist() == [1.0, 1.0]


def external(*locations: str) -> Any:
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2])
    weight.data_location = TensorProto.EXTERNAL
    for location in locations:
        weight.external_data.add(key="location", value=location)
    return weight


@pytest.mark.parametrize(
    "locations", [("listed.bin", "secret.bin"), ("secret.bin", "listed.bin"), ()]
)
def test_every_place_of_weights_counts(tmp_path: Path, locations: tuple[str, ...]) -> None:
    """Some versions of onnxruntime take the last of several."""
    folder = write_folder(tmp_path / "a").path
    for name in ("listed.bin", "secret.bin"):
        (folder / name).write_bytes(bytes(8))
    save_model(folder, external(*locations))
    list_file(folder, "model.onnx")
    list_file(folder, "listed.bin")
    with pytest.raises(ArtifactError, match=r"'(secret\.bin)?', which is not among"):
        run_artifact(folder, VIDEO, provider="cpu")


def test_an_address_in_memory_is_no_file(tmp_path: Path) -> None:
    folder, name = write_folder(tmp_path / "a").path, "*/_ORT_MEM_ADDR_/*"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_bytes(bytes(8))
    save_model(folder, external(name))
    list_file(folder, "model.onnx")
    list_file(folder, name)
    with pytest.raises(ArtifactError, match="_ORT_MEM_ADDR_"):
        run_artifact(folder, VIDEO, provider="cpu")


@pytest.mark.parametrize("name", ["model.json", "model.textproto", "model.onnxtxt"])
def test_a_model_is_read_as_onnxruntime_reads_it(tmp_path: Path, name: str) -> None:
    """Else what is checked may be another model than the one that runs."""
    folder = write_folder(tmp_path / "a").path
    (folder / "secret.bin").write_bytes(bytes(8))
    save_model(folder, external("secret.bin"))
    (folder / "model.onnx").rename(folder / name)
    rewrite(folder, lambda m: m.update(model=name, files={}))
    list_file(folder, name)
    with pytest.raises(ArtifactError, match=r"'secret\.bin', which is not among"):
        run_artifact(folder, VIDEO, provider="cpu")


def test_a_refused_run_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    folder = write_folder(tmp_path / "a").path
    (folder / "model.onnx").write_bytes(b"")
    list_file(folder, "model.onnx")
    with pytest.raises((ArtifactError, NotAvailableError)):
        run_artifact(folder, VIDEO, provider="cpu")
    with pytest.raises(Exception, match="inputs"):
        run_artifact(write_folder(tmp_path / "b").path, {}, provider="cpu")
    assert os.listdir(tmp_path / "temporary") == []


class TensorRT(types.ModuleType):
    """Stands for the bindings, and keeps what was loaded."""

    class Logger:
        WARNING = 0

        def __init__(self, level: int) -> None: ...

    def __init__(self) -> None:
        super().__init__("tensorrt")
        self.loaded: list[Any] = []
        self.__version__ = "0"

    def get_plugin_registry(self) -> Any:
        return types.SimpleNamespace(load_library=lambda path: self.loaded.append(path) or 1)

    def Runtime(self, logger: Any) -> Any:
        return types.SimpleNamespace(deserialize_cuda_engine=self.loaded.append)


def test_engines_and_plugins_need_trust_and_a_place_in_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bindings = TensorRT()
    monkeypatch.setitem(sys.modules, "tensorrt", bindings)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    folder = write_folder(tmp_path / "a", kind="tensorrt").path
    (folder / "plugin").mkdir()
    for name in (build_engine.ENGINE, f"plugin/{build_engine.PLUGIN}"):
        (folder / name).write_bytes(name.encode())
    with pytest.raises(ArtifactError, match=r"engine and plugin, which are programs.*--trust"):
        run_artifact(folder, {})
    with pytest.raises(ArtifactError, match=r"model\.engine is not among the files"):
        run_artifact(folder, {}, trust=True)
    build_engine.list_files(folder, [build_engine.ENGINE])
    with pytest.raises(ArtifactError, match=r"trt\.so is not among the files"):
        run_artifact(folder, {}, trust=True)
    assert not bindings.loaded
    build_engine.list_files(folder, [f"plugin/{build_engine.PLUGIN}"])
    with pytest.raises(ArtifactError, match="could not load .*model.engine"):
        run_artifact(folder, {}, trust=True)
    assert len(bindings.loaded) == 2


def test_the_command_says_what_runs() -> None:
    said = subprocess.run(
        [sys.executable, "-m", "freqopt", "run", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "200"},
    ).stdout
    assert "--trust" in said and "programs" in said


def test_a_cached_library_is_found_again_wherever_the_kernels_lie(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels' folder is a new one each time; its name must not be part of the key."""
    built: list[Path] = []

    def pretend(command: list[str], target: Path) -> None:
        built.append(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(b"library")

    monkeypatch.setattr(ort_library, "_compile", pretend)
    monkeypatch.setattr(ort_library, "compiler", lambda: "c++")

    def build(name: str, cubin: bytes) -> None:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "k.cubin").write_bytes(cubin)
        (folder / "cubins.S").write_text(f'.incbin "{folder}/k.cubin"')
        ort_library.build_library(tmp_path / "out", [folder / "cubins.S"])

    build("one", b"a")
    build("two", b"a")
    assert len(built) == 1
    build("three", b"b")
    assert len(built) == 2
    built[0].write_bytes(b"trunc")
    build("four", b"a")
    assert built[2] == built[0], "a damaged library of the cache is built anew"
    for index in range(ort_library.MOST_CACHED + 3):
        build(f"more{index}", bytes([index]))
    assert len(list((cache / "ort").iterdir())) == ort_library.MOST_CACHED


def test_kernels_lie_in_folders_of_any_name(tmp_path: Path) -> None:
    """Names beyond ASCII were written as escapes that no assembler knows."""
    from freqopt.exporters.onnx.cubins import Compiled, write_sources
    from freqopt.kernels.variant import Variant

    folder = tmp_path / "d\u00e9p\u00f4t \u2192"
    folder.mkdir()
    variant = Variant(90, "float16", 64, False)
    row = Compiled("attend", "symbol", variant, ("a",), "a/64", 4, 0, "k.cubin")
    assembly, _ = write_sources([row], folder)
    assert f'"{folder.resolve()}/k.cubin"' in assembly.read_text("utf-8")


def test_a_cache_that_cannot_be_written_does_not_end_an_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FREQOPT_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(ort_library, "compiler", lambda: "true")

    def pretend(command: list[str], target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(b"library")

    monkeypatch.setattr(ort_library, "_compile", pretend)
    made = ort_library.build_library(tmp_path / "out", [])
    assert made.read_bytes() == b"library"
    assert "set FREQOPT_CACHE to a folder that is yours" in caplog.text
