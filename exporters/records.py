"""What a manifest must say, checked field by field: it may come from a stranger.

Fields that nothing reads are taken as they are; those that are read have a type and a range here,
so that no reader meets another.
"""

from __future__ import annotations

from pathlib import PurePosixPath, PureWindowsPath
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from freqopt.config import SPLIT_VERSION

FORMAT = "freqopt-artifact"
MANIFEST_VERSION = 1

MOST_HEADS = 1 << 16


class Record(BaseModel):
    """Base of all: what is read is strict, what is not may be there."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)


def _inside(name: str) -> str:
    """A file's name if it is one inside the folder, in any system's way of writing names."""
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    plain = name and name.isprintable() and "\\" not in name and len(name) <= 1024
    if not plain or posix.is_absolute() or windows.drive or ".." in posix.parts:
        raise ValueError(f"{name!r} is no name of a file inside the folder")
    if str(posix) != name:
        raise ValueError(f"{name!r} is not written as {str(posix)!r}")
    return name


FileName = Annotated[str, AfterValidator(_inside)]


class FileRecord(Record):
    """A file of the folder. sha256: hexadecimal, bytes: its size."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class SiteRecord(Record):
    """A site that was split. budget: name of the model's initialiser. length: see `lengths`."""

    budget: str
    heads: int = Field(ge=1, le=MOST_HEADS)
    length: int | str | None = None


class PlanRecord(Record):
    """The plan that was baked in. lengths: least and most tokens that it serves, by site."""

    model: str
    model_fingerprint: str
    lengths: dict[str, Annotated[list[int], Field(min_length=2, max_length=2)]] = {}


class Manifest(Record):
    """manifest.json; fields as `write_manifest` writes them.

    Attributes:
        library: the operator library's file, None without one; a listed file like the model.
        files: every file of the folder but the manifest, by name.
    """

    format: Literal["freqopt-artifact"]
    version: Literal[1]
    split_version: int
    kind: Literal["onnx", "tensorrt"]
    model: FileName
    library: FileName | None = None
    opset: int | None = None
    sites: dict[str, SiteRecord]
    dense_sites: dict[str, str]
    notes: list[str] = []
    plan: PlanRecord | None = None
    files: dict[FileName, FileRecord]

    @model_validator(mode="after")
    def _check(self) -> Manifest:
        if self.split_version != SPLIT_VERSION:
            raise ValueError(f"split_version {self.split_version} is not {SPLIT_VERSION}")
        for name in (self.model, self.library):
            if name is not None and name not in self.files:
                raise ValueError(f"{name} is not among the files, so it has no hash")
        return self
