"""Gives an exported file another plan's budgets, without the model and without another export.

Budgets are initialisers named freqopt.budget.<site>, and the chunks of orders by content ones named
freqopt.chunks.<site>, so a deployment can be made more exact or faster where it lies. What the plan
decides beyond these is fixed in the file's nodes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from freqopt.errors import PlanError
from freqopt.exporters.lengths import length_notes
from freqopt.exporters.manifest import (
    FILE_NAME,
    Artifact,
    adopt,
    announce,
    describe_plan,
    manifest_of,
)
from freqopt.exporters.problems import ArtifactError, NotAvailableError
from freqopt.files import locked, replacing

if TYPE_CHECKING:
    from freqopt.plan.plan import Plan


def exchange_plan(path: str | os.PathLike[str] | Artifact, plan: Plan) -> Artifact:
    """Overwrite the budgets of an ONNX artifact by those of another plan, and its manifest.

    Interrupted at any point the folder is the old one or the new one, and runs as either.

    A site that is split in the file and dense in the plan attends every pair exactly from then on;
    one that is dense in the file stays so. Both are noted. Heads that the file orders by content
    get the plan's chunks, 0 for the grid's order.

    Raises:
        ArtifactError: not an intact ONNX artifact, or one that was exported without a plan.
        NotAvailableError: onnx is not installed.
        PlanError: a plan of another model, one that orders by content what the file orders by the
            grid alone, or one of lengths too far from the file's.
        FileError: the folder cannot be written.
    """
    artifact = path if isinstance(path, Artifact) else Artifact.load(path)
    if artifact.kind != "onnx":
        raise ArtifactError(
            f"{artifact.path} is for TensorRT, whose engines hold their budgets; export again"
        )
    made_for = artifact.manifest.get("plan")
    if made_for is None:
        raise ArtifactError(
            f"{artifact.path} was exported without a plan: its sites resolve a density in every "
            "call and read no budgets; export again with the plan"
        )
    if plan.model.fingerprint != made_for["model_fingerprint"]:
        raise PlanError(
            f"this plan is for {plan.model.class_name} with fingerprint {plan.model.fingerprint}; "
            f"the file is of {made_for['model']} with {made_for['model_fingerprint']}"
        )
    notes = _check_sites(artifact, plan)
    model = str(artifact.manifest["model"])
    with locked(artifact.path / FILE_NAME):
        with replacing(artifact.model_path) as fresh:
            _write_budgets(artifact, plan, fresh)
            manifest = manifest_of(
                artifact.path,
                kind=artifact.kind,
                model=model,
                files=list(artifact.manifest["files"]),
                content={**_kept(artifact.manifest), "plan": describe_plan(plan), "notes": notes},
                instead={model: fresh},
            )
            announce(artifact.path, manifest)
        return adopt(artifact.path, manifest)


def _check_sites(artifact: Artifact, plan: Plan) -> list[str]:
    """Raise PlanError where the plan does not know a site; the notes about the others."""
    served = [name for name, site in plan.sites.items() if site.decision == "split"]
    for name, held in artifact.sites.items():
        if name not in plan.sites:
            raise PlanError(f"this plan does not know the site {name!r}, which the file splits")
        if plan.largest_chunk(name) and held.get("chunks") is None:
            raise PlanError(
                f"this plan orders the tokens of {name!r} by content and the file by the grid: "
                "export again with the plan"
            )
        if isinstance(held.get("length"), int) and plan.sites[name].decision == "split":
            plan.expected_error(name, held["length"])
    notes = [
        f"{name} is dense in the plan: every pair is attended exactly, by the split's kernel"
        for name in artifact.sites
        if plan.sites[name].decision == "dense"
    ]
    notes += [
        f"the plan splits {name}, which is not split here"
        for name, site in plan.sites.items()
        if site.decision == "split" and name not in artifact.sites
    ]
    if plan.timestep_edges:
        notes.append("the plan has timestep buckets; the file holds the most exact budget of each")
    split = {name: site.get("length") for name, site in artifact.sites.items() if name in served}
    return notes + length_notes(split, plan)


def _write_budgets(artifact: Artifact, plan: Plan, fresh: Path) -> None:
    """Write the model with the plan's budgets to a new file."""
    try:
        import onnx
    except ImportError as error:
        raise NotAvailableError(
            f"exchanging a plan needs onnx ({error}); pip install 'freqopt[onnx]'"
        ) from error
    proto = onnx.load(artifact.model_path, load_external_data=False)
    held = {initializer.name: initializer for initializer in proto.graph.initializer}
    for name, site in artifact.sites.items():
        if site["budget"] not in held:
            raise ArtifactError(
                f"{artifact.model_path} has no initializer {site['budget']}; export again"
            )
        budgets = plan.budgets(name)
        lowest = budgets[:, 0].amin(0).numpy()
        held[site["budget"]].CopyFrom(onnx.numpy_helper.from_array(lowest, site["budget"]))
        if site.get("chunks") is not None:
            of_heads = budgets[0, 1, :: site["heads"] // site["kv_heads"]].to(torch.int32)
            _write_chunks(artifact, proto, site["chunks"], of_heads.numpy())
    onnx.save(proto, fresh)


def _write_chunks(artifact: Artifact, proto: Any, name: str, chunks: np.ndarray[Any, Any]) -> None:
    """Give a site's orders by content other chunks (Hkv,) int32, in the initialiser `name`."""
    import onnx

    from freqopt.exporters.onnx.content import CONTENT_NAME

    held = [initializer for initializer in proto.graph.initializer if initializer.name == name]
    if not held:
        raise ArtifactError(f"{artifact.model_path} has no initializer {name}; export again")
    held[0].CopyFrom(onnx.numpy_helper.from_array(chunks, name))
    for node in proto.graph.node:
        if node.op_type == CONTENT_NAME and name in node.input:
            (largest,) = (a for a in node.attribute if a.name == "largest_chunk")
            largest.i = int(chunks.max())


def _kept(manifest: dict[str, Any]) -> dict[str, Any]:
    """What of a manifest does not depend on the plan or the files."""
    written_anew = ("format", "version", "kind", "model", "files", "plan", "notes")
    return {key: value for key, value in manifest.items() if key not in written_anew}
