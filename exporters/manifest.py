"""`manifest.json`: what an exported folder holds, how it was made, and hashes to trust it by.

Written last by every exporter and checked first by every runner. Plain JSON, no code.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from freqopt.config import SPLIT_VERSION
from freqopt.exporters.problems import ArtifactError

FORMAT = "freqopt-artifact"
MANIFEST_VERSION = 1
FILE_NAME = "manifest.json"
PACKAGES = ("freqopt", "torch", "triton", "onnx", "onnxscript", "onnxruntime", "tensorrt")
TOLERANCES = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}
"""Relative L2 distance from the PyTorch op within which an artifact is right, per element type."""


@dataclass(frozen=True)
class Artifact:
    """An exported folder.

    Attributes:
        path: the folder.
        manifest: the content of its manifest.json.
    """

    path: Path
    manifest: dict[str, Any] = field(repr=False)

    @property
    def kind(self) -> str:
        """One of "onnx" and "tensorrt"."""
        return str(self.manifest["kind"])

    @property
    def model_path(self) -> Path:
        """The ONNX file."""
        return self.path / str(self.manifest["model"])

    @property
    def library_path(self) -> Path | None:
        """The onnxruntime custom-op library, if one was built."""
        name = self.manifest.get("library")
        return self.path / str(name) if name else None

    @property
    def sites(self) -> dict[str, dict[str, Any]]:
        """Split sites by name: heads, shape, names of their tensors."""
        found: dict[str, dict[str, Any]] = self.manifest["sites"]
        return found

    @property
    def dense_sites(self) -> dict[str, str]:
        """Sites that stay dense, with the reason."""
        found: dict[str, str] = self.manifest["dense_sites"]
        return found

    @property
    def notes(self) -> list[str]:
        """What was left out, or is otherwise than one may think."""
        found: list[str] = self.manifest["notes"]
        return found

    def __str__(self) -> str:
        lines = [f"{self.kind} artifact {self.path}: {len(self.sites)} split sites"]
        lines += [f"  {name}: split" for name in self.sites]
        lines += [f"  {name}: dense ({reason})" for name, reason in self.dense_sites.items()]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Artifact:
        """Open a folder after checking every file against its hash.

        Raises:
            ArtifactError: no manifest, one of another version, or files that are missing, changed
                or lie outside the folder.
        """
        folder = Path(path)
        if folder.name == FILE_NAME:
            folder = folder.parent
        manifest = _read_manifest(folder)
        for name, expected in manifest["files"].items():
            file = folder / name
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise ArtifactError(f"{folder / FILE_NAME} lists {name!r}, outside its folder")
            if not file.is_file():
                raise ArtifactError(f"{file} is missing; copy the whole folder or export again")
            if hash_file(file) != expected["sha256"]:
                raise ArtifactError(
                    f"{file} does not match its hash in {FILE_NAME}: it was changed or damaged "
                    "after the export; export again or copy it anew"
                )
        return cls(folder, manifest)


def hash_file(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_manifest(
    folder: Path, *, kind: str, model: str, files: list[str], content: dict[str, Any]
) -> Artifact:
    """Hash `files` (relative to the folder), write manifest.json, and open the result."""
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "version": MANIFEST_VERSION,
        "kind": kind,
        "model": model,
        "split_version": SPLIT_VERSION,
        "versions": installed_versions(),
        "tolerances": TOLERANCES,
        "library": None,
        "notes": [],
        **content,
        "files": {
            name: {"sha256": hash_file(folder / name), "bytes": (folder / name).stat().st_size}
            for name in sorted(files)
        },
    }
    target = folder / FILE_NAME
    partial = target.with_name(f"{FILE_NAME}.{os.getpid()}.partial")
    partial.write_text(json.dumps(manifest, indent=2, sort_keys=False) + "\n", encoding="utf-8")
    os.replace(partial, target)
    return Artifact(folder, manifest)


def installed_versions() -> dict[str, str]:
    """Versions of the packages that shape an export, and the machine's architecture."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe_plan(plan: Any) -> dict[str, Any] | None:
    """What a manifest says about the plan that was baked in."""
    if plan is None:
        return None
    content = json.dumps(plan.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return {
        "sha256": hashlib.sha256(content.encode()).hexdigest(),
        "model": plan.model.class_name,
        "model_fingerprint": plan.model.fingerprint,
        "target_error": plan.target_error,
        "measured_error": plan.measured_error,
        "mean_density": plan.mean_density,
    }


def _read_manifest(folder: Path) -> dict[str, Any]:
    source = folder / FILE_NAME
    try:
        manifest = json.loads(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(
            f"{folder} is not an exported folder: {FILE_NAME} cannot be read "
            f"({error.strerror or error})"
        ) from error
    except ValueError as error:
        raise ArtifactError(f"{source} is not complete JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ArtifactError(f"{source} is not the manifest of a freqopt export")
    if manifest.get("version") != MANIFEST_VERSION:
        raise ArtifactError(
            f"{source} has version {manifest.get('version')!r}; this freqopt reads "
            f"{MANIFEST_VERSION}. Export again, or install the version that wrote it"
        )
    if manifest.get("split_version") != SPLIT_VERSION:
        raise ArtifactError(
            f"{source} has split_version {manifest.get('split_version')!r}; this freqopt runs "
            f"{SPLIT_VERSION}. Export again"
        )
    missing = [k for k in ("kind", "model", "files", "sites", "dense_sites") if k not in manifest]
    if missing or manifest["model"] not in manifest["files"]:
        raise ArtifactError(f"{source} is incomplete (missing {missing or manifest['model']})")
    return manifest
