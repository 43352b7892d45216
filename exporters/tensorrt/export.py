"""`export_tensorrt`: model.trt.onnx without function bodies, the plugin, build_engine.py.

NVIDIA's parser prefers a function body to a plugin of the same name, so TensorRT gets its own file
of bare nodes. The plugin is one IPluginV3 per site over the launches and the table of cubins that
the onnxruntime library has (exporters/tensorrt/cpp), compiled where TensorRT's headers are. With
plugin="aot" each site is a chain of one-kernel nodes instead, which needs no compiler there.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from freqopt.config import DEFAULT_CHUNK, DEFAULT_PROBES
from freqopt.errors import OptionError
from freqopt.exporters.manifest import Artifact, write_manifest
from freqopt.exporters.onnx.export import (
    describe,
    local_capabilities,
    needed_variants,
    save_model,
    translate,
)
from freqopt.exporters.preparation import check_capabilities, prepare, prepare_folder
from freqopt.exporters.problems import ExportError, NotAvailableError
from freqopt.exporters.program import Program
from freqopt.exporters.tensorrt.cpp.build_engine import ENGINE, MODEL
from freqopt.grid import Grid

if TYPE_CHECKING:
    from freqopt.plan.plan import Plan

logger = logging.getLogger(__name__)

BUILDS = ("auto", "never", "always")
PLUGINS = ("cpp", "aot")
OPSET = 20
BUILD_SCRIPT = Path(__file__).parent / "cpp" / "build_engine.py"
NOT_INSTALLED = (
    "TensorRT is not installed here, so no engine was built: everything up to it is in this "
    "folder. Where TensorRT is, run `python build_engine.py`"
)


def export_tensorrt(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    out_dir: str | os.PathLike[str],
    *,
    plan: Plan | str | os.PathLike[str] | None = None,
    dynamic_shapes: Any = None,
    build: str = "auto",
    plugin: str = "cpp",
    grid: Grid | None = None,
    order: str | None = None,
    chunk: int | str = DEFAULT_CHUNK,
    probes: int = DEFAULT_PROBES,
    capabilities: Sequence[int] | None = None,
) -> Artifact:
    """Write model.trt.onnx, the plugin's sources, build_engine.py and a manifest.

    Args:
        build: "auto" also builds the engine where TensorRT is installed and no extent is free,
            "never" does not, "always" insists. Free extents need profiles: run build_engine.py.
        plugin: "cpp" for the C++ plugin, which carries every kernel; "aot" for chains of nodes with
            PTX, portable kernels only: no compiler and no headers are needed, and the batch alone
            may be free.
        capabilities: compute capabilities the plugin gets kernels for; by default those of the
            GPUs here, else 80 and 90 (each serves the later chips of its generation); with "aot"
            one, by default 80, whose PTX runs on every later GPU.

    Other arguments are as in `export_onnx`.

    Returns:
        The artifact; its notes say which sites the plugin cannot serve and why there is no engine.

    Raises:
        NotAvailableError: build="always" and TensorRT is missing, a site is not one the plugin
            serves, or the engine could not be built.
        OptionError: another value of build or plugin.
        ExportError, PlanError: as for `export_onnx`.
    """
    if build not in BUILDS:
        raise OptionError(f"build {build!r} is unknown; supported: {', '.join(BUILDS)}")
    if plugin not in PLUGINS:
        raise OptionError(f"plugin {plugin!r} is unknown; supported: {', '.join(PLUGINS)}")
    if build == "always" and not is_installed():
        raise NotAvailableError(f"build='always', but {NOT_INSTALLED}")
    check_capabilities(capabilities)
    ready = prepare(
        model,
        args,
        kwargs,
        out_dir,
        plan=plan,
        dynamic_shapes=dynamic_shapes,
        grid=grid,
        order=order,
        chunk=chunk,
        probes=probes,
    )
    return write_tensorrt(
        ready.program,
        ready.folder,
        plan=ready.plan,
        build=build,
        plugin=plugin,
        capabilities=capabilities,
    )


def is_installed() -> bool:
    """Whether the tensorrt package is here."""
    return importlib.util.find_spec("tensorrt") is not None


def write_tensorrt(
    program: Program,
    out_dir: str | os.PathLike[str],
    *,
    plan: Plan | None = None,
    build: str = "auto",
    plugin: str = "cpp",
    capabilities: Sequence[int] | None = None,
) -> Artifact:
    """Write a rewritten program as a TensorRT artifact; arguments as in `export_tensorrt`."""
    from freqopt.exporters.tensorrt.plugin import fit_nodes

    folder = prepare_folder(out_dir)
    (folder / ENGINE).unlink(missing_ok=True)  # of an export before this one
    onnx_model = translate(program, OPSET, bodies=False)
    problems = fit_nodes(onnx_model)
    shutil.rmtree(folder / "plugin", ignore_errors=True)
    shutil.rmtree(folder / "aot", ignore_errors=True)
    content = describe(program, onnx_model, plan)
    write = _add_chains if plugin == "aot" else _add_plugin
    files: list[str] = []
    failed: list[str] = []
    try:
        files, content["kernels"] = write(program, onnx_model, folder, problems, capabilities)
    except (ExportError, NotAvailableError) as error:
        if capabilities is not None:
            raise
        content["notes"].append(f"no plugin: {error}")
        failed = [str(error)]
    content["notes"] += [f"no plugin for {problem}" for problem in problems]
    problems += failed
    files += save_model(onnx_model, folder / MODEL)
    reason = _why_no_engine(program, onnx_model, problems, build)
    if reason is None:
        reason = _build_engine(folder)
    if reason is None:
        files += [ENGINE, *(["plugin/libfreqopt_trt.so"] if plugin == "cpp" else [])]
    elif build == "always":
        raise NotAvailableError(reason)
    else:
        content["notes"].append(reason)
        logger.info("%s", reason)
    return write_manifest(folder, kind="tensorrt", model=MODEL, files=files, content=content)


def _add_plugin(
    program: Program, model: Any, folder: Path, problems: list[str], named: Sequence[int] | None
) -> tuple[list[str], list[dict[str, Any]]]:
    """The C++ plugin's sources; their names and what a manifest says about the kernels."""
    from freqopt.exporters.tensorrt.plugin import DEFAULT_CAPABILITIES, write_plugin

    wanted = tuple(named or local_capabilities() or DEFAULT_CAPABILITIES)
    files, table = write_plugin(folder, needed_variants(program, wanted))
    return files, [row.describe() for row in table]


def _add_chains(
    program: Program, model: Any, folder: Path, problems: list[str], named: Sequence[int] | None
) -> tuple[list[str], list[dict[str, Any]]]:
    """Chains of one-kernel nodes in place of the model's split nodes; as `_add_plugin`."""
    from freqopt.exporters.tensorrt.aot.nodes import DEFAULT_CAPABILITY, write_chains

    shutil.copyfile(BUILD_SCRIPT, folder / BUILD_SCRIPT.name)
    files, rows, more = write_chains(model, folder, tuple(named or (DEFAULT_CAPABILITY,)))
    problems += more
    return [BUILD_SCRIPT.name, *files], rows


def _why_no_engine(
    program: Program, onnx_model: Any, problems: Sequence[str], build: str
) -> str | None:
    if problems:
        return "no engine was built: TensorRT cannot run this file. " + "; ".join(problems)
    if build == "never":
        return "no engine was built, as asked; run `python build_engine.py` where TensorRT is"
    if not is_installed():
        return NOT_INSTALLED
    free = [v.name for v in onnx_model.graph.inputs if not v.shape.is_static()]
    if free:
        return (
            f"no engine was built: {', '.join(free)} have free extents, which need profiles. Run "
            "`python build_engine.py --shape NAME=MIN:OPT:MAX`"
        )
    return None


def _build_engine(folder: Path) -> str | None:
    """Run build_engine.py as a user would; None, or why it failed."""
    done = subprocess.run(
        [sys.executable, str(folder / "build_engine.py")],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return None
    return f"no engine was built; the last words of build_engine.py: {done.stderr[-1500:]}"
