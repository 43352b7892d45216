"""`manifest.json`: what an exported folder holds, how it was made, and hashes that show damage.

Written last by every exporter and checked first by every runner, which open no file that it does
not list. Plain JSON, no code. Hashes say nothing about who made a folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from freqopt.config import SPLIT_VERSION
from freqopt.exporters.lengths import bounds
from freqopt.exporters.problems import ArtifactError
from freqopt.exporters.records import FORMAT, MANIFEST_VERSION, FileRecord, Manifest
from freqopt.files import check_regular, hash_of, read_bounded, write_atomically
from freqopt.shown import shown

FILE_NAME = "manifest.json"
NEXT_NAME = "manifest.next.json"
"""Beside it while a file is exchanged."""

MAX_MANIFEST_BYTES = 16 * 2**20
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
        found: list[str] = self.manifest.get("notes", [])
        return found

    def __str__(self) -> str:
        lines = [f"{self.kind} artifact {self.path}: {len(self.sites)} split sites"]
        lines += [f"  {shown(name)}: split" for name in self.sites]
        lines += [f"  {shown(n)}: dense ({shown(why)})" for n, why in self.dense_sites.items()]
        lines += [f"  note: {shown(note)}" for note in self.notes]
        return "\n".join(lines)

    def file(self, name: str) -> Path:
        """A file of the folder that the manifest lists, for whoever opens it.

        Raises:
            ArtifactError: it is not listed, so `load` has not looked at it.
        """
        if name not in self.manifest["files"]:
            raise ArtifactError(
                f"{self.path / name} is not among the files of {FILE_NAME}, so it is not opened; "
                "export again, or build it with the folder's own build_engine.py"
            )
        return self.path / name

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Artifact:
        """Open a folder after checking every file against its hash.

        Raises:
            ArtifactError: no manifest, one of another version or form, or files that are missing,
                changed, no regular files or outside the folder.
        """
        folder = Path(path)
        if folder.name == FILE_NAME:
            folder = folder.parent
        try:
            return cls(folder, _checked(folder, FILE_NAME))
        except ArtifactError:
            if not os.path.lexists(folder / NEXT_NAME):
                raise
            # An exchange was interrupted after the file, before the manifest.
            with contextlib.suppress(ArtifactError):
                return cls(folder, _checked(folder, NEXT_NAME))
            raise


def _checked(folder: Path, manifest_name: str) -> dict[str, Any]:
    """The content of a folder's manifest, after checking every file against it."""
    content, manifest = _read_manifest(folder, manifest_name)
    for name, expected in manifest.files.items():
        _check_file(folder, name, expected)
    return content


def _check_file(folder: Path, name: str, expected: FileRecord) -> None:
    file = folder / name
    if not os.path.lexists(file):
        raise ArtifactError(f"{file} is missing; copy the whole folder or export again")
    if Path(os.path.realpath(file)) != Path(os.path.realpath(folder)) / name:
        raise ArtifactError(f"{file} is a link to somewhere else; copy the file itself there")
    try:
        check_regular(file)
        same = file.stat().st_size == expected.bytes and hash_of(file) == expected.sha256
    except OSError as error:
        raise ArtifactError(f"cannot read {file}: {error.strerror or error}") from error
    if not same:
        raise ArtifactError(
            f"{file} does not match its hash in {FILE_NAME}: it was changed or damaged "
            "after the export; export again or copy it anew"
        )


def write_manifest(
    folder: Path, *, kind: str, model: str, files: list[str], content: dict[str, Any]
) -> Artifact:
    """Hash `files` (relative to the folder), write manifest.json, and open the result.

    Raises:
        FileError: it cannot be written.
    """
    manifest = manifest_of(folder, kind=kind, model=model, files=files, content=content)
    write_atomically(folder / FILE_NAME, _text(manifest))
    (folder / NEXT_NAME).unlink(missing_ok=True)
    return Artifact(folder, manifest)


def _text(manifest: dict[str, Any]) -> str:
    return json.dumps(manifest, indent=2, sort_keys=False) + "\n"


def announce(folder: Path, manifest: dict[str, Any]) -> None:
    """Lay a manifest beside the folder's own, before a file is replaced by the one it is for.

    Where an interruption leaves the new file with the old manifest, `Artifact.load` takes this one.
    """
    write_atomically(folder / NEXT_NAME, _text(manifest))


def adopt(folder: Path, manifest: dict[str, Any]) -> Artifact:
    """Let what was announced be the folder's manifest."""
    os.replace(folder / NEXT_NAME, folder / FILE_NAME)
    return Artifact(folder, manifest)


def manifest_of(
    folder: Path,
    *,
    kind: str,
    model: str,
    files: list[str],
    content: dict[str, Any],
    instead: Mapping[str, Path] | None = None,
) -> dict[str, Any]:
    """What manifest.json says. instead: files that will take the places of some."""
    places = {name: (instead or {}).get(name, folder / name) for name in sorted(files)}
    return {
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
            name: {"sha256": hash_of(place), "bytes": place.stat().st_size}
            for name, place in places.items()
        },
    }


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
        "lengths": {
            name: list(bounds(plan, name))
            for name, site in plan.sites.items()
            if site.decision == "split"
        },
    }


def _read_manifest(folder: Path, name: str) -> tuple[dict[str, Any], Manifest]:
    """The content of a manifest, as it is and as what it must say."""
    source = folder / name
    try:
        content = json.loads(read_bounded(source, MAX_MANIFEST_BYTES))
    except OSError as error:
        raise ArtifactError(
            f"{folder} is not an exported folder: {FILE_NAME} cannot be read "
            f"({error.strerror or error})"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{source} is not complete JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ArtifactError(f"{source} is not the manifest of a freqopt export")
    if content.get("version") != MANIFEST_VERSION:
        raise ArtifactError(
            f"{source} has version {content.get('version')!r}; this freqopt reads "
            f"{MANIFEST_VERSION}. Export again, or install the version that wrote it"
        )
    if content.get("split_version") != SPLIT_VERSION:
        raise ArtifactError(
            f"{source} has split_version {content.get('split_version')!r}; this freqopt runs "
            f"{SPLIT_VERSION}. Export again"
        )
    try:
        return content, Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the manifest"
        raise ArtifactError(
            f"{source} is not as freqopt writes it: {where}: {first['msg']}; export again"
        ) from error
