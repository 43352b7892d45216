"""The split as a chain of one-kernel nodes: which tensors and integers each kernel takes and makes.

What a plugin compiled ahead of time can carry: one launch per node, workspace as node outputs.
Everything but the batch is known when a file with a constant token order is exported, so extents
are integers here, or `Batch(n)` for n times the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil
from typing import NamedTuple

from freqopt.config import KEY_BLOCK, QUERY_TILE, SUB_TILE
from freqopt.kernels.forward.probe import MAX_PARTS, PROBE_PROGRAMS, moment_units
from freqopt.kernels.forward.routing import POOLED_TILES
from freqopt.kernels.forward.summaries import GROUP, ORDER_GROUP, TOTAL_COLS
from freqopt.kernels.portable.glue import MOMENTS
from freqopt.kernels.specialise import NATIVE, POINTERS
from freqopt.kernels.tiles import padded_dim


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

    @property
    def blocks(self) -> int:
        """Key blocks, the last of them ragged."""
        return -(-self.tokens // KEY_BLOCK)

    @property
    def tiles(self) -> int:
        """Query tiles, the last of them ragged."""
        return -(-self.tokens // QUERY_TILE)


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


def chain(call: Call) -> list[Step]:
    """The launches of one call in order; the first to last `out` is the attention's output.

    Names of tensors are those of the kernels' arguments; the site's own are query, key, value,
    budget and order.
    """
    c, heads, kv, dim = call, call.heads, call.kv_heads, call.dim
    blocks, tiles, tokens = call.blocks, call.tiles, call.tokens
    groups, spans = -(-blocks // GROUP), -(-blocks // ORDER_GROUP)
    text, probes = call.length - tokens, min(call.probes, tokens)
    parts = max(min(PROBE_PROGRAMS // heads, MAX_PARTS, blocks), 1)
    per_kv, per_head = Batch(kv), Batch(heads)
    sizes = {
        "heads": heads,
        "group_size": heads // kv,
        "tokens": tokens,
        "tiles": tiles,
        "blocks": blocks,
        "groups": groups,
        "text": text,
        "text_before": call.text_before,
        "probes": probes,
        "parts": parts,
        "cells": dim * dim,
        "kept": exact_pairs(call.density, tiles * blocks),
        "stride_mb": 0,
        "order_row": 0,
        "order_share": 1,
        "queries": tokens,
        "query_before": call.text_before,
        "query_text": text,
    }
    for letter, count in (("q", heads), ("k", kv), ("v", kv), ("o", heads)):
        sizes[f"stride_{letter}n"] = dim
        sizes[f"stride_{letter}h"] = call.length * dim
        sizes[f"stride_{letter}b"] = count * call.length * dim
    steps: list[Step] = []

    def step(
        kernel: str,
        inputs: str,
        outputs: dict[str, tuple[int, ...]],
        grid: tuple[Extent | tuple[str, int], ...],
        rewrites: str = "",
        renamed: dict[str, str] | None = None,
        unread: str = "",
        **integers: int,
    ) -> None:
        """outputs: tensor -> shape; rewrites: inputs that are outputs too; renamed: by tensor."""
        argument = renamed or {}
        own = [
            *(Output(name, argument.get(name, name), shape) for name, shape in outputs.items()),
            *(
                Output(name, argument.get(name, name), shapes[name], name)
                for name in rewrites.split()
            ),
        ]
        shapes.update(outputs)
        tensors = {argument.get(name, name): name for name in inputs.split()}
        steps.append(
            Step(kernel, tensors, tuple(own), {**sizes, **integers}, grid, tuple(unread.split()))
        )

    shapes: dict[str, tuple[int, ...]] = {"out": (heads, call.length, dim)}
    rows = blocks * KEY_BLOCK
    step(
        "summarise",
        "key value order",
        {
            "key_out": (kv, rows, dim),
            "value_out": (kv, rows, dim),
            "key_mean": (kv, blocks, dim),
            "low_value": (kv, blocks, dim),
            "key_var": (kv, blocks, dim),
            "spread": (kv, blocks),
            "sums": (kv, groups, 3, dim),
        },
        (per_kv, groups),
        heads=kv,
    )
    padded = padded_dim(dim)
    step(
        "total",
        "sums",
        {"key_shift": (kv, dim), "head_spread": (kv, padded // min(TOTAL_COLS, padded))},
        (("COLS", padded), per_kv),
    )
    step(
        "centre",
        "key_mean spread key_shift head_spread",
        {"low_key": (kv, blocks, dim)},
        (("BJ", blocks), per_kv),
        rewrites="spread",
    )
    step(
        "first",
        "key_out value_out key_mean",
        {"products": (kv, spans, dim, dim)},
        (spans, per_kv),
        renamed={"key_out": "key", "value_out": "value", "products": "first_order"},
    )
    step(
        "order",
        "products",
        {"low_order": (kv, dim, dim)},
        (("CELLS", dim * dim), per_kv),
        renamed={"products": "first_order", "low_order": "out"},
        groups=spans,
    )
    cells = (heads, tiles, blocks)
    pooled_rows = -(-tiles // POOLED_TILES) * POOLED_TILES * (QUERY_TILE // SUB_TILE)
    step(
        "pool_tiles",
        "query order",
        {"sub_mean": (heads, pooled_rows, dim), "tile_square": (heads, tiles, dim)},
        (per_head, tiles),
    )
    step(
        "disperse",
        "tile_square key_var",
        {"score": cells, "mass_term": cells},
        (per_head, ("BI", tiles), ("BJ", blocks)),
    )
    step(
        "score", "sub_mean low_key spread score", {}, (per_head, ("TILES", tiles)), rewrites="score"
    )
    if c.density > 0:
        step("density", "score", {"limits": (heads,)}, (per_head,))
    else:
        step("limits", "budget", {"limits": (heads,)}, (per_head,), unread="query")
    step(
        "route",
        "score limits mass_term",
        {"route": cells, "exact_list": cells, "counts": (heads, tiles)},
        (tiles, per_head),
        rewrites="mass_term",
        renamed={"limits": "threshold"},
    )
    found = (heads, parts, probes)
    step(
        "probe",
        "query order key_out value_out key value route key_shift",
        {
            "peak": found,
            "mass": (*found, 2),
            "exact_out": (*found, dim),
            "missing_out": (*found, dim),
        },
        (parts, per_head, ("BP", probes)),
        renamed={
            "key_out": "key",
            "value_out": "value",
            "key": "text_key",
            "value": "text_value",
            "peak": "peak_out",
            "mass": "mass_out",
        },
    )
    step(
        "merge",
        "peak mass exact_out missing_out",
        {},
        (("BP", probes), per_head),
        rewrites="peak mass exact_out missing_out",
    )
    step(
        "estimate",
        "query order low_key mass_term peak",
        {
            "logit": (heads, probes, blocks),
            "term": (heads, probes, blocks),
            "moments": (heads, moment_units(probes, blocks), MOMENTS.value),
        },
        (("BJ", blocks), per_head, ("BP", probes)),
        renamed={"logit": "logit_out", "term": "term_out"},
    )
    step(
        "fit",
        "query order low_value low_order logit term moments mass exact_out missing_out",
        {"coefficients": (heads, 2), "probe_error": (heads,)},
        (per_head,),
    )
    ordered = {"key_out": "key", "value_out": "value", "key": "text_key", "value": "text_value"}
    step(
        "attend",
        "query order key_out value_out key value key_shift low_key low_value low_order mass_term "
        "coefficients exact_list counts",
        {"out": (heads, call.length, dim)},
        (("BM", tokens), per_head),
        renamed=ordered,
    )
    if text:
        step(
            "text",
            "query key_out value_out key value out",
            {},
            (("BM", text), per_head),
            rewrites="out",
            renamed=ordered,
        )
    return steps


def element_type(argument: str) -> str:
    """Triton's pointer type of a kernel argument, or "own" for that of the attended tensors."""
    return "own" if argument in NATIVE else POINTERS[argument].removeprefix("*")
