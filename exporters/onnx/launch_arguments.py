"""What the library passes to a compiled kernel, checked against what the kernel says it takes.

The library knows arguments by name, so a launch is right if names, order and sizes are. Sizes come
from the kernel's own parameter list; a Triton that lays arguments out otherwise is refused here
instead of being launched wrongly on somebody's GPU.
"""

from __future__ import annotations

import re
from typing import Any

from freqopt.kernels.hopper.attend import HALF
from freqopt.kernels.specialise import DESCRIPTORS, NATIVE, POINTERS, Specialised

MAP_PARTS = {"map": 128, "extent0": 4, "extent1": 4, "stride0": 8, "stride1": 8}
"""A tensor descriptor as launched: the driver's map, extents and strides in elements; bytes."""

SCRATCH = (8, 8)
"""Two pointers that Triton appends to every kernel; ours need no scratch, so both are null."""

SWIZZLE_128 = 3  # CU_TENSOR_MAP_SWIZZLE_128B
PARAMETER = re.compile(r"\.param (?:\.align \d+ )?\.(b8|[fu]32|[fu]64)[^\n]*?(?:\[(\d+)\])?,?\n")


def launch_arguments(given: Specialised, made: Any) -> tuple[str, ...]:
    """Names of the launch arguments of a compiled kernel, in order; scratch pointers apart.

    A descriptor x becomes x.map, x.extent0, x.extent1, x.stride0, x.stride1.

    Raises:
        RuntimeError: the compiled kernel takes something else.
    """
    names: list[str] = []
    sizes: list[int] = []
    maps = 0
    for argument in given.function.arg_names:
        if argument in given.constants:
            continue
        if given.function.is_gluon() and argument in DESCRIPTORS:
            maps += 1
            names += [f"{argument}.{part}" for part in MAP_PARTS]
            sizes += MAP_PARTS.values()
        else:
            names.append(argument)
            sizes.append(8 if argument in POINTERS or argument in NATIVE else 4)
    found = parameter_sizes(made.asm["ptx"])
    if found != [*sizes, *SCRATCH]:
        raise RuntimeError(
            f"this Triton compiled {given.name} to parameters of {found} bytes and the library "
            f"passes {[*sizes, *SCRATCH]}; use a Triton between 3.6 and 3.7"
        )
    described = getattr(made.metadata, "tensordesc_meta", None) or []
    box = [HALF.value, HALF.value]
    if len(described) != maps or any(
        (d["swizzle"], d["elem_size"], d["block_size"], d["fp4_padded"])
        != (SWIZZLE_128, 2, box, False)
        for d in described
    ):
        raise RuntimeError(
            f"this Triton wants tensor maps of {described} for {given.name}, and the library makes "
            f"{maps} with boxes of {box}, two-byte elements and swizzle {SWIZZLE_128}"
        )
    return tuple(names)


def parameter_sizes(ptx: str) -> list[int]:
    """Bytes of each parameter of the one entry point in a PTX text."""
    start = ptx.index("(", ptx.index(".entry"))
    listing = ptx[start : ptx.index(")", start)]
    return [
        int(count) if kind == "b8" else int(kind[1:]) // 8
        for kind, count in PARAMETER.findall(listing)
    ]
