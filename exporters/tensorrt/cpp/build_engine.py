"""Build model.engine from an exported folder: run this file where TensorRT is installed.

    python build_engine.py [--shape NAME=MIN:OPT:MAX] [--include DIR] [--workspace-gib N]

It stands on its own: only the tensorrt package is needed, and a C++ compiler where the folder holds
a plugin's sources; freqopt is not.
Shapes are written 1x3x5x24x32; every input with a free extent needs one --shape.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MODEL, ENGINE, PLUGIN, AOT = "model.trt.onnx", "model.engine", "libfreqopt_trt.so", "aot"
HEADERS = ("NvInferRuntime.h", "cuda_runtime_api.h", "crt/host_defines.h")
PLACES = (
    "/usr/include/x86_64-linux-gnu",
    "/usr/include/aarch64-linux-gnu",
    "/usr/include",
    "/usr/local/cuda/include",
    "/usr/local/tensorrt/include",
    "/usr/local/TensorRT/include",
)
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden")
Profile = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def find_includes(extra: Sequence[str] = ()) -> list[str]:
    """Folders that hold TensorRT's and CUDA's headers; exits naming one that is not found."""
    pip = [p for s in sys.path for p in Path(s).glob("nvidia/*/include")]
    places = [*extra, *map(str, pip), *PLACES]
    found = []
    for header in HEADERS:
        place = next((p for p in places if (Path(p) / header).is_file()), None)
        if place is None:
            sys.exit(f"{header} was not found; name its folder with --include (repeatable)")
        found.append(place)
    return list(dict.fromkeys(found))


def build_plugin(folder: Path, includes: Sequence[str]) -> Path:
    """Compile the plugin's sources into the folder; exits with the compiler's words."""
    compiler = shutil.which(os.environ.get("CXX") or "g++")
    if compiler is None:
        sys.exit("no C++ compiler was found; install g++ or set CXX")
    sources = [*sorted(folder.glob("*.cc")), *folder.glob("*.S")]
    done = subprocess.run(
        [
            compiler,
            *FLAGS,
            *(part for i in includes for part in ("-isystem", i)),
            *(s.name for s in sources),
            "-ldl",
            "-o",
            PLUGIN,
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{compiler} could not build {PLUGIN}: {done.stderr[-2000:]}")
    return folder / PLUGIN


def register_nodes(folder: Path) -> bool:
    """Register the nodes that were compiled ahead of time; whether there are any."""
    if not folder.is_dir():
        return False
    sys.path.insert(0, str(folder))
    try:
        module = importlib.import_module("aot_plugin")
        module.register(folder)
    except (ImportError, AttributeError) as error:
        sys.exit(f"TensorRT has no usable tensorrt.plugin ({error}); export with plugin='cpp'")
    finally:
        sys.path.remove(str(folder))
    return True


def parse_profile(text: str) -> tuple[str, Profile]:
    """NAME=MIN:OPT:MAX; one shape alone stands for all three."""
    name, _, shapes = text.partition("=")
    try:
        parts = [tuple(int(n) for n in shape.split("x")) for shape in shapes.split(":")]
    except ValueError:
        parts = []
    if len(parts) == 1:
        parts = parts * 3
    if not name or len(parts) != 3 or len({len(p) for p in parts}) != 1:
        sys.exit(f"--shape {text!r} is not NAME=MIN:OPT:MAX with shapes like 1x3x5x24x32")
    return name, (parts[0], parts[1], parts[2])


def build_engine(
    tensorrt: Any,
    model: Path,
    plugin: Path | None,
    profiles: dict[str, Profile],
    workspace: int,
    ahead_of_time: bool = False,
) -> bytes:
    """Parse, optimise and serialise; exits with TensorRT's words. workspace: bytes.

    ahead_of_time: the nodes were registered by aot_plugin.py, and bring their kernels as PTX.
    """
    logger = tensorrt.Logger(tensorrt.Logger.WARNING)
    builder = tensorrt.Builder(logger)
    registry = builder.get_plugin_registry()
    if plugin is not None and registry.load_library(str(plugin)) is None:
        sys.exit(f"TensorRT {tensorrt.__version__} could not load {plugin}")
    flags = tensorrt.NetworkDefinitionCreationFlag
    # Strongly typed, as the file says; from TensorRT 11 on there is nothing else and no flag.
    typed = 1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0
    if ahead_of_time:
        typed |= 1 << int(flags.PREFER_AOT_PYTHON_PLUGINS)
    network = builder.create_network(typed)
    parser = tensorrt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(model)):
        errors = "\n".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        sys.exit(f"TensorRT's parser refused {model}:\n{errors}")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(tensorrt.MemoryPoolType.WORKSPACE, workspace)
    if ahead_of_time:  # some kernels rewrite an input, which is then an output as well
        config.set_preview_feature(tensorrt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        if tensor.name in profiles:
            profile.set_shape(tensor.name, *profiles[tensor.name])
        elif -1 in tuple(tensor.shape):
            sys.exit(f"{tensor.name} is {tuple(tensor.shape)}: give it --shape MIN:OPT:MAX")
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        sys.exit("TensorRT built no engine; the reason is in its log above")
    return bytes(engine)


def list_files(folder: Path, names: Sequence[str]) -> None:
    """Add files to the folder's manifest, which runners open no other files than those of."""
    manifest = folder / "manifest.json"
    if not manifest.is_file():  # an export that is under way writes it last
        return
    content = json.loads(manifest.read_text(encoding="utf-8"))
    for name in names:
        data = (folder / name).read_bytes()
        entry = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        content["files"][name] = entry
    partial = manifest.with_name(f".manifest.json.{os.getpid()}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, manifest)


def main(arguments: Sequence[str] | None = None) -> None:
    """Build and write the engine; the command line says of what and how."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parent)
    parser.add_argument("--shape", action="append", default=[], metavar="NAME=MIN:OPT:MAX")
    parser.add_argument("--include", action="append", default=[], metavar="DIR")
    parser.add_argument("--workspace-gib", type=float, default=16.0)
    given = parser.parse_args(arguments)
    try:
        tensorrt = importlib.import_module("tensorrt")
    except ImportError as error:
        sys.exit(f"TensorRT is not installed here ({error}); run this where it is")
    profiles = dict(parse_profile(text) for text in given.shape)
    sources = given.folder / "plugin"
    plugin = build_plugin(sources, find_includes(given.include)) if sources.is_dir() else None
    workspace = int(given.workspace_gib * 2**30)
    ahead = register_nodes(given.folder / AOT)
    engine = build_engine(tensorrt, given.folder / MODEL, plugin, profiles, workspace, ahead)
    (given.folder / ENGINE).write_bytes(engine)
    list_files(given.folder, [ENGINE, *([f"plugin/{PLUGIN}"] if plugin else [])])
    print(f"wrote {given.folder / ENGINE} ({len(engine) / 2**20:.1f} MiB)")


if __name__ == "__main__":
    main()
