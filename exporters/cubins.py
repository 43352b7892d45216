"""Compiles the kernels for GPUs that need not be here, and writes them as a table for the library.

One entry per compute capability, element type, head dimension and variant. Runs in a process of its
own, because Triton's interpreter mode is a property of the process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from freqopt.exporters.problems import ExportError, NotAvailableError

CAPABILITIES = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
"""Compute capabilities that kernels can be compiled for: bytes of shared memory per program."""

DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
DTYPE_CODES = {"float32": 0, "float16": 1, "bfloat16": 2}

F32 = (
    "budget limits threshold key_mean value_mean spread sums first_order fine_var "
    "key_shift score pooled peak mass peak_out mass_out exact_out missing_out logit logit_out "
    "coefficients probe_error"
).split()
NATIVE = (
    "query key value key_out value_out key_var text_key text_value low_key low_value low_order "
    "fine_key fine_value fine_order out"
).split()
POINTERS = {
    **dict.fromkeys(F32, "*fp32"), "mass_term": "*fp16", "term": "*fp16",
    "term_out": "*fp16", "order": "*i64", "route": "*i8",
    "exact_list": "*i32", "mid_list": "*i32", "counts": "*i32", "key_mask": "*i1",
}  # fmt: skip
"""Types of pointer arguments by name; those of NATIVE are the tensors' own."""


@dataclass(frozen=True)
class Variant:
    """What a set of kernels is compiled for. masked: with a key mask."""

    capability: int
    dtype: str
    head_dim: int
    mid_band: bool
    masked: bool


@dataclass(frozen=True)
class Compiled:
    """One kernel of the table; arguments: names of the launch arguments in order."""

    kernel: str
    symbol: str
    variant: Variant
    arguments: tuple[str, ...]
    tile: int
    warps: int
    shared: int
    file: str


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
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    request = json.dumps([asdict(v) for v in variants])
    done = subprocess.run(
        [sys.executable, "-m", "freqopt.exporters.cubins", str(folder)],
        input=request, capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    if done.returncode:
        raise NotAvailableError(
            f"the kernels could not be compiled; Triton's last words: {done.stderr[-1500:]}"
        )
    rows = json.loads((folder / "table.json").read_text())
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
    """The table as sources of the library: an assembler file with the cubins and a C++ index."""
    assembly, entries, externs = ['.section .rodata, "a", @progbits'], [], []
    for i, row in enumerate(table):
        path = json.dumps(str((folder / row.file).resolve()))
        assembly += [
            f".global freqopt_cubin_{i}", f".hidden freqopt_cubin_{i}", ".balign 64",
            f"freqopt_cubin_{i}:", f".incbin {path}",
        ]  # fmt: skip
        externs.append(
            f'extern "C" const unsigned char freqopt_cubin_{i}[] '
            '__attribute__((visibility("hidden")));'
        )
        v = row.variant
        values = (
            json.dumps(row.kernel), json.dumps(row.symbol), json.dumps(",".join(row.arguments)),
            v.capability, DTYPE_CODES[v.dtype], v.head_dim, int(v.mid_band), int(v.masked),
            row.tile, row.warps, row.shared, f"freqopt_cubin_{i}",
        )  # fmt: skip
        entries.append("    {" + ", ".join(map(str, values)) + "},")
    assembly.append('.section .note.GNU-stack, "", @progbits')
    index = [
        '#include "split_cuda.h"', *externs, "namespace freqopt {",
        "const Cubin kCubins[] = {", *entries, "};",
        f"const int kCubinCount = {len(table)};", "}  // namespace freqopt",
    ]  # fmt: skip
    (folder / "cubins.S").write_text("\n".join(assembly) + "\n")
    (folder / "cubins.cc").write_text("\n".join(index) + "\n")
    return [folder / "cubins.S", folder / "cubins.cc"]


def _kernels(variant: Variant) -> Iterator[tuple[str, Any, dict[str, Any], dict[str, int], int]]:
    """(name, function, constexprs, launch options, tile rows) of everything one call launches."""
    import torch

    from freqopt.kernels import triton_attend, triton_glue, triton_prepare, triton_split

    dim = variant.head_dim
    shared = CAPABILITIES[variant.capability]
    launch = triton_split.launch_for(getattr(torch, variant.dtype), dim, shared)
    padded = triton_split.padded_dim(dim)
    size = {"D": dim, "DP": padded}
    mid, mask = {"MID": variant.mid_band}, {"HAS_MASK": variant.masked}
    precise, fast = {"PRECISION": launch.fit_precision}, {"PRECISION": launch.precision}
    one = {"num_warps": 4, "num_stages": 1}
    glue, prepare = triton_glue, triton_prepare
    yield "limits", glue.limits_kernel, mid, {"num_warps": 1, "num_stages": 1}, 0
    yield (
        "summarise", prepare.summarise_kernel, {**size, **mid, "GROUP": triton_split.GROUP},
        {"num_warps": 8, "num_stages": launch.summary_stages}, triton_split.GROUP,
    )  # fmt: skip
    for name, fine in (("first", False), ("fine_first", True))[: 1 + variant.mid_band]:
        yield (
            name, prepare.first_order_kernel,
            {**size, "GROUP": triton_split.ORDER_GROUP, "FINE": fine},
            {"num_warps": 8, "num_stages": launch.summary_stages}, triton_split.ORDER_GROUP,
        )  # fmt: skip
    centred = triton_split.CENTRE_BLOCKS
    yield (
        "centre",
        glue.centre_kernel,
        {**size, "BJ": centred},
        {"num_warps": 8, "num_stages": 1},
        centred,
    )
    yield "order", glue.order_kernel, {"CELLS": 1024}, one, 1024
    tiles, blocks = launch.score_tiles, launch.score_blocks
    yield (
        "score", prepare.score_kernel, {**size, **fast, "TILES": tiles, "BJ": blocks},
        {"num_warps": launch.score_warps, "num_stages": launch.score_stages}, tiles,
    )  # fmt: skip
    yield "route", prepare.route_kernel, {**mid, "BJ": 1024}, one, 0
    yield (
        "probe", triton_attend.probe_kernel,
        {**size, **mask, **fast, "BP": launch.probe_rows},
        {"num_warps": 4, "num_stages": 2}, launch.probe_rows,
    )  # fmt: skip
    if variant.mid_band:
        yield "pool", glue.pool_kernel, size, one, 0
    rows, columns = launch.fit_rows, launch.fit_columns
    fit = {**size, **mid, **precise, "BP": rows, "BJ": columns}
    yield "merge", glue.merge_kernel, {**size, "BP": triton_split.MERGE_ROWS}, one, 4
    yield "estimate", glue.estimate_kernel, fit, one, columns
    yield "fit", glue.fit_kernel, fit, {"num_warps": 8, "num_stages": 1}, rows
    yield (
        "attend", triton_attend.attend_kernel,
        {**size, **mid, **mask, **fast, "BM": launch.rows, "TEXT": True, "RAGGED": True,
         "WIDE": launch.wide},
        {"num_warps": launch.warps, "num_stages": launch.stages}, launch.rows,
    )  # fmt: skip
    yield "text", glue.text_kernel, {**size, **mask, **fast, "BM": 64}, one, 64


def _compile(variant: Variant, folder: Path) -> Iterator[Compiled]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    own = DTYPES[variant.dtype]
    for name, kernel, constants, options, tile in _kernels(variant):
        signature: dict[str, str] = {}
        attributes: dict[tuple[int, ...], list[list[Any]]] = {}
        for i, argument in enumerate(kernel.arg_names):
            aligned = False
            if argument in constants:
                signature[argument] = "constexpr"
            elif argument in NATIVE or argument in POINTERS:
                signature[argument] = POINTERS.get(argument, f"*{own}")
                aligned = argument != "key_mask"
            else:
                signature[argument] = "fp32" if argument == "scale" else "i32"
                # The strides are multiples of the head dim: tensors arrive contiguous.
                aligned = argument.startswith("stride_") and variant.head_dim % 16 == 0
                aligned = aligned and argument != "stride_mb"
            if aligned:
                attributes[(i,)] = [["tt.divisibility", 16]]
        made = triton.compile(
            ASTSource(kernel, signature, constants, attributes),
            target=GPUTarget("cuda", variant.capability, 32),
            options=options,
        )
        if getattr(made.metadata, "global_scratch_size", 0):
            raise RuntimeError(f"{name} needs global scratch memory, which nobody would give it")
        flags = f"{'m' if variant.mid_band else ''}{'k' if variant.masked else ''}"
        stem = f"{name}_sm{variant.capability}_{variant.dtype}_d{variant.head_dim}{flags}"
        (folder / f"{stem}.cubin").write_bytes(made.asm["cubin"])
        yield Compiled(
            kernel=name,
            symbol=made.metadata.name,
            variant=variant,
            arguments=tuple(a for a in kernel.arg_names if a not in constants),
            tile=tile,
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
