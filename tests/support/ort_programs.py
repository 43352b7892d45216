"""The library's launches without a GPU: a program that launches, a made-up driver that records."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from freqopt.exporters.onnx import library as ort_library
from freqopt.exporters.onnx.cubins import Compiled, write_sources
from freqopt.exporters.onnx.library import SOURCES

HERE = Path(__file__).parent
FLAGS = ("-std=c++17", "-O1", f"-I{SOURCES}")


@dataclass(frozen=True)
class Programs:
    """launch: the program; driver: what it opens as libcuda; counts: arguments of each symbol."""

    launch: Path
    driver: Path
    counts: str

    def run(
        self,
        *arguments: float,
        capability: int = 90,
        driver: Path | None = None,
        **environment: str,
    ) -> list[list[str]]:
        """Lines of the program and the driver, in words; arguments: as in ort_launch.cc."""
        given = self.environment(capability, driver) | environment
        done = subprocess.run(
            [str(self.launch), *map(str, arguments)],
            env=given,
            capture_output=True,
            text=True,
            check=True,
        )
        return [line.split(" ") for line in done.stdout.splitlines()]

    def environment(self, capability: int, driver: Path | None = None) -> dict[str, str]:
        """Of a process that opens the made-up driver for the driver."""
        return {
            **os.environ,
            "FREQOPT_LIBCUDA": str(driver or self.driver),
            "FAKE_COUNTS": self.counts,
            "FAKE_CAPABILITY": str(capability),
        }


def build_driver(path: Path, *flags: str) -> Path:
    """Compile the made-up driver."""
    source = str(HERE / "ort_driver.cc")
    command = [ort_library.compiler(), *FLAGS, *flags, "-shared", "-fPIC", source, "-o", str(path)]
    subprocess.run(command, check=True)
    return path


def build_programs(table: Sequence[Compiled], folder: Path) -> Programs:
    """Compile both, with a table of kernels whose files lie in `folder`."""
    driver, program = build_driver(folder / "driver.so"), folder / "launch"
    ours = [path for path in sorted(SOURCES.glob("*.cc")) if path.name != "library.cc"]
    sources = [HERE / "ort_launch.cc", *ours, *write_sources(table, folder)]
    flags = (*FLAGS, f"-I{folder}")
    command = [ort_library.compiler(), *flags, *map(str, sources), "-ldl", "-o", str(program)]
    subprocess.run(command, check=True)
    counts = ";".join(f"{row.symbol}:{len(row.arguments)}" for row in table)
    return Programs(program, driver, counts)
