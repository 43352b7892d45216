"""Builds `libfreqopt_ort.so`, the onnxruntime operator library, and checks one before it is loaded.

The sources lie in exporters/onnx/cpp; nothing but a C++17 compiler is needed, no headers of
onnxruntime and none of CUDA.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from freqopt.exporters.problems import ArtifactError, NotAvailableError
from freqopt.files import cache_folder, hash_of, write_atomically

logger = logging.getLogger(__name__)

LIBRARY_NAME = "libfreqopt_ort.so"
LIBRARY_VERSION = "3"
MOST_CACHED = 8
"""Libraries that the cache folder keeps, the latest ones."""
OLDEST_ONNXRUNTIME = (1, 17)
SOURCES = Path(__file__).parent / "cpp"
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-include",
    str(SOURCES / "old_systems.h"),
)
UNMAPPED = "attend (attend_hopper needs a driver of CUDA 12.0 or newer)"
ELF_MACHINES = {62: "x86_64", 183: "aarch64"}


def compiler() -> str:
    """Path of the C++ compiler: $CXX, g++ or c++.

    Raises:
        NotAvailableError: there is none.
    """
    for name in (os.environ.get("CXX"), "g++", "c++"):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise NotAvailableError(
        "no C++ compiler was found (looked for $CXX, g++ and c++), so libfreqopt_ort.so cannot be "
        "built; install g++, or export with library=False and let the function body run"
    )


def build_library(folder: Path, table: Sequence[Path], *, defines: tuple[str, ...] = ()) -> Path:
    """Compile the library into a folder and return its path; compiled objects are cached.

    table: the sources that hold its kernels, as `cubins.write_sources` writes them, with the header
    of the launches beside them.

    Raises:
        NotAvailableError: no compiler, or one that fails on the sources, with its output.
    """
    sources = [*sorted(SOURCES.glob("*.cc")), *table]
    command = [
        compiler(),
        *FLAGS,
        f'-DFREQOPT_ORT_VERSION="{LIBRARY_VERSION}"',
        *(f"-D{name}" for name in defines),
        f"-I{SOURCES}",
        *sorted({f"-I{path.parent}" for path in table}),
        *map(str, sources),
        "-ldl",
    ]
    cached = cache_folder() / "ort" / _digest(command, sources, table) / LIBRARY_NAME
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / LIBRARY_NAME
    if not _is_whole(cached):
        try:
            _compile(command, cached)
            write_atomically(_stated(cached), hash_of(cached))
            _forget_old(cached.parents[1])
        except OSError as error:
            logger.warning(
                "the cache folder %s cannot be written (%s): %s is built anew for every export, "
                "and needs trust=True to be run; set FREQOPT_CACHE to a folder that is yours",
                cached.parents[2],
                error.strerror or error,
                LIBRARY_NAME,
            )
            _compile(command, target)
            return target
    shutil.copyfile(cached, target)
    return target


def _digest(command: Sequence[str], sources: Sequence[Path], table: Sequence[Path]) -> str:
    """Name of what a command builds: of its options and the content of its files.

    Where the files lie is left out, as those of the kernels are in a new folder every time.
    """
    folders = {str(path.parent) for path in sources} | {
        str(path.parent.resolve()) for path in table
    }
    paths = {str(path) for path in sources} | {f"-I{path.parent}" for path in table}
    options = [word for word in command[1:] if word not in paths]
    digest = hashlib.sha256(repr((options, platform.machine())).encode())
    beside = {path.parent for path in table}
    embedded = [c for f in beside for end in ("*.cubin", "*.h") for c in sorted(f.glob(end))]
    for source in [*sources, *sorted(SOURCES.glob("*.h")), *embedded]:
        content = source.read_bytes()
        for folder in sorted(folders, key=len, reverse=True):
            content = content.replace(folder.encode(), b"")
        digest.update(repr((source.name, len(content))).encode() + content)
    return digest.hexdigest()[:24]


def _stated(cached: Path) -> Path:
    """The file beside a library in the cache that says its hash."""
    return cached.with_name(f"{cached.name}.sha256")


def _is_whole(cached: Path) -> bool:
    """Whether a library in the cache is what was put there; a damaged one is built anew."""
    try:
        return _stated(cached).read_text() == hash_of(cached)
    except (OSError, UnicodeDecodeError):
        return False


def _forget_old(folder: Path) -> None:
    """Keep the latest libraries of the cache only."""
    found = sorted(folder.glob(f"*/{LIBRARY_NAME}"), key=lambda p: p.stat().st_mtime, reverse=True)
    for path in found[MOST_CACHED:]:
        with contextlib.suppress(OSError):
            shutil.rmtree(path.parent)


def built_here(digest: str) -> Path | None:
    """The library with a SHA-256 (hexadecimal) among those built on this machine, if there is."""
    for path in (cache_folder() / "ort").glob(f"*/{LIBRARY_NAME}"):
        with contextlib.suppress(OSError):
            if hash_of(path) == digest:
                return path
    return None


def _compile(command: list[str], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        partial = Path(scratch) / LIBRARY_NAME
        done = subprocess.run(
            [*command, "-o", str(partial)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise NotAvailableError(
                f"{command[0]} could not build {LIBRARY_NAME} (exit {done.returncode}); its last "
                f"words: {done.stderr[-2000:]}"
            )
        os.replace(partial, target)


def check_library(path: Path) -> None:
    """Refuse a file that this machine cannot load.

    Raises:
        ArtifactError: not an ELF library, or one for another architecture.
    """
    try:
        head = path.read_bytes()[:20]
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror or error}") from error
    if head[:4] != b"\x7fELF" or len(head) < 20:
        raise ArtifactError(f"{path} is not a Linux shared library")
    built_for = ELF_MACHINES.get(int.from_bytes(head[18:20], "little"), "another architecture")
    if built_for != platform.machine():
        raise ArtifactError(
            f"{path} was built for {built_for} and this machine is {platform.machine()}; build it "
            "here by exporting again, or run without the library"
        )


def attend_counts(library: Path) -> dict[str, int]:
    """How often each kernel of a library has attended on a GPU, in this process.

    Keys: "attend_hopper"; "attend", the portable one; and UNMAPPED, the portable one where that for
    Hopper would have served.

    Raises:
        ArtifactError: the library was built by a version of freqopt that does not count.
    """
    counts = (ctypes.c_int64 * 3)()
    try:
        ctypes.CDLL(str(library)).freqopt_ort_attend_counts(counts)
    except (OSError, AttributeError) as error:
        raise ArtifactError(
            f"{library} cannot be asked what it ran ({error}); export again with this freqopt"
        ) from error
    hopper, portable, unmapped = counts
    return {"attend_hopper": hopper, "attend": portable - unmapped, UNMAPPED: unmapped}
