"""The split as a chain of one-kernel nodes: which tensors and integers each kernel takes and makes.

What a plugin compiled ahead of time can carry: one launch per node, workspace as node outputs. The
launches are those that `freqopt.kernels.split_launches` declares.
Everything but the batch is known when a file with a constant token order is exported, so extents
are integers here, or `Batch(n)` for n times the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil
from typing import NamedTuple

from freqopt.kernels.launches import KernelLaunch
from freqopt.kernels.specialise import NATIVE, POINTERS, optional_arguments
from freqopt.kernels.split_launches import DERIVED, SHAPES, SPLIT, TOTAL_COLS, key_ranges
from freqopt.kernels.tiles import padded_dim

PAIRS = {"pairs": "heads", "kv_pairs": "kv_heads"}
"""Axes of grids that are the batch times something."""

SITE = {"key_order": "order"}
"""Tensors of a site that launches call otherwise: keys and queries have one order here."""


class Batch(NamedTuple):
    """`times` * the batch, which alone may be free."""

    times: int


Extent = int | Batch


@dataclass(frozen=True)
class Call:
    """One site's extents and attributes, but for the batch. tokens: of the video."""

    heads: int
    kv_heads: int
    length: int
    dim: int
    tokens: int
    text_before: int
    density: float
    probes: int


@dataclass(frozen=True)
class Output:
    """A tensor that a node makes: (B, *shape). rewrites: the input whose memory it is, if any."""

    name: str
    argument: str
    shape: tuple[int, ...]
    rewrites: str | None = None


@dataclass(frozen=True)
class Step:
    """One node. inputs: kernel argument -> tensor; grid: per axis, an extent or (tile, count).

    A grid axis ("BM", n) is ceil(n / the kernel's constant BM). unread: tensors that are inputs for
    their shape only.
    """

    kernel: str
    inputs: dict[str, str]
    outputs: tuple[Output, ...]
    integers: dict[str, int]
    grid: tuple[Extent | tuple[str, int], ...]
    unread: tuple[str, ...] = field(default=())


def exact_pairs(density: float, pairs: int) -> int:
    """How many of a head's pairs a density makes exact; as in exporters/onnx/cpp/split_cuda.h."""
    share = density * pairs
    return min(max(ceil(share - share * 1e-7), 1), pairs)


def extents_of(call: Call) -> dict[str, int]:
    """Integers that the kernels are given, and what they are derived from, by name."""
    c, text = call, call.length - call.tokens
    padded = padded_dim(c.dim)
    found = {
        "heads": c.heads,
        "kv_heads": c.kv_heads,
        "group_size": c.heads // c.kv_heads,
        "length": c.length,
        "dim": c.dim,
        "padded": padded,
        "shares": padded // min(TOTAL_COLS, padded),
        "cells": c.dim * c.dim,
        "tokens": c.tokens,
        "text_before": c.text_before,
        "text": text,
        "queries": c.tokens,
        "query_before": c.text_before,
        "query_text": text,
        "probes": min(c.probes, c.tokens),
        "stride_mb": 0,
        "order_row": 0,
        "key_order_row": 0,
        "order_share": 1,
    }
    for name, (of, part) in DERIVED.items():
        found[name] = -(-found[of] // part)
    found["parts"] = key_ranges(c.heads, found["blocks"])
    found["kept"] = exact_pairs(c.density, found["tiles"] * found["blocks"])
    for letter, count in (("q", c.heads), ("k", c.kv_heads), ("v", c.kv_heads), ("o", c.heads)):
        found[f"stride_{letter}n"] = c.dim
        found[f"stride_{letter}h"] = c.length * c.dim
        found[f"stride_{letter}b"] = count * c.length * c.dim
    return found


def chain(call: Call) -> list[Step]:
    """The launches of one call in order; the first to last `out` is the attention's output.

    Tensors are called as the declared launches call them; the site's own are query, key, value,
    budget and order.
    """
    extents = extents_of(call)
    calls = {
        "": True,
        "density": call.density > 0,
        "threshold": call.density <= 0,
        "probes": True,
        "query_text": extents["query_text"] > 0,
    }
    return [_step(launch, extents) for launch in SPLIT if calls[launch.when]]


def _step(launch: KernelLaunch, extents: dict[str, int]) -> Step:
    """A launch with its extents."""
    optional = optional_arguments(launch.kernel)
    tensors, integers = {}, dict(extents)
    for argument in launch.kernel.arg_names:
        name = launch.passed.get(argument, argument)
        if name in extents:
            integers[argument] = extents[name]
        elif (argument in NATIVE or argument in POINTERS) and argument not in optional:
            tensors[argument] = name
    tensors.pop("key_mask", None)  # chains serve no mask
    argument_of = {name: argument for argument, name in tensors.items()}
    writes, rewrites = launch.writes.split(), launch.rewrites.split()
    outputs = [
        Output(name, argument_of[name], _shape(name, extents), name if name in rewrites else None)
        for name in (*writes, *rewrites)
    ]
    inputs = {
        argument: SITE.get(name, name) for argument, name in tensors.items() if name not in writes
    }
    # The batch is that of an input, and thresholds have none.
    unread = ("query",) if launch.name == "limits" else ()
    grid = tuple(_axis(axis, extents) for axis in launch.grid.split())
    return Step(launch.name, inputs, tuple(outputs), integers, grid, unread)


def _shape(name: str, extents: dict[str, int]) -> tuple[int, ...]:
    shape = ("heads", "length", "dim") if name == "out" else SHAPES[name]
    return tuple(extents[x] if isinstance(x, str) else x for x in shape)


def _axis(axis: str, extents: dict[str, int]) -> Extent | tuple[str, int]:
    if axis in PAIRS:
        return Batch(extents[PAIRS[axis]])
    extent, _, part = axis.partition("/")
    return (part, extents[extent]) if part else extents[extent]


def element_type(argument: str) -> str:
    """Triton's pointer type of a kernel argument, or "own" for that of the attended tensors."""
    return "own" if argument in NATIVE else POINTERS[argument].removeprefix("*")
