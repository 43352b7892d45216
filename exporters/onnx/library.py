"""Builds `libfreqopt_ort.so`, the onnxruntime operator library, and checks one before it is loaded.

The sources lie in exporters/onnx/cpp; nothing but a C++17 compiler is needed, no headers of
onnxruntime and none of CUDA.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from freqopt.exporters.problems import ArtifactError, NotAvailableError
from freqopt.files import cache_folder

LIBRARY_NAME = "libfreqopt_ort.so"
LIBRARY_VERSION = "3"
OLDEST_ONNXRUNTIME = (1, 17)
SOURCES = Path(__file__).parent / "cpp"
FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden",
    "-Wall", "-Wextra", "-include", str(SOURCES / "old_systems.h"),
)  # fmt: skip
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

    table: the sources that hold its kernels, as `cubins.write_sources` writes them.

    Raises:
        NotAvailableError: no compiler, or one that fails on the sources, with its output.
    """
    sources = [*sorted(SOURCES.glob("*.cc")), *table]
    command = [
        compiler(), *FLAGS, f'-DFREQOPT_ORT_VERSION="{LIBRARY_VERSION}"',
        *(f"-D{name}" for name in defines), f"-I{SOURCES}", *map(str, sources), "-ldl",
    ]  # fmt: skip
    digest = hashlib.sha256(repr((command[1:], platform.machine())).encode())
    embedded = [c for s in table for c in sorted(s.parent.glob("*.cubin"))]
    for source in [*sources, *sorted(SOURCES.glob("*.h")), *embedded]:
        digest.update(source.read_bytes())
    cached = cache_folder() / "ort" / digest.hexdigest()[:24] / LIBRARY_NAME
    if not cached.is_file():
        _compile(command, cached)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / LIBRARY_NAME
    shutil.copyfile(cached, target)
    return target


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
    return {
        "attend_hopper": hopper, "attend": portable - unmapped, UNMAPPED: unmapped
    }  # fmt: skip
