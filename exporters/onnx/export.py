"""`export_onnx`: a folder with model.onnx, the operator library and a manifest.

Each split site is one `freqopt::SplitAttention` node whose function body is in the file:
onnxruntime runs the library's kernel where the library is registered, else the body.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from freqopt.config import DEFAULT_CHUNK, DEFAULT_PROBES, SPLIT_VERSION
from freqopt.errors import OptionError
from freqopt.exporters.lengths import length_notes, names_in
from freqopt.exporters.manifest import Artifact, describe_plan, write_manifest
from freqopt.exporters.preparation import check_capabilities, prepare
from freqopt.exporters.problems import ExportError, NotAvailableError
from freqopt.exporters.program import Program
from freqopt.grid import Grid
from freqopt.kernels.variant import Variant

if TYPE_CHECKING:
    from freqopt.plan.plan import Plan

logger = logging.getLogger(__name__)

OPSETS = range(18, 24)
"""Opsets of the default domain that files can be written for."""

EXTERNAL_ABOVE = 2**31 - 2**24
"""Bytes of weights from which they go to a file of their own: protobuf ends at 2 GiB."""


def export_onnx(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    out_dir: str | os.PathLike[str],
    *,
    plan: Plan | str | os.PathLike[str] | None = None,
    dynamic_shapes: Any = None,
    opset: int = 20,
    grid: Grid | None = None,
    order: str | None = None,
    chunk: int | str = DEFAULT_CHUNK,
    probes: int = DEFAULT_PROBES,
    library: bool = True,
    capabilities: Sequence[int] | None = None,
) -> Artifact:
    """Export a model with frequency-split attention to ONNX.

    Args:
        model: the model, on any device; weights keep their type.
        args, kwargs: an example call.
        out_dir: the folder to fill; created if need be.
        plan: from `freqopt.calibrate`, or the path of one; its budgets become initialisers named
            freqopt.budget.<site>. Without one every eligible site is split at a density of 0.25.
        dynamic_shapes: as in torch.export.export; batch and token counts may be free where the
            model leaves them so.
        opset: of the default domain, 18 to 23.
        grid: extents (t, h, w) where neither the graph nor the plan tells them.
        order, chunk: how tokens are ordered without a plan, as the backend's options of that name:
            with order="content" sites without a grid are split too.
        probes: queries per head attended exactly in every call.
        library: also build libfreqopt_ort.so, whose kernels ONNX Runtime's CUDA provider runs;
            where there is no GPU or no compiler the export goes on without it and says so in
            `Artifact.notes`. On a CPU the function body serves the split.
        capabilities: compute capabilities, as 90 for Hopper, that the library gets kernels for;
            none of them need be present, but every one must be possible. By default those of the
            GPUs here, as far as there are kernels for them.

    Returns:
        The artifact: model.onnx (with model.onnx.data above 2 GB), manifest.json and the library.

    Raises:
        ExportError: an opset that is not supported, or a model that cannot be exported.
        OptionError: probes, opset, capabilities or a folder of another kind; dimensions that an
            input does not have.
        PlanError: the plan was made for another model, or for lengths too far from the example's.
        NotAvailableError: onnx or onnxscript is not installed, or what the named capabilities
            need is not.
    """
    check_opset(opset)
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
    return write_onnx(
        ready.program,
        ready.folder,
        opset=opset,
        plan=ready.plan,
        library=library,
        capabilities=capabilities,
    )


def write_onnx(
    program: Program,
    folder: Path,
    *,
    opset: int = 20,
    plan: Plan | None = None,
    library: bool = True,
    capabilities: Sequence[int] | None = None,
) -> Artifact:
    """Write a rewritten program as an ONNX artifact; arguments as in `export_onnx`."""
    onnx_model = translate(program, opset, bodies=True)
    files = save_model(onnx_model, folder / "model.onnx")
    content = describe(program, onnx_model, plan)
    wanted = local_capabilities() if capabilities is None else tuple(capabilities)
    if library and program.split and not wanted:
        content["notes"].append(
            "no operator library: no GPU is here and no capabilities were named"
        )
    elif library and program.split:
        try:
            built, content["kernels"] = _add_library(folder, program, wanted)
            content["library"] = built
            files.append(built)
        except (ExportError, NotAvailableError) as error:
            if capabilities is not None:
                raise
            content["notes"].append(f"no operator library: {error}")
            logger.warning("exported without the operator library: %s", error)
    return write_manifest(folder, kind="onnx", model="model.onnx", files=files, content=content)


def check_opset(opset: int) -> None:
    """Raise ExportError unless files can be written for this opset.

    Raises:
        OptionError: it is no whole number.
    """
    if type(opset) is not int:
        raise OptionError(
            f"opset is {opset!r}, a {type(opset).__name__}; a whole number from {OPSETS[0]} to "
            f"{OPSETS[-1]} is needed"
        )
    if opset not in OPSETS:
        raise ExportError(
            f"opset {opset} is not supported; {OPSETS[0]} to {OPSETS[-1]} are (20 is the default)"
        )


def translate(program: Program, opset: int, *, bodies: bool) -> Any:
    """The ONNX model (onnx_ir.Model) of a rewritten program, bodies attached if wanted."""
    try:
        from freqopt.exporters.onnx import nodes as onnx_nodes
    except ImportError as error:
        raise NotAvailableError(
            f"exporting needs onnx and onnxscript ({error}); pip install 'freqopt[onnx]'"
        ) from error
    try:
        exported = torch.onnx.export(
            program.exported,
            (),
            dynamo=True,
            opset_version=opset,
            custom_translation_table=onnx_nodes.translation_table(),
            output_names=_output_names(program),
            verbose=False,
        )
    except Exception as error:  # the exporter's error types are private
        last = str(error.__cause__ or error).strip().splitlines()
        raise ExportError(
            f"torch.onnx.export could not translate the rewritten program: {' '.join(last[:4])}"
        ) from error
    assert exported is not None
    onnx_model = exported.model
    written = onnx_model.opset_imports.get("", opset)
    if written != opset:
        raise ExportError(
            f"the model could only be written at opset {written}, not {opset}: an operator has no "
            f"form there. Pass opset={written}"
        )
    sites = program.split.values()
    onnx_nodes.name_budgets(
        onnx_model, [site.budget for site in sites], [site.chunks for site in sites]
    )
    onnx_nodes.avoid_boolean_where(onnx_model)
    onnx_nodes.share_orders(onnx_model)
    if bodies:
        onnx_nodes.attach_bodies(onnx_model)
    onnx_nodes.strip_metadata(onnx_model)
    return onnx_model


def _output_names(program: Program) -> list[str]:
    count = len(program.exported.graph_signature.user_outputs)
    return ["output"] if count == 1 else [f"output_{i}" for i in range(count)]


def save_model(onnx_model: Any, path: Path, external_above: int = EXTERNAL_ABOVE) -> list[str]:
    """Write and check a model; names of the files, weights apart above a size."""
    import onnx_ir

    import onnx

    weights = sum(v.const_value.nbytes for v in onnx_model.graph.initializers.values())
    data = f"{path.name}.data"
    external = data if weights > external_above else None
    (path.parent / data).unlink(missing_ok=True)
    onnx_ir.save(onnx_model, path, external_data=external)
    onnx.checker.check_model(str(path))
    return [path.name, data] if external else [path.name]


def describe(program: Program, onnx_model: Any, plan: Plan | None) -> dict[str, Any]:
    """What the manifest says about a model file."""
    from freqopt.exporters.onnx.body import DOMAIN, OP_NAME, OP_VERSION

    def values(of: Any) -> list[dict[str, Any]]:
        return [
            {
                "name": v.name,
                "dtype": str(v.dtype),
                "shape": [d if isinstance(d, int) else str(d.value) for d in v.shape or ()],
            }
            for v in of
        ]

    inputs = {v.name for v in onnx_model.graph.inputs}
    sites = {name: asdict(site) for name, site in program.split.items()}
    for site in sites.values():
        if not names_in([site["length"]]) <= inputs:  # a size of something that is no input there
            site["length"] = None
    lengths = {name: site["length"] for name, site in sites.items()}
    return {
        "opset": onnx_model.opset_imports[""],
        "operator": {
            "domain": DOMAIN,
            "name": OP_NAME,
            "version": OP_VERSION,
            "split": SPLIT_VERSION,
        },
        "inputs": values(onnx_model.graph.inputs),
        "outputs": values(onnx_model.graph.outputs),
        "sites": sites,
        "dense_sites": program.dense,
        "plan": describe_plan(plan),
        "kernels": [],
        "notes": [*program.notes, *length_notes(lengths, plan)],
    }


def _add_library(
    folder: Path, program: Program, capabilities: Sequence[int]
) -> tuple[str, list[dict[str, Any]]]:
    """Build the library; its file name, and what a manifest says about its kernels."""
    from freqopt.exporters.onnx import cubins
    from freqopt.exporters.onnx.library import build_library

    with tempfile.TemporaryDirectory(prefix="freqopt-") as scratch:
        table = cubins.compile_table(needed_variants(program, capabilities), Path(scratch))
        built = build_library(folder, cubins.write_sources(table, Path(scratch)))
    return built.name, [row.describe() for row in table]


def needed_variants(program: Program, capabilities: Sequence[int]) -> list[Variant]:
    """The kernels' variants that a program's sites need."""
    content: dict[Variant, bool] = {}
    for site in program.split.values():
        for capability in capabilities:
            needed = Variant(capability, site.dtype, site.head_dim, site.masked)
            content[needed] = content.get(needed, False) or site.chunks is not None
    wanted = (replace(needed, content=asked) for needed, asked in content.items())
    return sorted(wanted, key=str)


def local_capabilities() -> tuple[int, ...]:
    """Compute capabilities of the GPUs of this machine."""
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return tuple(sorted(major * 10 + minor for major, minor in found))
