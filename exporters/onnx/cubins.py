"""Compiles the kernels for GPUs that need not be here, and writes them as a table for the library.

One entry per compute capability, element type, head dimension and variant. Runs in a process of its
own, because Triton's interpreter mode is a property of the process.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from freqopt.exporters.child import run_module
from freqopt.exporters.problems import ExportError, NotAvailableError
from freqopt.kernels.variant import CAPABILITIES, DTYPES, Variant

DTYPE_CODES = {"float32": 0, "float16": 1, "bfloat16": 2}


@dataclass(frozen=True)
class Compiled:
    """One kernel of the table.

    arguments: names of the launch arguments in order. grid: of its axes, separated by commas: an
    argument, and behind a slash the part of it that one program has.
    """

    kernel: str
    symbol: str
    variant: Variant
    arguments: tuple[str, ...]
    grid: str
    warps: int
    shared: int
    file: str

    def describe(self) -> dict[str, Any]:
        """What a manifest says about the kernel; shared: bytes."""
        return {
            "kernel": self.kernel,
            **asdict(self.variant),
            "warps": self.warps,
            "shared": self.shared,
        }


def compile_table(variants: Sequence[Variant], folder: Path) -> list[Compiled]:
    """Compile every kernel of the variants into `folder`; a table for `write_sources`.

    Raises:
        ExportError: a capability or type that is not supported, or a kernel that needs scratch.
        NotAvailableError: triton is missing or its compiler fails.
    """
    for variant in variants:
        if variant.capability not in CAPABILITIES or variant.dtype not in DTYPES:
            raise ExportError(
                f"no kernels for compute capability {variant.capability} and {variant.dtype}; "
                f"supported: {', '.join(map(str, CAPABILITIES))} and {', '.join(DTYPES)}"
            )
        if variant.head_dim % 8 or not 8 <= variant.head_dim <= 256:
            raise ExportError(
                f"no kernels for head_dim {variant.head_dim}; supported: multiples of 8 to 256"
            )
    folder.mkdir(parents=True, exist_ok=True)
    request = json.dumps([asdict(v) for v in variants])
    done = run_module("freqopt.exporters.onnx.cubins", folder, request)
    if done.returncode:
        raise NotAvailableError(
            f"the kernels could not be compiled; Triton's last words: {done.stderr[-1500:]}"
        )
    rows = json.loads((folder / "table.json").read_text("utf-8"))
    table = [
        Compiled(**{**r, "variant": Variant(**r["variant"]), "arguments": tuple(r["arguments"])})
        for r in rows
    ]
    for row in table:
        if row.shared > CAPABILITIES[row.variant.capability]:
            raise ExportError(
                f"the {row.kernel} kernel for {row.variant.dtype} and head_dim "
                f"{row.variant.head_dim} needs {row.shared} bytes of shared memory and sm_"
                f"{row.variant.capability} has {CAPABILITIES[row.variant.capability]}; export "
                "without that capability, or the model in half precision"
            )
    return table


def write_sources(table: Sequence[Compiled], folder: Path) -> list[Path]:
    """The table as sources of the library: an assembler file with the cubins and a C++ index.

    Beside them the header of the launches, launch_table.h.
    """
    from freqopt.exporters.onnx.launch_table import HEADER_NAME, launch_table, passed_to

    (folder / HEADER_NAME).write_text(launch_table(), "utf-8")
    assembly, entries, externs = ['.section .rodata, "a", @progbits'], [], []
    for i, row in enumerate(table):
        path = json.dumps(str((folder / row.file).resolve()), ensure_ascii=False)
        assembly += [
            f".global freqopt_cubin_{i}",
            f".hidden freqopt_cubin_{i}",
            ".balign 64",
            f"freqopt_cubin_{i}:",
            f".incbin {path}",
        ]
        externs.append(
            f'extern "C" const unsigned char freqopt_cubin_{i}[] '
            '__attribute__((visibility("hidden")));'
        )
        v = row.variant
        values = (
            json.dumps(row.kernel),
            json.dumps(row.symbol),
            json.dumps(",".join(passed_to(row.kernel, row.arguments))),
            json.dumps(row.grid),
            v.capability,
            DTYPE_CODES[v.dtype],
            v.head_dim,
            int(v.masked),
            row.warps,
            row.shared,
            f"freqopt_cubin_{i}",
        )
        entries.append("    {" + ", ".join(map(str, values)) + "},")
    assembly.append('.section .note.GNU-stack, "", @progbits')
    index = [
        '#include "launches.h"',
        *externs,
        "namespace freqopt {",
        "const Cubin kCubins[] = {",
        *entries,
        "};",
        f"const int kCubinCount = {len(table)};",
        "}  // namespace freqopt",
    ]
    for name, lines in (("cubins.S", assembly), ("cubins.cc", index)):
        (folder / name).write_text("\n".join(lines) + "\n", "utf-8", "surrogateescape")
    return [folder / "cubins.S", folder / "cubins.cc"]


def _compile(variant: Variant, folder: Path) -> Iterator[Compiled]:
    from freqopt.exporters.onnx.launch_arguments import launch_arguments
    from freqopt.kernels.specialise import (
        compile_specialised,
        hopper_specialisation,
        specialisations,
    )

    fast = hopper_specialisation(variant)
    for given in [*specialisations(variant), *([fast] if fast else [])]:
        made = compile_specialised(given, variant)
        flag = "k" if variant.masked else ""
        stem = f"{given.name}_sm{variant.capability}_{variant.dtype}_d{variant.head_dim}{flag}"
        (folder / f"{stem}.cubin").write_bytes(made.asm["cubin"])
        yield Compiled(
            kernel=given.name,
            symbol=made.metadata.name,
            variant=variant,
            arguments=launch_arguments(given, made),
            grid=",".join(f"{extent}/{part}" for extent, part in given.axes),
            warps=made.metadata.num_warps,
            shared=made.metadata.shared,
            file=f"{stem}.cubin",
        )


def main() -> None:
    """Read variants as JSON from standard input, compile them into the folder given."""
    folder = Path(sys.argv[1])
    variants = [Variant(**row) for row in json.load(sys.stdin)]
    table = [asdict(row) for variant in variants for row in _compile(variant, folder)]
    (folder / "table.json").write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
