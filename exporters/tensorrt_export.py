"""`export_tensorrt`: the rewritten model as a file for TensorRT's parser, without function bodies.

NVIDIA's parser prefers a function body to a plugin of the same name, so TensorRT gets its own file
of bare nodes. The plugin that would run them is not built yet, so no engine can be made.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from freqopt.config import DEFAULT_PROBES
from freqopt.errors import OptionError
from freqopt.exporters.manifest import Artifact, write_manifest
from freqopt.exporters.onnx_export import describe, prepare_folder, save_model, translate
from freqopt.exporters.problems import NotAvailableError
from freqopt.exporters.program import Program, make_program
from freqopt.grid import Grid

if TYPE_CHECKING:
    from freqopt.plan import Plan

BUILDS = ("auto", "never", "always")
OPSET = 20
MISSING = (
    "the TensorRT plugin of freqopt::SplitAttention is not part of this version, so no engine was "
    "built: model.trt.onnx is complete for a plugin of your own (inputs and attributes are in "
    "docs/export.md); to deploy today, use export_onnx and ONNX Runtime"
)


def export_tensorrt(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    out_dir: str | os.PathLike[str],
    *,
    plan: Plan | None = None,
    dynamic_shapes: Any = None,
    build: str = "auto",
    grid: Grid | None = None,
    probes: int = DEFAULT_PROBES,
) -> Artifact:
    """Write model.trt.onnx and a manifest; arguments as in `export_onnx`.

    Args:
        build: "auto" or "never" write everything up to the engine; "always" insists on an engine.

    Returns:
        The artifact; its notes say that there is no engine, and why.

    Raises:
        NotAvailableError: build="always", as this version has no plugin to build an engine with.
        OptionError: another value of build.
        ExportError, PlanError: as for `export_onnx`.
    """
    if build not in BUILDS:
        raise OptionError(f"build {build!r} is unknown; supported: {', '.join(BUILDS)}")
    if build == "always":
        raise NotAvailableError(MISSING)
    folder = prepare_folder(out_dir)
    program = make_program(
        model, args, kwargs, plan=plan, dynamic_shapes=dynamic_shapes, grid=grid, probes=probes
    )
    return write_tensorrt(program, folder, plan=plan)


def write_tensorrt(
    program: Program, out_dir: str | os.PathLike[str], *, plan: Plan | None = None
) -> Artifact:
    """Write a rewritten program as a TensorRT artifact."""
    folder = prepare_folder(out_dir)
    onnx_model = translate(program, OPSET, bodies=False)
    files = save_model(onnx_model, folder / "model.trt.onnx")
    content = describe(program, onnx_model, plan)
    if program.split:
        content["notes"].append(MISSING)
    return write_manifest(
        folder, kind="tensorrt", model="model.trt.onnx", files=files, content=content
    )
