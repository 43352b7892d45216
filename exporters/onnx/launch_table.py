"""What the library is told of a call's launches: their order, memory between them, arguments.

All of it is read from the declarations that PyTorch's launches read. Grids are in the table of
kernels, as they depend on tiles.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from freqopt.config import KEY_BLOCK, QUERY_TILE
from freqopt.kernels.content_order import LEAF, RANK, SAMPLES, SEGMENT_SAMPLES
from freqopt.kernels.launches import KernelLaunch
from freqopt.kernels.order_launches import LEVELS, MOMENT_PARTS
from freqopt.kernels.specialise import NATIVE, POINTERS
from freqopt.kernels.split_launches import (
    DERIVED,
    MAX_PARTS,
    PROBE_PROGRAMS,
    SHAPES,
    SPLIT,
    TOTAL_COLS,
)

HEADER_NAME = "launch_table.h"

NUMBERS = {
    "kKeyBlock": KEY_BLOCK,
    "kQueryTile": QUERY_TILE,
    "kTotalCols": TOTAL_COLS,
    "kProbePrograms": PROBE_PROGRAMS,
    "kMaxParts": MAX_PARTS,
    "kRank": RANK,
    "kSamples": SAMPLES,
    "kLeaf": LEAF,
    "kSegmentSamples": SEGMENT_SAMPLES,
    "kMomentParts": MOMENT_PARTS,
    "kLargestHalved": max(LEVELS),
}
"""What the library counts with beside the tables."""

BYTES = {"*fp32": 4, "*fp16": 2, "*i32": 4, "*i8": 1}


def launch_table() -> str:
    """Text of the header."""
    lines = [
        "// Written by freqopt.exporters.onnx.launch_table of what freqopt.kernels declares.",
        "#pragma once",
        '#include "launches.h"',
        "namespace freqopt {",
        *(f"constexpr int64_t {name} = {value};" for name, value in NUMBERS.items()),
        "constexpr Derived kDerived[] = {",
        *(f"    {{{_text(name)}, {_text(of)}, {part}}}," for name, (of, part) in DERIVED.items()),
        "};",
        "constexpr Buffer kBuffers[] = {",
        *(_buffer(name) for name in SHAPES),
        "};",
        "constexpr Step kSteps[] = {",
        *map(_step, SPLIT),
        "};",
        "}  // namespace freqopt",
    ]
    return "\n".join(lines) + "\n"


def passed_to(kernel: str, arguments: Sequence[str]) -> list[str]:
    """Names of what a kernel of the library gets as its arguments."""
    declared = {launch.name: launch.passed for launch in SPLIT}
    passed = declared.get(kernel.removesuffix("_other"), {})
    return [passed.get(argument, argument) for argument in arguments]


def _text(word: str) -> str:
    return json.dumps(word)


def _buffer(name: str) -> str:
    size = 0 if name in NATIVE else BYTES[POINTERS[name]]
    extents = [x for x in SHAPES[name] if isinstance(x, str)]
    times = math.prod(x for x in SHAPES[name] if isinstance(x, int))
    return f"    {{{_text(name)}, {size}, {times}, {{{', '.join(map(_text, extents))}}}}},"


def _step(launch: KernelLaunch) -> str:
    of_tokens = "true" if "OWN" in launch.of_call else "false"
    return f"    {{{_text(launch.name)}, {_text(launch.when)}, {of_tokens}}},"
